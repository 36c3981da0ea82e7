"""What the folders say: drops, and models that come, change and go."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from modelium.core import events as e
from modelium.core.instructions import Unload
from modelium.core.schedule import drain, want
from modelium.core.states import State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Model

_ACCEPTABLE = frozenset({State.COLD, State.FAILED, State.INVALID, State.QUEUED})


def drop_seen(turn: Turn, event: e.DropSeen) -> None:
    model = turn.models.get(event.name)
    if model is None:
        turn.born(Model(event.name, State.DISCOVERED, event.at, event.reason))
    elif model.state is State.INVALID:
        turn.move(model, State.DISCOVERED, event.reason, failure=None)
    elif model.reason != event.reason:
        turn.change(model, reason=event.reason)


def drop_refused(turn: Turn, event: e.DropRefused) -> None:
    model = turn.models.get(event.name)
    if model is not None and event.kept_as != event.name:
        turn.forget(model, f"refused; kept as {event.kept_as}: {event.failure.message}")
        model = None
    old = turn.models.get(event.kept_as)
    if old is None:
        turn.born(Model(event.kept_as, State.INVALID, event.at, event.failure.message, failure=event.failure))
    elif old.state is State.DISCOVERED:
        turn.move(old, State.INVALID, event.failure.message, failure=event.failure)
    else:
        turn.change(old, reason=event.failure.message, failure=event.failure)


def drop_gone(turn: Turn, event: e.DropGone) -> None:
    model = turn.models.get(event.name)
    if model is not None and model.spec is None:
        turn.forget(model, "no longer there")


def model_accepted(turn: Turn, event: e.ModelAccepted) -> None:
    always = any(fnmatchcase(event.name, pattern) for pattern in turn.policy.always_loaded)
    model = turn.models.get(event.name)
    if model is None:
        model = turn.born(
            Model(
                event.name,
                State.RECOVERING if event.was_loaded else State.COLD,
                event.at,
                event.reason,
                spec=event.spec,
                estimate=event.estimate,
                pinned=event.pinned,
                always_loaded=always,
                loaded_revision=event.loaded_revision if event.was_loaded else None,
            )
        )
        turn.dirty = turn.dirty or bool(turn.queue)
    else:
        model = _changed(turn, model, event, always)
    if event.dropped:
        want(turn, model, Want.DROPPED, "just dropped in")
    elif model.pinned or model.always_loaded:
        keep_resident(turn, model)


def _changed(turn: Turn, model: Model, event: e.ModelAccepted, always: bool) -> Model:
    """The files of a known model are others now, or the same."""
    if model.spec == event.spec and model.state is not State.INVALID and not model.forget:
        return turn.change(model, always_loaded=always)
    moved = model.spec is not None and model.spec.runtime != event.spec.runtime
    model = turn.respec(model, spec=event.spec, estimate=event.estimate, always_loaded=always, forget=False, failures=0)
    if model.state is State.INVALID:
        return turn.move(model, State.COLD, event.reason, failure=None)
    if model.state is State.FAILED and not model.booking:
        state = turn.move(model, State.COLD, "its files changed", failure=None, retry_at=0.0)
        if model.want is not Want.NONE or turn.waiting(state):
            return turn.move(state, State.QUEUED, "its files changed")
        return state
    if model.state is State.READY and moved:
        return drain(turn, model, "its plan changed", again=Want.RESTORE)
    turn.dirty = True
    return model


def keep_resident(turn: Turn, model: Model) -> None:
    what = "always loaded by configuration" if model.always_loaded else "pinned"
    if model.state in (State.COLD, State.QUEUED, State.FAILED, State.DRAINING, State.UNLOADING):
        want(turn, model, Want.RESIDENT, what)


def model_invalid(turn: Turn, event: e.ModelInvalid) -> None:
    model = turn.models.get(event.name)
    message = event.failure.message
    if model is None:
        turn.born(Model(event.name, State.INVALID, event.at, message, failure=event.failure))
    elif model.state in _ACCEPTABLE or (model.state is State.RECOVERING and not model.booking):
        if model.state is State.INVALID:
            turn.change(model, reason=message, failure=event.failure)
            return
        turn.refuse_all(model, event.failure)
        model = turn.models[model.name]
        turn.move(model, State.INVALID, message, failure=event.failure, want=Want.NONE, promise=())
    else:
        turn.change(model, reason=f"its files are no longer usable, the loaded ones still serve: {message}")


def model_removed(turn: Turn, event: e.ModelRemoved) -> None:
    model = turn.models.get(event.name)
    if model is None:
        return
    gone = Failure("model_not_found", f"{event.name} was removed from the repository")
    model = turn.refuse_all(replace_gone(turn, model), gone)
    match model.state:
        case State.READY:
            drain(turn, turn.change(model, forget=True), "removed from the repository")
        case State.DRAINING | State.UNLOADING:
            turn.change(model, forget=True, again=Want.NONE)
        case State.LOADING:
            give_up_load(turn, turn.change(model, forget=True), "removed from the repository")
        case _:
            turn.forget(model, "removed from the repository")


def replace_gone(turn: Turn, model: Model) -> Model:
    """Those who wait for it to be unloaded go on waiting while it is loaded; the record keeps their tickets."""
    return turn.put(replace(model, want=Want.NONE, promise=(), pinned=False))


def give_up_load(turn: Turn, model: Model, reason: str) -> Model:
    """Cancel a load that is under way; what it left is unloaded."""
    op = turn.new_id()
    model = turn.move(model, State.UNLOADING, reason, op=op, op_since=turn.now, want=Want.NONE)
    turn.out.append(Unload(model.name, op, model.runtime))
    return model
