"""What is known of each model in the repository, brought up to date by reading the folder again.

Only what every list and every load needs is kept in memory; the whole analysis stays in the manifest on disk, so that
ten thousand models cost little.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelium.api.names import check_model_name
from modelium.api.types import Inspection, Manifest, Plan, Severity
from modelium.core import events as e
from modelium.core.world import Estimate, Failure, Spec
from modelium.engine.loop import Loop
from modelium.engine.planner import Planner
from modelium.engine.repository import Entry, Repository
from modelium.engine.store import Store, measurement_key
from modelium.errors import ConfigError, ModelError, ModeliumError, ModelNotFound, PluginError

log = logging.getLogger(__name__)

READ_AT_ONCE = 100
"""Entries read in a thread before the event loop takes them in."""
BATCH_SIZE = 16
"""Unknown folders that are looked into together."""
BATCHES_IN_INSPECTOR = 2
"""So that it always has one before it; a drop, or a folder that is asked for, waits for these."""
BATCHES_IN_FLIGHT = 64
"""Looked into, they wait until the runtimes are known."""

Inspect = Callable[[Sequence[Path]], Awaitable[list[Inspection | ModeliumError]]]


@dataclass(frozen=True, slots=True)
class Known:
    """One usable model in the repository."""

    name: str
    path: Path
    revision: str
    managed: bool
    plan: Plan
    measured_as: str
    """The key under which its measurements are kept."""
    format: str
    task: str | None
    summary: str
    created_at: float
    """When it was first found out what it is."""
    decoupled: bool
    depends_on: tuple[str, ...]
    optimized: bool
    """It is served in a faster form than it was dropped in."""
    weights_bytes: int

    @property
    def spec(self) -> Spec:
        plan = self.plan
        return Spec(plan.runtime, plan.device_kind, self.revision, self.depends_on, plan.devices, plan.elastic)


class Catalog:
    def __init__(
        self,
        repository: Repository,
        planner: Planner,
        store: Store,
        inspect: Inspect,
        loop: Callable[[], Loop],
        runtimes_known: Callable[[], Awaitable[None]],
        settle_s: float,
    ):
        self._repository = repository
        self._planner = planner
        self._store = store
        self._inspect = inspect
        self._loop = loop
        self._runtimes_known = runtimes_known
        self._settle_s = settle_s
        self._reading = asyncio.Lock()
        self._changing: dict[str, tuple[str, float]] = {}
        """Folders that changed: as what, and since when (monotonic). They are taken in once they are still."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: set[str] = set()
        self._unstudied: dict[str, Entry] = {}
        """Folders that are still to be looked into."""
        self._asked = asyncio.Semaphore(BATCHES_IN_INSPECTOR)
        self._planning = asyncio.Lock()
        self._studied: dict[str, asyncio.Event] = {}
        """Folders that are being looked into."""
        self.known: dict[str, Known] = {}
        self._invalid: dict[str, str] = {}
        """Folders that are no usable models, and the revision at which that was found."""
        self.open = asyncio.Event()
        """Set when the core knows the runtimes: what is taken in before would be judged without them."""
        self.read_once = asyncio.Event()
        """Set when the whole repository was read for the first time."""
        self.names_known: Callable[[], None] = lambda: None
        """Told when that is set, before anybody who waits for it goes on."""

    # ------------------------------------------------------------------ reading the folder

    async def read(self) -> None:
        """Bring everything up to date with the folder. Raises `OSError` when it can't be read; nothing changes then."""
        async with self._reading:
            names = await asyncio.to_thread(self._repository.names)
            gone = (self.known.keys() | self._invalid.keys()) - set(names)
            for name in sorted(gone):
                self._removed(name)
            later: list[Entry] = []
            for start in range(0, len(names), READ_AT_ONCE):
                for found in await asyncio.to_thread(self._entries, names[start : start + READ_AT_ONCE]):
                    later.extend(self._take(found, settled=not self.read_once.is_set()))
            self._unstudied.update((entry.name, entry) for entry in later)
            if not self.read_once.is_set():
                self.read_once.set()
                self.names_known()
        await self._study_all(later)

    async def look(self, *names: str, settled: bool = False) -> None:
        """Bring a few names up to date; `settled` when whoever asks knows that nobody is still writing."""
        await self.open.wait()
        asked = [n for n in names if n in self.known or _is_name(n)]
        later: list[Entry] = []
        async with self._reading:
            for found in await asyncio.to_thread(self._entries, asked):
                later.extend(self._take(found, settled=settled))
        await self._study_all(later)

    def _entries(self, names: Iterable[str]) -> list[Entry | tuple[str, ModeliumError | None]]:
        """Runs in a thread."""
        found: list[Entry | tuple[str, ModeliumError | None]] = []
        for name in names:
            try:
                entry = self._repository.entry(name)
                found.append(entry if entry is not None else (name, None))
            except ModeliumError as exc:
                found.append((name, exc))
            except OSError as exc:
                if name in self.known:
                    log.warning("%s can't be read just now, and stays what it was: %s", name, exc)
                else:
                    found.append((name, ModelError(f"{name} can't be read: {exc.strerror}")))
        return found

    def _take(self, found: Entry | tuple[str, ModeliumError | None], *, settled: bool) -> list[Entry]:
        """Take in one folder; returned is what has to be looked into first."""
        if isinstance(found, tuple):
            name, error = found
            if error is None:
                self._removed(name)
            else:
                self._refuse(name, "", error)
            return []
        if found.name in self._leaving:
            return []
        old = self.known.get(found.name)
        if old is not None and old.revision == found.revision and found.name not in self._invalid:
            return []
        if self._invalid.get(found.name) == found.revision:
            return []
        if not settled and not self._still(found):
            return []
        self._changing.pop(found.name, None)
        if found.manifest is None:
            return [found]
        self._accept(found, found.manifest)
        return []

    def _still(self, entry: Entry) -> bool:
        """Whether nothing has changed for the settle time; if not, it is looked at again after that."""
        if entry.managed and entry.name not in self.known:
            return True  # it was renamed into place, whole
        before = self._changing.get(entry.name)
        now = time.monotonic()
        if before is not None and before[0] == entry.revision and now - before[1] >= self._settle_s:
            return True
        if before is None or before[0] != entry.revision:
            self._changing[entry.name] = (entry.revision, now)
            running = asyncio.get_running_loop()
            running.call_later(self._settle_s + 0.01, lambda: self._background(self.look(entry.name)))
        return False

    def _background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Nobody's leaving ends it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _study_all(self, entries: list[Entry]) -> None:
        """Look into folders; while the inspector looks into some, others are planned and written down."""
        self._unstudied.update((entry.name, entry) for entry in entries)
        batches = [entries[start : start + BATCH_SIZE] for start in range(0, len(entries), BATCH_SIZE)]
        waiting = iter(batches)

        async def work() -> None:
            for batch in waiting:
                await self._study(batch)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(BATCHES_IN_FLIGHT, len(batches))):
                group.create_task(work())

    def coming(self, name: str) -> asyncio.Task[Any] | None:
        """What to wait for before a name can be called unknown: its folder is still to be read, or looked into."""
        if name in self.known:
            return None
        if (entry := self._unstudied.get(name)) is not None:
            return self._background(self._study_now(entry))
        if (done := self._studied.get(name)) is not None:
            return self._background(done.wait())
        return None if self.read_once.is_set() else self._background(self.look(name, settled=True))

    def claims(self, name: str) -> bool:
        """Whether a name is, or may turn out to be, that of a folder here."""
        there = (self.known, self._invalid, self._unstudied, self._studied)
        return not self.read_once.is_set() or any(name in names for names in there)

    async def _study_now(self, entry: Entry) -> None:
        await self._study([entry], ahead=True)
        if (done := self._studied.get(entry.name)) is not None:
            await done.wait()  # somebody else was faster

    def leave(self, name: str, leaving: bool) -> None:
        """A model is being removed: its folder is not taken for a model meanwhile."""
        (self._leaving.add if leaving else self._leaving.discard)(name)
        if leaving:
            self.known.pop(name, None)
            self._invalid.pop(name, None)

    async def _study(self, entries: Sequence[Entry], *, ahead: bool = False) -> None:
        """Find out what folders without a manifest are, those that nobody has yet; nothing in them is changed.

        `ahead` of the batches: somebody waits for it.
        """
        mine: list[Entry] = []
        try:
            async with nullcontext() if ahead else self._asked:
                for entry in entries:
                    if self._unstudied.get(entry.name) is entry:
                        self._studied[entry.name] = asyncio.Event()
                        del self._unstudied[entry.name]
                        mine.append(entry)
                found = await self._look_into(mine)
            await self._runtimes_known()
            async with nullcontext() if ahead else self._planning:
                await self._plan(found)
        except (ConfigError, PluginError) as exc:
            for entry in mine:
                _not_its_fault(entry.name, exc)
        finally:
            for entry in mine:
                self._done(entry.name)

    def _done(self, name: str) -> None:
        done = self._studied.pop(name, None)
        if done is not None:
            done.set()

    async def _look_into(self, entries: Iterable[Entry]) -> list[tuple[Entry, Inspection | ModeliumError]]:
        good = []
        for entry in entries:
            try:
                check_model_name(entry.name)
                good.append(entry)
            except ModelError as exc:
                self._refuse(entry.name, entry.revision, exc)
        return list(zip(good, await self._inspect([entry.path for entry in good]), strict=True)) if good else []

    async def _plan(self, found: Iterable[tuple[Entry, Inspection | ModeliumError]]) -> None:
        planned: list[tuple[Entry, Manifest]] = []
        for entry, inspection in found:
            await asyncio.sleep(0)  # requests come first
            try:
                planned.append((entry, self._planned(entry, inspection)))
            except (ConfigError, PluginError) as exc:
                _not_its_fault(entry.name, exc)
            except ModeliumError as exc:
                if await asyncio.to_thread(self._is_as_read, entry):
                    self._refuse(entry.name, entry.revision, exc)
                else:  # it was moved or written to meanwhile, which says nothing about what it is
                    self._background(self.look(entry.name))
        await asyncio.to_thread(self._keep, [manifest for _, manifest in planned])
        for entry, manifest in planned:
            await asyncio.sleep(0)
            if entry.name not in self._leaving:
                self._accept(replace(entry, manifest=manifest), manifest)
            self._done(entry.name)

    def _is_as_read(self, entry: Entry) -> bool:
        """Runs in a thread."""
        try:
            return self._repository.entry(entry.name) == entry
        except (ModeliumError, OSError):
            return False

    def _planned(self, entry: Entry, inspection: Inspection | ModeliumError) -> Manifest:
        if isinstance(inspection, ModeliumError):
            raise inspection
        refused = [f.message for f in inspection.findings if f.severity is Severity.REFUSE]
        if refused or inspection.analysis is None:
            raise ModelError("; ".join(refused) or f"{entry.name} is no model that any analyzer knows")
        return Manifest(
            name=entry.name,
            created_at=time.time(),
            source=str(entry.path),
            revision=entry.revision,
            inspection=inspection,
            plan=self._planner.plan(entry.name, inspection),
        )

    def _keep(self, manifests: Iterable[Manifest]) -> None:
        """Runs in a thread."""
        for manifest in manifests:
            try:
                self._repository.keep_manifest(manifest)
            except OSError as exc:
                log.error("what was found out about %s could not be kept: %s", manifest.name, exc)

    # ------------------------------------------------------------------ telling the core

    def _accept(self, entry: Entry, manifest: Manifest) -> None:
        if manifest.plan.runtime not in self._planner.runtimes:
            there = ", ".join(self._planner.runtimes) or "none"
            error = ModelError(
                f"it is planned for the runtime {manifest.plan.runtime}, which is not there ({there} is)"
            )
            self._refuse(entry.name, entry.revision, error)
            return
        self.add(entry, manifest)

    def add(self, entry: Entry, manifest: Manifest, *, dropped: bool = False, reason: str | None = None) -> None:
        """Take in a model whose manifest is known."""
        known = self.known_from(entry, manifest)
        fresh = entry.name not in self.known
        self.known[entry.name] = known
        self._invalid.pop(entry.name, None)
        loaded_revision = self._store.loaded.get(entry.name) if fresh else None
        loop = self._loop()
        loop.post(
            e.ModelAccepted(
                loop.clock(),
                entry.name,
                known.spec,
                self.estimate(known),
                pinned=entry.name in self._store.pins,
                dropped=dropped,
                was_loaded=loaded_revision is not None,
                loaded_revision=loaded_revision,
                reason=reason or ("in the repository" if fresh else "its files changed"),
            )
        )

    def known_from(self, entry: Entry, manifest: Manifest) -> Known:
        inspection, plan = manifest.inspection, manifest.plan
        analysis = inspection.analysis
        if analysis is None:
            raise ModelError(f"the manifest of {entry.name} has no analysis")
        content = inspection.content_key
        if manifest.revision and manifest.revision != entry.revision:
            content = f"{content}+{entry.revision}"  # changed in place since it was looked into
        decoupled = plan.settings.get("decoupled", analysis.facts.get("decoupled", False))
        return Known(
            name=entry.name,
            path=entry.path,
            revision=entry.revision,
            managed=entry.managed,
            plan=plan,
            measured_as=measurement_key(content, plan),
            format=analysis.format,
            task=analysis.task,
            summary=analysis.summary,
            created_at=manifest.created_at,
            decoupled=bool(decoupled),
            depends_on=analysis.depends_on,
            optimized=manifest.optimization is not None,
            weights_bytes=analysis.weights_bytes,
        )

    def estimate(self, known: Known) -> Estimate:
        return self._planner.estimate(known.measured_as, known.plan, known.weights_bytes)

    def _removed(self, name: str) -> None:
        self._changing.pop(name, None)
        known = self.known.pop(name, None)
        if known is not None or self._invalid.pop(name, None) is not None:
            self._repository.forget(name)
            self._store.pin(name, False)
            loop = self._loop()
            loop.post(e.ModelRemoved(loop.clock(), name))

    def _refuse(self, name: str, revision: str, error: ModeliumError) -> None:
        if self._invalid.get(name) == revision:
            return
        self._invalid[name] = revision
        loop = self._loop()
        loop.post(e.ModelInvalid(loop.clock(), name, Failure("model_invalid", error.message)))

    # ------------------------------------------------------------------ asking

    def manifest(self, name: str) -> Manifest:
        """The whole of what was found out, from disk: to be called in a thread."""
        known = self.known.get(name)
        manifest = self._repository.manifest(name, managed=known.managed) if known is not None else None
        if manifest is None:
            raise ModelNotFound(f"{name} is not in the repository any more")
        return manifest


def _is_name(name: str) -> bool:
    try:
        check_model_name(name)
    except ModelError:
        return False
    return True


def _not_its_fault(name: str, exc: ModeliumError) -> None:
    log.error("%s could not be looked into, which is not its fault; it is tried again: %s", name, exc)
