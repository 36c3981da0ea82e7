"""The world as views: what people and programs are shown."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from modelium.api.units import human
from modelium.core.placement import spots
from modelium.core.standby import parked_as
from modelium.core.states import RuntimeState, State
from modelium.core.turn import Turn
from modelium.core.world import Account, Model, queued
from modelium.engine.ledger import Holding
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.runtimes import Running
from modelium.engine.views import DataPathView, DeviceView, Explanation, ModelDetail, ModelView, RuntimeView
from modelium.errors import ModeliumError


def view(engine: Orchestrator, model: Model) -> ModelView:
    return ModelView(**_fields(engine, model, engine.clock()))


def _fields(engine: Orchestrator, model: Model, now: float) -> dict[str, Any]:
    known = engine.catalog.known.get(model.name)
    usage = engine.usage.get(model.name)
    loaded = model.state in (State.READY, State.DRAINING)
    booked = sum(n for _, n in model.booking)
    waiting = [t for t in model.tickets if not engine.loop.world.tickets[t].gone]
    last_used = max(model.busy_since, usage.last_used if usage else 0.0)
    return {
        "name": model.name,
        "state": str(model.state),
        "reason": model.reason,
        "since": model.since,
        "runtime": model.runtime or None,
        "serving": known.plan.serving if known else None,
        "format": known.format if known else None,
        "task": known.task if known else None,
        "summary": known.summary if known else "",
        "created_at": known.created_at if known else None,
        "devices": tuple(d for d, _ in model.booking),
        "memory_bytes": booked or model.estimate.memory_bytes,
        "memory_source": "measured" if model.measured or model.estimate.measured else "estimated",
        "pinned": model.pinned,
        "always_loaded": model.always_loaded,
        "in_flight": usage.in_flight if usage else 0,
        "waiting": len(waiting),
        "requests": usage.requests if usage else 0,
        "failures": usage.failures if usage else 0,
        "qps": round(usage.qps(now), 3) if usage else 0.0,
        "idle_s": round(max(0.0, now - last_used), 1) if loaded else None,
        "retry_after_s": round(max(0.0, model.retry_at - now), 1) if model.state is State.FAILED else None,
        "progress": engine.progress.get(model.name),
    }


def outlook(engine: Orchestrator, model: Model) -> dict[str, Any]:
    """How far a model that is wanted is: `expected_s` is None where nobody can tell."""
    expected_s: float | None = model.estimate.load_s
    if model.state is State.LOADING:
        expected_s = _left_s(engine, model)
    elif model.state in (State.PARKING, State.STANDBY):
        how = parked_as(model)
        expected_s = how.wake_s if how is not None else None
    elif model.state not in (State.QUEUED, State.COLD, State.UNLOADING, State.DRAINING):
        expected_s = None
    progress = engine.progress.get(model.name)
    return {
        "model": model.name,
        "state": str(model.state),
        "progress": progress.model_dump() if progress is not None else None,
        "expected_s": round(expected_s, 1) if expected_s is not None else None,
    }


def _left_s(engine: Orchestrator, model: Model) -> float:
    """Seconds until a load, or a wake, should be done."""
    how = parked_as(model)
    return max(0.0, model.op_since + (model.estimate.load_s if how is None else how.wake_s) - engine.clock())


async def detail(engine: Orchestrator, model: Model) -> ModelDetail:
    known = engine.catalog.known.get(model.name)
    inspection = None
    if known is not None:
        try:
            inspection = (await asyncio.to_thread(engine.catalog.manifest, model.name)).inspection
        except ModeliumError:
            inspection = None
    world = engine.loop.world
    return ModelDetail(
        **_fields(engine, model, engine.clock()),
        path=str(known.path) if known else str(engine.place_of(model.name)),
        revision=model.spec.revision if model.spec else "",
        loaded_revision=model.loaded_revision,
        load_s=model.estimate.load_s,
        plan=known.plan if known else None,
        analysis=inspection.analysis if inspection else None,
        findings=inspection.findings if inspection else (),
        depends_on=model.spec.depends_on if model.spec else (),
        dependents=world.dependents.get(model.name, ()),
    )


async def explanation(engine: Orchestrator, model: Model) -> Explanation:
    known = engine.catalog.known.get(model.name)
    turn = Turn(engine.loop.world, engine.loop.policy, engine.clock())
    return Explanation(
        model=await detail(engine, model),
        estimate_bytes=known.plan.memory_bytes if known else 0,
        measured=engine.store.measurement(known.measured_as) if known else None,
        room="; ".join(_room(turn, model)),
        next=_next(engine, model),
        transitions=tuple(engine.journal.last(model.name, 20)),
    )


def _room(turn: Turn, model: Model) -> list[str]:
    if model.booking:
        return [
            f"holds {human(size)} on {device}: {human(turn.devices[device].booked_bytes)} of "
            f"{human(turn.devices[device].limit_bytes)} booked in all"
            for device, size in model.booking
            if device in turn.devices
        ]
    return [s.arithmetic + (f" = {human(s.free_now)} free" if s.seen else "") for s in spots(turn, model)]


def _next(engine: Orchestrator, model: Model) -> str:
    policy = engine.loop.policy
    now = engine.clock()
    match model.state:
        case State.COLD:
            return "a request, `modelium load` or `modelium pin` loads it"
        case State.INVALID if model.name.startswith("quarantine/"):
            return "moved back into the incoming folder it is looked at again; `modelium rm` takes it away"
        case State.INVALID:
            return "when its files change it is looked at again; `modelium rm` takes it away"
        case State.DISCOVERED:
            return "it is accepted once it is complete and passed"
        case State.QUEUED:
            return f"it loads when there is room: {model.reason}"
        case State.LOADING:
            return f"it is READY in about {_left_s(engine, model):.0f} s"
        case State.READY if model.always_loaded or model.pinned:
            return f"it stays: it is {'always loaded by configuration' if model.always_loaded else 'pinned'}"
        case State.READY if model.use.in_flight:
            return "it is in use"
        case State.READY:
            idle_at = max(0.0, model.busy_since + policy.idle_s - now)
            return (
                f"without a request it may be evicted for others' sake at any time after its minimum stay, is first "
                f"to go in {idle_at:.0f} s, and is unloaded in {idle_at + policy.idle_s:.0f} s"
            )
        case State.DRAINING:
            return "it is unloaded, or put to sleep, when nothing of it is in flight"
        case State.PARKING:
            return "it is STANDBY once its device's memory is back"
        case State.STANDBY if queued(model):
            return f"it wakes when there is room: {model.reason}"
        case State.STANDBY:
            how = parked_as(model)
            return (
                f"a request wakes it{f' in about {how.wake_s:.2g} s' if how is not None else ''}; it is unloaded when "
                f"its memory is needed for what is loaded, or for a model that saves more time by sleeping"
            )
        case State.UNLOADING:
            return "it is COLD once its runtime confirms that it is gone"
        case State.FAILED:
            return f"the next request after {max(0.0, model.retry_at - now):.0f} s, or `modelium load`, tries it again"
        case _:
            return "its runtime is being asked what it holds"


def devices(engine: Orchestrator) -> tuple[DeviceView, ...]:
    world = engine.loop.world
    holders: dict[str, list[str]] = {}
    for name in world.live:
        for device, _ in world.models[name].booking:
            holders.setdefault(device, []).append(name)
    measured = engine.runtimes.held()
    return tuple(
        _device(engine, a, holders, measured.get(a.id, 0)) for a in sorted(world.devices.values(), key=lambda a: a.id)
    )


def _device(engine: Orchestrator, account: Account, holders: Mapping[str, list[str]], measured: int) -> DeviceView:
    holding = engine.ledger.holdings.get(account.id, Holding())
    overhead = sum(r.overhead.get(account.id, 0) for r in engine.running.values()) + holding.service_bytes
    return DeviceView(
        id=account.id,
        kind=account.kind,
        name=account.name,
        total_bytes=account.total_bytes,
        used_bytes=account.used_bytes,
        budget_bytes=account.budget_bytes,
        booked_bytes=account.booked_bytes,
        promised_bytes=account.promised_bytes,
        measured_bytes=measured,
        overhead_bytes=overhead,
        foreign_bytes=holding.foreign_bytes,
        unexplained_bytes=max(0, account.used_bytes - measured - overhead - holding.foreign_bytes),
        foreign=holding.foreign,
        utilization=account.utilization,
        models=tuple(sorted(holders.get(account.id, ()))),
    )


def runtimes(engine: Orchestrator) -> tuple[RuntimeView, ...]:
    now = engine.clock()
    views = []
    for name, runtime in sorted(engine.loop.world.runtimes.items()):
        running = engine.running[name]
        reason = runtime.reason
        if runtime.state is RuntimeState.UP:
            reason = _missing(running) or reason
        if runtime.retry_at > now and math.isfinite(runtime.retry_at):
            reason += f"; tried again in {runtime.retry_at - now:.0f} s"
        if runtime.given_up:
            reason += "; it is left down: mend it, then `modelium load` any model of it"
        views.append(
            RuntimeView(
                name=name,
                state=str(runtime.state),
                reason=reason,
                since=runtime.since,
                info=running.info,
                foreign_models=runtime.foreign,
                progress=running.progress if runtime.state is RuntimeState.STARTING else None,
                residue_bytes=engine.store.residue.get(name, {}),
            )
        )
    return tuple(views)


def _missing(running: Running) -> str:
    """What an UP runtime can't answer without; empty where it answers."""
    facts = running.info.facts if running.info is not None and not running.loaded else {}
    if facts.get("installed") is False:
        install = facts.get("install")
        how = f"`{install}`, then start Modelium again" if install else "it is installed with its first model"
        return f"not installed: {how}"
    return "starts with its first model" if facts.get("running") is False else ""


def data_path(engine: Orchestrator) -> DataPathView:
    fast = engine.fast
    if fast is None:
        return DataPathView(name="service")
    return DataPathView(name=fast.name, state="DOWN" if fast.trouble else "UP", reason=fast.trouble, info=fast.info)
