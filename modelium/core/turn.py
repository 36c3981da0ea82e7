"""One step in the making: the next world and its instructions, kept consistent by few primitives.

All changes of a model's state, of memory booked and of tickets go through a Turn, so that indexes and sums are right
by construction and every transition is told with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from immutables import Map

from modelium.api.types import Transition
from modelium.core.instructions import Forget, Grant, Instruction, Refuse, Tell, WakeAt
from modelium.core.states import BIRTH, RUNTIME_TRANSITIONS, TRANSITIONS, RuntimeState, State
from modelium.core.world import (
    Account,
    Booking,
    Failure,
    Model,
    Policy,
    Runtime,
    Ticket,
    World,
    is_live,
    is_moving,
    is_stale,
    waits,
)


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
        self.moving = world.moving
        self.stale = world.stale
        self.dependents = world.dependents
        self.next_id = world.next_id
        self.next_sweep = world.next_sweep
        self.out: list[Instruction] = []
        self.dirty = False
        """Room, demand or a runtime changed: the queue should be looked at."""
        self.sweeping = False
        """What is told of those who wait should be brought up to date for all of them."""
        self._decision = 0
        self._wake: float | None = None

    def finish(self) -> tuple[World, list[Instruction]]:
        if self._wake is not None:
            self.out.append(WakeAt(self._wake))
        world = World(
            self.models, self.devices, self.runtimes, self.tickets, self.live, self.queue, self.moving, self.stale,
            self.dependents, self.next_id, self.next_sweep,
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
        self._settle(old, model)
        self.models = self.models.set(model.name, model)
        self.live = _member(self.live, model.name, is_live(model))
        self.queue = _member(self.queue, model.name, waits(model))
        self.moving = _member(self.moving, model.name, is_moving(model))
        self.stale = _member(self.stale, model.name, is_stale(model))
        if old is None or old.spec is not model.spec or old.held is not model.held or old.coming is not model.coming:
            before, after = old.parts if old is not None else (), model.parts
            for part in before:
                if part not in after:
                    self._depend(part, model.name, False)
            for part in after:
                if part not in before:
                    self._depend(part, model.name, True)
        return model

    def change(self, model: Model, **changes: Any) -> Model:
        assert self.models.get(model.name) is model, f"an outdated record of {model.name}"
        return self.put(_evolve(model, changes))

    def born(self, model: Model) -> Model:
        if model.state not in BIRTH:
            raise IllegalTransition(f"{model.name} can't begin as {model.state}")
        self.put(model)
        self.tell(model.name, "", model.state, model.reason)
        return model

    def move(self, model: Model, state: State, reason: str, **changes: Any) -> Model:
        """Take a model to another state, with the reason that people will read."""
        if state not in TRANSITIONS[model.state]:
            raise IllegalTransition(f"{model.name}: {model.state} to {state} ({reason})")
        assert self.models.get(model.name) is model, f"an outdated record of {model.name}"
        self.tell(model.name, model.state, state, reason)
        self.dirty = True
        changes["state"], changes["since"], changes["reason"] = state, self.now, reason
        return self.put(_evolve(model, changes))

    def forget(self, model: Model, reason: str) -> None:
        """Let go of a record, and of all that it holds."""
        model = self.grant_gone(model)
        model = self.refuse_all(model, Failure("model_not_found", f"{model.name} is gone: {reason}"))
        self.put(Model(model.name, State.COLD, self.now, reason))
        self.models = self.models.delete(model.name)
        self.tell(model.name, model.state, "", reason)
        self.out.append(Forget(model.name))
        self.dirty = True

    def _depend(self, part: str, name: str, on: bool) -> None:
        names = tuple(n for n in self.dependents.get(part, ()) if n != name) + ((name,) if on else ())
        if names:
            self.dependents = self.dependents.set(part, names)
        elif part in self.dependents:
            self.dependents = self.dependents.delete(part)

    def live_dependents(self, name: str) -> list[Model]:
        """What is loaded or loading, and breaks when `name` goes."""
        found = (self.models.get(n) for n in self.dependents.get(name, ()))
        return [m for m in found if m is not None and m.held is not None]

    def used_lately(self, model: Model) -> bool:
        """Whether it should come back when it is lost through no fault of its own."""
        recent = model.use.requests > 0 and self.now - model.busy_since < self.policy.idle_s
        return bool(model.use.in_flight) or recent

    # ------------------------------------------------------------------ devices

    def _settle(self, old: Model | None, new: Model) -> None:
        if old is not None and (
            old.booking is new.booking
            and old.extra is new.extra
            and old.promise is new.promise
            and (old.state in _RECLAIMING) is (new.state in _RECLAIMING)
        ):
            return
        sums: dict[str, list[int]] = {}
        for model, sign in ((old, -1), (new, 1)):
            if model is None:
                continue
            for held, going in ((model.booking, _RECLAIMING), (model.extra, _RECLAIMING_EXTRA)):
                back = sign if model.state in going else 0
                for device, size in held:
                    booked = sums.setdefault(device, [0, 0, 0])
                    booked[0] += sign * size
                    booked[2] += back * size
            for device, size in model.promise:
                sums.setdefault(device, [0, 0, 0])[1] += sign * size
        for device, (booked_bytes, promised_bytes, reclaiming_bytes) in sums.items():
            account = self.devices.get(device)
            if account is not None and (booked_bytes or promised_bytes or reclaiming_bytes):
                self.devices = self.devices.set(
                    device,
                    replace(
                        account,
                        booked_bytes=account.booked_bytes + booked_bytes,
                        promised_bytes=account.promised_bytes + promised_bytes,
                        reclaiming_bytes=account.reclaiming_bytes + reclaiming_bytes,
                    ),
                )

    def add_device(self, account: Account) -> None:
        """Take in a device that models may hold already."""
        for name in {*self.live, *self.queue}:
            model = self.models[name]
            size = bytes_on(model.booking, account.id) + bytes_on(model.extra, account.id)
            account = replace(
                account,
                booked_bytes=account.booked_bytes + size,
                promised_bytes=account.promised_bytes + bytes_on(model.promise, account.id),
                reclaiming_bytes=account.reclaiming_bytes + going_from(model, account.id),
            )
        self.devices = self.devices.set(account.id, account)

    # ------------------------------------------------------------------ runtimes

    def reaches(self, name: str, account: Account) -> bool:
        """Whether a runtime may place models on a device."""
        if account.runtime:
            return account.runtime == name
        runtime = self.runtimes.get(name)
        return runtime is None or not runtime.elsewhere

    def move_runtime(self, runtime: Runtime, state: RuntimeState, reason: str, **changes: Any) -> Runtime:
        if state not in RUNTIME_TRANSITIONS[runtime.state]:
            raise IllegalTransition(f"runtime {runtime.name}: {runtime.state} to {state} ({reason})")
        self.tell(f"runtime:{runtime.name}", runtime.state, state, reason)
        runtime = replace(runtime, state=state, since=self.now, reason=reason, **changes)
        self.runtimes = self.runtimes.set(runtime.name, runtime)
        self.dirty = True
        return runtime

    # ------------------------------------------------------------------ tickets

    def hold(self, ticket: Ticket) -> Model:
        """Let somebody wait."""
        self.tickets = self.tickets.set(ticket.id, ticket)
        model = self.models[ticket.model]
        return self.change(model, tickets=(*model.tickets, ticket.id))

    def let_go(self, ticket: Ticket) -> None:
        """Forget somebody who waits."""
        self.tickets = self.tickets.delete(ticket.id)
        model = self.models[ticket.model]
        self.change(model, tickets=tuple(i for i in model.tickets if i != ticket.id))

    def refuse(self, ticket: Ticket, failure: Failure, retry_after_s: float | None = None) -> None:
        """Answer somebody who does not wait, or not any more."""
        self.out.append(Refuse(ticket.id, ticket.model, failure.code, failure.message, retry_after_s))

    def grant(self, ticket: Ticket) -> None:
        self.out.append(Grant(ticket.id, ticket.model))

    def grant_all(self, model: Model, tickets: Sequence[Ticket]) -> Model:
        """Grant some of those who wait for it."""
        return self._answer(model, tickets, self.grant)

    def grant_gone(self, model: Model) -> Model:
        """Grant all who wait for it to be unloaded."""
        return self._answer(model, [t for i in model.tickets if (t := self.tickets[i]).gone], self.grant)

    def refuse_waiting(self, model: Model, failure: Failure, retry_after_s: float | None = None) -> Model:
        """Refuse all who wait for it to be READY."""
        return self._answer(model, self.waiting(model), lambda ticket: self.refuse(ticket, failure, retry_after_s))

    def refuse_all(self, model: Model, failure: Failure, retry_after_s: float | None = None) -> Model:
        everybody = [self.tickets[i] for i in model.tickets]
        return self._answer(model, everybody, lambda ticket: self.refuse(ticket, failure, retry_after_s))

    def _answer(self, model: Model, tickets: Sequence[Ticket], answer: Callable[[Ticket], None]) -> Model:
        if not tickets:
            return model
        left = self.tickets.mutate()
        for ticket in tickets:
            del left[ticket.id]
            answer(ticket)
        self.tickets = left.finish()
        answered = {t.id for t in tickets}
        return self.change(model, tickets=tuple(i for i in model.tickets if i not in answered))

    def waiting(self, model: Model) -> list[Ticket]:
        """Tickets of those who want it READY."""
        return [t for i in model.tickets if not (t := self.tickets[i]).gone]

    def asked_gone(self, model: Model) -> bool:
        """Whether somebody waits for it to be unloaded."""
        return any(self.tickets[i].gone for i in model.tickets)


def _member(index: Map[str, None], name: str, member: bool) -> Map[str, None]:
    if member is (name in index):
        return index
    return index.set(name, None) if member else index.delete(name)


_RECLAIMING = frozenset({State.DRAINING, State.UNLOADING})
_RECLAIMING_EXTRA = _RECLAIMING | {State.PARKING}


def _evolve(model: Model, changes: dict[str, Any]) -> Model:
    """`dataclasses.replace`, several times faster: a step does this for each change of a record."""
    new = object.__new__(Model)
    fields = new.__dict__
    fields.update(model.__dict__)
    size = len(fields)
    fields.update(changes)
    if len(fields) != size:
        raise TypeError(f"a model has no {', '.join(sorted(changes.keys() - model.__dict__.keys()))}")
    return new


def bytes_on(booking: Booking, device: str) -> int:
    return sum(n for d, n in booking if d == device)


def going_from(model: Model, device: str) -> int:
    """The part of what it has booked that is on its way back."""
    size = bytes_on(model.booking, device) if model.state in _RECLAIMING else 0
    return size + (bytes_on(model.extra, device) if model.state in _RECLAIMING_EXTRA else 0)


def added(one: Booking, other: Booking) -> Booking:
    """Two bookings as one."""
    return tuple((d, bytes_on((*one, *other), d)) for d in dict((*one, *other)))
