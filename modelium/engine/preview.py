"""What would happen to a drop: the same inspection, plan and judgement, on a copy of the world that is thrown away."""

from __future__ import annotations

from pathlib import Path

from modelium.api.names import check_model_name, name_of_drop
from modelium.api.types import Severity
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.placement import spots
from modelium.core.states import State
from modelium.core.step import steps
from modelium.core.turn import Turn
from modelium.core.world import Spec
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.store import measurement_key
from modelium.engine.views import PlanPreview
from modelium.errors import ModelConflict, ModelError, ModeliumError


async def preview(engine: Orchestrator, path: Path, name: str | None = None) -> PlanPreview:
    if name is None:
        name = path.name if path.is_dir() else name_of_drop(path.name)
    if not path.exists():
        raise ModelError(f"{path} does not exist, or the user that runs Modelium may not see it", code="not_found")
    try:
        check_model_name(name)
        told = await engine.inspector.completeness(path)
        if told is not None and not told.complete:
            raise ModelError(f"incomplete: {told.reason}")
        inspection = await engine.inspector.inspect(path)
    except ModeliumError as exc:
        return PlanPreview(name=name, analysis=None, findings=(), plan=None, layout=None, refused=exc.message)
    analysis, findings = inspection.analysis, inspection.findings
    bad = [f.message for f in findings if f.severity is Severity.REFUSE]
    convert = [f.message for f in findings if f.severity is Severity.CONVERT]
    if bad or analysis is None:
        why = "; ".join(bad) or ("it is converted first: " + "; ".join(convert) if convert else "no analyzer knows it")
        return PlanPreview(name=name, analysis=analysis, findings=findings, plan=None, layout=None, refused=why)
    try:
        if name in engine.catalog.known:
            raise ModelConflict(f"a model named {name} is there already")
        await engine.runtimes_known()
        plan = engine.planner.plan(name, inspection)
        offers = engine.planner.offers(analysis)
        layout = engine.planner.layout(name, analysis, plan)
    except ModeliumError as exc:
        return PlanPreview(name=name, analysis=analysis, findings=findings, plan=None, layout=None, refused=exc.message)
    now = engine.clock()
    measured_as = measurement_key(inspection.content_key, plan)
    estimate = engine.planner.estimate(measured_as, plan, analysis.weights_bytes)
    spec = Spec(plan.runtime, plan.device_kind, "preview", analysis.depends_on, plan.devices, plan.elastic)
    loop = engine.loop
    world, dropped = steps(loop.exact(), [e.ModelAccepted(now, name, spec, estimate, dropped=True)], loop.policy)
    would_load = any(isinstance(x, i.Load) and x.name == name for x in dropped)
    model = world.models[name]
    asked, orders = steps(world, [e.ReadyAsked(now, -1, name, now + 300.0)], loop.policy)
    evicted = {x.name for x in (*dropped, *orders) if isinstance(x, i.CloseRoute | i.Unload)}
    refused = next((x.message for x in orders if isinstance(x, i.Refuse) and x.ticket == -1), None)
    loads = [x for x in (*dropped, *orders) if isinstance(x, i.Load) and x.name == name]
    turn = Turn(loop.world, loop.policy, now)
    waiting = asked.models[name]
    room = "; ".join(s.arithmetic for s in spots(turn, model))
    if waiting.state is State.QUEUED:
        room = f"{room}; a request would find that it {waiting.reason}"
    return PlanPreview(
        name=name,
        analysis=analysis,
        findings=findings,
        plan=plan,
        layout=layout,
        device=" ".join(d for d, _ in loads[0].booking) if loads else None,
        would_load=would_load,
        would_evict=tuple(sorted(evicted)),
        refused=refused,
        room=room,
        installs=next((o.requires for o in offers if (o.runtime, o.serving) == (plan.runtime, plan.serving)), ()),
    )
