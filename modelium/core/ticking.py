"""What time, use and the devices bring: deadlines, idleness, pressure."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from modelium.api.units import human
from modelium.core import events as e
from modelium.core.demand import expired
from modelium.core.eviction import Tier, Victims
from modelium.core.line import Line
from modelium.core.loading import keep_old, stuck
from modelium.core.moves import begin_unload, drain, evict, give_up_load
from modelium.core.parking import not_parked, not_woken
from modelium.core.runtimes import start
from modelium.core.states import RuntimeState, State
from modelium.core.turn import Turn
from modelium.core.world import Account, Failure, Model, queued


def use_observed(turn: Turn, event: e.UseObserved) -> None:
    for name, use in event.use:
        model = turn.models.get(name)
        if model is not None and model.use != use:
            if turn.queue and model.use.in_flight and not use.in_flight:
                turn.wake(turn.now)  # it may make room: look once for all that become idle now
            turn.change(model, use=use)


def devices_observed(turn: Turn, event: e.DevicesObserved) -> None:
    loading = {d for n in turn.moving for d, _ in _unmeasured(turn.models[n])}
    for device in event.devices:
        account = turn.devices.get(device.id)
        foreign = max(0, device.used_bytes - event.accounted.get(device.id, 0))
        if account is not None and device.id in loading:
            foreign = min(foreign, account.foreign_bytes)
        budget = turn.policy.budgets.get(device.id, int(device.total_bytes * turn.policy.max_utilization))
        seen = Account(
            id=device.id, kind=device.kind, name=device.name, total_bytes=device.total_bytes,
            used_bytes=device.used_bytes, budget_bytes=min(budget, device.total_bytes), foreign_bytes=foreign,
            utilization=device.utilization,
        )  # fmt: skip
        if account is None:
            turn.add_device(seen)
        else:
            seen = replace(
                seen,
                booked_bytes=account.booked_bytes,
                promised_bytes=account.promised_bytes,
                reclaiming_bytes=account.reclaiming_bytes,
            )
            turn.devices = turn.devices.set(device.id, seen)
        before = None if account is None else (account.limit_bytes, account.budget_bytes)
        if before != (seen.limit_bytes, seen.budget_bytes):
            turn.dirty = turn.dirty or bool(turn.queue)


def _unmeasured(model: Model) -> tuple[tuple[str, int], ...]:
    """What is booked for what is under way, and so not yet in anybody's measurements."""
    return model.booking if model.state in (State.LOADING, State.PARKING) else model.extra


def ticked(turn: Turn, event: e.Ticked) -> None:
    for ticket in list(turn.tickets.values()):
        if ticket.deadline_at <= turn.now:
            expired(turn, ticket)
        else:
            turn.wake(ticket.deadline_at)
    for runtime in list(turn.runtimes.values()):
        if runtime.state is RuntimeState.CRASHED:
            if runtime.retry_at <= turn.now:
                start(turn, runtime, "tried again")
            elif isfinite(runtime.retry_at):
                turn.wake(runtime.retry_at)
    for name in sorted(turn.moving):
        _overdue(turn, turn.models[name])
    if turn.now >= turn.next_sweep or turn.next_sweep > turn.now + turn.policy.sweep_s:
        for name in sorted(turn.live):
            _idle(turn, turn.models[name])
        for account in sorted(turn.devices.values(), key=lambda a: a.id):
            _relieve(turn, account)
        turn.next_sweep = turn.now + turn.policy.sweep_s
        turn.sweeping = True
    turn.wake(turn.next_sweep)
    turn.dirty = turn.dirty or bool(turn.queue) or bool(turn.stale)


def _overdue(turn: Turn, model: Model) -> None:
    """End what was not answered in time."""
    policy = turn.policy
    match model.state:
        case State.LOADING | State.READY:
            limit_s = policy.load_timeout_s
        case State.DRAINING:
            limit_s = policy.drain_timeout_s
        case _:
            limit_s = policy.unload_timeout_s
    due = model.op_since + limit_s
    if due > turn.now:
        turn.wake(due)
        return
    match model.state:
        case State.PARKING:
            not_parked(turn, model, Failure("driver", f"not within {limit_s:.0f} s"))
        case State.LOADING if model.parked is not None:
            not_woken(turn, model, Failure("load_timeout", f"not within {limit_s:.0f} s"))
        case State.LOADING:
            failure = Failure("load_timeout", f"{model.name} did not load within {limit_s:.0f} s")
            give_up_load(turn, turn.refuse_all(model, failure), failure.message, failure)
        case State.READY:
            keep_old(turn, model, Failure("load_timeout", f"they did not load within {limit_s:.0f} s"))
        case State.UNLOADING:
            stuck(turn, model, Failure("driver", f"its runtime did not unload it within {limit_s:.0f} s"))
        case State.DRAINING if not turn.live_dependents(model.name):
            begin_unload(turn, model, f"{model.use.in_flight} still in flight after {limit_s:.0f} s")
        case _:
            pass


def _idle(turn: Turn, model: Model) -> None:
    """The idle rules. Between one and two times the threshold only pressure unloads a model.

    What is made of others goes alone; its parts are idle by their own count, and go at the next sweep.
    """
    policy = turn.policy
    if model.state is not State.READY or model.op or model.kept or model.use.in_flight:
        return
    if model.use.qps > policy.min_qps:
        return
    idle = turn.now - model.busy_since
    if idle < 2 * policy.idle_s or turn.now - model.loaded_at < policy.min_resident_s:
        return
    if turn.live_dependents(model.name) or _awaited(turn, model):
        return
    drain(turn, model, f"idle for {idle:.0f} s, twice the threshold of {policy.idle_s:.0f} s")


def _awaited(turn: Turn, model: Model) -> bool:
    """What is made of it is about to load."""
    found = (turn.models.get(n) for n in turn.dependents.get(model.name, ()))
    return any(m is not None and queued(m) for m in found)


def _relieve(turn: Turn, account: Account) -> None:
    """Memory grew, or others took it: what nobody uses makes room."""
    excess = account.booked_bytes - account.reclaiming_bytes - account.limit_bytes
    if excess <= 0:
        return
    victims = Victims(turn, Line(turn).awaited)
    for victim in victims.choose(account.id, excess, Tier.QUIET, None):
        evict(
            turn,
            turn.models[victim.name],
            f"{account.id} is {human(excess)} over its limit of {human(account.limit_bytes)}",
        )
