"""The lives of runtimes, and what they take with them."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from modelium.api.types import ObservedModel
from modelium.core import events as e
from modelium.core.instructions import CloseRoute, OpenRoute, StartRuntime
from modelium.core.loading import completed, footprint, measured
from modelium.core.moves import NOTHING_THERE, admit, drain, fail, onward, unload_parts, want
from modelium.core.parking import rest
from modelium.core.standby import asleep, parked_as
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Booking, Failure, Held, Model, Parked, Runtime, Use


def runtime_added(turn: Turn, event: e.RuntimeAdded) -> None:
    if event.name not in turn.runtimes:
        runtime = Runtime(event.name, since=event.at)
        turn.runtimes = turn.runtimes.set(event.name, runtime)
        start(turn, runtime, "configured")


def start(turn: Turn, runtime: Runtime, reason: str) -> None:
    epoch = runtime.epoch + 1
    crashes = () if runtime.given_up else runtime.crashes
    turn.move_runtime(runtime, RuntimeState.STARTING, reason, epoch=epoch, crashes=crashes, given_up=False)
    turn.out.append(StartRuntime(runtime.name, epoch))


def runtime_up(turn: Turn, event: e.RuntimeUp) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is None or runtime.epoch != event.epoch or runtime.state is not RuntimeState.STARTING:
        return
    reason = "adopted as it was" if event.adopted else "answers"
    known = runtime.instance == event.instance
    turn.move_runtime(
        runtime,
        RuntimeState.UP,
        reason,
        instance=event.instance,
        external=event.external,
        elsewhere=event.elsewhere,
        residue=runtime.residue if known else (),
        slowest_unload_s=runtime.slowest_unload_s if known else 0.0,
    )
    _reconcile(turn, event.name, event.observation.models, inf)
    for name in sorted(turn.models):
        model = turn.models[name]
        if model.home == event.name:
            unwanted(turn, model, f"{event.name} is up again")
    turn.dirty = True


def runtime_observed(turn: Turn, event: e.RuntimeObserved) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is None or runtime.epoch != event.epoch or runtime.state is not RuntimeState.UP:
        return
    if runtime.instance != event.observation.instance:
        lose_models(turn, runtime.name, Failure("runtime_unavailable", f"{runtime.name} was restarted by somebody"))
        turn.runtimes = turn.runtimes.set(runtime.name, replace(runtime, instance=event.observation.instance))
    _reconcile(turn, event.name, event.observation.models, event.taken_at)


def _reconcile(turn: Turn, runtime: str, observed: tuple[ObservedModel, ...], taken_at: float) -> None:
    """Bring what is believed in line with what is seen; what changed after the look is left alone."""
    seen = {m.name: m for m in observed if m.ready}
    there = {m.name: m for m in observed}
    foreign: list[str] = []
    for shown in there.values():
        if not shown.ready and not shown.parked:
            continue
        model = turn.models.get(shown.name)
        if model is None or model.home != runtime or model.state is State.INVALID:
            foreign.append(shown.name)
        elif model.state is (State.READY if shown.ready else State.STANDBY):
            _remeasure(turn, model, shown)
        elif model.state is State.RECOVERING or (model.state in _ADOPTABLE and model.since < taken_at):
            (_adopt if shown.ready else _adopt_parked)(turn, model, shown)
    lost: list[Model] = []
    for name in sorted(turn.live):
        model = turn.models[name]
        if model.home != runtime or name in seen:
            continue
        left = there.get(name)
        holds = left is not None and (not left.broken or (model.state is State.FAILED and any(left.memory.values())))
        if holds and model.state in (State.FAILED, State.RECOVERING, State.STANDBY):
            continue  # it is neither ready nor gone, and holds memory still
        lost.append(model)
        reason = left.reason if left is not None else f"{runtime} no longer has it loaded"
        if left is not None and left.parked:
            reason = "somebody put it to sleep"
        if model.state is State.RECOVERING:
            _gone(turn, model, reason, Want.RESTORE if left is not None else Want.NONE)
        elif model.since >= taken_at:
            continue
        elif model.state is State.READY and not model.op:
            lose(turn, model, Failure("runtime_unavailable", reason))
            if name in turn.models:
                unwanted(turn, turn.models[name], reason)
            whole = next((m.name for m in turn.live_dependents(name) if m.state is State.READY), None)
            if whole is not None and name in turn.models:
                want(turn, turn.models[name], Want.RESTORE, f"{whole} is made of it")
        elif model.state is State.FAILED:
            _gone(turn, model, reason)
        elif model.state is State.STANDBY:
            _gone(turn, model, reason, model.want)
    for model in lost:
        unload_parts(turn, model)
    known = turn.runtimes[runtime]
    if known.foreign != tuple(sorted(foreign)):
        turn.runtimes = turn.runtimes.set(runtime, replace(known, foreign=tuple(sorted(foreign))))


HAS_A_FOLDER = "a folder in the repository has its name"

_ADOPTABLE = frozenset({State.COLD, State.QUEUED, State.FAILED, State.STANDBY})


def _booking(turn: Turn, model: Model, shown: ObservedModel) -> Booking:
    memory = tuple(sorted(shown.memory.items()))
    if model.booking:
        return completed(memory, model.booking, model.placed, elastic=model.elastic)
    kind = model.spec.device_kind if model.spec else ""
    usable = [a for a in turn.devices.values() if a.kind == kind and turn.reaches(model.home, a)]
    device = min(((not a.runtime, a.id) for a in usable), default=(True, None))[1]  # its own before a shared one
    found = [a.id for a in usable if bytes_on(memory, a.id)]
    elastic = model.spec is not None and model.spec.elastic
    if device is None or (found and not elastic):
        return memory
    on = tuple(found) or (device,)
    return completed(memory, tuple((d, model.estimate.memory_bytes // len(on)) for d in on), on, elastic=elastic)


def _placed(turn: Turn, model: Model, shown: ObservedModel) -> tuple[str, ...]:
    """The devices of the model's kind among those that it was found on."""
    kind = model.spec.device_kind if model.spec else ""
    booking = _booking(turn, model, shown)
    return tuple(d for d, _ in booking if (account := turn.devices.get(d)) is not None and account.kind == kind)


def _remeasure(turn: Turn, model: Model, shown: ObservedModel) -> None:
    """Memory grows with use: the largest seen is what is booked."""
    if model.op:
        return
    if not shown.memory:
        if not model.booking:
            turn.change(model, booking=_booking(turn, model, shown))
        return
    old = dict(model.measured)
    new = tuple(sorted((d, max(n, old.get(d, 0))) for d, n in shown.memory.items()))
    if new == model.measured:
        return
    estimate = model.estimate
    if not model.stale and model.parked is None and not (model.held and model.held.note):
        estimate = measured(estimate, footprint(new, model.placed), elastic=model.elastic)
    booking = completed(new, model.booking, model.placed, elastic=model.elastic)
    turn.change(model, measured=new, booking=booking, estimate=estimate)
    turn.dirty = turn.dirty or bool(turn.queue)


def _adopt(turn: Turn, model: Model, shown: ObservedModel) -> None:
    if model.visits and model.spec is not None and not model.spec.guest:
        _gone(turn, model, HAS_A_FOLDER, Want.RESTORE)
        return
    if model.state is not State.RECOVERING:
        model = turn.move(model, State.RECOVERING, "found loaded in its runtime")
    model = turn.move(
        model,
        State.READY,
        "adopted: it was loaded already",
        booking=_booking(turn, model, shown),
        placed=model.placed or _placed(turn, model, shown),
        extra=(),
        measured=tuple(sorted(shown.memory.items())),
        promise=(),
        op=0,
        held=model.held or (Held(model.spec) if model.spec is not None else None),
        parked=None,
        coming=None,
        again=Want.NONE,
        loaded_at=turn.now,
        loaded_for=Want.NONE,
        want=Want.NONE,
        failure=None,
        failures=0,
    )
    turn.out.append(OpenRoute(model.name, model.home))
    model = admit(turn, model)
    if turn.asked_gone(model):
        drain(turn, model, "unload asked for")
    elif model.forget and not turn.live_dependents(model.name):
        drain(turn, model, "removed from the repository")
    for name in model.parts:
        part = turn.models.get(name)
        if part is not None and part.state is State.DRAINING:
            _take_back(turn, part, model)


def _adopt_parked(turn: Turn, model: Model, shown: ObservedModel) -> None:
    if model.state is not State.RECOVERING:
        model = turn.move(model, State.RECOVERING, "found asleep in its runtime")
    model = turn.change(model, parked=Parked(shown.parked))
    how, host = parked_as(model), turn.policy.standby_device
    expected = ((host, how.host_bytes),) if how is not None else ()
    model = turn.move(
        model,
        State.STANDBY,
        f"{asleep(model)}; adopted: it slept already",
        booking=tuple(sorted(shown.memory.items())) or expected,
        placed=model.placed or (_placed(turn, model, shown) if shown.memory else ()),
        extra=(),
        measured=tuple(sorted(shown.memory.items())),
        promise=(),
        op=0,
        held=model.held or (Held(model.spec) if model.spec is not None else None),
        coming=None,
        again=Want.NONE,
        failure=None,
        failures=0,
        retry_at=0.0,
    )
    rest(turn, model)


def _take_back(turn: Turn, part: Model, whole: Model) -> None:
    """It was about to go, and what is made of it turned out to be loaded."""
    part = turn.move(
        part, State.READY, f"{whole.name} is loaded and made of it", op=0, extra=(), coming=None,
        again=Want.NONE,
    )  # fmt: skip
    turn.out.append(OpenRoute(part.name, part.home))
    admit(turn, part)


def runtime_stopped(turn: Turn, event: e.RuntimeStopped) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is not None and runtime.epoch == event.epoch and runtime.state is RuntimeState.STOPPING:
        start(turn, turn.move_runtime(runtime, RuntimeState.DOWN, "stopped"), runtime.reason)


def runtime_down(turn: Turn, event: e.RuntimeDown) -> None:
    runtime = turn.runtimes.get(event.name)
    if runtime is None or runtime.epoch != event.epoch or runtime.state not in _ANSWERABLE:
        return
    policy = turn.policy
    crashes = (*(c for c in runtime.crashes if turn.now - c < policy.crash_window_s), turn.now)
    permanent = event.failure.code == "config"
    # one that never came up may still be on its way: a sidecar, a network
    spent = runtime.state is RuntimeState.UP and len(crashes) >= policy.crash_budget and not runtime.external
    reason = event.failure.message
    if permanent:
        retry_at = inf
    elif spent:
        retry_at = turn.now + policy.crash_window_s
        reason = f"{len(crashes)} failures within {policy.crash_window_s:.0f} s; {reason}"
    else:
        retry_at = turn.now + max(0.1, min(policy.retry_s * 2 ** min(len(crashes) - 1, 16) / 5, 60.0))
    if not permanent:
        turn.wake(retry_at)
    runtime = turn.move_runtime(
        runtime, RuntimeState.CRASHED, reason, crashes=crashes, retry_at=retry_at, given_up=permanent or spent,
        recycle="",
    )  # fmt: skip
    failure = Failure("runtime_unavailable", f"{runtime.name} is gone: {event.failure.message}")
    lose_models(turn, runtime.name, failure)


_ANSWERABLE = frozenset({RuntimeState.STARTING, RuntimeState.UP, RuntimeState.STOPPING})


def lose_models(turn: Turn, runtime: str, failure: Failure) -> None:
    given_up = turn.runtimes[runtime].given_up
    lost = [m for n in sorted(turn.live) if (m := turn.models[n]).home == runtime]
    for model in lost:
        if model.state is not State.RECOVERING:
            lose(turn, model, failure)
        elif given_up:
            failed = fail(turn, turn.grant_gone(model), failure)
            onward(turn, failed, Want.NONE, failure.message)
    for model in lost:
        unload_parts(turn, model)


def lose(turn: Turn, model: Model, failure: Failure) -> None:
    """The model went with its runtime; it comes back if it was in use."""
    if model.state is State.FAILED:
        _gone(turn, model, failure.message)
        return
    if model.state is State.STANDBY:
        _gone(turn, model, failure.message, model.want)
        return
    again = model.again
    if model.state is State.READY:
        turn.out.append(CloseRoute(model.name, 0))
        if turn.used_lately(model):
            again = Want.RESTORE
    if model.state is not State.LOADING:
        model = turn.change(model, failures=0, use=Use())
    model = turn.grant_gone(model)
    model = fail(turn, model, failure, runtime_lost=True)
    onward(turn, model, again, failure.message)


def unwanted(turn: Turn, model: Model, reason: str) -> None:
    """What was READY when it was lost, and nobody waits for, may be loaded again.

    One that was being loaded may be what the runtime was lost by: its failures go on counting.
    """
    lost = model.state is State.FAILED and model.blameless and model.held is None and model.failures <= 1
    if lost and model.want is Want.NONE and not model.tickets:
        _gone(turn, model, reason)


def _gone(turn: Turn, model: Model, reason: str, again: Want = Want.NONE) -> None:
    """What was not known, or could not be unloaded, is not there."""
    wanted = again or model.want
    model = turn.move(
        model, State.COLD, reason, **NOTHING_THERE, want=Want.NONE, promise=(), failure=None, failures=0, retry_at=0.0
    )
    model = turn.grant_gone(model)
    onward(turn, model, wanted if wanted in (Want.DROPPED, Want.RESTORE) else Want.NONE, reason)
