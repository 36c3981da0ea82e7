"""What the folders say: drops, and models that come, change and go."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from modelium.core import events as e
from modelium.core.moves import drain, drop_outdated, give_up_load, invalidate, keep_resident, want
from modelium.core.states import State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Held, Model


def drop_seen(turn: Turn, event: e.DropSeen) -> None:
    model = turn.models.get(event.name)
    if model is None:
        turn.born(Model(event.name, State.DISCOVERED, event.at, event.reason))
    elif model.spec is not None:
        return
    elif model.state is State.INVALID:
        turn.move(model, State.DISCOVERED, event.reason, failure=None)
    elif model.reason != event.reason:
        turn.change(model, reason=event.reason)


def drop_refused(turn: Turn, event: e.DropRefused) -> None:
    model = turn.models.get(event.name)
    if model is not None and model.spec is None and event.kept_as != event.name:
        turn.forget(model, f"refused; kept as {event.kept_as}: {event.failure.message}")
    old = turn.models.get(event.kept_as)
    if old is None:
        turn.born(Model(event.kept_as, State.INVALID, event.at, event.failure.message, failure=event.failure))
    elif old.state is State.DISCOVERED:
        turn.move(old, State.INVALID, event.failure.message, failure=event.failure)
    elif old.state is State.INVALID:
        turn.change(old, reason=event.failure.message, failure=event.failure)


def drop_gone(turn: Turn, event: e.DropGone) -> None:
    model = turn.models.get(event.name)
    if model is not None and model.spec is None:
        turn.forget(model, event.reason)


def model_accepted(turn: Turn, event: e.ModelAccepted) -> None:
    always = any(fnmatchcase(event.name, pattern) for pattern in turn.policy.always_loaded)
    model = turn.models.get(event.name)
    before = model.state if model is not None else None
    if model is None:
        held = Held(replace(event.spec, revision=event.loaded_revision or event.spec.revision))
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
                held=held if event.was_loaded else None,
            )
        )
        turn.dirty = turn.dirty or bool(turn.queue)
    else:
        model = _changed(turn, model, event, always)
    if event.dropped:
        model = want(turn, model, Want.DROPPED, "just dropped in")
    if model.kept:
        keep_resident(turn, model)
    if before in (None, State.INVALID):
        _part_is_there(turn, event)


def _part_is_there(turn: Turn, event: e.ModelAccepted) -> None:
    """What is made of it may have failed for want of it; what was dropped with it is loaded with it."""
    for name in turn.dependents.get(event.name, ()):
        whole = turn.models.get(name)
        if whole is None or whole.state is not State.FAILED or whole.held is not None:
            continue
        if whole.failure is None or whole.failure.code != "part_missing":
            continue
        reason = f"{event.name}, which it is made of, is there now"
        whole = turn.move(whole, State.COLD, reason, failure=None, failures=0, retry_at=0.0)
        if event.dropped or whole.want is not Want.NONE or turn.waiting(whole):
            want(turn, whole, Want.DROPPED, reason)


def _changed(turn: Turn, model: Model, event: e.ModelAccepted, always: bool) -> Model:
    """The files of a known model are others now, or the same."""
    if model.spec == event.spec and model.state is not State.INVALID and not model.forget and model.invalid is None:
        return turn.change(model, always_loaded=always)
    state = model.state
    model = turn.change(
        model,
        spec=event.spec,
        estimate=event.estimate,
        always_loaded=always,
        pinned=event.pinned if model.forget else model.pinned,
        forget=False,
        invalid=None,
        failures=0,
        retry_at=0.0,
    )
    turn.dirty = True
    if state in (State.INVALID, State.DISCOVERED):
        return turn.move(model, State.COLD, event.reason, failure=None)
    model = drop_outdated(turn, model)
    if state is State.FAILED and model.held is None:
        wanted = model.want is not Want.NONE or bool(turn.waiting(model))
        model = turn.move(model, State.COLD, "its files changed", failure=None, retry_at=0.0)
        if wanted:
            model = turn.move(model, State.QUEUED, "its files changed")
    return model


def model_invalid(turn: Turn, event: e.ModelInvalid) -> None:
    """What is not loaded can't be any more; what is goes on until it is unloaded."""
    model = turn.models.get(event.name)
    message = event.failure.message
    if model is None:
        turn.born(Model(event.name, State.INVALID, event.at, message, failure=event.failure))
        turn.dirty = turn.dirty or bool(turn.queue)
    elif model.state in (State.INVALID, State.DISCOVERED):
        turn.change(model, reason=message, failure=event.failure)
    elif model.forget:
        return
    elif model.held is None:
        invalidate(turn, model, event.failure)
    elif model.state in _NOT_SERVING:
        model = turn.refuse_waiting(turn.change(model, invalid=event.failure), event.failure)
        give_up_load(turn, model, message)
    else:
        reason = f"its files are no longer usable, the loaded ones still serve: {message}"
        turn.change(model, invalid=event.failure, reason=reason)


_NOT_SERVING = frozenset({State.LOADING, State.PARKING, State.STANDBY})
"""Nothing is lost by unloading it at once."""


def model_removed(turn: Turn, event: e.ModelRemoved) -> None:
    model = turn.models.get(event.name)
    if model is None:
        return
    unknown = model.state is State.RECOVERING and model.home not in turn.runtimes
    if model.held is None or unknown:
        turn.forget(model, "removed from the repository")
        return
    gone = Failure("model_not_found", f"{event.name} was removed from the repository")
    model = turn.refuse_waiting(model, gone)
    model = turn.change(model, forget=True, pinned=False, always_loaded=False, again=Want.NONE, want=Want.NONE)
    if model.state in _NOT_SERVING:
        give_up_load(turn, model, "removed from the repository")
    elif model.state is State.READY:
        needed = [m.name for m in turn.live_dependents(model.name)]
        if needed:
            turn.change(model, reason=f"removed from the repository, and still part of {', '.join(needed)}")
        else:
            drain(turn, model, "removed from the repository")
