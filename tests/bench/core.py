"""How long the core takes to judge, with 10,000 models, 500 of them loaded and 50 waiting for room."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

from modelium.api.types import Device, Observation, ObservedModel
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.states import State
from modelium.core.step import step
from modelium.core.world import Estimate, Failure, Policy, Spec, Use, World

MODELS = 10_000
LOADED = 500
WAITING = 50
SIZE = 10**9
EVENTS = 5_000


def name_of(number: int) -> str:
    return f"model-{number:05d}"


class Bench:
    """A world under load whose every step is timed. Its runtime does at once, and in order, what it is told."""

    def __init__(self, *, waiting: int):
        self.policy = Policy(budgets={"cuda:0": LOADED * SIZE}, max_concurrent_loads=4)
        self.world = World()
        self.now = 1_000_000.0
        self.orders: deque[i.Instruction] = deque()
        self.took: dict[str, list[float]] = {}
        self.waiting = waiting
        self.tickets: list[int] = []
        self.asked = 0
        self.grown = 0
        self.random = random.Random(1)
        self.devices()
        self.happen(e.RuntimeAdded(self.now, "triton"))
        for number in range(MODELS):
            spec = Spec("triton", "cuda", "1")
            self.happen(e.ModelAccepted(self.now, name_of(number), spec, Estimate(SIZE, 5.0, True)))
        loaded = Observation(instance="1", models=tuple(self.shown(n) for n in range(LOADED)))
        self.happen(e.RuntimeUp(self.now, "triton", 1, "1", False, loaded, adopted=True))
        self.took_adopting = self.took["RuntimeUp"][0]
        self.now += 60
        self.use(range(LOADED), busy=True)
        for _ in range(waiting):
            self.ask()
        self.took.clear()
        self.orders.clear()

    def happen(self, event: e.Event) -> None:
        begin = time.perf_counter()
        self.world, out = step(self.world, event, self.policy)
        self.took.setdefault(type(event).__name__, []).append(time.perf_counter() - begin)
        for order in out:
            if isinstance(order, i.Load | i.Unload | i.CloseRoute):
                self.orders.append(order)
            elif isinstance(order, i.Grant | i.Refuse) and order.ticket in self.tickets:
                self.tickets.remove(order.ticket)

    def shown(self, number: int) -> ObservedModel:
        return ObservedModel(name=name_of(number), ready=True, memory={"cuda:0": SIZE})

    def devices(self) -> None:
        device = Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=2 * LOADED * SIZE, used_bytes=LOADED * SIZE)
        self.happen(e.DevicesObserved(self.now, (device,), {"cuda:0": LOADED * SIZE}))

    def use(self, numbers: range, *, busy: bool) -> None:
        """`busy` models can't be evicted before somebody has waited for long."""
        use = tuple((name_of(n), Use(1 if busy else 0, 10 + self.random.randrange(9), self.now, 0.3)) for n in numbers)
        self.happen(e.UseObserved(self.now, use))

    def ask(self) -> None:
        self.asked += 1
        self.tickets.append(self.asked)
        name = name_of(LOADED + self.random.randrange(MODELS - LOADED))
        self.happen(e.ReadyAsked(self.now, self.asked, name, self.now + 300))

    def answer(self) -> None:
        """One instruction is done."""
        match self.orders.popleft() if self.orders else None:
            case i.Load(name, op, _, booking):
                self.happen(e.Loaded(self.now, name, op, booking, 5.0))
            case i.Unload(name, op):
                self.happen(e.Unloaded(self.now, name, op))
            case i.CloseRoute(name, op) if op:
                self.happen(e.Drained(self.now, name, op))
            case _:
                pass

    def one(self) -> None:
        """One event of a busy day."""
        self.now += 0.05
        kind = self.random.random()
        some = self.random.randrange(LOADED - 5)
        loaded = list(self.world.live)
        if kind < 0.30:
            use = Use(self.random.randrange(3), 100, self.now, 0.3)
            self.happen(e.UseObserved(self.now, tuple((n, use) for n in self.random.sample(loaded, 5))))
        elif kind < 0.65 and self.orders:
            self.answer()
        elif kind < 0.80:
            if len(self.tickets) < max(self.waiting, 1):
                self.ask()
            else:
                self.happen(e.TicketWithdrawn(self.now, self.random.choice(self.tickets)))
                self.tickets = [t for t in self.tickets if t in self.world.tickets]
        elif kind < 0.92:
            name = name_of(some)
            spec = self.world.models[name].spec
            assert spec is not None
            self.happen(e.ModelAccepted(self.now, name, spec, Estimate(SIZE, 5.0, True)))
        elif kind < 0.96:
            self.happen(e.LoadFailed(self.now, name_of(some), 10**9, Failure("driver", "too late to matter")))
        else:
            self.happen(e.Ticked(self.now))

    def observed(self) -> None:
        ready = [m for n in self.world.live if (m := self.world.models[n]).state is State.READY]
        self.grown += 1000
        memory = {"cuda:0": SIZE + self.grown}
        shown = tuple(ObservedModel(name=m.name, ready=True, memory=memory) for m in ready)
        self.happen(e.RuntimeObserved(self.now, "triton", 1, self.now, Observation(instance="1", models=shown)))


def _timed(work: Callable[[], None], times: int = 5) -> float:
    """Milliseconds of the middle one of several runs."""
    spent = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        spent.append((time.perf_counter() - begin) * 1e3)
    return median(spent)


def rows(folder: Path | None = None) -> list[tuple[str, str, str]]:
    """Name, figure and bar of each measurement; nothing is written to `folder`."""
    found = []
    for waiting in (0, WAITING):
        bench = Bench(waiting=waiting)
        adopting = bench.took_adopting * 1e3
        for _ in range(EVENTS):
            bench.one()
        spent = [s * 1e6 for row in bench.took.values() for s in row]
        who = f"{MODELS:,} models, {LOADED} loaded, {waiting} waiting"
        tail = quantiles(spent, n=100)[98]
        found.append((f"step(), {who}", f"median {median(spent):.0f} µs, p99 {tail:.0f} µs", "median < 100 µs"))
        if not waiting:
            found.append((f"RuntimeUp adopting {LOADED} of {MODELS:,}", f"{adopting:.1f} ms", ""))

    def reconcile() -> None:
        bench.now += bench.policy.sweep_s + 1
        bench.use(range(LOADED), busy=False)
        bench.observed()
        bench.devices()
        bench.happen(e.Ticked(bench.now))

    found.append(("a reconcile tick with all of that", f"{_timed(reconcile):.1f} ms", "< 50 ms"))
    for kind in ("UseObserved", "RuntimeObserved", "DevicesObserved", "Ticked"):
        worst = max(bench.took[kind][-5:]) * 1e3
        found.append((f"  of it {kind}, worst of 5", f"{worst:.1f} ms", ""))
    return found


if __name__ == "__main__":
    for row in rows():
        print("  ".join(row))
