"""How loads and unloads end."""

from __future__ import annotations

from dataclasses import replace

from modelium.core import events as e
from modelium.core.instructions import OpenRoute
from modelium.core.moves import DRAINED, admit, end_unload, fail, recycle, retire, unload_parts
from modelium.core.parking import not_woken
from modelium.core.standby import learnt, parked_as
from modelium.core.states import State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Booking, Estimate, Failure, Held, Model, Use


def loaded(turn: Turn, event: e.Loaded) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op:
        return
    if model.state is State.READY and model.coming is not None:
        _replaced(turn, model, model.coming, event)
    elif model.state is State.LOADING:
        asleep = model.parked
        model = turn.move(
            model,
            State.READY,
            _told(f"{'loaded' if asleep is None else 'woken'} in {event.load_s:.2f} s", event),
            op=0,
            booking=completed(
                event.memory, model.booking if asleep is None else asleep.before, model.placed, elastic=model.elastic
            ),
            measured=event.memory,
            estimate=_learnt(model, model.held, model.placed, event),
            parked=None,
            held=_noted(model.held, event),
            loaded_at=turn.now,
            loaded_for=model.want,
            want=Want.NONE,
            failure=None,
            failures=0,
            late=0,
            use=Use(),
        )
        turn.out.append(OpenRoute(model.name, model.home))
        admit(turn, model)


def _replaced(turn: Turn, model: Model, coming: Held, event: e.Loaded) -> None:
    """The new revision serves; the old one's memory is free. The route is opened anew, for what changed about it."""
    before = model
    placed = tuple(device for device, _ in model.extra) or model.placed
    model = turn.change(
        model,
        op=0,
        extra=(),
        booking=completed(event.memory, model.extra or model.booking, placed, elastic=coming.spec.elastic),
        placed=placed,
        measured=event.memory,
        estimate=_learnt(model, coming, placed, event),
        held=_noted(coming, event),
        coming=None,
        loaded_at=turn.now,
        reason=_told("its new files are loaded", event),
    )
    turn.tell(model.name, State.READY, State.READY, "reloaded: its files changed")
    turn.out.append(OpenRoute(model.name, model.home))
    admit(turn, model)
    unload_parts(turn, before)
    turn.dirty = True


def _told(what: str, event: e.Loaded) -> str:
    return f"{what}, {event.note}" if event.note else what


def _noted(held: Held | None, event: e.Loaded) -> Held | None:
    return replace(held, note=event.note) if held is not None and event.note else held


def _learnt(model: Model, held: Held | None, placed: tuple[str, ...], event: e.Loaded) -> Estimate:
    """What the next load is expected to take, unless what was loaded is out of date by now, or is not as planned."""
    if held is None or held.spec != model.spec or event.note:
        return model.estimate
    estimate = model.estimate
    if model.parked is None:
        estimate = replace(estimate, load_s=event.load_s, slowest_s=max(estimate.slowest_s, event.load_s))
    elif (how := parked_as(model)) is not None:
        estimate = learnt(estimate, replace(how, wake_s=event.load_s))
    return measured(estimate, footprint(event.memory, placed), elastic=held.spec.elastic)


def measured(estimate: Estimate, taken: int, *, elastic: bool = False) -> Estimate:
    """What was seen last is what the next load is expected to take; the most that was ever seen is remembered.

    Nothing is learnt where nothing was seen, or less than what is elastic may take.
    """
    if not taken or (elastic and taken <= estimate.memory_bytes):
        return estimate
    most = estimate.memory_bytes + estimate.spread_bytes if estimate.measured else 0
    return replace(estimate, memory_bytes=taken, measured=True, spread_bytes=max(0, most - taken))


def footprint(memory: Booking, placed: tuple[str, ...]) -> int:
    """What a model takes on the devices that it was placed on, and in all where it was placed on none; 0 where its
    processes could not be told apart there.

    Where they are unequal, the fullest one counts for all, since each is to have room for an equal part.
    """
    if not placed:
        return sum(n for _, n in memory)
    return max(bytes_on(memory, device) for device in placed) * len(placed)


def completed(memory: Booking, booked: Booking, placed: tuple[str, ...], *, elastic: bool = False) -> Booking:
    """What a model holds: as measured, and as booked on those of its devices where nothing was measured; where it is
    elastic, at least as booked on all of them.

    A GPU's driver does not tell processes apart in a container that hides the host's pids, for one.
    """
    if not memory:
        return booked
    held = dict(memory)
    for device, size in booked:
        if device in placed and (elastic or not held.get(device)):
            held[device] = max(size, held.get(device, 0))
    return tuple(sorted(held.items()))


def load_failed(turn: Turn, event: e.LoadFailed) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op:
        return
    if event.recycle:
        recycle(turn, model.home, event.failure.message)
    if model.state is State.READY:
        keep_old(turn, model, event.failure, blameless=event.runtime_lost)
    elif model.state is State.LOADING and model.parked is not None and not event.runtime_lost:
        not_woken(turn, model, event.failure)
    elif model.state is State.LOADING:
        fail(turn, model, event.failure, runtime_lost=event.runtime_lost)
        unload_parts(turn, model)


def keep_old(turn: Turn, model: Model, failure: Failure, *, blameless: bool = False) -> None:
    """What was to replace a model did not load, and what serves goes on, as it was asked for before."""
    held, coming = model.held, model.coming
    new_files = held is not None and coming is not None and coming.spec != held.spec
    what = "new files do" if new_files else "new parameters do"
    reason = f"its {what} not load, the old ones still serve: {failure.message}"
    model = turn.change(
        model,
        op=0,
        extra=(),
        coming=None,
        rejected=coming.spec if coming is not None and not blameless else model.rejected,
        retry_at=turn.now + turn.policy.retry_s,
        parameters=held.parameters if held is not None else {},
        reason=reason,
    )
    turn.tell(model.name, State.READY, State.READY, reason)
    turn.refuse_waiting(model, failure)
    turn.wake(model.retry_at)
    turn.dirty = True


def drained(turn: Turn, event: e.Drained) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op or model.state is not State.DRAINING:
        return
    if turn.live_dependents(model.name):
        turn.change(model, op=0, reason="waits for those that are made of it")
        return
    retire(turn, model, f"{DRAINED}{model.reason}")


def unloaded(turn: Turn, event: e.Unloaded) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op or model.state is not State.UNLOADING:
        return
    _note_unload(turn, model, event.residue)
    end_unload(turn, model)


def _note_unload(turn: Turn, model: Model, residue: Booking) -> None:
    runtime = turn.runtimes.get(model.home)
    if runtime is None:
        return
    took_s = 0.0 if model.given_up else turn.now - model.op_since
    if residue or took_s > runtime.slowest_unload_s:
        kept = dict(runtime.residue)
        for device, size in residue:
            kept[device] = kept.get(device, 0) + size
        noted = replace(
            runtime, residue=tuple(sorted(kept.items())), slowest_unload_s=max(took_s, runtime.slowest_unload_s)
        )
        turn.runtimes = turn.runtimes.set(runtime.name, noted)


def unload_failed(turn: Turn, event: e.UnloadFailed) -> None:
    model = turn.models.get(event.name)
    if model is not None and model.op == event.op and model.state is State.UNLOADING:
        stuck(turn, model, event.failure)
        if event.recycle:
            recycle(turn, model.home, event.failure.message)


def stuck(turn: Turn, model: Model, failure: Failure) -> None:
    """It stays on the books until its runtime shows that it is gone."""
    model = turn.refuse_all(model, failure)
    turn.move(
        model,
        State.FAILED,
        f"could not be unloaded: {failure.message}",
        op=0,
        failure=failure,
        again=Want.NONE,
        want=Want.NONE,
    )
