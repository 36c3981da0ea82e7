"""Whatever happens, in whatever order: no step breaks a rule, and once the world outside is fair, all comes to rest.

The rules are in `Sim` (each step is held to them) and in `modelium.core.invariants` (each world is).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from modelium.core.states import State
from modelium.core.world import Policy
from tests.core import actions
from tests.core.actions import AMONG_SLEEPERS, OFTEN, SELDOM, Pick
from tests.core.sim import Sim

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
WALKS, STEPS = (10_000, 200) if DEEP else (250, 150)


def _pick(data: st.DataObject) -> Pick:
    return lambda below: data.draw(st.integers(0, below - 1))


class Anything(RuleBasedStateMachine):
    """Every action of `actions`, in any order, with whatever numbers break it soonest."""

    sim: Sim

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.sim = actions.a_sim(_pick(data))

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.settle()


def _rule(action: Callable[[Sim, Pick], None]) -> Callable[..., None]:
    @rule(data=st.data())
    def act(self: Anything, data: st.DataObject) -> None:
        action(self.sim, _pick(data))

    return act


for _n, _action in enumerate((*OFTEN, *SELDOM)):
    setattr(Anything, f"{_action.__name__}_{_n}", _rule(_action))


@pytest.mark.timeout(0 if DEEP else 120)
def test_anything_goes_and_all_comes_to_rest() -> None:
    run_state_machine_as_test(Anything)


@pytest.mark.timeout(0 if DEEP else 120)
def test_long_walks_come_to_rest() -> None:
    """The same with plain random numbers: many more steps in the same time, without the search for a small example."""
    _walk(WALKS, actions.a_sim, OFTEN)


@pytest.mark.timeout(0 if DEEP else 120)
def test_walks_among_sleepers_come_to_rest() -> None:
    """Models fall asleep and wake while their devices come and go."""
    _walk(WALKS // 2, actions.a_sim_of_sleepers, AMONG_SLEEPERS)


def _walk(walks: int, begin: Callable[[Pick], Sim], often: Sequence[Callable[[Sim, Pick], None]]) -> None:
    seed = random.randrange(10**9) if DEEP else 0
    for walk in range(seed, seed + walks):
        numbers = random.Random(walk)
        sim = begin(numbers.randrange)
        try:
            for _ in range(STEPS):
                numbers.choice(often if numbers.random() < 0.75 else SELDOM)(sim, numbers.randrange)
            sim.settle()
        except Exception as exc:
            raise AssertionError(f"walk {walk}") from exc


# --------------------------------------------------------------------------- nobody starves


class Crowd:
    """Models that are asked for without end, whose requests take a while, as do loads and unloads: 3 s at most."""

    def __init__(self, sim: Sim, sizes: list[int], seed: int, *, priority: int = 0):
        self.sim = sim
        self.numbers = random.Random(seed)
        self.priority = priority
        self.names = [f"hot{n}" for n in range(len(sizes))]
        self.begun: dict[int, float] = {}
        for name, size in zip(self.names, sizes, strict=True):
            sim.accept(name, memory=size)

    def second(self) -> None:
        sim, numbers = self.sim, self.numbers
        for name in self.names:
            if not sim.use(name) and not sim.world.models[name].tickets:
                sim.ask(name, deadline_s=10_000, priority=self.priority)
            if numbers.random() < 0.7:
                sim.end(name)
            while name not in sim.open and sim.in_flight.get(name):
                sim.end(name)
        for p in sim.ready_to_end():
            begun = self.begun.setdefault(getattr(p.order, "op", 0), sim.now)
            if numbers.random() < 0.5 or sim.now - begun >= 2:
                sim.complete(p)
        sim.wait(1.0)


SEEDS = st.integers(0, 10**6)


@given(
    sizes=st.lists(st.sampled_from([20, 30, 40, 50, 70, 100]), min_size=1, max_size=5),
    need=st.sampled_from([10, 40, 60, 100]),
    parts=st.booleans(),
    head_start=st.integers(0, 40),
    seed=SEEDS,
)
def test_a_waiting_model_that_can_fit_is_granted_in_bounded_time(
    sizes: list[int], need: int, parts: bool, head_start: int, seed: int
) -> None:
    sim = Sim(Policy(budgets={"cpu:0": 100}))
    crowd = Crowd(sim, sizes, seed)
    if parts:
        sim.accept("part", memory=need // 2)
        sim.accept("small", memory=need // 4)
        sim.accept("waiter", memory=need - need // 2 - need // 4, parts=("part", "small"))
    else:
        sim.accept("waiter", memory=need)
    for _ in range(head_start):
        crowd.second()
    policy = sim.policy
    # Each of those who waited before it may have its turn first: to age, to see out a minimum stay, to drain, to load.
    turn_s = policy.fairness_after_s + policy.min_resident_s + policy.drain_timeout_s + 20
    bound = turn_s * (len(sizes) + 2) * (3 if parts else 1)
    ticket = sim.ask("waiter", deadline_s=10_000)
    began = sim.now
    while ticket not in sim.answered and sim.now - began < bound:
        crowd.second()
    assert any(granted == ticket for _, granted, _ in sim.grants), sim.story(f"not granted within {bound:.0f} s")


@given(sizes=st.lists(st.sampled_from([30, 50, 60, 100]), min_size=2, max_size=6), seed=SEEDS)
@settings(max_examples=100 if DEEP else 10)
def test_all_of_a_crowd_have_their_turn(sizes: list[int], seed: int) -> None:
    """More than fits, all wanted always."""
    sim = Sim(Policy(budgets={"cpu:0": 100}))
    crowd = Crowd(sim, sizes, seed)
    for _ in range(95 * (len(sizes) + 2)):
        crowd.second()
    assert {name for _, _, name in sim.grants} == set(crowd.names)


@given(seed=SEEDS)
@settings(max_examples=100 if DEEP else 5)
def test_a_high_priority_delays_and_never_starves(seed: int) -> None:
    """Priority 10 without end against -5: each `fairness_after_s` waited counts as one."""
    sim = Sim(Policy(budgets={"cpu:0": 100}))
    crowd = Crowd(sim, [100] * 4, seed, priority=10)
    sim.accept("waiter", memory=100)
    crowd.second()
    ticket = sim.ask("waiter", priority=-5, deadline_s=10_000)
    began = sim.now
    while ticket not in sim.answered:
        crowd.second()
        assert sim.now - began < 15 * 20 + 95 * 5, sim.story("it waits still")
    assert sim.world.models["waiter"].state is State.READY


@given(sizes=st.lists(st.sampled_from([20, 40, 60]), min_size=3, max_size=6), seed=SEEDS)
def test_what_nobody_asks_for_is_not_loaded_for_anothers_sake(sizes: list[int], seed: int) -> None:
    """Dropped models that do not fit together: each is loaded at most once, and none goes for another."""
    sim = Sim(Policy(budgets={"cpu:0": 100}))
    numbers = random.Random(seed)
    for n, size in enumerate(sizes):
        sim.accept(f"m{n}", memory=size, dropped=True)
        while numbers.random() < 0.5 and sim.step_fairly():
            pass
    while sim.step_fairly():
        pass
    sim.wait(200)
    assert len(set(sim.loads)) == len(sim.loads)
    ready = {m.name for m in sim.world.models.values() if m.state is State.READY}
    assert ready and sum(sizes[int(n[1:])] for n in ready) <= 100
    left = [sizes[int(m.name[1:])] for m in sim.world.models.values() if m.state is State.COLD]
    assert all(size > 100 - sum(sizes[int(n[1:])] for n in ready) for size in left), "there was room for more"
    assert not [m for m in sim.world.models.values() if m.state not in (State.READY, State.COLD)]
