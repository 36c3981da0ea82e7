"""What people and requests ask for."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from modelium.api.units import human
from modelium.core import events as e
from modelium.core.moves import admit, drain, drop_outdated, give_up_load, keep_resident, reopen, want
from modelium.core.states import State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Model, Runtime, Ticket, queued


def ready_asked(turn: Turn, event: e.ReadyAsked) -> None:
    ticket = Ticket(
        event.ticket, event.name, event.at, event.deadline_at, event.priority, person=event.person,
        particular=event.parameters is not None,
    )  # fmt: skip
    model = turn.models.get(event.name)
    if model is None or model.forget or (model.spec is None and model.state is not State.INVALID):
        turn.refuse(ticket, _unknown(turn, event.name))
        return
    if model.spec is None or model.state is State.INVALID:
        turn.refuse(ticket, model.failure or Failure("model_invalid", model.reason))
        return
    if event.person:
        model = turn.change(model, retry_at=0.0, failures=0, rejected=None)
        turn.dirty = True
        runtime = turn.runtimes.get(model.home)
        if runtime is not None and runtime.given_up:
            turn.runtimes = turn.runtimes.set(runtime.name, _another_chance(runtime, turn.now))
            turn.wake(turn.now)
    held = model.held
    as_asked = event.parameters is None or (
        model.coming is None and held is not None and (held.spec, held.parameters) == (model.spec, event.parameters)
    )
    if model.state is State.READY and as_asked:
        admit(turn, turn.hold(ticket))
        return
    refusal = _hopeless(turn, model)
    if refusal is not None:
        turn.refuse(ticket, *refusal)
        return
    if event.parameters is not None:
        model = turn.change(model, parameters=dict(event.parameters), rejected=None)
    first = all(t.priority < ticket.priority for t in turn.waiting(model))
    model = turn.hold(ticket)
    turn.wake(ticket.deadline_at)
    if not reopen(turn, model):
        model = want(turn, turn.models[model.name], Want.PERSON if event.person else Want.REQUEST, "asked for")
        if model.state in (State.FAILED, State.READY) or (first and queued(model)):
            turn.dirty = True
        drop_outdated(turn, model)


def _hopeless(turn: Turn, model: Model) -> tuple[Failure, float | None] | None:
    """Why there is no use in waiting, and after how many seconds there may be."""
    runtime = turn.runtimes.get(model.home)
    if runtime is None and model.state is State.RECOVERING:
        return Failure("plugin", f"no runtime named {model.home}: install its plugin or enable it"), None
    if runtime is not None and runtime.given_up:
        again_s = runtime.retry_at - turn.now if isfinite(runtime.retry_at) else None
        return Failure("runtime_unavailable", f"{runtime.name} is down: {runtime.reason}"), again_s
    if model.state is State.FAILED and model.held is None and model.retry_at > turn.now and not model.blameless:
        return model.failure or Failure("model_failed", model.reason), model.retry_at - turn.now
    policy = turn.policy
    if len(model.tickets) >= policy.max_queue_per_model:
        full = f"{len(model.tickets)} requests wait for {model.name} already (max_queue_per_model)"
    elif len(turn.tickets) >= policy.max_queue:
        full = f"{len(turn.tickets)} requests wait already (max_queue)"
    else:
        return None
    return Failure("queue_full", full), max(1.0, model.estimate.load_s)


def _another_chance(runtime: Runtime, now: float) -> Runtime:
    return replace(runtime, crashes=(), retry_at=now, given_up=False)


def _unknown(turn: Turn, name: str) -> Failure:
    drop = turn.models.get(f"incoming/{name}")
    if drop is not None:
        return Failure("model_not_found", f"{name} is not in the repository yet: {drop.reason}")
    return Failure("model_not_found", f"there is no model named {name}; `modelium ps` lists those there are")


def unload_asked(turn: Turn, event: e.UnloadAsked) -> None:
    ticket = Ticket(event.ticket, event.name, event.at, event.deadline_at, gone=True)
    model = turn.models.get(event.name)
    if model is None or model.spec is None:
        turn.refuse(ticket, _unknown(turn, event.name))
        return
    if model.spec.guest:
        told = f"{model.name} is not ours to unload: {model.runtime} serves it of its own accord"
        turn.refuse(ticket, Failure("model_conflict", told))
        return
    if model.always_loaded:
        turn.refuse(ticket, Failure("model_conflict", f"{model.name} is always loaded by configuration"))
        return
    if model.pinned:
        turn.refuse(ticket, Failure("model_conflict", f"{model.name} is pinned: unpin it first"))
        return
    needed = [m.name for m in turn.live_dependents(model.name)]
    if needed and model.held is not None:
        turn.refuse(ticket, Failure("model_conflict", f"{', '.join(needed)} needs it: unload that first"))
        return
    if model.state is State.FAILED and model.held is not None:
        turn.refuse(ticket, Failure("driver", f"{model.name} is stuck: {model.reason}"))
        return
    if model.state is State.RECOVERING:
        refusal = _hopeless(turn, model)
        if refusal is not None:
            turn.refuse(ticket, *refusal)
            return
    model = turn.refuse_waiting(model, Failure("model_conflict", f"{model.name} was unloaded on request"), 1.0)
    match model.state:
        case State.READY:
            turn.hold(ticket)
            drain(turn, turn.change(turn.models[model.name], parameters={}), "unload asked for")
            turn.wake(ticket.deadline_at)
        case State.LOADING | State.PARKING | State.STANDBY:
            turn.hold(ticket)
            model = turn.change(turn.models[model.name], parameters={}, want=Want.NONE, again=Want.NONE)
            give_up_load(turn, model, "unload asked for")
            turn.wake(ticket.deadline_at)
        case State.DRAINING | State.UNLOADING | State.RECOVERING:
            turn.change(turn.hold(ticket), again=Want.NONE, want=Want.NONE, parameters={})
            turn.wake(ticket.deadline_at)
        case State.QUEUED | State.FAILED:
            turn.move(
                model, State.COLD, "unload asked for", want=Want.NONE, promise=(), failure=None, failures=0,
                retry_at=0.0, parameters={},
            )  # fmt: skip
            turn.grant(ticket)
        case _:
            turn.grant(ticket)


def ticket_withdrawn(turn: Turn, event: e.TicketWithdrawn) -> None:
    ticket = turn.tickets.get(event.ticket)
    if ticket is not None:
        turn.let_go(ticket)
        turn.dirty = turn.dirty or not turn.models[ticket.model].tickets


def expired(turn: Turn, ticket: Ticket) -> None:
    """Answer somebody whose deadline has passed, with what stood in the way."""
    model = turn.models[ticket.model]
    waited = turn.now - ticket.since
    what = "unloaded" if ticket.gone else "ready"
    need = "" if ticket.gone else f" (needs {human(model.estimate.memory_bytes)})"
    message = f"{model.name} was not {what} within {waited:.3g} s{need}: it is {model.state}, {model.reason}"
    turn.let_go(ticket)
    turn.refuse(ticket, Failure("deadline_passed", message), max(1.0, model.estimate.load_s))
    turn.dirty = True


def pin_asked(turn: Turn, event: e.PinAsked) -> None:
    model = turn.models.get(event.name)
    if model is None or model.spec is None or model.forget:
        return
    model = turn.change(model, pinned=event.pinned)
    if model.kept:
        keep_resident(turn, model)
    turn.dirty = turn.dirty or bool(turn.queue)
