"""What happened, for those who ask afterwards: the last transitions, on disk too, and a live feed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelium.api.types import Progress, Transition
from modelium.engine.views import EventView

log = logging.getLogger("modelium.transitions")

KEPT = 10_000
KEPT_PER_SUBJECT = 50
FEED_BOUND = 1_000
"""Events that a slow reader may be behind before the oldest are dropped for it."""
FILE_BOUND_BYTES = 8 * 2**20


class Journal:
    """Transitions by time and by subject. Writing to disk is batched and done in a thread."""

    def __init__(self, file: Path | None):
        self._file = file
        self._all: deque[Transition] = deque(maxlen=KEPT)
        self._by_subject: dict[str, deque[Transition]] = {}
        self._feeds: set[asyncio.Queue[EventView]] = set()
        self._unwritten: list[Transition] = []
        self._event_id = 0
        for transition in self._tail():
            self._keep(transition)

    @property
    def last_decision(self) -> int:
        return max((t.decision for t in self._all), default=0)

    def add(self, transition: Transition) -> None:
        self._keep(transition)
        self._unwritten.append(transition)
        log.log(
            _level(transition),
            "%s %s -> %s: %s",  # no colon after the name: of a model called `token` the state is no secret
            transition.subject,
            transition.before or "new",
            transition.after or "gone",
            transition.reason,
            extra={"fields": transition.model_dump()},
        )
        self._publish("transition", transition.at, transition.subject, transition.model_dump())

    def progress(self, at: float, subject: str, progress: Progress) -> None:
        self._publish("progress", at, subject, progress.model_dump())

    def last(self, subject: str | None, limit: int) -> list[Transition]:
        """The latest transitions, newest last."""
        found = self._all if subject is None else self._by_subject.get(subject, ())
        return list(found)[-limit:]

    def forget(self, subject: str) -> None:
        self._by_subject.pop(subject, None)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[AsyncIterator[EventView]]:
        feed: asyncio.Queue[EventView] = asyncio.Queue()
        self._feeds.add(feed)

        async def read() -> AsyncIterator[EventView]:
            while True:
                yield await feed.get()

        try:
            yield read()
        finally:
            self._feeds.discard(feed)

    def _publish(self, kind: str, at: float, subject: str, data: Mapping[str, Any]) -> None:
        self._event_id += 1
        if not self._feeds:
            return
        event = EventView(id=self._event_id, kind=kind, at=at, subject=subject, data=data)
        for feed in self._feeds:
            if feed.qsize() >= FEED_BOUND:
                feed.get_nowait()
            feed.put_nowait(event)

    def _keep(self, transition: Transition) -> None:
        self._all.append(transition)
        mine = self._by_subject.get(transition.subject)
        if mine is None:
            mine = self._by_subject[transition.subject] = deque(maxlen=KEPT_PER_SUBJECT)
        mine.append(transition)

    # ------------------------------------------------------------------ disk

    def _tail(self) -> list[Transition]:
        if self._file is None:
            return []
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()[-KEPT:]
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(Transition.model_validate_json(line))
            except ValidationError:
                continue  # cut off in the middle of a line
        return found

    def write(self) -> None:
        """Append what is new; called now and then, in a thread."""
        lines, self._unwritten = self._unwritten, []
        if not lines or self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if self._file.exists() and self._file.stat().st_size > FILE_BOUND_BYTES:
                self._file.replace(self._file.with_suffix(".1.jsonl"))
            with self._file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(t.model_dump()) + "\n" for t in lines)
        except OSError as exc:
            logging.getLogger(__name__).error("could not write %s: %s", self._file, exc)


def _level(transition: Transition) -> int:
    """Trouble is a warning; that ten thousand models lie in a repository is no news."""
    if transition.after in ("FAILED", "INVALID", "CRASHED"):
        return logging.WARNING
    return logging.DEBUG if not transition.before and transition.after == "COLD" else logging.INFO
