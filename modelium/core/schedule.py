"""Who loads next, and who makes room for it.

The queue is looked at whenever room, demand or a runtime changed. A waiter is given room that is free; else victims
are drained and what they free is promised to it at once; else it waits, and once it has waited for
`fairness_after_s` its claim keeps later ones from taking what comes free, and models in use become victims too.
"""

from __future__ import annotations

from modelium.core.eviction import Tier, choose
from modelium.core.instructions import CloseRoute, Load, OpenRoute
from modelium.core.placement import Spot, human, never_fits, spots
from modelium.core.states import BASE_PRIORITY, RuntimeState, State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Model, Use

_URGENT = frozenset({Want.REQUEST, Want.PART, Want.PERSON, Want.RESIDENT})
_BROKEN = frozenset({State.INVALID, State.DISCOVERED})


def schedule(turn: Turn) -> None:
    """Give room, promise room, or say why not, to each waiting model in turn."""
    while turn.dirty:
        turn.dirty = False
        revive(turn)
        loading = _loads_by_runtime(turn)
        for name in sorted(turn.queue, key=lambda n: _order(turn, turn.models[n])):
            model = turn.models.get(name)
            if model is not None and model.state is State.QUEUED:
                _serve(turn, model, loading)
        _replace_stale(turn, loading)
        if any(a.reclaiming_bytes for a in turn.devices.values()):
            _rescue(turn)


def want(turn: Turn, model: Model, why: Want, reason: str) -> Model:
    """Note that a model should be loaded, and queue it if it is not on its way."""
    stronger = BASE_PRIORITY[why] > BASE_PRIORITY[model.want]
    since = turn.now if model.want is Want.NONE else model.wanted_since
    if stronger:
        model = turn.change(model, want=why, wanted_since=since)
    if model.state is State.COLD:
        return turn.move(model, State.QUEUED, reason)
    if model.state is State.FAILED:
        turn.dirty = True
    if model.state in (State.DRAINING, State.UNLOADING) and not model.forget:
        model = turn.change(model, again=why)
    return model


def revive(turn: Turn) -> None:
    """Queue what failed, is wanted, and may be tried again now."""
    for name in list(turn.queue):
        model = turn.models[name]
        if model.state is not State.FAILED or model.booking:
            continue
        runtime = turn.runtimes.get(model.runtime)
        if runtime is not None and runtime.state is not RuntimeState.UP:
            continue
        if model.retry_at <= turn.now:
            turn.move(model, State.QUEUED, f"tried again: {model.want.value}")
        else:
            turn.wake(model.retry_at)


def aged(turn: Turn, model: Model) -> bool:
    return turn.now - model.wanted_since >= turn.policy.fairness_after_s


def priority(turn: Turn, model: Model) -> float:
    """Own or asked-for priority, plus one for each `fairness_after_s` waited."""
    asked = max((t.priority for t in turn.waiting(model)), default=None)
    own = BASE_PRIORITY[model.want]
    base = own if asked is None else max(own, asked)
    return base + (turn.now - model.wanted_since) // max(turn.policy.fairness_after_s, 0.001)


def _order(turn: Turn, model: Model) -> tuple[float, float, str]:
    return (-priority(turn, model), model.wanted_since, model.name)


def _loads_by_runtime(turn: Turn) -> dict[str, int]:
    loading: dict[str, int] = {}
    for name in turn.live:
        model = turn.models[name]
        if model.state is State.LOADING or (model.state is State.READY and model.op):
            loading[model.runtime] = loading.get(model.runtime, 0) + 1
    return loading


def _wait(turn: Turn, model: Model, reason: str) -> None:
    if model.reason != reason:
        turn.change(model, reason=reason)


def _serve(turn: Turn, model: Model, loading: dict[str, int]) -> None:
    runtime = turn.runtimes.get(model.runtime)
    if runtime is None:
        fail(turn, model, Failure("plugin", f"no runtime named {model.runtime}: install its plugin or enable it"))
        return
    found = spots(turn, model)
    never = never_fits(model, found) or _whole_never_fits(turn, model)
    if never is not None and turn.devices:
        fail(turn, model, Failure("never_fits", f"{model.name} {never}"))
        return
    if runtime.given_up:
        fail(turn, model, Failure("runtime_unavailable", f"{runtime.name} is down: {runtime.reason}"))
        return
    if runtime.state is not RuntimeState.UP:
        _wait(turn, model, f"waits for {runtime.name}, which is {runtime.state}: {runtime.reason}")
        return
    if not _parts_ready(turn, model):
        return
    if loading.get(model.runtime, 0) >= turn.policy.max_concurrent_loads:
        _wait(turn, model, f"waits for its turn: {turn.policy.max_concurrent_loads} loads under way")
        return
    for spot in found:
        if spot.need <= min(spot.free_now, spot.account.budget_bytes):
            loading[model.runtime] = loading.get(model.runtime, 0) + 1
            _load(turn, model, spot)
            return
    _make_room(turn, model, [s for s in found if s.need <= s.account.budget_bytes])


def _parts_ready(turn: Turn, model: Model) -> bool:
    """Whether all that it depends on is loaded; asks for what is not."""
    waiting: list[str] = []
    for name in model.spec.depends_on if model.spec else ():
        part = turn.models.get(name)
        if part is None or part.state in _BROKEN:
            why = part.reason if part is not None else "there is no such model in the repository"
            fail(turn, model, Failure("model_invalid", f"{model.name} is made of {name}: {why}"))
            return False
        if part.state is State.READY:
            continue
        if part.state is State.FAILED and part.retry_at > turn.now and part.failure and not part.blameless:
            fail(turn, model, Failure(part.failure.code, f"{model.name} is made of {name}: {part.failure.message}"))
            return False
        waiting.append(name)
        want(turn, part, Want.PART, f"{model.name} is made of it")
    if waiting:
        _wait(turn, model, f"waits for its parts: {', '.join(waiting)}")
    return not waiting


def _whole_never_fits(turn: Turn, model: Model) -> str | None:
    """Why a model that is made of others can't fit together with them."""
    parts = [turn.models[n] for n in _parts(turn, model) if n in turn.models]
    if not parts:
        return None
    need = model.estimate.memory_bytes + sum(p.estimate.memory_bytes for p in parts)
    kinds = {m.spec.device_kind for m in (model, *parts) if m.spec}
    budget = sum(a.budget_bytes for a in turn.devices.values() if a.kind in kinds)
    if need <= budget:
        return None
    return f"can never fit with its parts: they need {human(need)} together, and the budget is {human(budget)}"


def _load(turn: Turn, model: Model, spot: Spot) -> None:
    op = turn.new_id()
    booking = ((spot.account.id, spot.need),)
    spec = model.spec
    assert spec is not None
    model = turn.move(
        model,
        State.LOADING,
        f"{human_want(turn, model)}; {spot.arithmetic}",
        booking=booking,
        promise=(),
        op=op,
        op_since=turn.now,
        loaded_revision=spec.revision,
        rejected_revision=None,
        promised_to=None,
        again=Want.NONE,
    )
    turn.wake(turn.now + turn.policy.load_timeout_s)
    turn.out.append(Load(model.name, op, spec.runtime, booking, spec.revision, False, model.parameters))


def human_want(turn: Turn, model: Model) -> str:
    waiting = len(turn.waiting(model))
    return f"{model.want.value}, {waiting} waiting" if waiting else model.want.value


def _make_room(turn: Turn, model: Model, found: list[Spot]) -> None:
    """Drain the smallest set of victims on the device where that is least, and promise what they free."""
    old = aged(turn, model)
    for spot in found:
        if spot.shortage <= 0:
            _promise(turn, model, spot)
            _wait(turn, turn.models[model.name], f"waits for memory on its way back; {spot.arithmetic}")
            return
    urgent = model.want in _URGENT or bool(turn.waiting(model))
    worst = (Tier.BUSY if old else Tier.QUIET) if urgent else Tier.IDLE
    spare = frozenset(_parts(turn, model))
    best = None
    obstacles: list[str] = []
    for spot in found:
        choice = choose(turn, spot.account.id, spot.shortage, worst=worst, spare=spare)
        if choice.groups:
            size = sum(g.memory_bytes for g in choice.groups)
            key = (max(g.tier for g in choice.groups), size, spot.account.id)
            if best is None or key < best[0]:
                best = (key, spot, choice)
        elif choice.again_at is not None:
            turn.wake(choice.again_at)
        obstacles.extend(o for o in choice.obstacles if o not in obstacles)
    if best is not None:
        _, spot, choice = best
        _promise(turn, model, spot)
        names = [m.name for g in choice.groups for m in g.members]
        for group in choice.groups:
            for member in group.members:
                drain(turn, turn.models[member.name], f"evicted for {model.name}", promised_to=model.name)
        _wait(turn, turn.models[model.name], f"waits for {', '.join(names)} to make room; {spot.arithmetic}")
        return
    if not old:
        turn.wake(model.wanted_since + turn.policy.fairness_after_s)
    if not urgent and not model.tickets:
        turn.move(model, State.COLD, f"no room to spare: {_first(found)}", want=Want.NONE, promise=())
        return
    if old and found and not model.promise:
        _promise(turn, model, found[0])
    told = "; ".join(obstacles[:4]) + (f"; and {len(obstacles) - 4} more" if len(obstacles) > 4 else "")
    _wait(turn, turn.models[model.name], f"waits for room: {_first(found)}{'; ' + told if told else ''}")


def _first(found: list[Spot]) -> str:
    return found[0].arithmetic if found else "no device"


def _parts(turn: Turn, model: Model) -> list[str]:
    """The names of all that it depends on, directly or not."""
    names: list[str] = []
    todo = [model]
    while todo:
        spec = todo.pop().spec
        for name in spec.depends_on if spec else ():
            if name not in names:
                names.append(name)
                part = turn.models.get(name)
                if part is not None:
                    todo.append(part)
    return names


def _promise(turn: Turn, model: Model, spot: Spot) -> None:
    promise = ((spot.account.id, spot.need),)
    if model.promise != promise:
        turn.change(model, promise=promise)


def drain(turn: Turn, model: Model, reason: str, *, promised_to: str | None = None, again: Want = Want.NONE) -> Model:
    """Take a READY model out of use; it is unloaded once nothing of it runs."""
    op = turn.new_id()
    model = turn.move(
        model, State.DRAINING, reason, op=op, op_since=turn.now, extra=(), promised_to=promised_to, again=again,
        want=Want.NONE,
    )  # fmt: skip
    turn.wake(turn.now + turn.policy.drain_timeout_s)
    turn.out.append(CloseRoute(model.name, op))
    return model


def fail(turn: Turn, model: Model, failure: Failure, *, runtime_lost: bool = False) -> Model:
    """End a model's wait or load with a reason.

    When the runtime is at fault, those who wait go on waiting; when the model is, they are answered, and it is
    retried later and later, only for somebody who asks.
    """
    policy = turn.policy
    failures = model.failures + 1
    retry_s = min(policy.retry_s * 2 ** min(failures - 1, 16), policy.retry_max_s)
    give_up = not runtime_lost or failures > 3
    keep = model.want is Want.RESIDENT or not give_up
    model = turn.move(
        model,
        State.FAILED,
        failure.message,
        failure=failure,
        failures=failures,
        retry_at=turn.now + (1.0 if runtime_lost and not give_up else retry_s),
        op=0,
        booking=(),
        extra=(),
        promise=(),
        measured=(),
        promised_to=None,
        loaded_revision=None,
        want=model.want if keep else Want.NONE,
    )
    if give_up:
        model = turn.refuse_all(model, failure, model.retry_at - turn.now)
    turn.wake(model.retry_at)
    return model


def _replace_stale(turn: Turn, loading: dict[str, int]) -> None:
    """Bring loaded models whose files changed up to date: side by side where there is room, else one after another."""
    for name in list(turn.live):
        model = turn.models[name]
        spec = model.spec
        if model.state is not State.READY or model.op or spec is None or model.forget:
            continue
        if spec.revision in (model.loaded_revision, model.rejected_revision):
            continue
        runtime = turn.runtimes.get(spec.runtime)
        if runtime is None or runtime.state is not RuntimeState.UP:
            continue
        if loading.get(spec.runtime, 0) >= turn.policy.max_concurrent_loads:
            continue
        here = next((s for s in spots(turn, model) if model.booking and s.account.id == model.booking[0][0]), None)
        if here is not None and here.need <= here.free_now:
            op = turn.new_id()
            loading[spec.runtime] = loading.get(spec.runtime, 0) + 1
            extra = ((here.account.id, here.need),)
            turn.change(model, op=op, op_since=turn.now, extra=extra, reason="its files changed: the new ones load")
            turn.out.append(Load(name, op, spec.runtime, extra, spec.revision, True, model.parameters))
            turn.wake(turn.now + turn.policy.load_timeout_s)
        else:
            again = Want.RESIDENT if model.pinned or model.always_loaded else Want.RESTORE
            drain(turn, model, "its files changed, and there is no room for both", again=again)


def release(turn: Turn, model: Model, reason: str) -> Model:
    """Let a model that was wanted go back to COLD when nobody wants it any more."""
    if model.state is not State.QUEUED or model.tickets or model.want not in (Want.REQUEST, Want.NONE, Want.PERSON):
        return model
    return turn.move(model, State.COLD, reason, want=Want.NONE, promise=())


def _rescue(turn: Turn) -> None:
    """Promise nothing to a model that waits no longer, and take back what drains for nobody while it is wanted."""
    for name in list(turn.live):
        model = turn.models[name]
        if model.state not in (State.DRAINING, State.UNLOADING):
            continue
        if model.promised_to is not None:
            waiter = turn.models.get(model.promised_to)
            if waiter is None or waiter.state is not State.QUEUED:
                model = turn.change(model, promised_to=None)
        if turn.waiting(model):
            reopen(turn, model)


def reopen(turn: Turn, model: Model) -> bool:
    """Put a draining model back in use, unless its room is promised, or it drains for a reason of its own."""
    asked_gone = any(turn.tickets[i].gone for i in model.tickets)
    parts_going = any(
        (p := turn.models.get(n)) is None or p.state is not State.READY
        for n in (model.spec.depends_on if model.spec else ())
    )
    if (
        model.state is not State.DRAINING
        or model.promised_to is not None
        or model.again is not Want.NONE
        or model.forget
        or asked_gone
        or parts_going
    ):
        return False
    model = turn.move(model, State.READY, "wanted again before it was unloaded", op=0)
    turn.out.append(OpenRoute(model.name, model.runtime))
    admit(turn, model)
    return True


def admit(turn: Turn, model: Model) -> Model:
    """Grant all who wait for a READY model, and count them as in flight from this moment."""
    count = len(turn.waiting(model))
    model = turn.grant_all(model, gone=False)
    if not count:
        return model
    use = Use(model.use.in_flight + count, model.use.requests + count, turn.now, model.use.qps)
    return turn.change(model, use=use)
