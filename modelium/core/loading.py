"""How loads and unloads end."""

from __future__ import annotations

from modelium.core import events as e
from modelium.core.disk import keep_resident
from modelium.core.instructions import OpenRoute, Unload
from modelium.core.schedule import admit, fail, want
from modelium.core.states import State, Want
from modelium.core.turn import Turn
from modelium.core.world import Booking, Estimate, Model


def loaded(turn: Turn, event: e.Loaded) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op:
        return
    estimate = Estimate(sum(n for _, n in event.memory) or model.estimate.memory_bytes, event.load_s, True)
    if not event.memory:
        estimate = Estimate(model.estimate.memory_bytes, event.load_s, model.estimate.measured)
    if model.state is State.READY:
        _replaced(turn, model, event.memory, estimate)
        return
    if model.state is not State.LOADING:
        return
    took = f"loaded in {event.load_s:.1f} s"
    model = turn.move(
        model,
        State.READY,
        took,
        op=0,
        booking=event.memory or model.booking,
        measured=event.memory,
        estimate=estimate,
        loaded_at=turn.now,
        want=Want.NONE,
        failure=None,
        failures=0,
        use=type(model.use)(),
    )
    turn.out.append(OpenRoute(model.name, model.runtime))
    admit(turn, model)


def _replaced(turn: Turn, model: Model, memory: Booking, estimate: Estimate) -> None:
    """The new revision serves; the old one's memory is free."""
    booking = memory or model.extra or model.booking
    revision = model.spec.revision if model.spec else None
    model = turn.change(
        model, op=0, extra=(), booking=booking, measured=memory, estimate=estimate, loaded_revision=revision,
        loaded_at=turn.now, reason="its new files are loaded",
    )  # fmt: skip
    turn.tell(model.name, State.READY, State.READY, "reloaded: its files changed")
    turn.out.append(OpenRoute(model.name, model.runtime))
    admit(turn, model)
    turn.dirty = True


def load_failed(turn: Turn, event: e.LoadFailed) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op:
        return
    if model.state is State.READY:
        reason = f"its new files do not load, the old ones still serve: {event.failure.message}"
        revision = model.spec.revision if model.spec else None
        model = turn.change(model, op=0, extra=(), rejected_revision=revision, reason=reason)
        turn.tell(model.name, State.READY, State.READY, reason)
        turn.refuse_all(model, event.failure)
        turn.dirty = True
    elif model.state is State.LOADING:
        fail(turn, model, event.failure, runtime_lost=event.runtime_lost)


def drained(turn: Turn, event: e.Drained) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op or model.state is not State.DRAINING:
        return
    if turn.live_dependents(model.name):
        turn.change(model, op=0, reason="waits for those that are made of it")
        return
    begin_unload(turn, model, f"nothing in flight; {model.reason}")


def begin_unload(turn: Turn, model: Model, reason: str) -> None:
    op = turn.new_id()
    model = turn.move(model, State.UNLOADING, reason, op=op, op_since=turn.now)
    turn.out.append(Unload(model.name, op, model.runtime))


def unloaded(turn: Turn, event: e.Unloaded) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op or model.state is not State.UNLOADING:
        return
    again = model.again
    reason = model.reason.removeprefix("nothing in flight; ")
    model = turn.move(
        model, State.COLD, reason, op=0, booking=(), measured=(), promised_to=None, again=Want.NONE,
        loaded_revision=None, use=type(model.use)(),
    )  # fmt: skip
    model = turn.grant_all(model, gone=True)
    unload_parts(turn, model)
    if model.forget:
        turn.forget(model, reason)
    elif model.pinned or model.always_loaded:
        keep_resident(turn, model)
    elif turn.waiting(model):
        want(turn, model, Want.REQUEST, "asked for while it was unloaded")
    elif again is not Want.NONE:
        want(turn, model, again, reason)


def unload_parts(turn: Turn, whole: Model) -> None:
    """Go on with parts that drained before what is made of them was gone."""
    for name in whole.spec.depends_on if whole.spec else ():
        part = turn.models.get(name)
        if part is not None and part.state is State.DRAINING and not part.op and not turn.live_dependents(name):
            begin_unload(turn, part, part.reason)


def unload_failed(turn: Turn, event: e.UnloadFailed) -> None:
    """It stays on the books until its runtime shows that it is gone."""
    model = turn.models.get(event.name)
    if model is None or model.op != event.op or model.state is not State.UNLOADING:
        return
    model = turn.refuse_all(model, event.failure)
    turn.move(
        model, State.FAILED, f"could not be unloaded: {event.failure.message}", op=0, failure=event.failure,
        promised_to=None, again=Want.NONE, want=Want.NONE,
    )  # fmt: skip
