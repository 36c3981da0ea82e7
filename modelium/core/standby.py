"""Whether a model that goes is put to sleep rather than unloaded, and which sleepers make room for it.

Asleep it gives the room on its device to others and holds host memory instead, for which it is back in a fraction of
the time that a load takes. Host memory that nobody needs is a cache of models: what is worth most stays in it, by the
seconds that it is expected to save for each byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Account, Booking, Estimate, Model, Standby, Use, queued

QUICK = 0.5
"""A wake that takes more than this share of a load's time is not worth the memory."""

SHARE = 0.5
"""Of the host memory that would be free if nobody slept: the other half is left to the page cache and to others."""


@dataclass(frozen=True, slots=True)
class Berth:
    """How a model is to be parked."""

    how: Standby
    holds: Booking
    """What it will hold then."""
    instead_of: tuple[Model, ...] = ()
    """Parked models that make room for it."""


def reuse(use: Use, now: float, idle_s: float) -> float:
    """How many uses a second are expected of a model.

    Use ages: what has been idle for a time is as likely as not to stay idle for as long again. One use alone may have
    been the only one.
    """
    if not use.requests:
        return 0.0
    seen = use.requests / (use.requests + 1)
    return seen * max(use.qps, 1 / max(1.0, now - use.last_used + idle_s))


def worth(turn: Turn, model: Model, how: Standby | None) -> float:
    """Seconds that a model saves while it is parked, for each second and byte of host memory."""
    if how is None:
        return 0.0
    wanted = model.kept or model.want is not Want.NONE or bool(turn.waiting(model))
    rate = 1.0 if wanted else reuse(model.use, turn.now, turn.policy.idle_s)
    return rate * max(0.0, model.estimate.load_s - how.wake_s) / max(1, how.host_bytes)


def parked_as(model: Model) -> Standby | None:
    """What it is expected to take as it is parked now; None where that is not known."""
    level = model.parked.level if model.parked is not None else 0
    return next((s for s in model.estimate.standby if s.level == level), None)


def learnt(estimate: Estimate, how: Standby) -> Estimate:
    """What is expected, with what one level really took."""
    return replace(estimate, standby=tuple(how if s.level == how.level else s for s in estimate.standby))


def asleep(model: Model) -> str:
    """For the reason that people read."""
    level, how = model.parked.level if model.parked is not None else 0, parked_as(model)
    return f"asleep at level {level}" + (f", wakes in about {how.wake_s:.2g} s" if how is not None else "")


def berth(turn: Turn, model: Model) -> Berth | None:
    """How to park a model that is drained; None when it should be unloaded.

    The first level, the quickest to wake, for which there is room within the budget; where there is none, what is
    parked and worth less goes for it. The host itself must have the room at once: only the budget may be overdrawn,
    until they are gone.
    """
    host = turn.devices.get(turn.policy.standby_device)
    if host is None or not _may_sleep(turn, model, host):
        return None
    own = bytes_on(model.booking, host.id)
    sleepers = list(_sleepers(turn, host))
    asleep = sum(size for _, size in sleepers)
    budget = turn.policy.standby_budget_bytes
    if budget is None:
        budget = int(SHARE * max(0, host.limit_bytes - host.booked_bytes + asleep + own))
    free = host.limit_bytes - host.booked_bytes - host.promised_bytes + own
    levels = [
        Berth(how, holds)
        for how in model.estimate.standby
        if how.host_bytes <= free
        and how.wake_s <= QUICK * model.estimate.load_s
        and worth(turn, model, how)
        and _leaves_room(turn, model, holds := _holds(model, how, host), host)
    ]
    for found in levels:
        if asleep + found.how.host_bytes <= budget:
            return found
    for found in levels:
        mine = worth(turn, model, found.how)
        less = [
            (w, m, size)
            for m, size in sleepers
            if size and m.state is State.STANDBY and not queued(m) and (w := worth(turn, m, parked_as(m))) < mine
        ]
        instead_of = _enough(less, asleep + found.how.host_bytes - budget)
        if instead_of:
            return replace(found, instead_of=instead_of)
    return None


def _may_sleep(turn: Turn, model: Model, host: Account) -> bool:
    """Whether it goes for nothing but room or idleness, and is as it should be."""
    runtime = turn.runtimes.get(model.home)
    return (
        bool(model.estimate.standby)
        and model.state is State.DRAINING
        and model.again is Want.NONE
        and model.coming is None
        and model.invalid is None
        and not model.forget
        and not model.stale
        and not model.parts
        and model.spec is not None
        and model.spec.device_kind != host.kind
        and all(device in turn.devices for device, _ in model.booking)
        and runtime is not None
        and runtime.state is RuntimeState.UP
        and not runtime.recycle
        and turn.reaches(runtime.name, host)
        and not turn.asked_gone(model)
    )


def _sleepers(turn: Turn, host: Account) -> Iterator[tuple[Model, int]]:
    """Those that are parked or about to be, and not about to wake, and what they hold of the host's memory."""
    for name in sorted(turn.live):
        model = turn.models[name]
        if model.state in (State.PARKING, State.STANDBY) and not model.promise:
            yield model, bytes_on(model.booking, host.id)


def _holds(model: Model, how: Standby, host: Account) -> Booking:
    devices = [(d, n) for d, n in model.booking if d != host.id]
    left = -(-how.device_bytes // max(1, len(devices)))
    return ((host.id, how.host_bytes), *((d, min(left, n)) for d, n in devices))


def _leaves_room(turn: Turn, model: Model, holds: Booking, host: Account) -> bool:
    """Whether it gives room back, and what it keeps of its devices is promised to nobody."""
    kept = [(turn.devices.get(d), size) for d, size in holds if d != host.id]
    return sum(n for _, n in kept) < sum(n for d, n in model.booking if d != host.id) and all(
        a is None or not size or size <= a.limit_bytes - a.booked_bytes + a.reclaiming_bytes - a.promised_bytes
        for a, size in kept
    )


def _enough(less: list[tuple[float, Model, int]], shortage: int) -> tuple[Model, ...] | None:
    """The least worthy that free enough, without any that need not go; None where all together don't."""
    chosen: list[tuple[Model, int]] = []
    for _, model, size in sorted(less, key=lambda x: (x[0], x[1].name)):
        if shortage <= 0:
            break
        chosen.append((model, size))
        shortage -= size
    if shortage > 0:
        return None
    for model, size in reversed(chosen[:]):
        if size <= -shortage:
            chosen.remove((model, size))
            shortage += size
    return tuple(m for m, _ in chosen)
