"""The lives of runtimes, and what they take with them."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from modelium.api.types import ObservedModel
from modelium.core import events as e
from modelium.core.disk import keep_resident
from modelium.core.instructions import CloseRoute, OpenRoute, StartRuntime
from modelium.core.schedule import admit, fail
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn
from modelium.core.world import Booking, Failure, Model, Runtime


def runtime_added(turn: Turn, event: e.RuntimeAdded) -> None:
    if event.name not in turn.runtimes:
        runtime = Runtime(event.name, since=event.at)
        turn.runtimes = turn.runtimes.set(event.name, runtime)
        start(turn, runtime, "configured")


def start(turn: Turn, runtime: Runtime, reason: str) -> None:
    epoch = runtime.epoch + 1
    turn.move_runtime(runtime, RuntimeState.STARTING, reason, epoch=epoch)
    turn.out.append(StartRuntime(runtime.name, epoch))


def runtime_up(turn: Turn, event: e.RuntimeUp) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is None or runtime.epoch != event.epoch or runtime.state is not RuntimeState.STARTING:
        return
    reason = "adopted as it was" if event.adopted else "answers"
    turn.move_runtime(runtime, RuntimeState.UP, reason, instance=event.instance, external=event.external)
    _reconcile(turn, event.name, event.observation.models, event.at)
    for name in list(turn.live):
        model = turn.models[name]
        if model.runtime == event.name and model.state is State.RECOVERING:
            model = turn.move(model, State.COLD, "no longer loaded in its runtime", loaded_revision=None)
            model = turn.grant_all(model, gone=True)
            if turn.waiting(model):
                model = turn.move(model, State.QUEUED, "asked for", want=Want.REQUEST, wanted_since=turn.now)
            elif model.pinned or model.always_loaded:
                keep_resident(turn, model)
    turn.dirty = True


def runtime_observed(turn: Turn, event: e.RuntimeObserved) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is None or runtime.epoch != event.epoch or runtime.state is not RuntimeState.UP:
        return
    if runtime.instance != event.observation.instance:
        _lose_models(turn, runtime.name, Failure("runtime_unavailable", f"{runtime.name} was restarted by somebody"))
        turn.runtimes = turn.runtimes.set(runtime.name, replace(runtime, instance=event.observation.instance))
    _reconcile(turn, event.name, event.observation.models, event.taken_at)


def _reconcile(turn: Turn, runtime: str, observed: tuple[ObservedModel, ...], taken_at: float) -> None:
    """Bring what is believed in line with what is seen; what changed after the look is left alone."""
    seen = {m.name: m for m in observed if m.ready}
    foreign: list[str] = []
    for shown in seen.values():
        model = turn.models.get(shown.name)
        if model is None or model.runtime != runtime:
            foreign.append(shown.name)
        elif model.state is State.READY:
            _remeasure(turn, model, shown)
        elif model.state in (State.COLD, State.QUEUED, State.FAILED, State.RECOVERING) and (
            model.since < taken_at or model.state is State.RECOVERING
        ):
            _adopt(turn, model, shown)
    for name in list(turn.live):
        model = turn.models[name]
        if model.runtime != runtime or name in seen or model.since >= taken_at:
            continue
        if model.state is State.READY and not model.op:
            turn.out.append(CloseRoute(name, 0))
            failure = Failure("runtime_unavailable", f"{runtime} no longer has it loaded")
            _lose(turn, model, failure)
        elif model.state is State.FAILED and model.booking:
            turn.change(model, booking=(), measured=())
            turn.dirty = True
    known = turn.runtimes[runtime]
    if known.foreign != tuple(sorted(foreign)):
        turn.runtimes = turn.runtimes.set(runtime, replace(known, foreign=tuple(sorted(foreign))))


def _booking(turn: Turn, model: Model, shown: ObservedModel) -> Booking:
    if shown.memory:
        return tuple(sorted(shown.memory.items()))
    if model.booking:
        return model.booking
    kind = model.spec.device_kind if model.spec else ""
    device = next((a.id for a in sorted(turn.devices.values(), key=lambda a: a.id) if a.kind == kind), None)
    return ((device, model.estimate.memory_bytes),) if device is not None else ()


def _remeasure(turn: Turn, model: Model, shown: ObservedModel) -> None:
    """Memory grows with use: the largest seen is what is booked."""
    if not shown.memory or model.op:
        return
    old = dict(model.measured or ())
    new = tuple(sorted((d, max(n, old.get(d, 0))) for d, n in shown.memory.items()))
    if new != model.measured:
        size = sum(n for _, n in new)
        estimate = replace(model.estimate, memory_bytes=size, measured=True)
        turn.change(model, measured=new, booking=new, estimate=estimate)


def _adopt(turn: Turn, model: Model, shown: ObservedModel) -> None:
    if model.state is not State.RECOVERING:
        model = turn.move(model, State.RECOVERING, "found loaded in its runtime")
    revision = model.loaded_revision or (model.spec.revision if model.spec else None)
    model = turn.move(
        model,
        State.READY,
        "adopted: it was loaded already",
        booking=_booking(turn, model, shown),
        measured=tuple(sorted(shown.memory.items())),
        promise=(),
        op=0,
        loaded_revision=revision,
        loaded_at=turn.now,
        want=Want.NONE,
        failure=None,
        failures=0,
    )
    turn.out.append(OpenRoute(model.name, model.runtime))
    admit(turn, model)


def runtime_down(turn: Turn, event: e.RuntimeDown) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is None or runtime.epoch != event.epoch or runtime.state is RuntimeState.CRASHED:
        return
    policy = turn.policy
    crashes = (*(c for c in runtime.crashes if turn.now - c < policy.crash_window_s), turn.now)
    permanent = event.failure.code == "config"
    spent = len(crashes) >= policy.crash_budget and not runtime.external
    if permanent or spent:
        retry_at = inf
        why = f"{len(crashes)} failures within {policy.crash_window_s:.0f} s; " if spent else ""
        reason = f"{why}{event.failure.message}"
    else:
        retry_at = turn.now + min(policy.retry_s * 2 ** (len(crashes) - 1) / 5, 60.0)
        reason = event.failure.message
        turn.wake(retry_at)
    turn.move_runtime(runtime, RuntimeState.CRASHED, reason, crashes=crashes, retry_at=retry_at)
    _lose_models(turn, runtime.name, Failure("runtime_unavailable", f"{runtime.name} is gone: {event.failure.message}"))


def _lose_models(turn: Turn, runtime: str, failure: Failure) -> None:
    for name in list(turn.live):
        model = turn.models[name]
        if model.runtime == runtime and model.state is not State.RECOVERING:
            _lose(turn, model, failure)


def _lose(turn: Turn, model: Model, failure: Failure) -> None:
    """The model went with its runtime; it comes back if somebody wants it."""
    if model.state is State.FAILED:
        turn.change(model, booking=(), measured=())
        return
    in_use = bool(model.use.in_flight) or (
        model.state is State.READY and model.use.requests > 0 and turn.now - model.busy_since < turn.policy.idle_s
    )
    forget, again = model.forget, model.again
    if model.state in (State.READY, State.DRAINING):
        turn.out.append(CloseRoute(model.name, 0))
    model = turn.grant_all(model, gone=True)
    if model.state in (State.READY, State.DRAINING, State.UNLOADING):
        model = turn.change(model, failures=0, use=type(model.use)())
    model = fail(turn, model, failure, runtime_lost=True)
    if forget:
        turn.forget(model, "removed from the repository")
        return
    if model.pinned or model.always_loaded:
        turn.change(model, want=Want.RESIDENT, wanted_since=turn.now)
    elif again is not Want.NONE or in_use:
        turn.change(model, want=Want.RESTORE, wanted_since=turn.now)
    elif turn.waiting(model):
        turn.change(model, want=Want.REQUEST, wanted_since=turn.now)
