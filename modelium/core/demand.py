"""What people and requests ask for."""

from __future__ import annotations

from dataclasses import replace

from modelium.core import events as e
from modelium.core.disk import give_up_load, keep_resident
from modelium.core.placement import human
from modelium.core.schedule import admit, drain, release, reopen, want
from modelium.core.states import State, Want
from modelium.core.turn import Turn
from modelium.core.world import Failure, Model, Runtime, Ticket


def ready_asked(turn: Turn, event: e.ReadyAsked) -> None:
    ticket = Ticket(event.ticket, event.name, event.at, event.deadline_at, event.priority)
    model = turn.models.get(event.name)
    if model is None or model.spec is None or model.forget:
        turn.refuse(ticket, _unknown(turn, event.name))
        return
    if model.state is State.INVALID:
        turn.refuse(ticket, model.failure or Failure("model_invalid", model.reason))
        return
    if event.person:
        model = turn.change(model, retry_at=0.0, failures=0)
        runtime = turn.runtimes.get(model.runtime)
        if runtime is not None and runtime.given_up:
            turn.runtimes = turn.runtimes.set(runtime.name, _another_chance(runtime, turn.now))
            turn.wake(turn.now)
    runtime = turn.runtimes.get(model.runtime)
    if runtime is not None and runtime.given_up:
        turn.refuse(ticket, Failure("runtime_unavailable", f"{runtime.name} is down: {runtime.reason}"))
        return
    if model.state is State.FAILED and model.retry_at > event.at and not model.blameless:
        failure = model.failure or Failure("model_failed", model.reason)
        turn.refuse(ticket, failure, model.retry_at - event.at)
        return
    if event.parameters is not None and event.parameters != model.parameters:
        model = turn.change(model, parameters=dict(event.parameters))
        if model.state is State.READY and not model.op:
            model = turn.change(model, loaded_revision=None, rejected_revision=None)
    if model.state is State.READY and (event.parameters is None or not _stale(model)):
        _hold(turn, ticket)
        admit(turn, turn.models[model.name])
        return
    full = _queue_full(turn, model)
    if full is not None:
        turn.refuse(ticket, Failure("queue_full", full), max(1.0, model.estimate.load_s))
        return
    model = _hold(turn, ticket)
    turn.wake(ticket.deadline_at)
    if model.state is State.READY:
        turn.dirty = True
    elif not reopen(turn, model):
        want(turn, model, Want.PERSON if event.person else Want.REQUEST, "asked for")
        turn.dirty = True


def _stale(model: Model) -> bool:
    return bool(model.op) or (model.spec is not None and model.loaded_revision != model.spec.revision)


def _another_chance(runtime: Runtime, now: float) -> Runtime:
    return replace(runtime, crashes=(), retry_at=now)


def _hold(turn: Turn, ticket: Ticket) -> Model:
    turn.tickets = turn.tickets.set(ticket.id, ticket)
    model = turn.models[ticket.model]
    return turn.change(model, tickets=(*model.tickets, ticket.id))


def _unknown(turn: Turn, name: str) -> Failure:
    on_its_way = [m for m in (f"incoming/{name}",) if m in turn.models]
    if on_its_way:
        return Failure("model_not_found", f"{name} is not in the repository yet: {turn.models[on_its_way[0]].reason}")
    return Failure("model_not_found", f"there is no model named {name}; `modelium ps` lists those there are")


def _queue_full(turn: Turn, model: Model) -> str | None:
    policy = turn.policy
    if len(model.tickets) >= policy.max_queue_per_model:
        return f"{len(model.tickets)} requests wait for {model.name} already (max_queue_per_model)"
    if len(turn.tickets) >= policy.max_queue:
        return f"{len(turn.tickets)} requests wait already (max_queue)"
    return None


def unload_asked(turn: Turn, event: e.UnloadAsked) -> None:
    ticket = Ticket(event.ticket, event.name, event.at, event.deadline_at, gone=True)
    model = turn.models.get(event.name)
    if model is None or model.spec is None:
        turn.refuse(ticket, _unknown(turn, event.name))
        return
    if model.always_loaded:
        turn.refuse(ticket, Failure("model_conflict", f"{model.name} is always loaded by configuration"))
        return
    if model.pinned:
        turn.refuse(ticket, Failure("model_conflict", f"{model.name} is pinned: unpin it first"))
        return
    needed = [m.name for m in turn.live_dependents(model.name)]
    if needed:
        turn.refuse(ticket, Failure("model_conflict", f"{', '.join(needed)} needs it: unload that first"))
        return
    match model.state:
        case State.READY:
            _hold(turn, ticket)
            drain(turn, turn.change(turn.models[model.name], parameters={}), "unload asked for")
            turn.wake(ticket.deadline_at)
        case State.LOADING:
            turn.refuse_all(model, Failure("model_conflict", f"{model.name} is being unloaded on request"), 1.0)
            _hold(turn, ticket)
            give_up_load(turn, turn.models[model.name], "unload asked for")
            turn.wake(ticket.deadline_at)
        case State.DRAINING | State.UNLOADING | State.RECOVERING:
            turn.change(_hold(turn, ticket), again=Want.NONE)
            turn.wake(ticket.deadline_at)
        case State.QUEUED:
            model = turn.refuse_all(model, Failure("model_conflict", f"{model.name} was unloaded on request"), 1.0)
            turn.move(model, State.COLD, "unload asked for", want=Want.NONE, promise=())
            turn.grant(ticket)
        case State.FAILED:
            model = turn.refuse_all(model, Failure("model_conflict", f"{model.name} was unloaded on request"), 1.0)
            if not model.booking:
                turn.move(model, State.COLD, "reset", want=Want.NONE, failure=None, failures=0, retry_at=0.0)
                turn.grant(ticket)
            else:
                turn.refuse(ticket, Failure("driver", f"{model.name} is stuck: {model.reason}"))
        case _:
            turn.grant(ticket)


def ticket_withdrawn(turn: Turn, event: e.TicketWithdrawn) -> None:
    ticket = turn.tickets.get(event.ticket)
    if ticket is None:
        return
    turn.tickets = turn.tickets.delete(ticket.id)
    model = turn.models.get(ticket.model)
    if model is not None:
        left = tuple(i for i in model.tickets if i != ticket.id)
        released(turn, turn.change(model, tickets=left), "nobody waits for it any more")


def released(turn: Turn, model: Model, reason: str) -> None:
    """What follows when the number of those who wait for a model went down."""
    model = release(turn, model, reason)
    if model.state is State.FAILED and not model.tickets and model.want in (Want.REQUEST, Want.PERSON):
        turn.change(model, want=Want.NONE)
    for name in model.spec.depends_on if model.spec else ():
        part = turn.models.get(name)
        if part is None or part.want is not Want.PART or part.state is not State.QUEUED or part.tickets:
            continue
        dependents = (turn.models.get(n) for n in turn.dependents.get(name, ()))
        if not any(d is not None and d.want is not Want.NONE for d in dependents):
            turn.move(part, State.COLD, reason, want=Want.NONE, promise=())


def expired(turn: Turn, ticket: Ticket) -> None:
    """Answer somebody whose deadline has passed, with what stood in the way."""
    model = turn.models[ticket.model]
    waited = turn.now - ticket.since
    what = "unloaded" if ticket.gone else "ready"
    need = "" if ticket.gone else f" (needs {human(model.estimate.memory_bytes)})"
    message = f"{model.name} was not {what} within {waited:.0f} s{need}: it is {model.state}, {model.reason}"
    turn.refuse(ticket, Failure("deadline_passed", message), max(1.0, model.estimate.load_s))
    released(turn, turn.models[ticket.model], "nobody waits for it any more")


def pin_asked(turn: Turn, event: e.PinAsked) -> None:
    model = turn.models.get(event.name)
    if model is None or model.spec is None:
        return
    model = turn.change(model, pinned=event.pinned)
    if event.pinned:
        keep_resident(turn, model)
    elif model.want is Want.RESIDENT and not model.always_loaded:
        model = turn.change(model, want=Want.NONE)
        release(turn, model, "unpinned before it was loaded")
    turn.dirty = turn.dirty or bool(turn.queue)
