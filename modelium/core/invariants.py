"""What is true of every world that steps lead to; tests hold each step to it.

`violations` finds bugs of the core, never mistakes of plugins or people: a world that has one can't come about.
"""

from __future__ import annotations

from collections.abc import Iterator

from modelium.core.line import Line
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Model, Policy, World, is_live, is_moving, is_stale, queued, waits

S = State

HOLDS = frozenset({S.LOADING, S.READY, S.DRAINING, S.PARKING, S.STANDBY, S.UNLOADING, S.RECOVERING})
"""A runtime has it, or may have."""
_RECLAIMING = frozenset({S.DRAINING, S.UNLOADING})
_GOING = frozenset({S.DRAINING, S.UNLOADING, S.FAILED, S.RECOVERING})
_LEAVING = _RECLAIMING | {S.PARKING}
_UNWANTED = frozenset({S.DISCOVERED, S.INVALID, S.COLD, S.READY}) | _LEAVING


def violations(world: World, policy: Policy, now: float | None = None) -> list[str]:
    """What is wrong with a world, one line each. Give `now` to have promises held against the room that there is."""
    found = [*_sums(world), *_indexes(world), *_tickets(world), *_ids(world)]
    for model in world.models.values():
        found.extend(f"{model.name} ({model.state}): {wrong}" for wrong in _model(world, model))
    if now is not None:
        found.extend(_promises(world, policy, now))
    return found


def _sums(world: World) -> Iterator[str]:
    for account in world.devices.values():
        booked = promised = reclaiming = 0
        for model in world.models.values():
            size = bytes_on(model.booking, account.id) + bytes_on(model.extra, account.id)
            booked += size
            reclaiming += size if model.state in _RECLAIMING else 0
            reclaiming += bytes_on(model.extra, account.id) if model.state is S.PARKING else 0
            promised += bytes_on(model.promise, account.id)
        for what, told, sum_of in (
            ("booked", account.booked_bytes, booked),
            ("promised", account.promised_bytes, promised),
            ("reclaiming", account.reclaiming_bytes, reclaiming),
        ):
            if told != sum_of:
                yield f"{account.id}: {what} {told}, and the models' sum is {sum_of}"


def _indexes(world: World) -> Iterator[str]:
    for what, index, member in (
        ("live", world.live, is_live),
        ("queue", world.queue, waits),
        ("moving", world.moving, is_moving),
        ("stale", world.stale, is_stale),
    ):
        right = {m.name for m in world.models.values() if member(m)}
        if set(index) != right:
            yield f"index {what}: {sorted(index)}, and it should be {sorted(right)}"
    depend: dict[str, set[str]] = {}
    for model in world.models.values():
        for part in model.parts:
            depend.setdefault(part, set()).add(model.name)
    if {n: set(d) for n, d in world.dependents.items()} != depend:
        yield f"index dependents: {dict(world.dependents)}, and it should be {depend}"
    yield from (f"dependents of {n}: {d} twice" for n, d in world.dependents.items() if len(set(d)) != len(d))


def _tickets(world: World) -> Iterator[str]:
    for key, ticket in world.tickets.items():
        model = world.models.get(ticket.model)
        if key != ticket.id or model is None or model.tickets.count(ticket.id) != 1:
            yield f"ticket {key} waits for {ticket.model}, which does not know of it"
    for model in world.models.values():
        for id in model.tickets:
            if id not in world.tickets or world.tickets[id].model != model.name:
                yield f"{model.name} knows of ticket {id}, which does not wait for it"
                return
        gone = any(world.tickets[i].gone for i in model.tickets)
        waiting = any(not world.tickets[i].gone for i in model.tickets)
        if gone and model.state not in (*_RECLAIMING, S.RECOVERING):
            yield f"{model.name} ({model.state}) will never be gone for the one who waits for it"
        if waiting and not _answers(world, model):
            yield f"{model.name} ({model.state}: {model.reason}) will never answer those who wait for it"


def _answers(world: World, model: Model) -> bool:
    """Whether those who wait for it to be READY have something to wait for."""
    runtime = world.runtimes.get(model.home)
    match model.state:
        case S.READY:
            return model.coming is not None or (model.stale and model.spec != model.rejected and not model.forget)
        case S.QUEUED | S.LOADING | S.DRAINING | S.PARKING | S.STANDBY | S.UNLOADING:
            return not model.forget or model.state is S.UNLOADING
        case S.RECOVERING | S.FAILED:
            return runtime is not None and not runtime.given_up and not model.forget
        case _:
            return False


def _ids(world: World) -> Iterator[str]:
    ops = [m.op for m in world.models.values() if m.op]
    if len(set(ops)) != len(ops):
        yield f"two operations have the same id: {sorted(ops)}"
    if any(op >= world.next_id for op in ops):
        yield f"the next id {world.next_id} is in use: {sorted(ops)}"


def _model(world: World, model: Model) -> Iterator[str]:
    state = model.state
    stuck = state is S.FAILED and model.held is not None
    live = [m for n in world.dependents.get(model.name, ()) if (m := world.models.get(n)) and m.held is not None]

    if model.spec is None and state not in (S.DISCOVERED, S.INVALID):
        yield "it has no spec"
    if (model.held is not None) != (state in HOLDS or stuck):
        yield f"held is {model.held}"
    if model.booking and model.held is None:
        yield f"it has booked {model.booking}"
    if model.extra and model.coming is None and state is not S.PARKING:
        yield f"it has booked {model.extra} beside, for nothing"
    if model.measured and not model.booking:
        yield "it is measured, and nothing is booked"
    if model.parked is not None and state not in (S.PARKING, S.STANDBY, S.LOADING):
        yield f"it is not asleep, nor wakes: {model.parked}"
    if model.parked is None and state in (S.PARKING, S.STANDBY):
        yield "it does not sleep"
    if model.parked is not None and (gone := [d for d, _ in model.parked.before if d not in world.devices]):
        yield f"it is to wake on {', '.join(gone)}, and there is no such device"
    if model.promise and not queued(model):
        yield f"it is promised {model.promise}"
    if any(size < 0 for _, size in (*model.booking, *model.extra, *model.promise)):
        yield "it holds less than nothing"

    match state:
        case S.LOADING | S.PARKING | S.UNLOADING:
            operates = bool(model.op)
        case S.DRAINING:
            operates = bool(model.op) or bool(live)
        case S.READY:
            operates = bool(model.op) == (model.coming is not None)
        case _:
            operates = not model.op
    if not operates:
        yield f"its operation is {model.op}, what loads beside it {model.coming}"
    if model.coming is not None and state not in (S.READY, S.DRAINING, S.UNLOADING) and not stuck:
        yield "something loads beside it"

    if model.again is not Want.NONE and state not in _LEAVING:
        yield f"it should come back: {model.again}"
    if (model.forget or model.invalid is not None) and model.held is None:
        yield "it should be forgotten or INVALID by now"
    if model.want is not Want.NONE and state in _UNWANTED:
        yield f"it is wanted: {model.want}"
    if model.kept and state is S.COLD:
        yield "it should be loaded at all times, and nothing brings it"
    if state is S.STANDBY and (model.forget or model.stale or model.invalid is not None):
        yield "it sleeps, and is of no use"
    if queued(model) and not _wanted(world, model):
        yield f"it waits for nobody: {model.want}"

    runtime = world.runtimes.get(model.home)
    up = runtime is not None and runtime.state is RuntimeState.UP
    if (state in HOLDS or stuck) and state is not S.RECOVERING and not up:
        yield f"its runtime {model.home} is not up"
    if state is S.DRAINING and any(m.state not in _GOING for m in live):
        yield f"it goes, and {', '.join(m.name for m in live)} is made of it"


def _wanted(world: World, model: Model) -> bool:
    waiting = any(not world.tickets[i].gone for i in model.tickets)
    match model.want:
        case Want.NONE:
            return False
        case Want.REQUEST | Want.PERSON:
            return waiting
        case Want.PART:
            wholes = (world.models.get(n) for n in world.dependents.get(model.name, ()))
            return any(m is not None and queued(m) for m in wholes)
        case Want.RESIDENT:
            return model.kept
        case _:
            return True


def _promises(world: World, policy: Policy, now: float) -> Iterator[str]:
    """What is promised is there or on its way back, save for the claims of those who have waited long."""
    line = Line(Turn(world, policy, now))
    for account in world.devices.values():
        promised = sum(
            bytes_on(m.promise, account.id) for n in world.queue if queued(m := world.models[n]) and not line.aged(m)
        )
        room = account.limit_bytes - account.booked_bytes + account.reclaiming_bytes
        if promised > max(0, room):
            yield f"{account.id}: {promised} promised, and there will be room for {room}"
