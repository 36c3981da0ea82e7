"""Bringing loaded models up to date whose files, plan or parameters changed."""

from __future__ import annotations

from modelium.core.instructions import Load
from modelium.core.line import loads
from modelium.core.loading import keep_old
from modelium.core.moves import drain
from modelium.core.placement import never_fits, spots
from modelium.core.runtimes import HAS_A_FOLDER
from modelium.core.states import RuntimeState, State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Held, Model, Spec


def replace_stale(turn: Turn) -> None:
    """Side by side where there is room, the old one serving until the new one is ready; else one after another."""
    for name in sorted(turn.stale):
        model = turn.models[name]
        spec = model.spec
        if model.state is not State.READY or model.op or model.forget or model.invalid is not None or spec is None:
            continue
        if spec == model.rejected:
            continue
        if model.retry_at > turn.now:
            turn.wake(model.retry_at)
            continue
        runtime = turn.runtimes.get(spec.runtime)
        if runtime is None or runtime.state is not RuntimeState.UP or runtime.recycle:
            continue
        _bring_up_to_date(turn, model, spec)


def _bring_up_to_date(turn: Turn, model: Model, spec: Spec) -> None:
    found = spots(turn, model)
    never = never_fits(turn, model, found)
    if never is not None:
        model = turn.change(model, coming=Held(spec, model.parameters))
        keep_old(turn, model, Failure("never_fits", f"{model.name} {never}"))
        return
    parts = [turn.models.get(n) for n in spec.depends_on]
    if any(p is None or p.forget or p.state in (State.INVALID, State.FAILED) for p in parts):
        _say(turn, model, "its files changed, but not all that they are made of can be loaded")
        return
    here = next((s for s in found if sorted(d for d, _ in s.booking) == sorted(model.placed)), None)
    if here is not None and not here.seen:
        _say(turn, model, f"its files changed: the new ones wait to load; {here.arithmetic}")
        return
    together = (
        here is not None
        and here.fits_now
        and model.held is not None
        and model.held.spec.runtime == spec.runtime
        and all(p is not None and p.state is State.READY for p in parts)
    )
    if here is None or not together:
        _one_after_another(turn, model)
        return
    if loads(turn).count(spec.runtime) >= turn.policy.max_concurrent_loads:
        _say(turn, model, "its files changed: the new ones wait for their turn to load")
        return
    op = turn.new_id()
    extra = here.taken
    turn.change(
        model,
        op=op,
        op_since=turn.now,
        extra=extra,
        coming=Held(spec, model.parameters),
        reason="its files changed: the new ones load",
    )
    turn.out.append(Load(model.name, op, spec.runtime, extra, spec.revision, True, model.parameters))
    turn.wake(turn.now + turn.policy.load_timeout_s)


def _one_after_another(turn: Turn, model: Model) -> None:
    """Unload it, and with it what is made of it, to load it anew."""
    going = [model]
    for member in going:
        for whole in turn.live_dependents(member.name):
            if whole.state is not State.READY or whole.op:
                _say(turn, model, f"its files changed: the new ones wait for {whole.name}, which is {whole.state}")
                return
            if whole not in going:
                going.append(whole)
    for member in reversed(going):
        why = "there is no room for both" if member is model else f"{model.name} is a part of it"
        reason = HAS_A_FOLDER if member.visits else f"its files changed, and {why}"
        drain(turn, turn.models[member.name], reason, again=Want.RESTORE)


def _say(turn: Turn, model: Model, reason: str) -> None:
    if model.reason != reason:
        turn.change(model, reason=reason)
