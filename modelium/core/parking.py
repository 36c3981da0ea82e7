"""How parking ends, and what becomes of a model that is parked."""

from __future__ import annotations

from dataclasses import replace

from modelium.core import events as e
from modelium.core.moves import DRAINED, begin_unload, drop_outdated, keep_resident, want
from modelium.core.standby import asleep, learnt, parked_as
from modelium.core.states import State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Failure, Model


def parked(turn: Turn, event: e.Parked) -> None:
    model = turn.models.get(event.name)
    if model is None or model.op != event.op or model.state is not State.PARKING:
        return
    estimate, how = model.estimate, parked_as(model)
    if how is not None and event.memory:
        host = bytes_on(event.memory, turn.policy.standby_device)
        how = replace(how, host_bytes=host, device_bytes=sum(n for _, n in event.memory) - host)
        estimate = learnt(estimate, how)
    again = model.again
    model = turn.move(
        model,
        State.STANDBY,
        f"{asleep(model)}; {model.reason.removeprefix(DRAINED)}",
        op=0,
        booking=event.memory or model.booking,
        measured=event.memory,
        extra=(),
        estimate=estimate,
        again=Want.NONE,
    )
    rest(turn, model, again)


def rest(turn: Turn, model: Model, again: Want = Want.NONE) -> None:
    """What comes next for a model that is STANDBY: it may be wanted by now, or of no use."""
    if turn.asked_gone(model):
        begin_unload(turn, turn.change(model, want=Want.NONE), "unload asked for")
    elif model.forget:
        begin_unload(turn, model, "removed from the repository")
    elif model.invalid is not None:
        begin_unload(turn, model, model.invalid.message)
    elif model.stale:
        drop_outdated(turn, model)
    else:
        if model.kept:
            model = keep_resident(turn, model)
        if turn.waiting(model):
            model = want(turn, model, Want.REQUEST, "asked for")
        if again is not Want.NONE:
            want(turn, model, again, model.reason)


def let_be(turn: Turn, model: Model, reason: str) -> None:
    """Nobody wants it any more: it sleeps on."""
    turn.change(model, want=Want.NONE, promise=(), reason=f"{asleep(model)}; {reason}")


def park_failed(turn: Turn, event: e.ParkFailed) -> None:
    model = turn.models.get(event.name)
    if model is not None and model.op == event.op and model.state is State.PARKING:
        not_parked(turn, model, event.failure)


def not_parked(turn: Turn, model: Model, failure: Failure) -> None:
    begin_unload(turn, _no_more(turn, model), f"could not be parked: {failure.message}")


def not_woken(turn: Turn, model: Model, failure: Failure, *, late: bool = False) -> None:
    """It is loaded anew, while those who wait go on waiting. One that only was `late` may sleep so again."""
    model = model if late else _no_more(turn, model)
    begin_unload(turn, model, f"did not wake, and is loaded anew: {failure.message}", again=model.want)


def _no_more(turn: Turn, model: Model) -> Model:
    """A level at which it went wrong is not tried again."""
    level = model.parked.level if model.parked is not None else 0
    left = tuple(s for s in model.estimate.standby if s.level != level)
    return turn.change(model, estimate=replace(model.estimate, standby=left))
