"""A program that works for Modelium while nobody needs its device: run at a low priority, paused, and ended."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from modelium.api.types import Report
from modelium.engine.processes import NAME_MARK, ROOT_MARK
from modelium.errors import DriverError

NAME = "optimizer"
"""Of its processes, by which those of a Modelium that was killed are found."""
NICE = ("nice", "-n", "10")
LAST_LINES = 12
LONGEST_KEPT = 4096
LONGEST_LINE = 2**20
"""Of longer ones, in characters, the end is what is kept to tell why it failed, and what is told as a line."""


class Job:
    """`modelium.api.Job` for one optimization."""

    def __init__(self, root_id: str, report: Report):
        self.report = report
        self.paused = False
        self._marks = {ROOT_MARK: root_id, NAME_MARK: NAME}
        self._process: asyncio.subprocess.Process | None = None

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """As the protocol has it; cancelled, it ends the program with all that it started."""
        try:
            process = await asyncio.create_subprocess_exec(
                *NICE,
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {}), **self._marks},
                cwd=cwd,
            )
        except OSError as exc:
            raise DriverError(f"could not start {argv[0]}: {exc}") from exc
        self._process = process
        self._signal(signal.SIGSTOP if self.paused else signal.SIGCONT)
        last: deque[str] = deque(maxlen=LAST_LINES)
        try:
            assert process.stdout is not None
            output = _Lines()
            while chunk := await process.stdout.read(1 << 16):
                for line in output.ended(chunk):
                    last.append(line[-LONGEST_KEPT:])
                    if tell is not None:
                        tell(line)
            last.append(output.rest[-LONGEST_KEPT:])
            code = await process.wait()
        finally:
            self._process = None
            # What it started may live on, and be stopped: SIGKILL ends that, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if code != 0:
            said = "\n".join(line for line in last if line.strip())
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            raise DriverError(f"{Path(argv[0]).name} ended with {how}:\n{said}".rstrip(":\n"))

    def pause(self, on: bool) -> None:
        """Let it rest, or go on."""
        if on is not self.paused:
            self.paused = on
            self._signal(signal.SIGSTOP if on else signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class _Lines:
    """What a program writes, in lines. Progress bars end theirs with a carriage return, and are told at once."""

    def __init__(self) -> None:
        self.rest = ""
        """The line that has not ended."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._returned = False
        """What came last was a carriage return: a newline after it ends no other line."""

    def ended(self, chunk: bytes) -> list[str]:
        text = self._decoder.decode(chunk)
        if not text:
            return []
        if self._returned:
            text = text.removeprefix("\n")
        self._returned = text.endswith("\r")
        *lines, rest = (self.rest + text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
        self.rest = rest[-LONGEST_LINE:]
        return [line[-LONGEST_LINE:] for line in lines]
