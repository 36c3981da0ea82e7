"""The moves in a model's life that more than one part of the core makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelium.core.instructions import CloseRoute, OpenRoute, Park, Unload
from modelium.core.standby import Berth, berth
from modelium.core.states import BASE_PRIORITY, URGENT, RuntimeState, State, Want
from modelium.core.turn import Turn, added, bytes_on
from modelium.core.world import Failure, Model, Parked, Use

DRAINED = "nothing in flight; "
"""How the reason begins for which a drained model goes."""

PATIENCE = 3
"""So many losses of its runtime in a row a waiting model sits out; then it is failed itself."""


def want(turn: Turn, model: Model, why: Want, reason: str) -> Model:
    """Note that a model should be loaded, and queue it if it is not on its way.

    One that is on its way out is only noted for reasons of its own: those who wait for it have tickets, what is made
    of it asks again, and what is to be kept is seen to when it is gone.
    """
    if model.forget or model.state in _SETTLED:
        return model
    if model.state in _LEAVING:
        if why in (Want.DROPPED, Want.RESTORE) and model.again is Want.NONE:
            model = turn.change(model, again=why)
        return model
    if BASE_PRIORITY[why] > BASE_PRIORITY[model.want]:
        anew = model.want is Want.NONE or (why in URGENT and model.want not in URGENT)
        model = turn.change(model, want=why, wanted_since=turn.now if anew else model.wanted_since)
        turn.dirty = True
    if model.state is State.COLD:
        model = turn.move(model, State.QUEUED, reason)
    return model


_SETTLED = frozenset({State.DISCOVERED, State.INVALID, State.READY})
_LEAVING = frozenset({State.DRAINING, State.PARKING, State.UNLOADING})


def keep_resident(turn: Turn, model: Model) -> Model:
    """See that a model that should be loaded at all times is on its way."""
    reopen(turn, model)
    what = "pinned" if model.pinned else "always loaded by configuration"
    if model.spec is not None and model.spec.guest:
        what = f"{model.runtime} has it of its own accord"
    return want(turn, turn.models[model.name], Want.RESIDENT, what)


def onward(turn: Turn, model: Model, again: Want, reason: str) -> None:
    """What becomes of a COLD or FAILED model that holds nothing any more."""
    if model.forget:
        turn.forget(model, "removed from the repository")
        return
    if model.invalid is not None:
        invalidate(turn, model, model.invalid)
        return
    if model.kept:
        model = keep_resident(turn, model)
    if turn.waiting(model):
        model = want(turn, model, Want.REQUEST, "asked for")
    if again is not Want.NONE:
        want(turn, model, again, reason)


def invalidate(turn: Turn, model: Model, failure: Failure) -> None:
    """Its files are not usable."""
    model = turn.grant_gone(model)
    model = turn.refuse_all(model, failure)
    turn.move(model, State.INVALID, failure.message, failure=failure, invalid=None, want=Want.NONE, promise=())


def drain(turn: Turn, model: Model, reason: str, *, again: Want = Want.NONE) -> Model:
    """Take a READY model out of use; it is unloaded once nothing of it runs.

    What loads beside it to replace it stays booked: only the unload gives that load up.
    """
    op = turn.new_id()
    model = turn.move(model, State.DRAINING, reason, op=op, op_since=turn.now, again=again, want=Want.NONE)
    turn.wake(turn.now + turn.policy.drain_timeout_s)
    turn.out.append(CloseRoute(model.name, op))
    return model


def evict(turn: Turn, model: Model, reason: str) -> None:
    """Have a loaded model make room: one that serves is drained first."""
    if model.state is State.STANDBY:
        begin_unload(turn, model, reason)
    else:
        drain(turn, model, reason)


def begin_unload(turn: Turn, model: Model, reason: str, *, again: Want = Want.NONE) -> Model:
    """Unload what is drained, parked, or not loaded yet; what is parked and wanted comes back.

    A runtime keeps what it has of its own accord: that is let go of.
    """
    op, dirty = turn.new_id(), turn.dirty
    drained = model.state is State.DRAINING
    if model.state is State.STANDBY and again is Want.NONE:
        again = model.want
    model = turn.move(
        model,
        State.UNLOADING,
        reason,
        op=op,
        op_since=turn.now,
        booking=added(model.booking, model.extra) if model.state is State.PARKING else model.booking,
        extra=() if model.state is State.PARKING else model.extra,
        promise=(),
        parked=None,
        given_up=model.state is State.LOADING,
        again=again if again in _OF_ITS_OWN else model.again,
        want=Want.NONE,
    )
    if drained:
        turn.dirty = dirty  # its room was on its way back already
    if model.visits:
        end_unload(turn, model)
        return turn.models.get(model.name, model)
    turn.wake(turn.now + turn.policy.unload_timeout_s)
    turn.out.append(Unload(model.name, op, model.home))
    return model


NOTHING_THERE: Mapping[str, Any] = {
    "booking": (), "extra": (), "measured": (), "placed": (), "held": None, "parked": None, "coming": None,
}  # fmt: skip
"""What is known of a model that no runtime has any more."""


def end_unload(turn: Turn, model: Model) -> None:
    """Its runtime has it no more, or what it has is no longer taken for this model."""
    again, whole = model.again, model
    reason = model.reason.removeprefix(DRAINED)
    if model.failure is not None:
        model = turn.grant_gone(model)
        model = fail(turn, model, model.failure or Failure("driver", reason))
    else:
        model = turn.move(
            model,
            State.COLD,
            reason,
            op=0,
            **NOTHING_THERE,
            again=Want.NONE,
            use=Use(),
        )
        model = turn.grant_gone(model)
    onward(turn, model, again, reason)
    unload_parts(turn, whole)


_OF_ITS_OWN = frozenset({Want.DROPPED, Want.RESTORE})
"""Reasons that are noted of a model that goes: others are told by tickets, by what is made of it, by configuration."""


def retire(turn: Turn, model: Model, reason: str) -> Model:
    """Unload a model that is drained, or park it where that is worth its memory."""
    found = berth(turn, model)
    if found is None:
        return begin_unload(turn, model, reason)
    for sleeper in found.instead_of:
        begin_unload(turn, sleeper, f"{model.name} is parked instead: it saves more time for the memory")
    return _begin_park(turn, model, found, reason)


def _begin_park(turn: Turn, model: Model, found: Berth, reason: str) -> Model:
    op, dirty = turn.new_id(), turn.dirty
    level = found.how.level
    goes = tuple((d, left) for d, n in model.booking if (left := n - bytes_on(found.holds, d)) > 0)
    model = turn.move(
        model,
        State.PARKING,
        reason,
        op=op,
        op_since=turn.now,
        parked=Parked(level, model.booking),
        booking=found.holds,
        extra=goes,
        measured=(),
    )
    turn.dirty = dirty  # its room was on its way back already
    turn.wake(turn.now + turn.policy.unload_timeout_s)
    turn.out.append(Park(model.name, op, model.home, level))
    return model


def drop_outdated(turn: Turn, model: Model) -> Model:
    """What sleeps is of no use once it should be something else."""
    if model.state in (State.PARKING, State.STANDBY) and model.stale:
        return begin_unload(turn, model, "it should be another than the one that was parked")
    return model


def give_up_load(turn: Turn, model: Model, reason: str, failure: Failure | None = None) -> Model:
    """Cancel a load that is under way; what it left is unloaded. With a failure, it is FAILED after that."""
    return begin_unload(turn, turn.change(model, failure=failure), reason)


def unload_parts(turn: Turn, whole: Model) -> None:
    """Go on with parts that had to wait until what is made of them was gone."""
    for name in whole.parts:
        part = turn.models.get(name)
        if part is None or turn.live_dependents(name):
            continue
        if part.state is State.DRAINING and not part.op:
            retire(turn, part, part.reason)
        elif part.state is State.READY and part.forget:
            drain(turn, part, "removed from the repository")


def may_reopen(turn: Turn, model: Model) -> bool:
    """Whether a model is DRAINING for nothing but room, and its room is nobody's yet."""
    if (
        model.state is not State.DRAINING
        or model.again is not Want.NONE
        or model.forget
        or model.coming is not None
        or turn.asked_gone(model)
    ):
        return False
    runtime = turn.runtimes.get(model.home)
    if runtime is not None and runtime.recycle:
        return False
    for name in model.parts:
        part = turn.models.get(name)
        if part is None or part.state is not State.READY:
            return False
    for device, size in model.booking:
        account = turn.devices.get(device)
        if (
            size
            and account is not None
            and size > account.limit_bytes - (account.booked_bytes - account.reclaiming_bytes + account.promised_bytes)
        ):
            return False
    return True


def reopen(turn: Turn, model: Model) -> bool:
    """Put a draining model back in use, if it may be."""
    if not may_reopen(turn, model):
        return False
    model = turn.move(model, State.READY, "wanted again before it was unloaded", op=0)
    turn.out.append(OpenRoute(model.name, model.home))
    admit(turn, model)
    return True


def admit(turn: Turn, model: Model) -> Model:
    """Grant all whom a READY model serves as it is, and count their requests as in flight from this moment."""
    as_asked = model.held is not None and model.held.parameters == model.parameters
    served = [t for t in turn.waiting(model) if as_asked or not t.particular]
    if not served:
        return model
    model = turn.grant_all(model, served)
    requests = sum(not t.person for t in served)
    use = Use(model.use.in_flight + requests, model.use.requests + len(served), turn.now, model.use.qps)
    return turn.change(model, use=use)


def fail(turn: Turn, model: Model, failure: Failure, *, runtime_lost: bool = False) -> Model:
    """End a model's wait or load with a reason.

    When the runtime is at fault, those who wait go on waiting; when the model is, they are answered, and it is
    retried later and later, only for somebody who asks.
    """
    policy = turn.policy
    failures = model.failures + 1
    retry_s = max(0.1, min(policy.retry_s * 2 ** min(failures - 1, 16), policy.retry_max_s))
    give_up = not runtime_lost or failures > PATIENCE
    keep = Want.RESIDENT if model.kept else Want.NONE if give_up else model.want
    model = turn.move(
        model,
        State.FAILED,
        failure.message,
        failure=failure,
        failures=failures,
        retry_at=turn.now + (retry_s if give_up else min(1.0, retry_s)),
        op=0,
        **NOTHING_THERE,
        promise=(),
        again=Want.NONE,
        want=keep,
        wanted_since=model.wanted_since if model.want is not Want.NONE else turn.now,
    )
    if give_up:
        model = turn.refuse_all(model, failure, model.retry_at - turn.now)
    turn.wake(model.retry_at)
    return model


def recycle(turn: Turn, name: str, reason: str) -> None:
    """Have a runtime started anew, unless it is somebody else's."""
    runtime = turn.runtimes.get(name)
    if runtime is None or runtime.state is not RuntimeState.UP or runtime.external or runtime.recycle:
        return
    turn.move_runtime(runtime, RuntimeState.UP, f"to be started anew: {reason}", recycle=reason)
