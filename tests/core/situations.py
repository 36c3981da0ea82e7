"""A model `m` in each state, brought there by real steps, and each event as it can meet it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modelium.api.types import Device, Observation, ObservedModel
from modelium.core import events as e
from modelium.core.states import State
from modelium.core.world import Estimate, Failure, Policy, Spec, Use
from tests.core.sim import File, Sim

M = "m"
FAILURE = Failure("driver", "it broke")
STALE = 999_999
"""An operation's or a start's id that is not the one under way."""


def _sim() -> Sim:
    return Sim(Policy(budgets={"cpu:0": 100}))


def started(sim: Sim) -> Sim:
    for p in [p for p in sim.pending if not p.late]:
        sim.complete(p)
    return sim


def _discovered() -> Sim:
    sim = started(_sim())
    sim.happen(e.DropSeen(sim.now, M))
    return sim


def _invalid() -> Sim:
    sim = started(_sim())
    sim.happen(e.ModelInvalid(sim.now, M, FAILURE))
    return sim


def _cold() -> Sim:
    sim = started(_sim())
    sim.accept(M)
    return sim


def _queued() -> Sim:
    """Somebody waits for it, and a pinned model holds all the room."""
    sim = started(_sim())
    sim.accept("full", memory=95, pinned=True)
    started(sim)
    sim.accept(M)
    sim.ask(M)
    return sim


def _loading() -> Sim:
    sim = _cold()
    sim.ask(M)
    return sim


def _ready() -> Sim:
    return started(_loading())


def _replacing() -> Sim:
    """It serves while its new files load beside it, and a person waits for new parameters."""
    sim = _ready()
    sim.end(M)
    sim.change(M)
    sim.ask(M, person=True, parameters={"config": "x"})
    return sim


def _draining() -> Sim:
    """A request is in flight, and a person waits for it to be gone."""
    sim = _ready()
    sim.unload(M)
    return sim


def _draining_idle() -> Sim:
    """Nobody has used it for long, and nobody waits for its room."""
    sim = _ready()
    sim.end(M)
    sim.wait(620)
    return sim


def _unloading() -> Sim:
    sim = _draining()
    sim.end(M)
    sim.complete(sim.pending[-1])
    return sim


def _draining_to_sleep() -> Sim:
    """Nobody has used it for long, and it can be parked."""
    sim = started(Sim(Policy(budgets={"cpu:0": 100}), levels=(1,), residue=2))
    sim.accept(M)
    sim.load(M)
    sim.wait(620)
    return sim


def _parking() -> Sim:
    sim = _draining_to_sleep()
    sim.complete(sim.pending[-1])
    return sim


def _standby() -> Sim:
    return started(_parking())


def _standby_waiting() -> Sim:
    """Somebody waits for it, and a pinned model holds all the room."""
    sim = _standby()
    sim.accept("full", memory=95, pinned=True)
    started(sim)
    sim.ask(M)
    return sim


def _waking() -> Sim:
    sim = _standby()
    sim.ask(M)
    return sim


def _failed() -> Sim:
    """It did not load."""
    sim = _loading()
    sim.fail(sim.pending[-1])
    return sim


def _lost() -> Sim:
    """It was in use when its runtime died, which is being started again."""
    sim = _ready()
    sim.crash()
    sim.wait(2)
    return sim


def _stuck() -> Sim:
    """It could not be unloaded."""
    sim = _unloading()
    sim.fail(sim.pending[-1])
    return sim


def _recovering() -> Sim:
    """A record says that it was loaded; its runtime does not answer yet. Somebody waits."""
    sim = _sim()
    sim.accept(M, was_loaded=True)
    sim.ask(M)
    return sim


SITUATIONS: Mapping[str, tuple[State, Callable[[], Sim]]] = {
    "DISCOVERED": (State.DISCOVERED, _discovered),
    "INVALID": (State.INVALID, _invalid),
    "COLD": (State.COLD, _cold),
    "QUEUED": (State.QUEUED, _queued),
    "LOADING": (State.LOADING, _loading),
    "READY": (State.READY, _ready),
    "READY replacing": (State.READY, _replacing),
    "DRAINING": (State.DRAINING, _draining),
    "DRAINING idle": (State.DRAINING, _draining_idle),
    "DRAINING to sleep": (State.DRAINING, _draining_to_sleep),
    "PARKING": (State.PARKING, _parking),
    "STANDBY": (State.STANDBY, _standby),
    "STANDBY waiting": (State.STANDBY, _standby_waiting),
    "LOADING waking": (State.LOADING, _waking),
    "UNLOADING": (State.UNLOADING, _unloading),
    "FAILED": (State.FAILED, _failed),
    "FAILED lost": (State.FAILED, _lost),
    "FAILED stuck": (State.FAILED, _stuck),
    "RECOVERING": (State.RECOVERING, _recovering),
}


# --------------------------------------------------------------------------- events


def _op(sim: Sim) -> int:
    """The id of the operation under way, or of none."""
    model = sim.world.models.get(M)
    return model.op if model is not None and model.op else STALE


def _ticket(sim: Sim) -> int:
    return sim._ticket()


def _epoch(sim: Sim) -> int:
    return sim.world.runtimes["r"].epoch


def _accepted(sim: Sim, revision: str = "", *, dropped: bool = False) -> e.ModelAccepted:
    """Without a revision, as it is known."""
    model = sim.world.models.get(M)
    known = model.spec.revision if model is not None and model.spec is not None else "1"
    sim.files.setdefault(M, File(Spec("r", "cpu", "1"), 10, 10))
    return e.ModelAccepted(sim.now, M, Spec("r", "cpu", revision or known), Estimate(10, 1.0), dropped=dropped)


def _shown(name: str, parked: int) -> ObservedModel:
    memory = {"cpu:0": 2, "host:0": 5} if parked else {"cpu:0": 12}
    return ObservedModel(name=name, ready=not parked, parked=parked, memory=memory)


def _seen(sim: Sim, *names: str, at: float = 0.0, epoch: int | None = None, parked: int = 0) -> e.RuntimeObserved:
    others = tuple(m for m in sim.observation("r").models if m.name != M)
    models = (*others, *(_shown(n, parked) for n in names))
    return e.RuntimeObserved(
        sim.now + 1,
        "r",
        _epoch(sim) if epoch is None else epoch,
        sim.now + at,
        Observation(instance=sim.world.runtimes["r"].instance, models=models),
    )


def _up(sim: Sim, *names: str, epoch: int | None = None, parked: int = 0) -> e.RuntimeUp:
    models = tuple(_shown(n, parked) for n in names)
    told = Observation(instance="9", models=models)
    return e.RuntimeUp(sim.now, "r", _epoch(sim) if epoch is None else epoch, "9", False, told)


def _devices(sim: Sim) -> e.DevicesObserved:
    device = Device(id="cpu:0", kind="cpu", name="memory", total_bytes=100, used_bytes=0)
    return e.DevicesObserved(sim.now, (device,))


def _withdrawn(sim: Sim) -> e.TicketWithdrawn:
    ticket = min(sim.world.tickets, default=STALE)
    sim.asked.discard(ticket)
    return e.TicketWithdrawn(sim.now, ticket)


def _drained(sim: Sim) -> e.Drained:
    sim.in_flight.clear()
    return e.Drained(sim.now, M, _op(sim))


EVENTS: Mapping[str, Callable[[Sim], e.Event]] = {
    "DropSeen": lambda s: e.DropSeen(s.now, M, "half of it is here"),
    "DropRefused": lambda s: e.DropRefused(s.now, M, FAILURE, M),
    "DropRefused, moved": lambda s: e.DropRefused(s.now, M, FAILURE, "quarantine/m"),
    "DropGone": lambda s: e.DropGone(s.now, M),
    "ModelAccepted, the same": _accepted,
    "ModelAccepted, changed": lambda s: _accepted(s, "7"),
    "ModelAccepted, dropped": lambda s: _accepted(s, "7", dropped=True),
    "ModelInvalid": lambda s: e.ModelInvalid(s.now, M, FAILURE),
    "ModelRemoved": lambda s: e.ModelRemoved(s.now, M),
    "ReadyAsked": lambda s: e.ReadyAsked(s.now, _ticket(s), M, s.now + 300),
    "ReadyAsked, by a person": lambda s: e.ReadyAsked(s.now, _ticket(s), M, s.now + 300, person=True),
    "ReadyAsked, with parameters": lambda s: e.ReadyAsked(
        s.now, _ticket(s), M, s.now + 300, person=True, parameters={"config": "x"}
    ),
    "UnloadAsked": lambda s: e.UnloadAsked(s.now, _ticket(s), M, s.now + 300),
    "TicketWithdrawn": _withdrawn,
    "PinAsked": lambda s: e.PinAsked(s.now, M, True),
    "PinAsked, unpinned": lambda s: e.PinAsked(s.now, M, False),
    "Loaded": lambda s: e.Loaded(s.now, M, _op(s), (("cpu:0", 12),), 2.0),
    "Loaded, stale": lambda s: e.Loaded(s.now, M, STALE, (("cpu:0", 12),), 2.0),
    "LoadFailed": lambda s: e.LoadFailed(s.now, M, _op(s), FAILURE),
    "LoadFailed, runtime lost": lambda s: e.LoadFailed(s.now, M, _op(s), FAILURE, runtime_lost=True),
    "LoadFailed, runtime stuck": lambda s: e.LoadFailed(s.now, M, _op(s), FAILURE, runtime_lost=True, recycle=True),
    "LoadFailed, stale": lambda s: e.LoadFailed(s.now, M, STALE, FAILURE),
    "Parked": lambda s: e.Parked(s.now, M, _op(s), (("cpu:0", 2), ("host:0", 5)), 1.0),
    "Parked, stale": lambda s: e.Parked(s.now, M, STALE, (("host:0", 5),), 1.0),
    "ParkFailed": lambda s: e.ParkFailed(s.now, M, _op(s), FAILURE),
    "ParkFailed, stale": lambda s: e.ParkFailed(s.now, M, STALE, FAILURE),
    "Drained": _drained,
    "Drained, stale": lambda s: e.Drained(s.now, M, STALE),
    "Unloaded": lambda s: e.Unloaded(s.now, M, _op(s)),
    "Unloaded, stale": lambda s: e.Unloaded(s.now, M, STALE),
    "UnloadFailed": lambda s: e.UnloadFailed(s.now, M, _op(s), FAILURE),
    "UnloadFailed, runtime stuck": lambda s: e.UnloadFailed(s.now, M, _op(s), FAILURE, recycle=True),
    "UnloadFailed, stale": lambda s: e.UnloadFailed(s.now, M, STALE, FAILURE),
    "UseObserved": lambda s: e.UseObserved(s.now, ((M, Use(0, 9, s.now, 0.1)),)),
    "DevicesObserved": _devices,
    "RuntimeAdded": lambda s: e.RuntimeAdded(s.now, "r"),
    "RuntimeUp, without it": _up,
    "RuntimeUp, with it": lambda s: _up(s, M),
    "RuntimeUp, with it asleep": lambda s: _up(s, M, parked=1),
    "RuntimeUp, stale": lambda s: _up(s, M, epoch=STALE),
    "RuntimeDown": lambda s: e.RuntimeDown(s.now, "r", _epoch(s), FAILURE),
    "RuntimeDown, for good": lambda s: e.RuntimeDown(s.now, "r", _epoch(s), Failure("config", "no such program")),
    "RuntimeStopped": lambda s: e.RuntimeStopped(s.now, "r", _epoch(s)),
    "RuntimeDown, stale": lambda s: e.RuntimeDown(s.now, "r", STALE, FAILURE),
    "RuntimeObserved, with it": lambda s: _seen(s, M, at=0.5),
    "RuntimeObserved, with it asleep": lambda s: _seen(s, M, at=0.5, parked=1),
    "RuntimeObserved, asleep before": lambda s: _seen(s, M, at=-1, parked=1),
    "RuntimeObserved, without it": lambda s: _seen(s, at=0.5),
    "RuntimeObserved, with it before": lambda s: _seen(s, M, at=-1),
    "RuntimeObserved, without it before": lambda s: _seen(s, at=-1),
    "RuntimeObserved, stale": lambda s: _seen(s, epoch=STALE),
    "Ticked": lambda s: e.Ticked(s.now),
    "Ticked, late": lambda s: e.Ticked(s.now + 3600),
}
