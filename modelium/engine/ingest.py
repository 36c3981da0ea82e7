"""From a drop in the incoming folder to a model in the repository, or to quarantine with the reason."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modelium.api.names import check_model_name, name_of_drop
from modelium.api.types import Analysis, Completeness, Inspection, Manifest, Progress, Severity
from modelium.core import events as e
from modelium.core.world import Failure
from modelium.engine.catalog import Catalog
from modelium.engine.files import look_of, shown
from modelium.engine.loop import Loop
from modelium.engine.planner import Planner
from modelium.engine.repository import MANIFEST, Changed, Repository
from modelium.engine.store import Quarantined, Store
from modelium.errors import ConfigError, ModelConflict, ModelError, ModeliumError, PluginError

if TYPE_CHECKING:
    from modelium.engine.inspector import Inspector

log = logging.getLogger(__name__)

STALLED_S = 15.0
"""A drop that its format calls incomplete is marked so once it has been still for this long."""
POLL_S = 0.5
"""How often a growing drop is looked at when the file system says nothing."""


@dataclass(slots=True)
class Drop:
    path: Path
    place: str
    """`incoming/NAME`: what it is called until it is a model."""
    moved: bool = False
    """It came by a rename, and so in one piece; or its writer has closed it."""
    poke: asyncio.Event = field(default_factory=asyncio.Event)
    signature: str = ""
    still_since: float = 0.0
    """On the monotonic clock: since when nothing changed, as far as was seen."""


class Ingest:
    """Follows each drop by a task of its own."""

    def __init__(
        self,
        incoming: Path,
        *,
        repository: Repository,
        catalog: Catalog,
        planner: Planner,
        inspector: Inspector,
        store: Store,
        loop: Callable[[], Loop],
        report: Callable[[str, Progress], None],
        runtimes_known: Callable[[], Awaitable[None]],
        work: Path,
        settle_s: float,
        retry_s: float,
    ):
        self._incoming = incoming
        self._repository = repository
        self._catalog = catalog
        self._planner = planner
        self._inspector = inspector
        self._store = store
        self._loop = loop
        self._report = report
        self._runtimes_known = runtimes_known
        self._work = work
        self._settle_s = settle_s
        self._retry_s = retry_s
        self._drops: dict[str, Drop] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken: set[str] = set()
        """Names of models that are being installed."""

    # ------------------------------------------------------------------ noticing

    async def read(self) -> None:
        """Look at the whole folder: what is new is followed, what is followed is looked at."""
        try:
            entries = await asyncio.to_thread(os.listdir, self._incoming)
        except OSError as exc:
            log.error("the incoming folder can't be read: %s", exc)
            return
        for entry in entries:
            self.noticed(entry)

    def noticed(self, entry: str, *, moved: bool = False) -> None:
        """Something happened to an entry of the incoming folder."""
        if entry.startswith("."):
            return
        drop = self._drops.get(entry)
        if drop is None:
            drop = self._drops[entry] = Drop(self._incoming / entry, f"incoming/{shown(entry)}")
            task = asyncio.get_running_loop().create_task(self._follow(entry, drop), name=f"drop {entry}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        drop.moved = drop.moved or moved
        drop.poke.set()

    def is_taking(self, name: str) -> bool:
        """Whether a model of that name is being installed just now."""
        return name in self._taken

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=30)

    # ------------------------------------------------------------------ following one drop

    async def _follow(self, entry: str, drop: Drop) -> None:
        loop = self._loop()
        try:
            while os.path.lexists(drop.path):
                self._tell(drop, "seen; being looked at")
                try:
                    if await self._arrived(drop):
                        await self._accept(drop)
                        return
                except Changed as exc:
                    log.info("%s; it is looked at again", exc.message)
                except (ConfigError, PluginError) as exc:
                    self._mark(drop, exc)  # not the drop's fault: it stays, and is tried again
                    await self._poked(drop, self._retry_s)
                except ModeliumError as exc:
                    if exc.code == "unknown_format" and drop.path.is_dir() and not drop.moved:
                        # a folder may be made long before its files come
                        empty = not await asyncio.to_thread(_holds_anything, drop.path)
                        why = "the folder is empty" if empty else exc.message
                        self._mark(drop, ModelError(f"{why}; it is looked at again when it changes"))
                        await self._changed(drop)
                    elif not await self._refuse(drop, exc):
                        return
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s could not be taken in", drop.place)
            self._mark(drop, ModelError("an error in Modelium itself kept it out; the log has the details"))
            return
        finally:
            self._drops.pop(entry, None)
        loop.post(e.DropGone(loop.clock(), drop.place))

    async def _arrived(self, drop: Drop) -> bool:
        """Wait until the drop is whole; False when it is gone."""
        drop.still_since = time.monotonic()
        while os.path.lexists(drop.path):
            drop.poke.clear()
            quiet = await asyncio.to_thread(self._quiet_s, drop)
            told = await self._inspector.completeness(drop.path)
            if told is None and (drop.moved or quiet >= self._settle_s):
                return True
            if told is not None and told.complete:
                whole = drop.moved or not drop.path.is_dir()
                if (whole and (drop.moved or quiet >= min(self._settle_s, 0.2))) or quiet >= self._settle_s:
                    return True
            if told is not None and not told.complete and quiet >= STALLED_S:
                self._mark(drop, ModelError(f"incomplete: {told.reason}; it is looked at again when it changes"))
                await self._changed(drop)
                self._tell(drop, "it changed; being looked at")
                continue
            self._tell_arrival(drop, told)
            wait = self._settle_s - quiet if quiet < self._settle_s else POLL_S
            await self._poked(drop, min(max(wait, 0.02), POLL_S))
        return False

    def _quiet_s(self, drop: Drop) -> float:
        """For how long nothing about the drop has changed. A folder that was renamed in holds old files."""
        now = time.time()
        try:
            signature, newest = look_of(drop.path)
        except FileNotFoundError:
            signature, newest = "", now
        if signature != drop.signature:
            drop.moved = drop.moved and not drop.signature
            drop.signature = signature
            drop.still_since = time.monotonic()
        return max(now - newest if newest else 0.0, time.monotonic() - drop.still_since)

    async def _changed(self, drop: Drop) -> None:
        """Until the drop is another than it was, or gone; that somebody only looked is no change."""
        before = drop.signature
        while drop.signature == before and os.path.lexists(drop.path):
            drop.poke.clear()
            await drop.poke.wait()
            await asyncio.to_thread(self._quiet_s, drop)

    async def _poked(self, drop: Drop, within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await drop.poke.wait()

    # ------------------------------------------------------------------ taking it in

    async def _accept(self, drop: Drop) -> None:
        name = name_of_drop(drop.path.name) if not drop.path.is_dir() else drop.path.name
        check_model_name(name)
        self._check_free(name)
        if await asyncio.to_thread(os.path.lexists, drop.path / MANIFEST):
            raise ModelError(
                f"it holds a {MANIFEST}, which is Modelium's own note on a model in a repository: remove that file, "
                "and drop the folder again"
            )
        self._taken.add(name)
        original = drop.path
        path = original
        try:
            looked, _ = await asyncio.to_thread(look_of, drop.path)
            inspection = await self._inspector.inspect(drop.path)
            note = ""
            if (codes := _codes(inspection, Severity.CONVERT)) and not _codes(inspection, Severity.REFUSE):
                self._tell(drop, f"being converted ({', '.join(codes)})")
                path, note = await self._convert(drop, inspection)
                inspection = await self._inspector.inspect(path)
            analysis = _usable(inspection)
            await self._wait_for_runtimes(drop)
            plan = self._planner.plan(name, inspection)
            layout = self._planner.layout(name, analysis, plan)
            manifest = Manifest(
                name=name, created_at=time.time(), source=drop.path.name, inspection=inspection, plan=plan
            )
            managed = not (layout.files.get(".") == "." and not layout.texts)
            await asyncio.to_thread(
                self._repository.install,
                path,
                layout,
                manifest,
                managed=managed,
                looked=looked if path == original else None,
                moved=self._moved(drop),
            )
            if path != original:
                kept = await asyncio.to_thread(self._repository.set_aside, original)
                note = f"{note}; the original is kept as {kept}"
            entry = await asyncio.to_thread(self._repository.entry, name)
            if entry is None:
                raise ModelError(f"{name} vanished from the repository right after it was installed")
            if not managed:
                await asyncio.to_thread(
                    self._repository.keep_manifest, manifest.model_copy(update={"revision": entry.revision})
                )
        finally:
            if path != original:
                await asyncio.to_thread(shutil.rmtree, path, True)
            self._taken.discard(name)
        loop = self._loop()
        loop.post(e.DropGone(loop.clock(), drop.place, f"accepted as {name}"))
        reason = f"accepted: {analysis.summary}" + (f"; {note}" if note else "")
        self._catalog.add(entry, manifest, dropped=True, reason=reason)

    def _check_free(self, name: str) -> None:
        if name in self._taken or name in self._catalog.known or os.path.lexists(self._repository.path / name):
            raise ModelConflict(
                f"a model named {name} is there already: drop it under another name, or `modelium rm {name}` first"
            )

    async def _convert(self, drop: Drop, inspection: Inspection) -> tuple[Path, str]:
        target = self._work / drop.path.name
        await asyncio.to_thread(self._work.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(shutil.rmtree, target, True)
        note = await self._inspector.convert(drop.path, target, inspection.findings)
        return target, note

    async def _wait_for_runtimes(self, drop: Drop) -> None:
        waiting = asyncio.ensure_future(self._runtimes_known())
        try:
            await asyncio.wait([waiting], timeout=0.05)
            if not waiting.done():
                self._tell(drop, "complete; waits for its runtime to be up")
            await waiting
        finally:
            waiting.cancel()

    def _moved(self, drop: Drop) -> Callable[[int, int], None]:
        running = asyncio.get_running_loop()
        told = 0.0

        def moved(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told > 0.2 or done == total:
                told = time.monotonic()
                progress = Progress(stage="copying into the repository", done=done, total=total, unit="bytes")
                running.call_soon_threadsafe(self._report, drop.place, progress)

        return moved

    # ------------------------------------------------------------------ refusing, telling

    async def _refuse(self, drop: Drop, error: ModeliumError) -> bool:
        """Take it to quarantine; whether it could be."""
        place = await asyncio.to_thread(self._repository.quarantine, drop.path)
        kept_as = drop.place if place == drop.path else f"quarantine/{place.name}"
        loop = self._loop()
        reason = shown(error.message)
        if place != drop.path:
            self._store.set_quarantined(place.name, Quarantined(reason=reason, code=error.code, at=loop.clock()))
        loop.post(e.DropRefused(loop.clock(), drop.place, Failure(error.code, reason), kept_as))
        return place != drop.path

    def _mark(self, drop: Drop, error: ModeliumError) -> None:
        """Refused for now, where it lies."""
        loop = self._loop()
        loop.post(e.DropRefused(loop.clock(), drop.place, Failure(error.code, error.message), drop.place))

    def _tell(self, drop: Drop, reason: str) -> None:
        loop = self._loop()
        loop.post(e.DropSeen(loop.clock(), drop.place, reason))

    def _tell_arrival(self, drop: Drop, told: Completeness | None) -> None:
        if told is None or told.complete:
            self._tell(drop, "arriving")
            return
        self._tell(drop, f"arriving: {told.reason}")
        if told.want_bytes:
            progress = Progress(stage="arriving", done=told.have_bytes, total=told.want_bytes, unit="bytes")
            self._report(drop.place, progress)


def _holds_anything(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def _codes(inspection: Inspection, severity: Severity) -> list[str]:
    return sorted({f.code for f in inspection.findings if f.severity is severity})


def _usable(inspection: Inspection) -> Analysis:
    refused = [f for f in inspection.findings if f.severity is not Severity.WARN]
    if refused:
        raise ModelError("; ".join(f.message for f in refused[:5]), code=refused[0].code)
    if inspection.analysis is None:
        raise ModelError("no analyzer knows what it is")
    return inspection.analysis
