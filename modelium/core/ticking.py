"""What time, use and the devices bring: deadlines, idleness, pressure."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from modelium.api.units import human
from modelium.core import events as e
from modelium.core.demand import expired
from modelium.core.eviction import Tier, Victims
from modelium.core.instructions import GiveUp
from modelium.core.line import Line
from modelium.core.loading import keep_old, stuck
from modelium.core.moves import begin_unload, drain, evict, give_up_load, recycle, unload_parts
from modelium.core.parking import not_parked, not_woken
from modelium.core.placement import spots
from modelium.core.runtimes import lose, start, unwanted
from modelium.core.schedule import NO_ROOM
from modelium.core.standby import parked_as
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Account, Failure, Model, Runtime, queued


def use_observed(turn: Turn, event: e.UseObserved) -> None:
    for name, use in event.use:
        model = turn.models.get(name)
        if model is not None and model.use != use:
            if turn.queue and model.use.in_flight and not use.in_flight:
                turn.wake(turn.now)  # it may make room: look once for all that become idle now
            turn.change(model, use=use)


def devices_observed(turn: Turn, event: e.DevicesObserved) -> None:
    loading = {d for n in turn.moving for d, _ in _unmeasured(turn.models[n])}
    seen_ids = {device.id for device in event.devices}
    for _, former in sorted(turn.devices.items()):
        if former.runtime and former.id not in seen_ids:
            _missed(turn, former)
    for device in event.devices:
        account = turn.devices.get(device.id)
        unbooked = max(0, device.used_bytes - event.accounted.get(device.id, 0))
        if account is not None and device.id in loading:
            unbooked = min(unbooked, account.unbooked_bytes)
        budget = turn.policy.budgets.get(device.id, int(device.total_bytes * turn.policy.max_utilization))
        seen = Account(
            id=device.id, kind=device.kind, name=device.name, total_bytes=device.total_bytes,
            used_bytes=device.used_bytes, budget_bytes=min(budget, device.total_bytes), unbooked_bytes=unbooked,
            utilization=device.utilization, runtime=device.runtime,
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
        before = None if account is None else (account.limit_bytes, account.budget_bytes, account.missed)
        if before != (seen.limit_bytes, seen.budget_bytes, seen.missed):
            turn.dirty = turn.dirty or bool(turn.queue) or bool(turn.stale)


GONE_AFTER = 3
GONE_AFTER_S = 5.0
"""So many looks in a row without it, over so long at least, and a device of another machine is gone: one may just have
been slow to answer, and several looks may be at one observation of its runtime."""


def _missed(turn: Turn, account: Account) -> None:
    """What is loaded there serves on while its runtime shows it."""
    since = account.missed_since if account.missed else turn.now
    account = replace(account, missed=account.missed + 1, missed_since=since)
    if account.missed < GONE_AFTER or turn.now - since < GONE_AFTER_S:
        turn.devices = turn.devices.set(account.id, account)
    else:
        _gone(turn, account)


def _gone(turn: Turn, account: Account) -> None:
    """A device of another machine is not there any more, nor what was loaded on it."""
    failure = Failure("runtime_unavailable", f"{account.id} is gone")
    turn.devices = turn.devices.delete(account.id)
    lost: list[Model] = []
    for name in sorted({*turn.live, *turn.queue}):
        model = turn.models[name]
        if any(device == account.id for device, _ in model.promise):
            model = turn.change(model, promise=())
        before = model.parked.before if model.parked is not None else ()
        if any(device == account.id for device, _ in model.booking + model.extra + before):
            _lost_with_device(turn, model, failure)
            lost.append(model)
    for model in lost:
        unload_parts(turn, model)
    turn.dirty = True


def _lost_with_device(turn: Turn, model: Model, failure: Failure) -> None:
    """What sleeps, falls asleep or wakes can't wake there, and its process holds host memory still: it is unloaded.

    So it is with all that goes and holds something elsewhere, which only its runtime gives back.
    """
    if model.parked is not None:
        begin_unload(turn, model, failure.message, again=model.want)
    elif model.state in _GOING and any(size and device in turn.devices for device, size in model.booking):
        return
    else:
        lose(turn, model, failure)
        if model.name in turn.models:
            unwanted(turn, turn.models[model.name], failure.message)


_GOING = frozenset({State.UNLOADING, State.FAILED})
"""It is being unloaded, or could not be."""


def _unmeasured(model: Model) -> tuple[tuple[str, int], ...]:
    """What is booked for what is under way, and so not yet in anybody's measurements."""
    return model.booking if model.state in (State.LOADING, State.PARKING) else model.extra


def ticked(turn: Turn, event: e.Ticked) -> None:
    for ticket in list(turn.tickets.values()):
        if ticket.deadline_at <= turn.now:
            expired(turn, ticket)
        else:
            turn.wake(ticket.deadline_at)
    for _, runtime in sorted(turn.runtimes.items()):
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
            _unclear(turn, turn.models[name])
        for account in sorted(turn.devices.values(), key=lambda a: a.id):
            _relieve(turn, account)
        _release(turn)
        for _, runtime in sorted(turn.runtimes.items()):
            _keeps(turn, runtime)
        turn.next_sweep = turn.now + turn.policy.sweep_s
        turn.sweeping = True
    turn.wake(turn.next_sweep)
    turn.dirty = turn.dirty or bool(turn.queue) or bool(turn.stale)


def _overdue(turn: Turn, model: Model) -> None:
    """End what was not answered in time."""
    policy = turn.policy
    wake = parked_as(model)
    match model.state:
        case State.LOADING if wake is not None:
            load_s = model.estimate.slowest_s or model.estimate.load_s
            limit_s = min(policy.load_timeout_s, _late_after(max(wake.wake_s, load_s)))
        case State.LOADING | State.READY:
            limit_s = policy.load_timeout_s
        case State.DRAINING:
            limit_s = policy.drain_timeout_s
        case _:
            limit_s = policy.unload_timeout_s
    due = model.op_since + limit_s
    if due > turn.now:
        turn.wake(due)
        _late(turn, model)
        return
    match model.state:
        case State.PARKING:
            not_parked(turn, model, Failure("driver", f"not within {limit_s:.0f} s"))
        case State.LOADING if model.parked is not None:
            told = f", and expected were {wake.wake_s:.1f} s" if wake is not None else ""
            not_woken(turn, model, Failure("load_timeout", f"not within {limit_s:.0f} s{told}"), late=True)
        case State.LOADING:
            failure = Failure("load_timeout", f"{model.name} did not load within {limit_s:.0f} s")
            give_up_load(turn, turn.refuse_all(model, failure), failure.message, failure)
        case State.READY:
            turn.out.append(GiveUp(model.name))
            keep_old(turn, model, Failure("load_timeout", f"they did not load within {limit_s:.0f} s"))
        case State.UNLOADING:
            failure = Failure("driver", f"its runtime did not unload it within {limit_s:.0f} s")
            stuck(turn, model, failure)
        case State.DRAINING if not turn.live_dependents(model.name):
            begin_unload(turn, model, f"{model.use.in_flight} still in flight after {limit_s:.0f} s")
        case _:
            pass


LATE_FACTOR = 4
LATE_LEAST_S = 60.0
"""An operation is late when it takes this many times as long as the slowest of its kind did, and at least so long.

A wake may have to read the weights again from a cold disk: it is late when a load would be too. Then it is given up,
since a load can be had instead, and it says nothing against the next one.
"""
STUCK_S = 60.0
"""So long a runtime may still show that a model is gone after all that it did not unload in time."""


def _late_after(usual_s: float) -> float:
    return max(LATE_FACTOR * usual_s, LATE_LEAST_S)


def _late(turn: Turn, model: Model) -> None:
    """Say what takes far longer than it ever did. A load that goes on so is begun anew, those who wait for it wait on;
    the next one gets twice the time. An unload is left to its limit."""
    match model.state:
        case State.LOADING if model.parked is None:
            slowest_s, what = model.estimate.slowest_s, "load"
        case State.UNLOADING:
            runtime = turn.runtimes.get(model.home)
            slowest_s, what = runtime.slowest_unload_s if runtime is not None else 0.0, "unload"
        case _:
            return
    if not slowest_s:
        return
    bound_s = _late_after(slowest_s) * 2**model.late
    told_at, anew_at = model.op_since + bound_s, model.op_since + 2 * bound_s
    if told_at > turn.now:
        turn.wake(told_at)
        return
    taken_s = turn.now - model.op_since
    told = f"late: its slowest {what} took {slowest_s:.0f} s, and this one has been under way for "
    if not model.reason.startswith(told):
        reason = f"{told}{taken_s:.0f} s"
        turn.change(model, reason=reason)
        turn.tell(model.name, model.state, model.state, reason)
    if model.state is not State.LOADING:
        return
    if anew_at > turn.now:
        turn.wake(anew_at)
        return
    model = turn.models[model.name]
    again = model.want if model.want in (Want.DROPPED, Want.RESTORE) else Want.NONE
    give_up_load(
        turn, turn.change(model, late=model.late + 1, again=again), f"given up to be loaded anew, {told}{taken_s:.0f} s"
    )


def _unclear(turn: Turn, model: Model) -> None:
    """Of what was found neither loaded nor gone, and stays so for longer than a load may take, a new start rids us."""
    load_s = model.estimate.slowest_s or model.estimate.load_s
    if model.state is State.RECOVERING and turn.now - model.since >= _late_after(load_s):
        recycle(turn, model.home, f"{model.name} is neither loaded there nor gone")


def _release(turn: Turn) -> None:
    """What could not be unloaded, and keeps somebody from the room that it holds, goes with its runtime."""
    live = (turn.models[n] for n in sorted(turn.live))
    stuck = [
        m
        for m in live
        if m.state is State.FAILED and turn.now - m.since >= STUCK_S and not turn.runtimes[m.home].external
    ]
    if not stuck:
        return
    line = Line(turn)
    needed = {device for n in turn.queue for device in _kept_from(turn, line, turn.models[n], stuck)}
    for model in stuck:
        if any(device in needed for device, _ in model.booking):
            recycle(turn, model.home, f"{model.name} could not be unloaded, and others wait for its room")


def _kept_from(turn: Turn, line: Line, model: Model, stuck: list[Model]) -> list[str]:
    """The devices on which one who waits never gets its room as long as these stay, and gets it without them."""
    if not queued(model) or not model.reason.startswith(NO_ROOM):
        return []
    place = line.place(model)
    lacks = [
        {p.account.id: p.need - line.victims.claimable(p.account.id, place) for p in spot.places}
        for spot in spots(turn, model)
    ]
    if any(all(size <= 0 for size in lack.values()) for lack in lacks):
        return []
    for lack in lacks:
        if all(size <= sum(bytes_on(m.booking, device) for m in stuck) for device, size in lack.items()):
            return [device for device, size in lack.items() if size > 0]
    return []


def _keeps(turn: Turn, runtime: Runtime) -> None:
    """A runtime that keeps too much of what it unloaded is started anew while nothing of it is in use."""
    kept = max((size for _, size in runtime.residue), default=0)
    if runtime.state is not RuntimeState.UP or runtime.recycle or kept <= turn.policy.max_residue_bytes:
        return
    held = [m for n in turn.live if (m := turn.models[n]).home == runtime.name]
    if any(m.use.in_flight or m.state is State.LOADING for m in held):
        return
    if kept <= 2 * turn.policy.max_residue_bytes:
        quiet_s = turn.policy.min_resident_s
        if any(turn.now - m.busy_since < quiet_s for m in held if m.state is State.READY):
            return
    recycle(turn, runtime.name, f"{human(kept)} did not come back after unloads")


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
    for victim in victims.choose({account.id: excess}, Tier.QUIET, None):
        evict(
            turn,
            turn.models[victim.name],
            f"{account.id} is {human(excess)} over its limit of {human(account.limit_bytes)}",
        )
