"""What time, use and the devices bring: deadlines, idleness, pressure."""

from __future__ import annotations

from modelium.core import events as e
from modelium.core.demand import expired
from modelium.core.disk import give_up_load
from modelium.core.eviction import Tier, choose, group_of
from modelium.core.loading import begin_unload
from modelium.core.placement import human
from modelium.core.runtimes import start
from modelium.core.schedule import drain
from modelium.core.states import RuntimeState, State
from modelium.core.turn import Turn
from modelium.core.world import Account, Failure, Model


def use_observed(turn: Turn, event: e.UseObserved) -> None:
    for name, use in event.use:
        model = turn.models.get(name)
        if model is not None and model.use != use:
            if turn.queue and model.use.in_flight and not use.in_flight:
                turn.dirty = True
            turn.change(model, use=use)


def devices_observed(turn: Turn, event: e.DevicesObserved) -> None:
    loading = {d for n in turn.live for d, _ in _unmeasured(turn.models[n])}
    for device in event.devices:
        account = turn.devices.get(device.id)
        foreign = max(0, device.used_bytes - event.accounted.get(device.id, 0))
        if account is not None and device.id in loading:
            foreign = min(foreign, account.foreign_bytes)
        budget = turn.policy.budgets.get(device.id, int(device.total_bytes * turn.policy.max_utilization))
        seen = Account(
            id=device.id, kind=device.kind, name=device.name, total_bytes=device.total_bytes,
            used_bytes=device.used_bytes, budget_bytes=min(budget, device.total_bytes), foreign_bytes=foreign,
            booked_bytes=account.booked_bytes if account else 0,
            promised_bytes=account.promised_bytes if account else 0,
            reclaiming_bytes=account.reclaiming_bytes if account else 0,
            utilization=device.utilization,
        )  # fmt: skip
        if account is None or (turn.queue and seen.limit_bytes > account.limit_bytes):
            turn.dirty = True
        turn.devices = turn.devices.set(device.id, seen)


def _unmeasured(model: Model) -> tuple[tuple[str, int], ...]:
    """What is booked for a load that is under way, and so not yet in anybody's measurements."""
    return model.booking if model.state is State.LOADING else model.extra


def ticked(turn: Turn, event: e.Ticked) -> None:
    for ticket in list(turn.tickets.values()):
        if ticket.deadline_at <= turn.now:
            expired(turn, ticket)
        else:
            turn.wake(ticket.deadline_at)
    for runtime in list(turn.runtimes.values()):
        if runtime.state is RuntimeState.CRASHED and not runtime.given_up:
            if runtime.retry_at <= turn.now:
                start(turn, runtime, "tried again")
            else:
                turn.wake(runtime.retry_at)
    sweep = turn.now >= turn.next_sweep
    for name in list(turn.live):
        _overdue(turn, turn.models[name])
    if sweep:
        for name in list(turn.live):
            _idle(turn, turn.models[name])
        for account in list(turn.devices.values()):
            _relieve(turn, account)
        turn.next_sweep = turn.now + turn.policy.sweep_s
    turn.wake(turn.next_sweep)
    turn.dirty = turn.dirty or bool(turn.queue)


def _overdue(turn: Turn, model: Model) -> None:
    policy = turn.policy
    if model.state is State.LOADING:
        due = model.op_since + policy.load_timeout_s
        if due <= turn.now:
            failure = Failure("load_timeout", f"{model.name} did not load within {policy.load_timeout_s:.0f} s")
            turn.refuse_all(model, failure)
            give_up_load(turn, turn.models[model.name], failure.message)
        else:
            turn.wake(due)
    elif model.state is State.DRAINING and not turn.live_dependents(model.name):
        due = model.op_since + policy.drain_timeout_s
        if due <= turn.now:
            begin_unload(turn, model, f"{model.use.in_flight} still in flight after {policy.drain_timeout_s:.0f} s")
        else:
            turn.wake(due)


def _idle(turn: Turn, model: Model) -> None:
    """The idle rules. Between one and two times the threshold only pressure unloads a model."""
    policy = turn.policy
    if model.state is not State.READY or model.op or model.pinned or model.always_loaded:
        return
    if model.use.in_flight or turn.live_dependents(model.name):
        return
    if model.use.qps > policy.min_qps:
        return
    idle = turn.now - model.busy_since
    if idle < 2 * policy.idle_s or turn.now - model.loaded_at < policy.min_resident_s:
        return
    device = model.booking[0][0] if model.booking else ""
    for member in group_of(turn, model, device).members:
        drain(turn, turn.models[member.name], f"idle for {idle:.0f} s, twice the threshold of {policy.idle_s:.0f} s")


def _relieve(turn: Turn, account: Account) -> None:
    """Memory grew, or others took it: what nobody uses makes room."""
    excess = account.booked_bytes - account.reclaiming_bytes - account.limit_bytes
    if excess <= 0:
        return
    choice = choose(turn, account.id, excess, worst=Tier.QUIET)
    for group in choice.groups:
        for member in group.members:
            drain(
                turn,
                turn.models[member.name],
                f"{account.id} is {human(excess)} over its limit of {human(account.limit_bytes)}",
            )
