"""A world outside for the core: runtimes, requests, people, files and devices that behave as badly as they can.

`Sim` carries out instructions when it is told to, in any order, rightly, wrongly, late or never, and holds every step
to the rules of the game (`Foul`). It knows what is really loaded and really in flight, so that it can tell what the
core believes from what is true. It holds no clock and no randomness of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from modelium.api.types import Device, Observation, ObservedModel
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.eviction import Tier, tier_of
from modelium.core.invariants import violations
from modelium.core.line import Line
from modelium.core.states import BIRTH, TRANSITIONS, RuntimeState, State, Want
from modelium.core.step import step
from modelium.core.ticking import GONE_AFTER, GONE_AFTER_S
from modelium.core.turn import Turn
from modelium.core.world import Booking, Estimate, Failure, Model, Policy, Spec, Standby, Use, World, queued

DEVICE_BYTES = 100
HOST = "host:0"
"""Where parked models are, in worlds whose models' devices are of kind `cpu`."""


class Foul(AssertionError):
    """A step broke a rule, or led to a world that can't be."""


@dataclass
class RealRuntime:
    """What a runtime really is, whatever the core believes."""

    instance: int = 1
    alive: bool = True
    models: dict[str, Booking] = field(default_factory=dict)
    """What is loaded in it, with what it takes."""
    broken: set[str] = field(default_factory=set)
    """What has to be loaded again before it serves."""
    asleep: dict[str, tuple[int, Booking]] = field(default_factory=dict)
    """What is parked: the level, and what it takes when it is awake."""

    def clear(self) -> None:
        self.models.clear()
        self.asleep.clear()

    def drop(self, name: str) -> None:
        self.models.pop(name, None)
        self.asleep.pop(name, None)

    def sleep(self, name: str, level: int, holds: Booking) -> None:
        self.asleep[name] = (level, self.models[name])
        self.models[name] = holds

    def wake(self, name: str) -> None:
        self.models[name] = self.asleep.pop(name)[1]


@dataclass(frozen=True)
class Pending:
    """An instruction that is being carried out."""

    order: i.Load | i.Unload | i.Park | i.Wake | i.CloseRoute | i.StartRuntime | i.StopRuntime
    instance: int = 0
    late: bool = False
    """Given up: nobody waits for its result any more, which may come nevertheless."""


@dataclass
class File:
    """A model's folder."""

    spec: Spec
    memory: int
    """Estimated bytes."""
    real: int
    """What it really takes."""
    bad: bool = False
    """Loading it fails."""


def _brief(model: Model) -> str:
    """What is not as it is in a new record."""
    new = Model("", State.COLD, 0.0, "")
    told = (f"{n}={v}" for n, v in vars(model).items() if n not in ("name", "state") and v != vars(new)[n])
    return f"{model.name} {model.state} {' '.join(told)}"


class Sim:
    def __init__(
        self,
        policy: Policy | None = None,
        devices: int = 1,
        runtimes: Sequence[str] = ("r",),
        *,
        blind: bool = False,
        levels: Sequence[int] = (),
        residue: int = 0,
    ):
        """`blind` runtimes can't tell what memory their models take.

        With `levels` models can be parked: level 1 takes half of their size from the host, any other 2, and `residue`
        is left on their device.
        """
        self.policy = policy or Policy()
        self.blind = blind
        self.levels = levels
        self.residue = residue
        if levels:
            self.policy = replace(self.policy, standby_device=HOST)
        self.world = World()
        self.now = 1000.0
        self.latest = 0.0
        """The clock's highest so far: it may be set back."""
        self.wake: float | None = None
        self.files: dict[str, File] = {}
        self.real: dict[str, RealRuntime] = {}
        self.pending: list[Pending] = []
        self.in_flight: dict[str, int] = {}
        self.served: dict[str, int] = {}
        self.used_at: dict[str, float] = {}
        self.touched: set[str] = set()
        self.open: set[str] = set()
        self.answered: dict[int, i.Grant | i.Refuse] = {}
        self.asked: set[int] = set()
        self.people: set[int] = set()
        self.foreign = [0] * devices
        self.elsewhere: set[str] = set()
        """Runtimes on other machines."""
        self.apart: dict[str, str] = {}
        """Devices that only one runtime reaches, and which."""
        self.kept: dict[str, Booking] = {}
        """What unloading a model does not give back, by its name."""
        self.taken = 0
        """Of the host's memory, by others."""
        self.snapshots: list[tuple[str, int, float, Observation]] = []
        self.next_ticket = 1
        self.steps = 0
        self.history: list[tuple[e.Event, list[i.Instruction]]] = []
        """The last steps, for whoever asks what led to a foul."""
        self.grants: list[tuple[float, int, str]] = []
        """When, which ticket, which model."""
        self.loads: list[str] = []
        """Names, in the order in which loads were begun."""
        self.see_devices()
        for name in runtimes:
            self.real[name] = RealRuntime()
            self.happen(e.RuntimeAdded(self.now, name))
        self.tick()

    # ------------------------------------------------------------------ steps

    def happen(self, event: e.Event) -> list[i.Instruction]:
        """One step, with use made exact before it, as the engine does."""
        if self.touched and not isinstance(event, e.UseObserved):
            self.see_use()
        before = self.world
        self.world, out = step(self.world, event, self.policy)
        self.steps += 1
        self.history.append((event, out))
        del self.history[:-40]
        self.latest = max(self.latest, event.at)
        wrong = violations(self.world, self.policy, self.latest)
        if wrong:
            raise Foul(self.story("; ".join(wrong)))
        if isinstance(event, e.Ticked):
            self.wake = None
        states = {n: m.state for n, m in before.models.items()}
        for order in out:
            self._referee(before, event, order, states)
            self._carry_out(order)
        for name, model in self.world.models.items():
            if states.get(name) is not model.state:
                raise Foul(self.story(f"{name} was told to be {states.get(name)}, and is {model.state}"))
        if not isinstance(event, e.UseObserved):
            self._check_grants(before, out)
        return out

    def story(self, what: str) -> str:
        lines = [what]
        for event, out in self.history[-12:]:
            lines.append(f"> {event}")
            lines.extend(f"    {o}" for o in out)
        lines.extend(f"* {_brief(m)}" for m in self.world.models.values())
        lines.extend(f"* {a}" for a in (*self.world.devices.values(), *self.world.runtimes.values()))
        lines.extend(f"* under way: {p}" for p in self.pending)
        lines.extend(f"* really {n}: {r}" for n, r in self.real.items())
        return "\n".join(lines)

    def _foul(self, what: str) -> Foul:
        return Foul(self.story(what))

    def _referee(self, before: World, event: e.Event, order: i.Instruction, states: dict[str, State]) -> None:
        """Whether an instruction may be given; `states` are those told so far in this step."""
        match order:
            case i.Tell(t) if not t.subject.startswith("runtime:"):
                self._told(before, t.subject, t.before, t.after, t.reason, states)
            case i.OpenRoute(name, runtime):
                model = self.world.models[name]
                reload = name in before.models and before.models[name].coming is not None
                if name in self.open and not reload:
                    raise self._foul(f"the route of {name} is opened twice")
                if model.home != runtime:
                    raise self._foul(f"the route of {name} leads to {runtime}, and it is in {model.home}")
                self.open.add(name)
            case i.CloseRoute(name, _):
                if name not in self.open:
                    raise self._foul(f"the route of {name} is closed twice")
                self.open.discard(name)
            case i.Grant(ticket, name):
                self._answer(order)
                if ticket in before.tickets and before.tickets[ticket].gone:
                    return
                if isinstance(event, e.UnloadAsked) and event.ticket == ticket:
                    return
                if name not in self.open:
                    raise self._foul(f"{name} was granted while its route is closed")
                self.grants.append((self.now, ticket, name))
                if ticket not in self.people:
                    self.in_flight[name] = self.in_flight.get(name, 0) + 1
                    self.served[name] = self.served.get(name, 0) + 1
                self.used_at[name] = self.now
                self.touched.add(name)
            case i.Refuse():
                self._answer(order)
            case i.Load(name, op, runtime):
                self.loads.append(name)
                self._check_op(before, event, name)
                if before.runtimes[runtime].state is not RuntimeState.UP and not isinstance(event, e.RuntimeUp):
                    raise self._foul(f"{name} is to be loaded in {runtime}, which is not up")
                if self.world.models[name].op != op:
                    raise self._foul(f"the load of {name} is not its operation")
                if self.world.runtimes[runtime].recycle:
                    raise self._foul(f"{name} is to be loaded in {runtime}, which is to be started anew")
            case i.Park(name, op, runtime):
                self._check_unload(before, event, name, runtime)
                if self.world.models[name].op != op:
                    raise self._foul(f"the parking of {name} is not its operation")
            case i.Wake(name, op, runtime, level):
                self.loads.append(name)
                self._check_op(before, event, name)
                model = self.world.models[name]
                if model.op != op or model.parked is None or model.parked.level != level or model.stale:
                    raise self._foul(f"{name} is woken as what it is not")
                if self.world.runtimes[runtime].recycle:
                    raise self._foul(f"{name} is woken in {runtime}, which is to be started anew")
            case i.Unload(name, op, runtime):
                self._check_unload(before, event, name, runtime)
                if self.world.models[name].op != op:
                    raise self._foul(f"the unload of {name} is not its operation")
            case i.StopRuntime(runtime):
                used = [n for n in self.real[runtime].models if self.in_flight.get(n) and n in self.open]
                if used:
                    raise self._foul(f"{runtime} is to be stopped while {used} are in use")
            case _:
                pass

    def _told(self, before: World, name: str, was: str, now: str, reason: str, states: dict[str, State]) -> None:
        if (states.get(name) or "") != was:
            raise self._foul(f"{name} is told to come from {was}, and was {states.get(name)}")
        if not now:
            del states[name]
            return
        state = State(now)
        if was == "":
            if state not in BIRTH:
                raise self._foul(f"{name} is born {state}")
        elif state is not State(was) and state not in TRANSITIONS[State(was)]:
            raise self._foul(f"{name} went from {was} to {now}")
        states[name] = state
        model = before.models.get(name)
        if state is not State.DRAINING or model is None or name not in self.world.models:
            return
        kept = model.kept and self.world.models[name].kept
        forced = (
            "its files changed",
            "its plan changed",
            "its parameters changed",
            "its runtime is to be started anew",
        )
        if kept and not reason.startswith(forced):
            raise self._foul(f"{name} is kept, and was drained: {reason}")
        if reason.startswith("evicted for "):
            self._check_victim(name, reason.removeprefix("evicted for "))

    def _check_victim(self, name: str, waiter_name: str) -> None:
        waiter = self.world.models[waiter_name]
        turn = Turn(self.world, self.policy, self.history[-1][0].at)
        if not queued(waiter):
            return  # it was given up on later in the same step
        line = Line(turn)
        tier = tier_of(turn, self.world.models[name])
        if not line.urgent(waiter) and tier is not Tier.IDLE:
            raise self._foul(f"{name} is {tier.name} and went for {waiter_name}, which nobody needs ({waiter.want})")
        if not line.aged(waiter) and tier > Tier.QUIET:
            raise self._foul(f"{name} is {tier.name} and went for {waiter_name}, which has not waited long")

    def _check_op(self, before: World, event: e.Event, name: str) -> None:
        """At most one operation of a model is awaited: the former one is over, or given up in this step."""
        model = before.models.get(name)
        if model is None or not model.op:
            return
        ended = getattr(event, "op", None) == model.op
        lost = isinstance(event, e.RuntimeDown | e.RuntimeObserved) or any(
            d in before.devices and d not in self.world.devices for d, _ in model.booking
        )
        rescued = model.state is State.DRAINING
        if not (ended or lost or rescued or isinstance(event, e.Ticked)):
            raise self._foul(f"{name} begins an operation while {model.op} is under way")

    def _check_unload(self, before: World, event: e.Event, name: str, runtime: str) -> None:
        model = before.models[name]
        if (model.home or runtime) != runtime:
            raise self._foul(f"{name} is to be unloaded from {runtime}, and it is in {model.home}")
        asleep = model.state in (State.PARKING, State.STANDBY) or name in self.real[runtime].asleep
        if model.state is State.LOADING or asleep:
            return  # what was in flight when somebody else put it to sleep is lost
        overdue = isinstance(event, e.Ticked) and model.op_since + self.policy.drain_timeout_s <= event.at
        waited = model.state is State.DRAINING and not model.op
        if self.in_flight.get(name) and not overdue and not waited:
            raise self._foul(f"{name} is to be unloaded with {self.in_flight[name]} in flight")
        turn = Turn(self.world, self.policy, event.at)
        whole = [m.name for m in turn.live_dependents(name)]
        if whole:
            raise self._foul(f"{name} is to be unloaded, and {whole} is made of it")

    def _answer(self, order: i.Grant | i.Refuse) -> None:
        if order.ticket in self.answered:
            raise self._foul(f"ticket {order.ticket} is answered twice")
        if order.ticket not in self.asked:
            raise self._foul(f"ticket {order.ticket} was never asked for")
        self.answered[order.ticket] = order

    def _check_grants(self, before: World, out: list[i.Instruction]) -> None:
        for order in out:
            if isinstance(order, i.Load | i.Wake):
                booking = order.booking if isinstance(order, i.Load) else self.world.models[order.name].booking
                held = dict(before.models[order.name].booking) if isinstance(order, i.Wake) else {}
                for device, size in booking:
                    if size <= held.get(device, 0) or (device == HOST and isinstance(order, i.Wake)):
                        continue  # it is there already
                    account = self.world.devices[device]
                    if account.missed:
                        raise self._foul(f"{order.name} was granted room on {device}, which is not seen")
                    if account.booked_bytes > account.limit_bytes:
                        raise self._foul(f"{order.name} was granted room on {device} that is not there: {account}")
        for id in self.asked:
            if id not in self.answered and id not in self.world.tickets:
                raise self._foul(f"ticket {id} was lost")

    # ------------------------------------------------------------------ carrying out

    def _carry_out(self, order: i.Instruction) -> None:
        match order:
            case i.WakeAt(at):
                self.wake = at if self.wake is None else min(self.wake, at)
            case i.Load() | i.Unload() | i.Park() | i.Wake():
                self._give_up(order.name)
                self.pending.append(Pending(order, self.real[order.runtime].instance))
            case i.GiveUp(name):
                self._give_up(name)
            case i.CloseRoute(name, op):
                self._give_up(name, drains=True)
                if op:
                    self.pending.append(Pending(order))
            case i.OpenRoute(name, _):
                self._give_up(name, drains=True)
            case i.StartRuntime() | i.StopRuntime():
                self.pending.append(Pending(order))
            case i.Forget(name):
                self.in_flight.pop(name, None)
                self.served.pop(name, None)
                self.used_at.pop(name, None)
                self.touched.discard(name)
            case _:
                pass

    def _give_up(self, name: str, *, drains: bool = False) -> None:
        """A new operation takes the place of the former one, whose result may still come, too late."""
        for n, p in enumerate(self.pending):
            if isinstance(p.order, i.StartRuntime | i.StopRuntime) or p.order.name != name or p.late:
                continue
            if isinstance(p.order, i.CloseRoute) or not drains:
                self.pending[n] = replace(p, late=True)

    def ready_to_end(self) -> list[Pending]:
        """Operations that can end now: a drain only once nothing is in flight."""
        return [
            p
            for p in self.pending
            if p.late or not isinstance(p.order, i.CloseRoute) or not self.in_flight.get(p.order.name)
        ]

    def complete(self, p: Pending, took: float = 1.0) -> None:
        """An operation succeeds."""
        self.pending.remove(p)
        match p.order:
            case i.CloseRoute(name, op):
                self.happen(e.Drained(self.now, name, op))
            case i.Unload(name, op, runtime):
                if not p.late:
                    self.real[runtime].drop(name)
                self.happen(e.Unloaded(self.now, name, op, self.kept.get(name, ())))
            case i.Park(name, op, runtime, level):
                holds = self._asleep(name, level)
                real = self.real[runtime]
                if not p.late and name in real.models and name not in real.broken | real.asleep.keys():
                    real.sleep(name, level, holds)
                elif not p.late:
                    self.happen(e.ParkFailed(self.now, name, op, Failure("driver", "it is not there")))
                    return
                self.happen(e.Parked(self.now, name, op, () if self.blind else holds, took))
            case i.Wake(name, op, runtime, level):
                real = self.real[runtime]
                if p.late:
                    self.happen(e.Loaded(self.now, name, op, (), took))
                elif not real.alive or real.instance != p.instance:
                    self.happen(e.LoadFailed(self.now, name, op, Failure("runtime_unavailable", "it is gone"), True))
                elif name not in real.asleep or name in real.broken:
                    self.happen(e.LoadFailed(self.now, name, op, Failure("driver", "it does not sleep")))
                elif not all(self._there(d) for d, _ in real.asleep[name][1]):
                    self.happen(e.LoadFailed(self.now, name, op, Failure("driver", "its device is gone")))
                else:
                    real.wake(name)
                    self.happen(e.Loaded(self.now, name, op, () if self.blind else real.models[name], took))
            case i.Load(name, op, runtime, booking):
                real = self.real[runtime]
                file = self.files.get(name)
                if p.late:
                    self.happen(e.Loaded(self.now, name, op, booking, took))
                elif not real.alive or real.instance != p.instance:
                    self.happen(e.LoadFailed(self.now, name, op, Failure("runtime_unavailable", "it is gone"), True))
                elif file is None or file.bad:
                    self.happen(e.LoadFailed(self.now, name, op, Failure("load_rejected", "it is bad")))
                elif not all(self._there(d) for d, _ in booking):
                    self.happen(e.LoadFailed(self.now, name, op, Failure("driver", "its device is gone")))
                else:
                    memory = self._spread(booking, file.real)
                    real.drop(name)
                    real.models[name] = memory
                    real.broken.discard(name)
                    self.happen(e.Loaded(self.now, name, op, () if self.blind else memory, took))
            case i.StopRuntime(name, epoch):
                self.real[name].alive = False
                self.real[name].clear()
                self.happen(e.RuntimeStopped(self.now, name, epoch))
            case i.StartRuntime(name, epoch):
                real = self.real[name]
                adopted = real.alive
                if not adopted:
                    real.alive = True
                    real.instance += 1
                    real.clear()
                self.happen(
                    e.RuntimeUp(
                        self.now,
                        name,
                        epoch,
                        str(real.instance),
                        False,
                        self.observation(name),
                        adopted=adopted,
                        elsewhere=name in self.elsewhere,
                    )
                )

    @staticmethod
    def _spread(booking: Booking, real: int) -> Booking:
        """What a model really takes of the devices that it was placed on."""
        return tuple((device, -(-real // len(booking))) for device, _ in booking) or (("cpu:0", real),)

    def fail(self, p: Pending, *, runtime_lost: bool = False, config: bool = False, recycle: bool = False) -> None:
        """An operation fails."""
        self.pending.remove(p)
        match p.order:
            case i.CloseRoute(name, op):
                self.happen(e.Drained(self.now, name, op))
            case i.Unload(name, op):
                self.happen(e.UnloadFailed(self.now, name, op, Failure("driver", "it does not go"), recycle))
            case i.Park(name, op):
                self.happen(e.ParkFailed(self.now, name, op, Failure("driver", "it does not sleep")))
            case i.Load(name, op) | i.Wake(name, op):
                code = "runtime_stuck" if recycle else "runtime_unavailable" if runtime_lost else "load_rejected"
                self.happen(e.LoadFailed(self.now, name, op, Failure(code, "it failed"), runtime_lost, recycle))
            case i.StopRuntime(name, epoch):
                self.happen(e.RuntimeDown(self.now, name, epoch, Failure("driver", "it does not stop")))
            case i.StartRuntime(name, epoch):
                self.real[name].alive = False
                code = "config" if config else "driver"
                self.happen(e.RuntimeDown(self.now, name, epoch, Failure(code, "it does not start")))

    def lose(self, p: Pending, *, done: bool = False) -> None:
        """An operation's result never comes; with `done`, it was carried out."""
        if isinstance(p.order, i.StartRuntime | i.StopRuntime):
            return  # it may take for ever and is never given up
        self.pending.remove(p)
        if not done or p.late:
            return
        match p.order:
            case i.Unload(name, _, runtime):
                self.real[runtime].drop(name)
            case i.Park(name, _, runtime, level):
                if name in self.real[runtime].models and name not in self.real[runtime].asleep:
                    self.real[runtime].sleep(name, level, self._asleep(name, level))
            case i.Wake(name, _, runtime):
                if name in self.real[runtime].asleep:
                    self.real[runtime].wake(name)
            case i.Load(name, _, runtime, booking):
                there = bool(booking) and all(self._there(d) for d, _ in booking)
                if self.real[runtime].instance == p.instance and name in self.files and there:
                    self.real[runtime].drop(name)
                    self.real[runtime].models[name] = self._spread(booking, self.files[name].real)
            case _:
                pass

    # ------------------------------------------------------------------ files

    def accept(
        self,
        name: str,
        *,
        memory: int = 10,
        real: int | None = None,
        parts: Sequence[str] = (),
        runtime: str = "r",
        revision: str = "1",
        kind: str = "cpu",
        devices: int = 1,
        elastic: bool = False,
        bad: bool = False,
        dropped: bool = False,
        pinned: bool = False,
        was_loaded: bool = False,
        loaded_revision: str | None = None,
    ) -> list[i.Instruction]:
        spec = Spec(runtime, kind, revision, tuple(parts), devices, elastic)
        self.files[name] = File(spec, memory, memory if real is None else real, bad)
        return self.happen(
            e.ModelAccepted(
                self.now, name, spec, self.estimate(memory, parts), pinned=pinned, dropped=dropped,
                was_loaded=was_loaded, loaded_revision=loaded_revision,
            )
        )  # fmt: skip

    def estimate(self, memory: int, parts: Sequence[str] = ()) -> Estimate:
        levels = () if parts else self.levels
        standby = tuple(Standby(n, memory // 2 if n == 1 else 2, self.residue, 0.2) for n in levels)
        return Estimate(memory, 1.0, standby=standby)

    def _asleep(self, name: str, level: int) -> Booking:
        """What a model really takes while it is parked."""
        held = next((r.models[name] for r in self.real.values() if name in r.models), ())
        size = sum(n for _, n in held)
        return ((HOST, size // 2 if level == 1 else 2), *((d, min(self.residue, n)) for d, n in held if self.residue))

    def rescan(self, name: str) -> None:
        """The folder is found again as it was: nothing may come of it."""
        file, before = self.files[name], self.world.models.get(name)
        out = self.happen(e.ModelAccepted(self.now, name, file.spec, self.estimate(file.memory, file.spec.depends_on)))
        evicted = before is not None and before.state is State.COLD and before.spec == file.spec and not before.kept
        if evicted and any(isinstance(o, i.Load | i.Tell) for o in out):
            raise self._foul(f"a rescan did something with {name}")

    def change(self, name: str, *, memory: int | None = None, bad: bool = False) -> None:
        file = self.files[name]
        revision = str(int(file.spec.revision) + 1)
        self.accept(
            name,
            memory=file.memory if memory is None else memory,
            parts=file.spec.depends_on,
            runtime=file.spec.runtime,
            revision=revision,
            devices=file.spec.devices,
            bad=bad,
        )

    def remove(self, name: str) -> None:
        self.files.pop(name, None)
        self.happen(e.ModelRemoved(self.now, name))

    # ------------------------------------------------------------------ people and requests

    def ask(
        self,
        name: str,
        *,
        deadline_s: float = 300.0,
        priority: int = 0,
        person: bool = False,
        parameters: dict[str, str] | None = None,
    ) -> int:
        """A request, or a person's `load`; returns its ticket. One for a model whose route is open goes straight in."""
        ticket = self._ticket()
        if person:
            self.people.add(ticket)
        self.happen(e.ReadyAsked(self.now, ticket, name, self.now + deadline_s, priority, person, parameters))
        return ticket

    def use(self, name: str) -> bool:
        """A request on the hot path: let in when the route is open, without a step."""
        if name not in self.open:
            return False
        self.in_flight[name] = self.in_flight.get(name, 0) + 1
        self.served[name] = self.served.get(name, 0) + 1
        self.used_at[name] = self.now
        self.touched.add(name)
        return True

    def end(self, name: str) -> None:
        """One request that is in flight is over."""
        if self.in_flight.get(name):
            self.in_flight[name] -= 1
            self.used_at[name] = self.now
            self.touched.add(name)

    def unload(self, name: str, deadline_s: float = 300.0) -> int:
        ticket = self._ticket()
        self.happen(e.UnloadAsked(self.now, ticket, name, self.now + deadline_s))
        return ticket

    def withdraw(self, ticket: int) -> None:
        """The client left."""
        self.asked.discard(ticket)
        self.happen(e.TicketWithdrawn(self.now, ticket))

    def pin(self, name: str, pinned: bool = True) -> None:
        self.happen(e.PinAsked(self.now, name, pinned))

    def _ticket(self) -> int:
        ticket = self.next_ticket
        self.next_ticket += 1
        self.asked.add(ticket)
        return ticket

    # ------------------------------------------------------------------ what is seen

    def see_use(self) -> None:
        use = []
        for name in sorted(self.touched):
            fresh = self.now - self.used_at.get(name, 0.0) < 60
            qps = min(self.served.get(name, 0), 60) / 60 if fresh else 0.0
            use.append(
                (name, Use(self.in_flight.get(name, 0), self.served.get(name, 0), self.used_at.get(name, 0.0), qps))
            )
            if not qps:
                self.touched.discard(name)
        self.happen(e.UseObserved(self.now, tuple(use)))

    def see_devices(self, without: str = "") -> None:
        """A look at them; it may miss one that only one runtime reaches."""
        devices, accounted = [], {}
        apart = ((id, 0, runtime) for id, runtime in sorted(self.apart.items()) if id != without)
        local = ((f"cpu:{n}", foreign, "") for n, foreign in enumerate(self.foreign))
        for id, foreign, runtime in (*local, *apart):
            held = sum(b for r in self.real.values() for m in r.models.values() for d, b in m if d == id)
            accounted[id] = held
            devices.append(
                Device(
                    id=id, kind="cpu", name="memory", total_bytes=DEVICE_BYTES, used_bytes=held + foreign,
                    runtime=runtime,
                )
            )  # fmt: skip
        if self.levels:
            accounted[HOST] = sum(b for r in self.real.values() for m in r.models.values() for d, b in m if d == HOST)
            host = Device(
                id=HOST, kind="host", name="memory", total_bytes=DEVICE_BYTES, used_bytes=accounted[HOST] + self.taken
            )
            devices.append(host)
        self.happen(e.DevicesObserved(self.now, tuple(devices), accounted))

    def lose_device(self, id: str, *, sleepers: bool = False, looks: int = GONE_AFTER) -> None:
        """A device that only one runtime reached is gone, with all that holds some of it, and what sleeps if told so.

        Else that is there still, and can't wake. So many looks are without it, far enough apart.
        """
        runtime = self.real[self.apart.pop(id)]
        for name, holds in list(runtime.models.items()):
            before = runtime.asleep[name][1] if sleepers and name in runtime.asleep else ()
            if any(d == id for d, _ in (*holds, *before)):
                runtime.drop(name)
        for _ in range(looks):
            self.see_devices()
            self.now += GONE_AFTER_S

    def _there(self, device: str) -> bool:
        return device in self.apart or "/" not in device

    def observation(self, runtime: str) -> Observation:
        real = self.real[runtime]
        return Observation(
            instance=str(real.instance),
            models=tuple(
                ObservedModel(
                    name=n,
                    ready=n not in real.broken and n not in real.asleep,
                    parked=real.asleep[n][0] if n in real.asleep and n not in real.broken else 0,
                    broken=n in real.broken,
                    memory={} if self.blind else dict(memory),
                    reason="it broke" if n in real.broken else "",
                )
                for n, memory in sorted(real.models.items())
            ),
        )

    def look(self, runtime: str) -> None:
        """An observation begins; `see` ends it."""
        known = self.world.runtimes[runtime]
        if known.state is RuntimeState.UP and self.real[runtime].alive:
            self.snapshots.append((runtime, known.epoch, self.now, self.observation(runtime)))

    def see(self) -> None:
        """The oldest observation that is under way ends."""
        if self.snapshots:
            runtime, epoch, taken_at, observation = self.snapshots.pop(0)
            self.happen(e.RuntimeObserved(self.now, runtime, epoch, taken_at, observation))

    def see_runtime(self, runtime: str = "r") -> None:
        self.now += 0.001
        self.look(runtime)
        while self.snapshots:
            self.see()
        self.now += 0.001

    # ------------------------------------------------------------------ runtimes

    def crash(self, runtime: str = "r", *, told: bool = True) -> None:
        """It dies with all that it holds."""
        real = self.real[runtime]
        real.alive = False
        real.clear()
        if told:
            self.tell_down(runtime)

    def tell_down(self, runtime: str = "r") -> None:
        """Contact with it is lost, whatever became of it."""
        known = self.world.runtimes[runtime]
        if known.state is RuntimeState.UP:
            failure = Failure("runtime_unavailable", "it does not answer")
            self.happen(e.RuntimeDown(self.now, runtime, known.epoch, failure))

    def restart_silently(self, runtime: str = "r") -> None:
        """Somebody restarts it before anybody notices."""
        real = self.real[runtime]
        if real.alive:
            real.instance += 1
            real.clear()

    # ------------------------------------------------------------------ time

    def tick(self) -> list[i.Instruction]:
        return self.happen(e.Ticked(self.now))

    def jump(self, seconds: float) -> None:
        """Time passes while nothing is seen to: the machine slept."""
        self.now += seconds
        if self.wake is not None and self.wake <= self.now:
            self.tick()

    def wait(self, seconds: float) -> None:
        """Time passes, and the core is woken when it asked to be."""
        until = self.now + seconds
        while self.wake is not None and self.wake <= until:
            self.now = max(self.now, self.wake)
            self.tick()
        self.now = until

    # ------------------------------------------------------------------ fairness

    def step_fairly(self) -> bool:
        """End one operation well, oldest first; whether there was one."""
        for p in self.ready_to_end():
            if p.late:
                self.pending.remove(p)
            else:
                self.complete(p)
            return True
        return False

    def run(self) -> None:
        """End well all that can end without time passing."""
        while self.step_fairly():
            pass

    def state(self, name: str) -> State | None:
        model = self.world.models.get(name)
        return None if model is None else model.state

    def states(self) -> dict[str, str]:
        return {n: str(m.state) for n, m in sorted(self.world.models.items())}

    def answer(self, ticket: int) -> str:
        """`granted`, the code of the refusal, or `waits`."""
        order = self.answered.get(ticket)
        return "waits" if order is None else order.code if isinstance(order, i.Refuse) else "granted"

    def message(self, ticket: int) -> str:
        order = self.answered[ticket]
        assert isinstance(order, i.Refuse)
        return order.message

    def load(self, name: str, *, finish: bool = True) -> None:
        """Have it loaded by one request, which ends at once."""
        self.ask(name)
        self.run()
        if finish:
            self.end(name)
            self.see_use()
        if self.state(name) is not State.READY:
            raise self._foul(f"{name} did not load")

    def settle(self, limit: int = 3000) -> None:
        """The world outside becomes fair: all that is under way ends well, requests end, time passes.

        Returns when everything is at rest; raises `Foul` when it does not come to rest, or rests wrongly.
        """
        self.foreign = [0] * len(self.foreign)
        self.taken = 0
        self.snapshots.clear()
        for file in self.files.values():
            file.bad = False
        for name in list(self.in_flight):
            while self.in_flight.get(name):
                self.end(name)
        self.now = max([self.now, *(m.since for m in self.world.models.values())])
        for name, real in self.real.items():
            if not real.alive:
                self.tell_down(name)
        quiet = 0
        for _ in range(limit):
            if self.step_fairly():
                quiet = 0
                for name in list(self.in_flight):
                    while self.in_flight.get(name):
                        self.end(name)
                continue
            resting = not self._restless()
            quiet = quiet + 1 if resting else 0
            if quiet >= 3:
                break
            self.see_devices()
            for runtime in self.real:
                self.see_runtime(runtime)
            if self.wake is None:
                raise self._foul("nothing is under way, and nobody is to be woken")
            self.wait(max(0.0, self.wake - self.now))
        else:
            raise self._foul(f"it does not come to rest: {self._restless()}")
        self._check_rest()

    def _restless(self) -> list[str]:
        """Models that something should become of still."""
        found = [f"ticket {t}" for t in self.world.tickets]
        for model in self.world.models.values():
            runtime = self.world.runtimes.get(model.home)
            hopeless = runtime is None or runtime.given_up
            match model.state:
                case State.LOADING | State.DRAINING | State.PARKING | State.UNLOADING:
                    found.append(f"{model.name}: {model.state}")
                case State.RECOVERING if not hopeless:
                    found.append(f"{model.name}: {model.state}")
                case State.QUEUED | State.STANDBY if queued(model) and not self._crowded_out(model):
                    found.append(f"{model.name}: {model.state}, {model.reason}")
                case State.READY if model.op or (model.stale and self._can_be_replaced(model)):
                    found.append(f"{model.name}: {model.state}, {model.reason}")
                case State.FAILED if model.held is not None:
                    found.append(f"{model.name}: {model.state}, {model.reason}")
                case State.FAILED if model.want is not Want.NONE and not hopeless and not self._doomed(model):
                    found.append(f"{model.name}: {model.state}, {model.reason}")
                case _:
                    pass
        restless = (RuntimeState.STARTING, RuntimeState.STOPPING)
        found.extend(r.name for r in self.world.runtimes.values() if r.state in restless or r.recycle)
        found.extend(a.id for a in self.world.devices.values() if a.missed)
        return found

    def _can_be_replaced(self, model: Model) -> bool:
        parts = [self.world.models.get(n) for n in (model.spec.depends_on if model.spec else ())]
        usable = all(p is not None and p.state not in (State.INVALID, State.FAILED) and not p.forget for p in parts)
        runtime = self.world.runtimes.get(model.runtime)
        usable = usable and runtime is not None and runtime.state is RuntimeState.UP
        return usable and model.spec != model.rejected and model.invalid is None and not model.forget

    def _crowded_out(self, model: Model) -> bool:
        """What should always be loaded may be too much: then the last of it waits for ever."""
        wholes = [model]
        for whole in wholes:
            wholes.extend(
                m for n in self.world.dependents.get(whole.name, ()) if (m := self.world.models[n]) not in wholes
            )
        parts = [p for n in model.parts if (p := self.world.models.get(n)) and p.state is State.QUEUED]
        if any(self._crowded_out(p) for p in parts):
            return True
        scattered = len(self.world.devices) > 1 or bool(model.parts)  # what is kept is not moved to make it fit
        return any(m.kept for m in wholes) and (scattered or not self._kept_fit())

    def _kept_fit(self) -> bool:
        """Whether all that should always be loaded has room at once, with the largest placed first."""
        names = {n for n, m in self.world.models.items() if m.kept}
        for name in list(names):
            todo = [name]
            while todo:
                for part in self.world.models[todo.pop()].parts:
                    if part in self.world.models and part not in names:
                        names.add(part)
                        todo.append(part)
        free = {a.id: a.budget_bytes for a in self.world.devices.values()}
        kept = [m for n in names if (m := self.world.models[n])]
        for model in sorted(kept, key=lambda m: max(m.need, *(b for _, b in m.booking), 0), reverse=True):
            size = max(model.need, *(b for _, b in model.booking), 0)
            several = model.spec.devices if model.spec else 1
            turn = Turn(self.world, self.policy, self.now)
            reached = [d for d in sorted(free) if turn.reaches(model.runtime, self.world.devices[d])]
            where = [d for d in reached if free[d] >= size][:several]
            if len(where) < several:
                return False
            for device in where:
                free[device] -= size
        return True

    def _doomed(self, model: Model) -> bool:
        """It fails again whenever it is tried: too big, or made of what is not there."""
        return model.failure is not None and model.failure.code in (
            "never_fits",
            "plugin",
            "model_invalid",
            "part_missing",
            "runtime_unavailable",
        )

    def _check_rest(self) -> None:
        if self.world.tickets:
            raise self._foul("somebody waits still")
        loaded = {n for n, m in self.world.models.items() if m.state is State.READY}
        managed = {
            n
            for name, r in self.real.items()
            for n in r.models.keys() - r.broken - r.asleep.keys()
            if n in self.world.models
            and self.world.models[n].state is not State.INVALID
            and self.world.models[n].home == name
            and self.world.runtimes[name].state is RuntimeState.UP
        }
        if loaded != managed:
            raise self._foul(f"loaded are {sorted(managed)}, and the core believes {sorted(loaded)}")
        parked = {n for n, m in self.world.models.items() if m.state is State.STANDBY}
        asleep = {
            n
            for name, r in self.real.items()
            for n in r.asleep.keys() - r.broken
            if n in self.world.models
            and self.world.models[n].state is not State.INVALID
            and self.world.models[n].home == name
            and self.world.runtimes[name].state is RuntimeState.UP
        }
        if parked != asleep:
            raise self._foul(f"asleep are {sorted(asleep)}, and the core believes {sorted(parked)}")
        for account in self.world.devices.values():
            held = sum(
                b
                for name, r in self.real.items()
                for n, m in r.models.items()
                if n in loaded | parked and self.world.models[n].home == name
                for d, b in m
                if d == account.id
            )
            if account.booked_bytes < held and not self.blind:
                raise self._foul(f"{account.id} has {account.booked_bytes} booked, and {held} are loaded")
        if self.open != loaded:
            raise self._foul(f"routes are open to {sorted(self.open)}, and loaded are {sorted(loaded)}")
        for _ in range(3):
            out = self.tick()
            if any(not isinstance(o, i.WakeAt) for o in out):
                raise self._foul("it acts while all is at rest")
