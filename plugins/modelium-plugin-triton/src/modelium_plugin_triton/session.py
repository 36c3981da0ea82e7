"""One server while it lives: what it holds, loads and unloads. Another instance of it gets another session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelium.api import (
    LoadOutcome,
    LoadRequest,
    Observation,
    ObservedModel,
    Progress,
    Report,
    UnloadOutcome,
)
from modelium.api.measuring import added, less
from modelium.errors import DriverError, LoadRejected
from modelium_plugin_triton import folders, reasons
from modelium_plugin_triton.client import CallFailed, Counted, TritonClient
from modelium_plugin_triton.measure import Family, Measurer, Stub, has_shaken_hands, kill
from modelium_plugin_triton.settings import TritonSettings
from modelium_plugin_triton.unfinished import Unfinished
from modelium_plugin_triton.watch import LoadWatch

log = logging.getLogger(__name__)

LINGERING_S = 10.0
"""A stub that outlives its model's unload by this much is ended."""
UNENDED_S = 3.0
"""How long to wait for the end of an unload that Triton perhaps never ends; where it does, one second is enough."""
BACK_S = 2.0
"""How long memory of a native backend may take to come back before it counts as kept."""
SMALL_BYTES = 4 << 20
"""Below this a server's size changes for reasons of its own."""

_FLUX = {"LOADING", "UNLOADING"}
_ALIVE = {"READY", *_FLUX}
"""States in the repository index of versions that hold memory."""


class GivenUp(Exception):
    """Nobody wants the operation any more."""


class Attempt:
    """One try at a load, which may be given up."""

    def __init__(self) -> None:
        self.given_up = asyncio.Event()
        self.begun = False
        """Triton was asked: from here on it takes an effort to leave nothing behind."""


@dataclass
class Session:
    """Everything that is known of one instance of a server."""

    client: TritonClient
    settings: TritonSettings
    instance: str
    repository: Path
    memory_file: Path
    """Where measured sizes of models of native backends are kept, which can be measured only while they load."""
    measurer: Measurer | None = None
    """None when its processes can't be seen from here."""
    own: bool = True
    """It is ours: its stubs may be ended."""
    backends: tuple[str, ...] = ()
    python_based: frozenset[str] = frozenset({"python"})
    """Backends whose models run in processes of their own."""
    tail: Callable[[int], list[str]] = lambda lines: []
    lingering: set[str] = field(default_factory=set)
    """Models that were loading or unloading when we came."""
    inherited: frozenset[int] = frozenset()
    """Processes that had died unnoticed when we came: Triton may wait for one of them without end."""
    used_backends: set[str] = field(default_factory=set)
    """Of the models that it holds or held."""
    missing_backends: set[str] = field(default_factory=set)
    busy: dict[str, str] = field(default_factory=dict)
    unfinished: Unfinished = field(default_factory=Unfinished)
    native: dict[str, dict[str, int]] = field(default_factory=dict)
    stubs: dict[str, int] = field(default_factory=dict)
    """How many stubs each Python model has when it is well."""
    turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the server's own size is being compared."""
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    # ------------------------------------------------------------------ beginning

    async def begin(self) -> None:
        """Learn what it holds already."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            saved = json.loads(self.memory_file.read_text())
            if saved.get("instance") == self.instance:
                self.native = saved["models"]
        self.inherited = frozenset((await self.look()).zombies)
        self.lingering = await self._in_flux()
        for name, versions in _by_name(await self.client.statistics()).items():
            with contextlib.suppress(CallFailed):  # it has just been unloaded
                await self._count_instances(name, [v.version for v in versions])

    async def _count_instances(self, name: str, versions: Sequence[str]) -> None:
        """Learn how many processes a Python model has, all being well."""
        told = [await self.client.backend(name, version) for version in versions]
        self.used_backends |= {backend for backend, _ in told if backend}
        if any(backend in self.python_based for backend, _ in told):
            self.stubs[name] = sum(count for _, count in told)

    async def _in_flux(self) -> set[str]:
        return {m.name for m in await self.client.index() if m.state in _FLUX}

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            self.memory_file.parent.mkdir(parents=True, exist_ok=True)
            self.memory_file.write_text(json.dumps({"instance": self.instance, "models": self.native}))

    # ------------------------------------------------------------------ observing

    async def look(self) -> Family:
        if self.measurer is None:
            return Family()
        async with self._looking:
            return await asyncio.to_thread(self.measurer.look)

    async def observe(self) -> Observation:
        """Its models; those that are loading or unloading are there as not ready, since they hold memory."""
        counted, family = await asyncio.gather(self.client.statistics(), self.look())
        stubs = family.by_model()
        if self.lingering or self.unfinished.names:
            self.lingering &= await self._forget_done(set(stubs))
        serving = _by_name(counted)
        models = [self._observed(name, versions, stubs.get(name, [])) for name, versions in serving.items()]
        for name in {*stubs, *self.busy, *self.lingering, *self.unfinished.names} - set(serving):
            memory = added(stub.memory for stub in stubs.get(name, []))
            reason = self.unfinished.stuck.get(name) or self.busy.get(name) or "loading or unloading"
            models.append(ObservedModel(name=name, ready=False, memory=memory, reason=reason))
        known = added(sizes for name, sizes in self.native.items() if name in serving)
        return Observation(instance=self.instance, models=tuple(models), overhead=less(family.server, known))

    async def _forget_done(self, alive: Set[str]) -> set[str]:
        """Forget the loads that Triton is done with after all; gives the models that it works on. `alive`: those that
        have a process."""
        index = await self.client.index()
        flux = {m.name for m in index if m.state in _FLUX}
        self.unfinished.forget_done({m.name for m in index}, flux, alive)
        return flux

    def _observed(self, name: str, versions: Sequence[Counted], stubs: Sequence[Stub]) -> ObservedModel:
        reason = ""
        if name not in self.busy and self.measurer is not None:
            whole = self.stubs.get(name, 0)
            if len(stubs) > whole > 0:
                # Those of the revision that was replaced linger for a moment, and are not what this one takes.
                stubs = sorted(stubs, key=lambda stub: stub.key[1])[-whole:]
            if len(stubs) < whole:
                reason = f"{whole - len(stubs)} of its {whole} processes has ended: it has to be loaded again"
        return ObservedModel(
            name=name,
            ready=not reason,
            broken=bool(reason),
            versions=tuple(v.version for v in versions),
            memory=added(stub.memory for stub in stubs) if stubs else self.native.get(name, {}),
            requests=sum(v.requests for v in versions),
            reason=reason,
        )

    # ------------------------------------------------------------------ loading

    async def load(self, request: LoadRequest, report: Report, attempt: Attempt) -> LoadOutcome:
        """Load it. When the attempt is given up, nothing is left of it, and `GivenUp` is raised.

        Until the attempt has begun, the task may as well be cancelled.
        """
        async with self.turns[request.name]:
            await self._check_unfinished(request.name, request.path)
            backend = await asyncio.to_thread(folders.check, request)
            with self._busy_with(request.name, "loading"):
                if backend == folders.NO_BACKEND or backend in self.python_based:
                    return await self._load(request, report, attempt, native=False)
                async with self.alone:
                    return await self._load(request, report, attempt, native=True)

    async def _check_unfinished(self, name: str, folder: Path) -> None:
        """Raise what is to be said of a model that Triton is not done with."""
        if name in self.unfinished.names:
            await self._forget_done(set((await self.look()).by_model()))
            limit = self.settings.load_timeout_s
            await self.unfinished.check(name, folder, limit, own=self.own)

    async def _load(self, request: LoadRequest, report: Report, attempt: Attempt, native: bool) -> LoadOutcome:
        name = request.name
        before = await self.look()
        if self.measurer is not None and len(before.of(name)) < self.stubs.get(name, 0):
            await self._remove(name)  # it lost a process: a plain load would change nothing
            before = await self.look()
        parameters = await asyncio.to_thread(folders.parameters, request)
        attempt.begun = True
        began = time.monotonic()
        behind = not self.inherited.isdisjoint(before.zombies) and name in await self._in_flux()
        watch = LoadWatch(name, before, behind=behind)
        call = asyncio.ensure_future(self.client.load(name, parameters))
        try:
            await self._follow(call, request, watch, report, attempt.given_up)
        except CallFailed as error:
            raise self._failure(name, error.details) from error
        except (GivenUp, TimeoutError) as ended:
            await self._abandon(request, call, watch)
            if isinstance(ended, GivenUp):
                raise
            limit = self._limit(request)
            raise DriverError(
                f"{name} was not loaded within {limit:.0f} s (triton.load_timeout_s)", code="load_timeout"
            ) from ended
        except BaseException:
            call.cancel()
            raise
        load_s = time.monotonic() - began
        await self._until_ready(name)
        self.unfinished.culprits.pop(name, None)
        with contextlib.suppress(CallFailed):
            versions = [c.version for c in await self.client.statistics() if c.name == name]
            await self._count_instances(name, versions)
        after = await self.look()
        return LoadOutcome(memory=self._measured(name, before, after, native), load_s=load_s)

    def _measured(self, name: str, before: Family, after: Family, native: bool) -> dict[str, int]:
        old = {stub.key for stub in before.stubs}
        stubs = after.of(name)
        if native and not stubs:
            if growth := less(after.server, before.server):
                self.native[name] = growth
                self._save()
            return dict(self.native.get(name, {}))
        new = [stub for stub in stubs if stub.key not in old]  # those of the revision that it replaces may linger
        return added(stub.memory for stub in new or stubs)

    async def _follow(
        self,
        call: asyncio.Future[None],
        request: LoadRequest,
        watch: LoadWatch,
        report: Report,
        given_up: asyncio.Event,
    ) -> None:
        """Wait for the load, telling how far it is by the memory that its processes hold."""
        started = time.monotonic()
        stop = asyncio.ensure_future(given_up.wait())
        both: list[asyncio.Future[Any]] = [call, stop]
        report(Progress(stage="loading", total=request.memory_bytes or None, unit="bytes"))
        try:
            while True:
                await asyncio.wait(both, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    return call.result()
                if stop.done():
                    raise GivenUp
                if time.monotonic() - started > self._limit(request):
                    raise TimeoutError
                family = await self.look()
                held = sum(added(stub.memory for stub in watch.mine(family)).values())
                report(Progress(stage="loading", done=held, total=request.memory_bytes or None, unit="bytes"))
                if self._in_vain(watch, family):
                    call.cancel()
                    raise self._wedged(request.name, watch, family)
        finally:
            stop.cancel()

    def _in_vain(self, watch: LoadWatch, family: Family) -> bool:
        return watch.is_in_vain(family, time.monotonic(), alone=len(self.busy) == 1)

    def _wedged(self, name: str, watch: LoadWatch, family: Family) -> LoadRejected:
        for stub in watch.mine(family) if self.own else ():
            kill(stub)  # nothing will ever be asked of its other instances
        said = [line for line in reasons.since_load(name, self.tail(400)) if "Failed to" in line][-1:]
        self.unfinished.stuck[name] = f"{name}: Triton waits without end for a process of it that has died"
        return LoadRejected(
            f"{name}: its Python process ended before it had read model.py: "
            + (said[0] if said else "it was killed, or the module ended it while it was imported"),
            code="process_died",
        )

    async def _abandon(self, request: LoadRequest, call: asyncio.Future[None], watch: LoadWatch) -> None:
        """End a load that is under way. Triton has no call for that; without its process a Python model's load fails.

        A process for which Triton would wait without end is let live until it is past that.
        """
        name = request.name
        self.busy[name] = "unloading"
        deadline = time.monotonic() + self.settings.unload_timeout_s
        while not call.done() and time.monotonic() < deadline:
            family = await self.look()
            if self._in_vain(watch, family):
                self._wedged(name, watch, family)
                break
            for stub in watch.mine(family) if self.own else ():
                if not stub.completing and await asyncio.to_thread(has_shaken_hands, stub):
                    kill(stub)
            await asyncio.wait({call}, timeout=0.2)
        if not call.done():
            call.cancel()
            self.unfinished.give_up(name)
            log.warning("%s: Triton goes on with a load that was given up", name)
            return
        failed = call.exception() is not None  # asked for, so that it counts as seen
        if not request.replace:
            if not failed:
                await self._remove(name)
            self.stubs.pop(name, None)
            self.native.pop(name, None)

    async def _until_ready(self, name: str) -> None:
        async with asyncio.timeout(10) as bound:
            try:
                while not await self.client.ready(name):
                    await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                if bound.expired():
                    raise DriverError(f"Triton loaded {name} and does not call it ready") from None
                raise

    def _limit(self, request: LoadRequest) -> float:
        return float(request.plan.settings.get("load_timeout_s") or self.settings.load_timeout_s)

    def _failure(self, name: str, said: str) -> DriverError:
        error = reasons.failure(name, said, backends=self.backends, log=reasons.since_load(name, self.tail(400)))
        if error.code == "backend_missing":
            self.missing_backends.add(error.fields["backend"])
        return error

    # ------------------------------------------------------------------ unloading

    async def unload(self, name: str) -> UnloadOutcome:
        async with self.turns[name]:
            if name in self.unfinished.stuck and not await self._serves(name):
                return UnloadOutcome()  # nothing is left of it; only the next load needs a new start of Triton
            await self._check_unfinished(name, self.repository / name)
            with self._busy_with(name, "unloading"):
                if name not in self.native:
                    await self._remove(name)
                    return UnloadOutcome()
                async with self.alone:
                    return await self._remove_native(name)

    async def _remove_native(self, name: str) -> UnloadOutcome:
        before = await self.look()
        await self._remove(name)
        held = self.native.pop(name, {})
        self._save()
        deadline = time.monotonic() + BACK_S
        while True:
            kept = less(held, less(before.server, (await self.look()).server))
            residue = {device: size for device, size in kept.items() if size > SMALL_BYTES}
            if not residue or time.monotonic() > deadline:
                return UnloadOutcome(residue=residue)
            await asyncio.sleep(0.1)

    async def _remove(self, name: str) -> None:
        """Unload it and wait until it is gone, processes and all."""
        limit = self.settings.unload_timeout_s
        lost = self.measurer is not None and len((await self.look()).of(name)) < self.stubs.get(name, 0)
        try:
            async with asyncio.timeout(limit):
                await self.client.unload(name)
                await self._until_gone(name, lost)
        except CallFailed as error:
            raise DriverError(f"Triton did not unload {name}: {error.details}", code="unload_failed") from error
        except TimeoutError as error:
            raise DriverError(
                f"{name} is not gone {limit:.0f} s after its unload began (triton.unload_timeout_s): requests may "
                "still be running",
                code="unload_stuck",
            ) from error
        self.stubs.pop(name, None)
        self.lingering.discard(name)

    async def _until_gone(self, name: str, lost: bool) -> None:
        """`lost`: one of its processes had died before. When it was asked something after that, Triton never ends its
        unload; it serves no more all the same, and can be loaded again."""
        pause, began = 0.02, time.monotonic()
        while True:
            stubs = (await self.look()).of(name)
            # The index costs more, and is asked once the processes are gone.
            if not stubs and not await self._alive(name):
                return
            waited = time.monotonic() - began
            if lost and not stubs and waited > UNENDED_S and not await self._serves(name):
                return
            if stubs and self.own and waited > LINGERING_S and not await (self._serves if lost else self._alive)(name):
                log.warning("%s: ending %d processes that outlived its unload", name, len(stubs))
                for stub in stubs:
                    kill(stub)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    async def _serves(self, name: str) -> bool:
        return any(c.name == name for c in await self.client.statistics())

    async def _alive(self, name: str) -> bool:
        """Whether a version of it is there in any way; one whose folder was removed is not in the index."""
        if await self._serves(name):
            return True
        return any(m.name == name and m.state in _ALIVE for m in await self.client.index())

    @contextlib.contextmanager
    def _busy_with(self, name: str, doing: str) -> Iterator[None]:
        self.busy[name] = doing
        try:
            yield
        finally:
            self.busy.pop(name, None)


def _by_name(counted: Iterable[Counted]) -> dict[str, list[Counted]]:
    models: dict[str, list[Counted]] = {}
    for version in counted:
        models.setdefault(version.name, []).append(version)
    return models
