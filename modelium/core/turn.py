"""One step in the making: the next world and its instructions, kept consistent by few primitives.

All changes of a model's state, of memory booked and of tickets go through a Turn, so that indexes and sums are right
by construction and every transition is told with its reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modelium.api.types import Transition
from modelium.core.instructions import Forget, Grant, Instruction, Refuse, Tell, WakeAt
from modelium.core.states import BIRTH, RUNTIME_TRANSITIONS, TRANSITIONS, RuntimeState, State
from modelium.core.world import Account, Booking, Failure, Model, Policy, Runtime, Ticket, World, is_live, waits


class IllegalTransition(Exception):
    """A bug: a step tried what the table does not have."""


class Turn:
    def __init__(self, world: World, policy: Policy, now: float):
        self.start = world
        self.policy = policy
        self.now = now
        self.models = world.models
        self.devices = world.devices
        self.runtimes = world.runtimes
        self.tickets = world.tickets
        self.live = world.live
        self.queue = world.queue
        self.dependents = world.dependents
        self.next_id = world.next_id
        self.next_sweep = world.next_sweep
        self.out: list[Instruction] = []
        self.dirty = False
        """Room, demand or a runtime changed: the queue should be looked at."""
        self._decision = 0
        self._wake: float | None = None

    def finish(self) -> tuple[World, list[Instruction]]:
        if self._wake is not None:
            self.out.append(WakeAt(self._wake))
        world = World(
            self.models, self.devices, self.runtimes, self.tickets, self.live, self.queue, self.dependents,
            self.next_id, self.next_sweep,
        )  # fmt: skip
        return world, self.out

    # ------------------------------------------------------------------ ids, time, words

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    @property
    def decision(self) -> int:
        if not self._decision:
            self._decision = self.new_id()
        return self._decision

    def wake(self, at: float) -> None:
        if self._wake is None or at < self._wake:
            self._wake = at

    def tell(self, subject: str, before: str, after: str, reason: str) -> None:
        self.out.append(
            Tell(
                Transition(
                    decision=self.decision, at=self.now, subject=subject, before=before, after=after, reason=reason
                )
            )
        )

    # ------------------------------------------------------------------ models

    def put(self, model: Model) -> Model:
        """Store a record and keep the indexes and the devices' sums right."""
        old = self.models.get(model.name)
        old_bookings = _bookings(old) if old is not None else ()
        new_bookings = _bookings(model)
        if old_bookings != new_bookings:
            self._settle(old_bookings, -1)
            self._settle(new_bookings, 1)
        self.models = self.models.set(model.name, model)
        if (old is not None and is_live(old)) != (live := is_live(model)):
            self.live = self.live.set(model.name, None) if live else self.live.delete(model.name)
        if (old is not None and waits(old)) != (waiting := waits(model)):
            self.queue = self.queue.set(model.name, None) if waiting else self.queue.delete(model.name)
        return model

    def change(self, model: Model, **changes: Any) -> Model:
        return self.put(replace(model, **changes))

    def born(self, model: Model) -> Model:
        if model.state not in BIRTH:
            raise IllegalTransition(f"{model.name} can't begin as {model.state}")
        self.put(model)
        if model.spec is not None:
            for part in model.spec.depends_on:
                self._depend(part, model.name, True)
        self.tell(model.name, "", model.state, model.reason)
        return model

    def move(self, model: Model, state: State, reason: str, **changes: Any) -> Model:
        """Take a model to another state, with the reason that people will read."""
        if state not in TRANSITIONS[model.state]:
            raise IllegalTransition(f"{model.name}: {model.state} to {state} ({reason})")
        self.tell(model.name, model.state, state, reason)
        self.dirty = True
        return self.put(replace(model, state=state, since=self.now, reason=reason, **changes))

    def forget(self, model: Model, reason: str) -> None:
        """Let go of a record that holds nothing."""
        self.refuse_all(model, Failure("model_not_found", f"{model.name} is gone: {reason}"))
        model = self.models[model.name]
        self.put(replace(model, state=State.COLD, booking=(), extra=(), promise=(), tickets=()))
        if model.spec is not None:
            for part in model.spec.depends_on:
                self._depend(part, model.name, False)
        self.models = self.models.delete(model.name)
        self.tell(model.name, model.state, "", reason)
        self.out.append(Forget(model.name))
        self.dirty = True

    def respec(self, model: Model, **changes: Any) -> Model:
        """Change a record whose spec may change too."""
        for part in model.spec.depends_on if model.spec else ():
            self._depend(part, model.name, False)
        model = self.change(model, **changes)
        for part in model.spec.depends_on if model.spec else ():
            self._depend(part, model.name, True)
        return model

    def _depend(self, part: str, name: str, on: bool) -> None:
        names = tuple(n for n in self.dependents.get(part, ()) if n != name) + ((name,) if on else ())
        if names:
            self.dependents = self.dependents.set(part, names)
        elif part in self.dependents:
            self.dependents = self.dependents.delete(part)

    def live_dependents(self, name: str) -> list[Model]:
        """Loaded or loading models that break when `name` goes."""
        found = (self.models.get(n) for n in self.dependents.get(name, ()))
        return [m for m in found if m is not None and m.state in _HOLDS_PARTS]

    # ------------------------------------------------------------------ devices

    def _settle(self, bookings: tuple[tuple[str, str, int], ...], sign: int) -> None:
        for field, device, size in bookings:
            account = self.devices.get(device)
            if account is None:
                continue
            self.devices = self.devices.set(device, _add(account, field, sign * size))

    # ------------------------------------------------------------------ runtimes

    def move_runtime(self, runtime: Runtime, state: RuntimeState, reason: str, **changes: Any) -> Runtime:
        if state not in RUNTIME_TRANSITIONS[runtime.state]:
            raise IllegalTransition(f"runtime {runtime.name}: {runtime.state} to {state} ({reason})")
        self.tell(f"runtime:{runtime.name}", runtime.state, state, reason)
        runtime = replace(runtime, state=state, since=self.now, reason=reason, **changes)
        self.runtimes = self.runtimes.set(runtime.name, runtime)
        self.dirty = True
        return runtime

    # ------------------------------------------------------------------ tickets

    def grant(self, ticket: Ticket) -> None:
        self._drop(ticket)
        self.out.append(Grant(ticket.id, ticket.model))

    def refuse(self, ticket: Ticket, failure: Failure, retry_after_s: float | None = None) -> None:
        self._drop(ticket)
        self.out.append(Refuse(ticket.id, ticket.model, failure.code, failure.message, retry_after_s))

    def grant_all(self, model: Model, *, gone: bool) -> Model:
        for ticket in self._tickets(model):
            if ticket.gone is gone:
                self.grant(ticket)
        return self.models[model.name]

    def refuse_all(self, model: Model, failure: Failure, retry_after_s: float | None = None) -> Model:
        for ticket in self._tickets(model):
            self.refuse(ticket, failure, retry_after_s)
        return self.models[model.name]

    def _tickets(self, model: Model) -> list[Ticket]:
        return [self.tickets[i] for i in model.tickets]

    def _drop(self, ticket: Ticket) -> None:
        if ticket.id in self.tickets:
            self.tickets = self.tickets.delete(ticket.id)
        model = self.models.get(ticket.model)
        if model is not None and ticket.id in model.tickets:
            self.change(model, tickets=tuple(i for i in model.tickets if i != ticket.id))

    def waiting(self, model: Model) -> list[Ticket]:
        """Tickets of those who want it READY."""
        return [t for t in self._tickets(model) if not t.gone]


_HOLDS_PARTS = frozenset({State.LOADING, State.READY, State.DRAINING, State.UNLOADING})

_RECLAIMING = frozenset({State.DRAINING, State.UNLOADING})


def _bookings(model: Model) -> tuple[tuple[str, str, int], ...]:
    if not (model.booking or model.extra or model.promise):
        return ()
    held = tuple(("booked_bytes", d, n) for d, n in model.booking + model.extra)
    if model.state in _RECLAIMING:
        held += tuple(("reclaiming_bytes", d, n) for d, n in model.booking + model.extra)
    return held + tuple(("promised_bytes", d, n) for d, n in model.promise)


def _add(account: Account, field: str, size: int) -> Account:
    if field == "booked_bytes":
        return replace(account, booked_bytes=account.booked_bytes + size)
    if field == "promised_bytes":
        return replace(account, promised_bytes=account.promised_bytes + size)
    return replace(account, reclaiming_bytes=account.reclaiming_bytes + size)


def bytes_on(booking: Booking, device: str) -> int:
    return sum(n for d, n in booking if d == device)
