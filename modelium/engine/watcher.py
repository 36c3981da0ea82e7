"""Notices what happens in the folders, at once where the file system tells, else by reading them again."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

log = logging.getLogger(__name__)

# Of a folder that comes back by its old name; events go on.
warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning, "watchdog")

_TELLING: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]
"""Reading a file is none of these: looking at a drop must not look like a change of it."""

Noticed = Callable[[str, bool], None]
"""The name of the entry right below the watched folder, and whether it arrived in one piece."""


class Watcher:
    """Calls back in the event loop's thread."""

    def __init__(self) -> None:
        self._observer = _observer()
        self._loop = asyncio.get_running_loop()

    def watch(self, folder: Path, noticed: Noticed, *, deep: bool) -> None:
        """Watch a folder; `deep` for what happens further below too. A folder that can't be watched is only reread."""
        handler = _Handler(folder, noticed, self._loop)
        try:
            self._observer.schedule(handler, str(folder), recursive=deep, event_filter=_TELLING)
        except OSError as exc:
            log.warning("%s can't be watched (%s); it is read again now and then instead", folder, exc)

    def start(self) -> None:
        self._observer.start()

    def stop(self) -> None:
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join(5)


class _Handler(FileSystemEventHandler):
    def __init__(self, folder: Path, noticed: Noticed, loop: asyncio.AbstractEventLoop):
        self._parts = len(folder.parts)
        self._noticed = noticed
        self._loop = loop

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Runs in the observer's thread."""
        arrived = isinstance(event, DirMovedEvent | FileMovedEvent)
        for raw, here in ((event.src_path, False), (event.dest_path, arrived)):
            parts = Path(raw if isinstance(raw, str) else bytes(raw).decode(errors="replace")).parts
            if len(parts) <= self._parts:
                continue
            top = len(parts) == self._parts + 1
            whole = top and (here or isinstance(event, FileClosedEvent))
            try:
                self._loop.call_soon_threadsafe(self._noticed, parts[self._parts], whole)
            except RuntimeError:
                return  # the loop is closed: nobody listens any more


def _observer() -> BaseObserver:
    """inotify can tell a rename from outside apart from a new folder; elsewhere that is left to stillness."""
    try:
        from watchdog.observers.inotify import InotifyObserver
    except ImportError:
        return Observer()
    return InotifyObserver(generate_full_events=True)
