"""Logs for people and for programs, through the standard library's logging.

Records go through a bounded queue to a thread that writes them, so that a slow terminal or a full disk never holds up
the event loop; when the queue is full, lines are dropped and counted. Secrets are taken out before anything is
written.
"""

from __future__ import annotations

import copy
import json
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, ClassVar, Self, TextIO

from modelium.redact import redact, redact_value

CAPACITY = 10_000
"""Lines that may wait to be written."""

CLOSE_S = 5.0
"""How long the end of the service waits for a terminal that does not take its lines."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup(*, format: str = "console", level: str = "info", stream: TextIO | None = None) -> Logging:
    """Send all logs of this process to `stream` (stderr), as `console` lines or `json` objects. Close the result."""
    return Logging(format=format, level=level, stream=stream or sys.stderr)


class Logging:
    """The running log; a context manager. Closing it writes what still waits and puts the root logger back."""

    def __init__(self, *, format: str, level: str, stream: TextIO):
        out = logging.StreamHandler(stream)
        out.setFormatter(JsonFormatter() if format == "json" else ConsoleFormatter(colour=_wants_colour(stream)))
        self._handler = _QueueHandler(queue.Queue(CAPACITY))
        self._writer = threading.Thread(target=self._write, args=(out,), name="log", daemon=True)
        root = logging.getLogger()
        self._before = (root.level, root.handlers[:])
        root.handlers[:] = [self._handler]
        root.setLevel(level.upper())
        self._writer.start()

    def _write(self, out: logging.Handler) -> None:
        while (record := self._handler.waiting.get()) is not None:
            if dropped := self._handler.take_dropped():
                out.handle(_record(f"{dropped} log lines were dropped: the terminal or disk is too slow"))
            out.handle(record)

    def close(self) -> None:
        root = logging.getLogger()
        root.setLevel(self._before[0])
        root.handlers[:] = self._before[1]
        try:
            self._handler.waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._writer.join(CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _QueueHandler(logging.Handler):
    """Puts records into a bounded queue, without ever waiting."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord | None]):
        super().__init__()
        self.waiting = waiting
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.waiting.put_nowait(self._frozen(record))
        except queue.Full:
            self._dropped += 1  # under the handler's lock

    def _frozen(self, record: logging.LogRecord) -> logging.LogRecord:
        """A copy that no longer refers to what the caller may go on to change."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_info = None
        return record

    def take_dropped(self) -> int:
        with self.lock or threading.Lock():
            dropped, self._dropped = self._dropped, 0
        return dropped


def _record(message: str) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message, "created": time.time()}
    )


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was passed as `extra`, without secrets; `extra={"fields": {...}}` is the same as giving them one by one."""
    given = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    fields = given.pop("fields", {})
    given |= fields if isinstance(fields, dict) else {"fields": fields}
    return {key: redact_value(key, value) for key, value in given.items()}


class JsonFormatter(logging.Formatter):
    """One JSON object in each line: `at` (RFC 3339, UTC), `level`, `logger`, `message`, `extra` fields, `error`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = redact(record.getMessage())
        line = line | _fields(record) | line
        error = record.exc_text or (self.formatException(record.exc_info) if record.exc_info else "")
        if error:
            line["error"] = redact(error)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """`12:03:04 warning  message`: the time and quiet levels faint, trouble in colour."""

    COLOURS: ClassVar = {"DEBUG": "2", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
    """SGR parameters, ECMA-48 section 8.3.117."""

    def __init__(self, *, colour: bool):
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname.lower():<8}"
        text = f"{self._paint('2', at)} {self._paint(self.COLOURS.get(record.levelname, '0'), level)} "
        text += redact(record.getMessage())
        error = record.exc_text or (self.formatException(record.exc_info) if record.exc_info else "")
        return f"{text}\n{redact(error)}" if error else text

    def _paint(self, sgr: str, text: str) -> str:
        return f"\x1b[{sgr}m{text}\x1b[0m" if self._colour else text


def _wants_colour(stream: TextIO) -> bool:
    """By https://no-color.org, and only on a terminal."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()
