"""Who loads next, and who makes room for it.

The queue is looked at whenever room, demand or a runtime changed, in the order of its places. A waiter is given room
that is free; else victims are drained and what they free is promised to it at once; else it waits, and once it has
waited for `fairness_after_s` its claim keeps later ones from taking what comes free, and models in use become victims
too. What is kept for a waiter counts only against those behind it, so that the first in the queue is never held up by
another's claim.
"""

from __future__ import annotations

from dataclasses import replace

from modelium.api.units import human
from modelium.core.eviction import Tier
from modelium.core.instructions import Load, Wake
from modelium.core.line import Line
from modelium.core.moves import begin_unload, evict, fail, give_up_load, reopen, want
from modelium.core.parking import let_be
from modelium.core.placement import Spot, never_beside, never_fits, spots, spots_anew
from modelium.core.recycling import go_on
from modelium.core.replacing import replace_stale
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn, added
from modelium.core.world import Failure, Held, Model, queued

_BROKEN = frozenset({State.INVALID, State.DISCOVERED})


class Restless(Exception):
    """A bug: the queue did not come to rest within one step."""


def schedule(turn: Turn) -> None:
    """Give room, promise room, or say why not, to each waiting model in turn."""
    looks = 100 + 10 * (len(turn.queue) + len(turn.live))
    while turn.dirty:
        looks -= 1
        if not looks:
            raise Restless(f"models that wait: {', '.join(sorted(turn.queue))}")
        turn.dirty = False
        if turn.queue:
            _prune(turn)
            _revive(turn)
            line = Line(turn)
            for name in line.order():
                model = turn.models.get(name)
                if model is not None and queued(model):
                    _serve(turn, line, model)
                    after = turn.models[name]
                    if model.parts and not queued(after) and after.state is not State.LOADING:
                        break  # its parts wait for it no longer: look anew
        replace_stale(turn)
        _rescue(turn)
        go_on(turn)


def _prune(turn: Turn) -> None:
    """Let nobody wait for nobody: see why each is wanted still."""
    for name in sorted(turn.queue):
        model = turn.models[name]
        if model.want is Want.REQUEST and model.tickets and not model.kept and name not in turn.dependents:
            continue
        why = _still_wanted(turn, model)
        if why is model.want:
            continue
        if why is not Want.NONE or model.state is State.FAILED:
            turn.change(model, want=why)
        elif model.state is State.STANDBY:
            let_be(turn, model, "nobody waits for it any more")
        else:
            turn.move(model, State.COLD, "nobody waits for it any more", want=Want.NONE, promise=())


def _still_wanted(turn: Turn, model: Model) -> Want:
    if model.kept:
        return Want.RESIDENT
    waiting = turn.waiting(model)
    if any(t.person for t in waiting):
        return Want.PERSON
    for name in turn.dependents.get(model.name, ()):
        whole = turn.models.get(name)
        if whole is not None and queued(whole):
            return Want.PART
    if waiting:
        return Want.REQUEST
    return model.want if model.want in (Want.DROPPED, Want.RESTORE) else Want.NONE


def _revive(turn: Turn) -> None:
    """Queue what failed, is wanted, and may be tried again now."""
    for name in sorted(turn.queue):
        model = turn.models[name]
        if model.state is not State.FAILED or model.held is not None:
            continue
        runtime = turn.runtimes.get(model.runtime)
        if runtime is not None and runtime.given_up:
            if model.tickets:
                turn.refuse_all(model, Failure("runtime_unavailable", f"{runtime.name} is down: {runtime.reason}"))
                turn.dirty = True
        elif runtime is not None and runtime.state is not RuntimeState.UP:
            continue
        elif model.retry_at <= turn.now:
            turn.move(model, State.QUEUED, f"tried again: {model.want.value}")
        else:
            turn.wake(model.retry_at)


def _serve(turn: Turn, line: Line, model: Model) -> None:
    runtime = turn.runtimes.get(model.runtime)
    if runtime is None:
        fail(turn, model, Failure("plugin", f"no runtime named {model.runtime}: install its plugin or enable it"))
        return
    if runtime.given_up:
        fail(turn, model, Failure("runtime_unavailable", f"{runtime.name} is down: {runtime.reason}"))
        return
    spec = model.spec
    assert spec is not None
    if turn.devices and (model.parts or spec.devices > 1 or model.need > line.largest(spec)):
        never = never_fits(turn, model, spots_anew(turn, model)) or _whole_never_fits(turn, model)
        if never is not None:
            _cannot(turn, model, Failure("never_fits", f"{model.name} {never}"))
            return
    if runtime.state is not RuntimeState.UP:
        _wait(turn, model, f"waits for {runtime.name}, which is {runtime.state}: {runtime.reason}")
        return
    if runtime.recycle:
        _wait(turn, model, f"waits for {runtime.name}, which is to be started anew: {runtime.recycle}")
        return
    if model.parts and not _parts_ready(turn, line, model):
        return
    full = line.loading.get(model.runtime, 0) >= turn.policy.max_concurrent_loads
    turns = f"waits for its turn: {turn.policy.max_concurrent_loads} loads under way"
    if full and not model.promise:
        _wait(turn, model, turns)
        return
    if model.reason.startswith(NO_ROOM) and not turn.sweeping and line.in_vain(model):
        if not line.aged(model):
            turn.wake(line.ages_at(model))
        return
    everywhere = spots(turn, model, line.ahead)
    found = [s for s in everywhere if s.seen]
    missed = [s.arithmetic for s in everywhere if s.fits_ever and not s.seen]
    if missed and not any(s.fits_ever if line.urgent(model) else s.fits_now for s in found):
        _wait(turn, model, f"waits for a device: {missed[0]}")
        return
    if full:
        kept = next((s for s in found if s.booking == model.promise), None)
        if kept is not None and kept.shortage <= 0:
            _promise(turn, line, model, kept, turns)
        else:
            _wait(turn, model, turns)
        return
    for spot in found:
        if spot.fits_now:
            _load(turn, line, model, spot)
            return
    _make_room(turn, line, model, [s for s in found if s.fits_ever])


NO_ROOM = "waits for room: "
"""How the reason of one begins that waits, and for which nothing may be evicted."""


def _cannot(turn: Turn, model: Model, failure: Failure) -> None:
    """There is no use in waiting. What sleeps in its runtime is unloaded, and FAILED after that."""
    if model.held is not None:
        give_up_load(turn, turn.change(model, want=Want.NONE), failure.message, failure)
    else:
        fail(turn, model, failure)


def _wait(turn: Turn, model: Model, reason: str, promise: tuple[tuple[str, int], ...] = ()) -> None:
    if model.reason != reason or model.promise != promise:
        turn.change(model, reason=reason, promise=promise)


def _parts_ready(turn: Turn, line: Line, model: Model) -> bool:
    """Whether all that it depends on is loaded; asks for what is not."""
    if model.name in whole_of(turn, model):
        _cannot(turn, model, Failure("model_invalid", f"{model.name} is made of itself: see what its parts depend on"))
        return False
    waiting: list[str] = []
    for name in model.parts:
        part = turn.models.get(name)
        if part is None or part.forget or part.state in _BROKEN:
            why = "there is no such model in the repository" if part is None else part.reason
            _cannot(turn, model, Failure("part_missing", f"{model.name} is made of {name}: {why}"))
            return False
        if part.state is State.READY:
            continue
        if part.state is State.FAILED and part.failure is not None and _hopeless(turn, part):
            _cannot(turn, model, Failure(part.failure.code, f"{model.name} is made of {name}: {part.failure.message}"))
            return False
        if reopen(turn, part):
            line.moved()
            continue
        waiting.append(name)
        want(turn, turn.models[name], Want.PART, f"{model.name} is made of it")
    if waiting:
        _wait(turn, model, f"waits for its parts: {', '.join(waiting)}")
    return not waiting


def _hopeless(turn: Turn, part: Model) -> bool:
    runtime = turn.runtimes.get(part.runtime)
    if runtime is None or runtime.given_up:
        return True
    return part.held is None and part.retry_at > turn.now and not part.blameless


def whole_of(turn: Turn, model: Model) -> list[str]:
    """The names of all that it depends on, directly or not."""
    names: list[str] = []
    todo = [model]
    while todo:
        for name in todo.pop().parts:
            if name not in names:
                names.append(name)
                part = turn.models.get(name)
                if part is not None:
                    todo.append(part)
    return names


def _whole_never_fits(turn: Turn, model: Model) -> str | None:
    """Why a model that is made of others can't fit together with them."""
    if not model.parts:
        return None
    parts = [turn.models[n] for n in whole_of(turn, model) if n in turn.models and n != model.name]
    need = model.estimate.memory_bytes + sum(p.estimate.memory_bytes for p in parts)
    kinds = {m.spec.device_kind for m in (model, *parts) if m.spec}
    budget = sum(a.budget_bytes for a in turn.devices.values() if a.kind in kinds)
    if need <= budget:
        return None
    return f"can never fit with its parts: they need {human(need)} together, and the budget is {human(budget)}"


def _load(turn: Turn, line: Line, model: Model, spot: Spot) -> None:
    op, dirty = turn.new_id(), turn.dirty
    booking = spot.taken
    spec, asleep = model.spec, model.parked
    assert spec is not None
    if asleep is not None:
        asleep = replace(asleep, before=asleep.before or booking)
        booking = added(booking, model.booking)  # it may hold both until it is awake
    waiting = len(turn.waiting(model))
    told = f"{model.want.value}, {waiting} waiting" if waiting else model.want.value
    model = turn.move(
        model,
        State.LOADING,
        f"{told}; {spot.arithmetic}",
        booking=booking,
        placed=tuple(device for device, _ in spot.booking),
        promise=(),
        op=op,
        op_since=turn.now,
        held=Held(spec, model.parameters),
        parked=asleep,
        measured=(),
        rejected=None,
        failure=None,
    )
    turn.dirty = dirty  # nobody gains by it
    line.loading[spec.runtime] = line.loading.get(spec.runtime, 0) + 1
    line.moved()
    turn.wake(turn.now + turn.policy.load_timeout_s)
    if asleep is not None:
        turn.out.append(Wake(model.name, op, spec.runtime, asleep.level))
    else:
        turn.out.append(Load(model.name, op, spec.runtime, booking, spec.revision, False, model.parameters))


def _make_room(turn: Turn, line: Line, model: Model, found: list[Spot]) -> None:
    """Drain the smallest set of victims on the device where that is least, and promise what they free."""
    mine = tuple(device for device, _ in model.promise)
    own = {spot.id: spot.id.split() != list(mine) for spot in found}
    for spot in sorted(found, key=lambda s: own[s.id]):
        if spot.shortage <= 0:
            _promise(turn, line, model, spot, f"waits for memory on its way back; {spot.arithmetic}")
            return
    old, urgent, place = line.aged(model), line.urgent(model), line.place(model)
    worst = (Tier.BUSY if old else Tier.QUIET) if urgent else Tier.IDLE
    best: tuple[tuple[int, int, str], Spot, tuple[Model, ...]] | None = None
    for movable in (frozenset[str](), line.in_the_way(model) if model.want is Want.PART else None):
        if best is not None or movable is None:
            break
        for spot in found:
            shortages = {p.account.id: p.shortage for p in spot.places if p.shortage > 0}
            chosen = line.victims.choose(shortages, worst, place, movable)
            if chosen:
                size = sum(n for m in chosen for d, n in m.booking if d in shortages)
                key = (max(line.victims.tier(m.name) for m in chosen), size, spot.id)
                if best is None or key < best[0]:
                    best = (key, spot, chosen)
    if best is not None:
        _, spot, chosen = best
        for victim in chosen:
            evict(turn, turn.models[victim.name], f"evicted for {model.name}")
        line.moved()
        names = ", ".join(m.name for m in chosen)
        _promise(turn, line, model, spot, f"waits for {names} to make room; {spot.arithmetic}")
        return
    if model.state is State.STANDBY and (not found or _goes_elsewhere(turn, line, model, found)):
        begin_unload(turn, model, "there is no room where it sleeps: it is loaded anew elsewhere")
        return
    if not urgent:
        _give_up(turn, line, model, f"no room to spare: {_first(found)}")
        return
    never = never_beside(turn, model, [s for s in spots_anew(turn, model) if s.fits_ever])
    if never is not None:
        _cannot(turn, model, Failure("never_fits", f"{model.name} {never}"))
        return
    again_at = line.victims.again_at()
    if again_at is not None:
        turn.wake(again_at)
    if not old:
        turn.wake(line.ages_at(model))
    obstacles = line.victims.obstacles(worst)
    told = "; ".join(obstacles[:4]) + (f"; and {len(obstacles) - 4} more" if len(obstacles) > 4 else "")
    reason = f"{NO_ROOM}{_first(found)}{'; ' + told if told else ''}"
    if model.spec is not None:
        line.found_none(model)
    if old:
        for spot in sorted(found, key=lambda s: (own[s.id], s.shortage, s.id)):
            if _claimable(line, model, spot):
                _promise(turn, line, model, spot, reason)
                return
    _wait(turn, model, reason)


def _goes_elsewhere(turn: Turn, line: Line, model: Model, found: list[Spot]) -> bool:
    """Whether what sleeps is better loaded anew: there is room now, or there will be and none where it sleeps."""
    anywhere = [s for s in spots_anew(turn, model, line.ahead) if s.seen]
    if any(s.fits_now for s in anywhere):
        return True
    in_vain = line.urgent(model) and not any(_claimable(line, model, s) for s in found)
    return in_vain and any(s.fits_ever and _claimable(line, model, s) for s in anywhere)


def _claimable(line: Line, model: Model, spot: Spot) -> bool:
    """Whether it can get the room if it waits long enough."""
    place = line.place(model)
    return all(p.need <= line.victims.claimable(p.account.id, place) for p in spot.places)


def _first(found: list[Spot]) -> str:
    return found[0].arithmetic if found else "no device"


def _promise(turn: Turn, line: Line, model: Model, spot: Spot, reason: str) -> None:
    line.reserve(spot.booking)
    _wait(turn, model, reason, spot.booking)


def _give_up(turn: Turn, line: Line, model: Model, reason: str) -> None:
    """Nobody needs it: let it be, and with it what waits for it, which nobody needs either."""
    if model.state is State.STANDBY:
        let_be(turn, model, reason)
    else:
        turn.move(model, State.COLD, reason, want=Want.NONE, promise=())
    for name in turn.dependents.get(model.name, ()):
        whole = turn.models.get(name)
        if whole is not None and queued(whole):
            _give_up(turn, line, whole, f"no room to spare for {model.name}, which it is made of")


def _rescue(turn: Turn) -> None:
    """Take back what drains for nobody while it is wanted."""
    for name in sorted(turn.moving):
        model = turn.models[name]
        if model.state is State.DRAINING and (model.kept or turn.waiting(model)):
            reopen(turn, model)
