"""What becomes of each instruction of the core: routes, tickets, runtimes, records, and those who are told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelium.api.datapath import DataRoute
from modelium.api.types import LoadRequest, Transition
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.loading import footprint
from modelium.core.states import LIVE, State
from modelium.engine.admission import Route
from modelium.errors import (
    CapacityError,
    ConfigError,
    DeadlinePassed,
    DriverError,
    LoadRejected,
    ModelConflict,
    ModelError,
    ModelFailed,
    ModeliumError,
    ModelNotFound,
    NeverFits,
    QueueFull,
    RuntimeUnavailable,
)

if TYPE_CHECKING:
    from modelium.engine.orchestrator import Orchestrator

_ERRORS: Mapping[str, type[ModeliumError]] = {
    t.code: t
    for t in (
        CapacityError,
        ConfigError,
        DeadlinePassed,
        DriverError,
        LoadRejected,
        ModelConflict,
        ModelError,
        ModelFailed,
        ModelNotFound,
        NeverFits,
        QueueFull,
        RuntimeUnavailable,
    )
}


class Effects:
    """Carries out instructions, in the order in which the core gives them; nothing here waits."""

    def __init__(self, engine: Orchestrator):
        self._engine = engine
        self.forgotten: dict[str, list[asyncio.Future[None]]] = {}
        """Who waits for a model to be forgotten."""
        self._measured_as: dict[str, str] = {}
        """What each model that loads, or was loaded here, is measured as: its files may be others by then."""

    def execute(self, order: i.Instruction) -> None:
        match order:
            case i.Tell(transition):
                self._tell(transition)
            case i.Grant(ticket, name):
                self._engine.admission.grant(ticket, name)
            case i.Refuse(ticket, name, code, message, retry_after_s):
                kind = _ERRORS.get(code, ModelFailed)
                self._engine.admission.refuse(ticket, kind(message, code=code, retry_after_s=retry_after_s, model=name))
            case i.OpenRoute(name, runtime):
                self._open(name, runtime)
            case i.CloseRoute(name, op):
                self._close(name, op)
            case i.Load():
                if not order.replace:
                    self._engine.usage.model(order.name).loads()
                self._engine.runtimes.load(order)
            case i.Park():
                self._engine.runtimes.park(order)
            case i.Wake():
                self._engine.runtimes.wake(order)
            case i.Unload():
                self._engine.runtimes.unload(order)
            case i.GiveUp(name):
                self._engine.runtimes.give_up(name)
            case i.StartRuntime():
                self._engine.runtimes.start(order)
            case i.StopRuntime():
                self._engine.runtimes.stop(order)
            case i.Forget(name):
                for waiter in self.forgotten.pop(name, []):
                    if not waiter.done():
                        waiter.set_result(None)
                self._engine.usage.forget(name)
                self._engine.readahead.forget(name)
                self._engine.journal.forget(name)
                self._engine.progress.pop(name, None)
                self._measured_as.pop(name, None)
                self._engine.store.set_loaded(name, None)
            case _:
                raise AssertionError(f"no effect for {order!r}")
        self._engine.admission.watch_queue(bool(self._engine.loop.world.queue))

    def _close(self, name: str, op: int) -> None:
        """With an operation, tell when nothing is in flight any more, by whatever way it came."""
        fast = self._engine.fast
        if fast is not None:
            fast.close(name)

        def drained() -> None:
            self._engine.loop.post(e.Drained(self._engine.clock(), name, op))

        if not op:
            self._engine.admission.close(name, None)
        elif fast is None:
            self._engine.admission.close(name, drained)
        else:
            self._engine.admission.close(name, lambda: fast.when_idle(name, drained))

    def _tell(self, transition: Transition) -> None:
        self._engine.journal.add(transition)
        self._engine.usage.observe(transition)
        self._engine.readahead.observe(transition)
        self._engine.host.transition(transition)
        name = transition.subject
        if transition.after != State.LOADING:
            self._engine.progress.pop(name, None)
        if transition.before in LIVE - {State.RECOVERING} and transition.after in (State.COLD, State.FAILED):
            self._engine.store.set_loaded(name, None)

    def reroute(self, name: str, runtime: str) -> None:
        """A model in a runtime answers elsewhere than before."""
        route = self._engine.admission.routes.get(name)
        if route is not None and route.runtime == runtime:
            self._open(name, runtime)

    def _open(self, name: str, runtime: str) -> None:
        running, known = self._engine.running[runtime], self._engine.catalog.known.get(name)
        endpoints = self._engine.runtimes.endpoints.get((runtime, name))
        if endpoints is None:
            endpoints = {e.protocol: e.address for e in running.info.endpoints} if running.info else {}
        decoupled = known.decoupled if known else False
        self._engine.admission.open(Route(name, runtime, endpoints, decoupled, self._engine.usage.model(name)))
        if self._engine.fast is not None:
            self._engine.fast.open(DataRoute(model=name, endpoints=endpoints, decoupled=decoupled))
        self._remember(name, runtime)

    def _remember(self, name: str, runtime: str) -> None:
        """Called when a model is READY, loaded or reloaded: keep what was measured, and that it is loaded."""
        known, model = self._engine.catalog.known.get(name), self._engine.loop.world.models.get(name)
        if known is None or model is None:
            return
        revision = model.loaded_revision or known.revision
        self._engine.store.set_loaded(name, revision)

    def measured(self, name: str, memory: Mapping[str, int], load_s: float | None) -> None:
        """What its next load is placed by is kept, as the core has it."""
        model = self._engine.loop.world.models.get(name)
        if load_s is None and model is not None and model.held is not None and model.held.note:
            return
        memory_bytes = footprint(tuple(memory.items()), self._placed(name, memory))
        known = self._engine.catalog.known.get(name)
        if known is not None and known.plan.elastic and memory_bytes:
            memory_bytes = max(memory_bytes, known.plan.memory_bytes)
        key = self._key(name)
        if key is not None and memory_bytes:
            self._engine.store.measure(key, memory_bytes, load_s)

    def _placed(self, name: str, memory: Mapping[str, int]) -> tuple[str, ...]:
        """Where it was placed; of one that was found loaded, all that it takes of the kind that it was planned for."""
        world, known = self._engine.loop.world, self._engine.catalog.known.get(name)
        model = world.models.get(name)
        if known is None or (model is not None and model.placed):
            return model.placed if model is not None else ()
        kind = known.plan.device_kind
        return tuple(d for d, n in memory.items() if n and (a := world.devices.get(d)) is not None and a.kind == kind)

    def left_behind(self, name: str, runtime: str, size: int) -> None:
        """An unload did not give all back: note it against the way of serving."""
        known = self._engine.catalog.known.get(name)
        self._engine.store.note_residue(runtime, known.plan.serving if known is not None else "", size)

    def parked(self, name: str, level: int, memory: Mapping[str, int]) -> None:
        key = self._key(name)
        if key is not None and memory:
            host = memory.get(self._engine.loop.policy.standby_device, 0)
            self._engine.store.measure_parked(key, level, host, sum(memory.values()) - host)

    def woken(self, name: str, level: int, wake_s: float) -> None:
        key = self._key(name)
        if key is not None:
            self._engine.store.measure_wake(key, level, wake_s)

    def _key(self, name: str) -> str | None:
        known = self._engine.catalog.known.get(name)
        return self._measured_as.get(name) or (known.measured_as if known is not None else None)

    def request_for(self, order: i.Load) -> LoadRequest:
        known = self._engine.catalog.known.get(order.name)
        if known is None:
            raise LoadRejected(
                f"{order.name} has no folder in the repository: {order.runtime} has to show it by itself"
            )
        self._measured_as[order.name] = known.measured_as
        analysis = self._engine.catalog.manifest(order.name).inspection.analysis
        if analysis is None:
            raise ModelError(f"the manifest of {order.name} has no analysis")
        return LoadRequest(
            name=order.name,
            path=known.path,
            plan=known.plan,
            analysis=analysis,
            devices=tuple(d for d, _ in order.booking),
            memory_bytes=sum(n for _, n in order.booking),
            device_bytes={
                d: account.total_bytes
                for d, _ in order.booking
                if (account := self._engine.loop.world.devices.get(d)) is not None
            },
            replace=order.replace,
            parameters=order.parameters,
        )
