"""Puts the engine's parts together: the single writer, the effects, the folders and what is remembered."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from modelium.api.datapath import DataPath, DataPathContext, DataPathDriver
from modelium.api.driver import RuntimeBackend, RuntimeContext
from modelium.api.measuring import Gpus, added
from modelium.api.types import Device, Progress, Report, Situation
from modelium.config import Config
from modelium.core import events as e
from modelium.core.loading import completed
from modelium.core.states import RuntimeState, State
from modelium.core.world import Booking, Failure, Model, Policy, World
from modelium.engine.admission import Admission
from modelium.engine.catalog import Catalog
from modelium.engine.effects import Effects
from modelium.engine.fastpath import READ_EVERY_S, FastPath
from modelium.engine.guests import Guests
from modelium.engine.ingest import Ingest
from modelium.engine.journal import Journal
from modelium.engine.ledger import Ledger
from modelium.engine.loop import Clock, Loop
from modelium.engine.optimizing import Optimizing
from modelium.engine.planner import Planner, budgets
from modelium.engine.processes import ProcessSupervisor
from modelium.engine.readahead import ReadAhead
from modelium.engine.repository import Repository
from modelium.engine.runtimes import Running, Runtimes
from modelium.engine.store import Quarantined, Store
from modelium.engine.usage import UsageBook
from modelium.engine.watcher import Watcher
from modelium.errors import (
    ConfigError,
    ModelConflict,
    RuntimeUnavailable,
)
from modelium.host import PluginHost
from modelium.paths import Paths, socket_folder

if TYPE_CHECKING:
    from modelium.engine.inspector import Inspector

log = logging.getLogger(__name__)

USAGE_EVERY_S = 2.0
JOURNAL_EVERY_S = 1.0
LOADED_EVERY_S = 3.0
"""How often the files of loaded models are compared with what was loaded."""


def policy_of(config: Config, host: PluginHost) -> Policy:
    section = config.policies
    return Policy(
        always_loaded=section.always_loaded,
        idle_s=section.evict_after_idle_seconds,
        keep_above_qps=section.keep_above_qps,
        min_qps=section.min_qps_threshold,
        min_resident_s=section.min_resident_seconds,
        max_utilization=section.max_gpu_memory_utilization,
        budgets=dict(section.device_budget_bytes),
        drain_timeout_s=section.drain_timeout_s,
        load_timeout_s=section.load_timeout_s,
        fairness_after_s=section.fairness_after_s,
        max_residue_bytes=section.max_residue_bytes,
        max_queue=section.max_queue,
        max_queue_per_model=section.max_queue_per_model,
        max_concurrent_loads=section.max_concurrent_loads,
        retry_s=max(section.retry_s, 0.1),
        retry_max_s=section.retry_max_s,
        crash_budget=section.crash_budget,
        crash_window_s=section.crash_window_s,
        standby_budget_bytes=section.standby_budget_bytes,
        rank=host.eviction_policy(config.eviction.name, config.eviction.settings).rank,
    )


def _wanted_runtimes(config: Config, host: PluginHost) -> Iterator[tuple[str, RuntimeBackend]]:
    """One of each backend by its own name, and those that the configuration names."""
    backends = {backend.name: backend for backend in host.runtime_backends()}
    yield from backends.items()
    for name, named in config.runtimes.items():
        if named.backend not in backends:
            raise ConfigError(f"runtimes.{name}.backend: {named.backend} is no runtime: there is {', '.join(backends)}")
        yield name, backends[named.backend]


class Orchestrator:
    """The engine. Made, started, stopped once."""

    def __init__(
        self,
        config: Config,
        paths: Paths,
        host: PluginHost,
        sections: Mapping[str, BaseModel],
        inspector: Inspector,
        *,
        clock: Clock = time.time,
    ):
        self.config = config
        self.paths = paths
        self.host = host
        self.clock = clock
        self.started_at = clock()
        self.store = Store(paths.state)
        self.journal = Journal(paths.state / "decisions.jsonl")
        self.usage = UsageBook(known=config.policies.high_priority_teams)
        self.admission = Admission(self.usage, clock)
        self.listening: dict[str, str] = {}
        """The addresses that clients know, once they are bound."""
        self.devices: tuple[Device, ...] = ()
        self.progress: dict[str, Progress] = {}
        """Of loads and moves under way, by model or drop."""
        self.processes = ProcessSupervisor(
            paths.root, state_dir=paths.state / "processes", log_dir=paths.state / "logs"
        )
        self.ledger = Ledger()
        self.running: dict[str, Running] = {}
        starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        for name, backend in _wanted_runtimes(config, host):
            settings = sections[name]
            if getattr(settings, "enabled", True) is False:
                continue
            context = RuntimeContext(
                name=name,
                repository=paths.repository,
                state_dir=paths.state / "runtimes" / name,
                cache_dir=paths.cache,
                settings=settings,
                processes=self.processes,
                report=self._runtime_report(name),
                starting=starting,
            )
            self.running[name] = Running(backend, backend.create(context))
        self._sections = sections
        self.fast = self._chosen_path()
        self.readahead = ReadAhead(self)
        self.effects = Effects(self)
        world = World(next_id=self.journal.last_decision + 1)
        self.loop = Loop(world, policy_of(config, host), self.usage, self.effects.execute, clock)
        self.admission.on_idle = self._became_idle
        self.inspector = inspector
        self.repository = Repository(
            paths.repository, state=paths.state, quarantine=paths.quarantine, trash=paths.trash
        )
        self.runtimes = Runtimes(
            self.running,
            lambda: self.loop,
            self.effects.request_for,
            self._report_for,
            self.effects.measured,
            self._see,
            self.effects.left_behind,
        )
        self.runtimes.moved = self.effects.reroute
        self.runtimes.devices_changed = lambda: self._background(self._look_at_devices())
        self.runtimes.parked = self.effects.parked
        self.runtimes.woken = self.effects.woken
        self.planner = Planner(
            host.brain(config.brain.name, config.brain.settings), self.running, self.situation, self.store
        )
        self.catalog = Catalog(
            self.repository,
            self.planner,
            self.store,
            self.inspector.inspect_all,
            lambda: self.loop,
            self.runtimes_known,
            config.orchestration.settle_s,
        )
        self._guests = Guests(lambda: self.loop, self.catalog.claims)
        self.runtimes.shown = self._guests.see
        self.catalog.names_known = self._names_known
        self.ingest: Ingest | None = None
        if paths.incoming is not None:
            self.ingest = Ingest(
                paths.incoming,
                repository=self.repository,
                catalog=self.catalog,
                planner=self.planner,
                inspector=self.inspector,
                store=self.store,
                loop=lambda: self.loop,
                report=self.tell_progress,
                runtimes_known=self.runtimes_known,
                work=paths.state / "converted",
                settle_s=config.orchestration.settle_s,
                retry_s=config.orchestration.rescan_interval_s,
            )
        self.optimizing = Optimizing(self, sections)
        self._watcher: Watcher | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looking = asyncio.Lock()
        """Held while the devices are looked at."""
        self._idle_due = False
        self._tickets = 0

    def _chosen_path(self) -> FastPath | None:
        """The configured data path; None where the service carries all requests itself."""
        wanted = self.config.server.data_path
        offered = {path.name: path for path in self.host.data_paths()}
        if wanted == "service":
            return None
        if wanted != "auto" and wanted not in offered:
            there = ", ".join(("auto", "service", *offered))
            raise ConfigError(f"there is no data path {wanted!r}: expected server.data_path to be one of {there}")
        for path in offered.values():
            if wanted not in ("auto", path.name):
                continue
            problem = path.usable(self._sections[path.name])
            if problem is None:
                return FastPath(path, self._driver_of(path), self.usage, self.clock)
            if wanted != "auto":
                raise ConfigError(f"the data path {path.name} can't run: {problem}")
            log.warning("the data path %s can't run, and the service carries requests itself: %s", path.name, problem)
        return None

    def _driver_of(self, path: DataPath) -> DataPathDriver:
        context = DataPathContext(
            name=path.name,
            state_dir=self.paths.state / "paths" / path.name,
            socket_dir=socket_folder(self.paths.state),
            settings=self._sections[path.name],
            processes=self.processes,
        )
        return path.create(context)

    @property
    def owns_repository(self) -> bool:
        """Models are dropped into it through Modelium; otherwise it is somebody else's."""
        return self.paths.incoming is not None

    def new_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def place_of(self, name: str) -> Path:
        """Where a record's files lie."""
        where, _, entry = name.partition("/")
        if entry and where == "quarantine":
            return self.paths.quarantine / entry
        if entry and self.paths.incoming is not None:
            return self.paths.incoming / entry
        return self.paths.repository / name

    async def discard_drop(self, name: str) -> Path:
        """Take a refused drop away, to the trash."""
        place = await asyncio.to_thread(self.repository.set_aside, self.place_of(name))
        where, _, entry = name.partition("/")
        if where == "quarantine":
            self.store.set_quarantined(entry, None)
        self.loop.post(e.DropGone(self.clock(), name))
        return place

    async def forget(self, name: str) -> None:
        """Let nobody want a model any more; return when it is unloaded and forgotten. Its folder may then be moved."""
        gone = asyncio.get_running_loop().create_future()
        self.effects.forgotten.setdefault(name, []).append(gone)
        self.catalog.leave(name, True)
        self.loop.post(e.ModelRemoved(self.clock(), name))
        try:
            async with asyncio.timeout(self.config.policies.request_deadline_s):
                await gone
        except TimeoutError:
            self.catalog.leave(name, False)
            model = self.loop.world.models.get(name)
            why = f"it is {model.state}, {model.reason}" if model is not None else "?"
            raise ModelConflict(f"{name} could not be unloaded, and stays: {why}") from None

    # ------------------------------------------------------------------ life

    async def end_other_paths(self) -> None:
        """End data paths that this root had before another way was configured: they hold the addresses."""
        for path in self.host.data_paths():
            if self.fast is None or path.name != self.fast.name:
                await self._driver_of(path).stop()

    async def start(self) -> None:
        """Bring everything up; returns before runtimes answer and before the repository is read."""
        for folder in (self.paths.repository, self.paths.incoming, self.paths.state):
            if folder is not None:
                _make(folder)
        await asyncio.to_thread(self.repository.recover)
        await self._look_at_devices()
        for wrong in self.doubts():
            log.warning("%s", wrong)
        self._recall_quarantine()
        for name in self.running:
            self.loop.post(e.RuntimeAdded(self.clock(), name))
        self.catalog.open.set()
        self.loop.tick()
        self._watcher = Watcher()
        if self.ingest is not None and self.paths.incoming is not None:
            ingest = self.ingest
            self._watcher.watch(self.paths.incoming, lambda entry, whole: ingest.noticed(entry, moved=whole), deep=True)
        self._watcher.watch(self.paths.repository, self._repository_changed, deep=False)
        self._watcher.start()
        self._every(self.config.metrics.collection_interval_seconds, self._look_at_devices)
        self._every(JOURNAL_EVERY_S, self._keep_house)
        self._every(LOADED_EVERY_S, self._look_at_loaded)
        self._background(self.inspector.start())
        self._background(self.readahead.run())
        self._background(self._reread())
        for name in self.running:
            self._background(self.runtimes.watch(name))
        for source in self.host.usage_sources():
            self._every(USAGE_EVERY_S, lambda s=source: self._read_usage(s))
        if self.optimizing.wanted:
            self._background(self.optimizing.run())
        if self.fast is not None:
            self._background(self.fast.run())
            self._background(self._settle(self.fast))
            self._every(READ_EVERY_S, self._read_fast)

    def shut(self) -> None:
        """Answer who waits, and everybody who would have to from now on; loaded models go on."""
        self.admission.shut(RuntimeUnavailable("Modelium is stopping", retry_after_s=5))

    async def stop(self, *, stop_runtimes: bool = False) -> None:
        """Answer who waits, let go, keep what must be kept. Runtimes stay up unless they are to be ended."""
        self.shut()
        self.loop.stop()
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.stop)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=10)
        self.readahead.close()
        if self.ingest is not None:
            await self.ingest.close()
        if self.fast is not None:
            await self.fast.close_all(stop=stop_runtimes)
        await self.runtimes.close(stop=stop_runtimes)
        if stop_runtimes:
            for name in list(self.store.loaded):
                self.store.set_loaded(name, None)
        await self.inspector.close()
        self.store.flush()
        self.journal.write()

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def ended(done: asyncio.Task[Any]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and done.exception() is not None:
                log.error("a background task ended", exc_info=done.exception())

        task.add_done_callback(ended)

    def _every(self, seconds: float, work: Any) -> None:
        async def forever() -> None:
            while True:
                await asyncio.sleep(seconds)
                try:
                    await work()
                except Exception:
                    log.exception("a periodic task failed; it goes on")

        self._background(forever())

    # ------------------------------------------------------------------ folders

    async def _reread(self) -> None:
        while True:
            try:
                await self.catalog.read()
                for name in self.running:
                    self.runtimes.poke(name)  # what it holds may be known now
                if self.ingest is not None:
                    await self.ingest.read()
                await self._reread_quarantine()
            except Exception:
                log.exception("the folders could not be read; they are read again")
            await asyncio.sleep(self.config.orchestration.rescan_interval_s)

    def _names_known(self) -> None:
        """Guests are told of before anybody hears that the engine is ready: a request waits until they are found."""
        self._guests.see_again()
        for name in self.running:
            self.runtimes.poke(name)

    def _repository_changed(self, entry: str, _: bool) -> None:
        if not entry.startswith("."):
            self._background_look(entry)

    def _background_look(self, entry: str) -> None:
        if self.ingest is not None and self.ingest.is_taking(entry):
            return
        self._background(self.catalog.look(entry))

    def _recall_quarantine(self) -> None:
        for name, record in self.store.quarantined.items():
            self._show_quarantined(name, record)

    def _show_quarantined(self, name: str, record: Quarantined) -> None:
        place = f"quarantine/{name}"
        self.loop.post(e.DropRefused(self.clock(), place, Failure(record.code, record.reason), place))

    async def _reread_quarantine(self) -> None:
        """What a person took out of quarantine is shown no more."""
        for name in list(self.store.quarantined):
            if not await asyncio.to_thread(os.path.lexists, self.paths.quarantine / name):
                self.store.set_quarantined(name, None)
                self.loop.post(e.DropGone(self.clock(), f"quarantine/{name}"))

    # ------------------------------------------------------------------ devices, use, housekeeping

    async def _look_at_devices(self) -> None:
        """One look after another: each tells what is newer than the one before."""
        async with self._looking:
            devices = await asyncio.to_thread(self._take_stock)
            devices += tuple(device for running in self.running.values() for device in running.devices)
            if devices:
                self.devices = devices
                self.loop.post(e.DevicesObserved(self.clock(), devices, self._accounted()))

    def _take_stock(self) -> tuple[Device, ...]:
        """The devices as they are, and who holds what of them; in a thread."""
        if self.ledger.gpus is None and any(device.kind == "cuda" for device in self.devices):
            self.ledger.gpus = Gpus.open()
        runtimes = {running.info.pid for running in self.running.values() if running.info and running.info.pid}
        self.ledger.look(runtimes | self.processes.pids())
        return self.host.devices()

    def _accounted(self) -> dict[str, int]:
        """Bytes by device of models whose memory is on the books: as measured, and as booked of what is loaded where
        nothing was measured."""
        world = self.loop.world
        booked = [model for model in (world.models[name] for name in world.live) if model.booking]
        return added(dict(self._held(model)) for model in booked)

    def _held(self, model: Model) -> Booking:
        memory = tuple(self.runtimes.measured.get(model.home, {}).get(model.name, {}).items())
        if model.state is not State.READY:
            return memory
        return completed(memory, model.booking, model.placed)

    def doubts(self) -> list[str]:
        """What the configuration names and is not there."""
        there = [device.id for device in self.devices]
        return [
            f"device_budget_bytes has a budget for {name}, and there is no such device: there is {', '.join(there)}"
            for name in self.config.policies.device_budget_bytes
            if there and name not in there
        ]

    def situation(self) -> Situation:
        section = self.config.policies
        limits = budgets(self.devices, section.device_budget_bytes, section.max_gpu_memory_utilization)
        elsewhere = frozenset(n for n, running in self.running.items() if running.info and running.info.elsewhere)
        return Situation(devices=self.devices, budgets=limits, elsewhere=elsewhere)

    async def _read_usage(self, source: Any) -> None:
        counts = await source.read()
        known = {n: c for n, c in counts.items() if n in self.catalog.known}
        self.usage.merge(source.name, known, self.clock())

    async def _see(self, finished: Mapping[str, int]) -> None:
        """Count what goes straight to a runtime, past every door of ours."""
        if self.fast is not None:
            await self.fast.read()
        now = self.clock()
        for name, total in finished.items():
            usage = self.usage.get(name)
            if usage is not None:
                usage.see(total, now)

    async def _read_fast(self) -> None:
        assert self.fast is not None
        await self.fast.read()
        if self.loop.world.queue:
            self.loop.tick()  # what has become idle may make room

    async def _settle(self, fast: FastPath) -> None:
        await self.runtimes_known()
        await self.catalog.read_once.wait()
        fast.settled()

    async def _keep_house(self) -> None:
        await asyncio.to_thread(self.journal.write)
        await self.processes.rotate()

    async def _look_at_loaded(self) -> None:
        await self.catalog.look(*self.loop.world.live)

    def _became_idle(self) -> None:
        """Somebody waits for room, and a model has just become idle: look, once for many."""
        if not self._idle_due:
            self._idle_due = True

            def look() -> None:
                self._idle_due = False
                self.loop.tick()

            asyncio.get_running_loop().call_soon(look)

    async def runtimes_known(self) -> None:
        """Until every runtime was up once, or has failed to be."""
        for running in self.running.values():
            await running.known.wait()

    def ready(self) -> bool:
        up = any(r.state is RuntimeState.UP for r in self.loop.world.runtimes.values())
        return up and self.catalog.read_once.is_set() and (self.fast is None or self.fast.clean)

    # ------------------------------------------------------------------ progress

    def tell_progress(self, subject: str, progress: Progress) -> None:
        self.progress[subject] = progress
        self.journal.progress(self.clock(), subject, progress)

    def _report_for(self, name: str) -> Report:
        return lambda progress: self.tell_progress(name, progress)

    def _runtime_report(self, name: str) -> Report:
        def report(progress: Progress) -> None:
            running = self.running.get(name)
            if running is not None:
                running.progress = progress
            self.journal.progress(self.clock(), f"runtime:{name}", progress)

        return report


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"{folder} can't be made: {exc.strerror}; let the user that runs Modelium write there", code="storage"
        ) from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} can't be written: let the user that runs Modelium write there", code="storage")
