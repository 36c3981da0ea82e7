"""Every event in every state: `table.txt` says what comes of it, and what is not in it changes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.states import BIRTH, RUNTIME_TRANSITIONS, TRANSITIONS, RuntimeState, State
from modelium.core.step import _HANDLERS, step
from modelium.core.turn import IllegalTransition, Turn
from modelium.core.world import Model, Policy, Runtime, World
from tests.core.sim import Sim
from tests.core.situations import EVENTS, SITUATIONS, M


def read_table() -> dict[tuple[str, str], tuple[str, list[str]]]:
    rows: dict[tuple[str, str], tuple[str, list[str]]] = {}
    situation = ""
    for line in (Path(__file__).parent / "table.txt").read_text().splitlines():
        if line.startswith("["):
            situation = line.strip("[]")
        elif situation and line:
            event, after, *orders = line[:36].strip(), *line[36:].split()
            rows[situation, event] = (after, orders)
    return rows


TABLE = read_table()
PAIRS = list(itertools.product(SITUATIONS, EVENTS))


def told(order: i.Instruction) -> str:
    text = type(order).__name__
    if isinstance(order, i.Refuse):
        text += f"({order.code})"
    name = getattr(order, "name", M)
    return text if name == M else f"{text}[{name}]"


def happen(situation: str, event: str) -> tuple[Sim, list[i.Instruction]]:
    state, make = SITUATIONS[situation]
    sim = make()
    assert sim.world.models[M].state is state
    return sim, sim.happen(EVENTS[event](sim))


@pytest.mark.parametrize(("situation", "event"), PAIRS)
def test_event_in_state(situation: str, event: str) -> None:
    sim, out = happen(situation, event)
    model = sim.world.models.get(M)
    after = str(model.state) if model is not None else "gone"
    orders = [told(o) for o in out if not isinstance(o, i.Tell | i.WakeAt)]
    assert (after, orders) == TABLE.get((situation, event), (str(SITUATIONS[situation][0]), []))


def test_the_table_speaks_of_nothing_else() -> None:
    assert set(TABLE) <= set(PAIRS)
    assert {state for state, _ in SITUATIONS.values()} == set(State)
    assert {type(EVENTS[event](SITUATIONS["READY"][1]())) for event in EVENTS} == set(_HANDLERS)


def test_every_transition_is_reached_and_no_other() -> None:
    seen: set[tuple[State, State]] = set()
    births: set[State] = set()
    for situation, event in PAIRS:
        sim, out = happen(situation, event)
        for order in [*out, *(o for _, earlier in sim.history for o in earlier)]:
            if isinstance(order, i.Tell) and order.transition.subject == M and order.transition.after:
                if order.transition.before:
                    seen.add((State(order.transition.before), State(order.transition.after)))
                else:
                    births.add(State(order.transition.after))
    seen = {(a, b) for a, b in seen if a is not b}
    assert seen == {(a, b) for a, follow in TRANSITIONS.items() for b in follow}
    assert births == BIRTH


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_illegal_transitions_raise(before: State, after: State) -> None:
    model = Model(M, before, 0.0, "")
    turn = Turn(World(), Policy(), 1.0)
    turn.put(model)
    if after in TRANSITIONS[before]:
        assert turn.move(model, after, "because").state is after
    else:
        with pytest.raises(IllegalTransition, match=f"{before} to {after}"):
            turn.move(model, after, "because")


@pytest.mark.parametrize("state", State)
def test_illegal_births_raise(state: State) -> None:
    turn = Turn(World(), Policy(), 1.0)
    if state in BIRTH:
        turn.born(Model(M, state, 0.0, ""))
    else:
        with pytest.raises(IllegalTransition, match=str(state)):
            turn.born(Model(M, state, 0.0, ""))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(RuntimeState, RuntimeState)))
def test_illegal_transitions_of_runtimes_raise(before: RuntimeState, after: RuntimeState) -> None:
    turn = Turn(World(), Policy(), 1.0)
    runtime = Runtime("r", before)
    if after in RUNTIME_TRANSITIONS[before]:
        assert turn.move_runtime(runtime, after, "because").state is after
    else:
        with pytest.raises(IllegalTransition):
            turn.move_runtime(runtime, after, "because")


def test_a_change_of_an_outdated_record_is_noticed() -> None:
    turn = Turn(World(), Policy(), 1.0)
    old = turn.born(Model(M, State.COLD, 0.0, ""))
    turn.change(old, reason="newer")
    with pytest.raises(AssertionError, match="outdated"):
        turn.change(old, reason="newest")


def test_a_misspelt_field_is_noticed() -> None:
    turn = Turn(World(), Policy(), 1.0)
    model = turn.born(Model(M, State.COLD, 0.0, ""))
    with pytest.raises(TypeError, match="resaon"):
        turn.change(model, resaon="typo")


@pytest.mark.parametrize("event", EVENTS)
def test_nobody_is_known_yet(event: str) -> None:
    """Any event in an empty world: nothing is loaded, nobody is left without an answer."""
    sim = Sim()
    for p in list(sim.pending):
        sim.complete(p)
    if event == "ModelAccepted, the same":
        return  # there is none to be the same as
    what = EVENTS[event](sim)
    world, out = step(sim.world, what, sim.policy)
    assert not [o for o in out if isinstance(o, i.Unload | i.CloseRoute | i.Grant | i.OpenRoute)]
    assert not world.tickets
    if isinstance(what, e.ReadyAsked | e.UnloadAsked):
        assert [o.code for o in out if isinstance(o, i.Refuse)] == ["model_not_found"]
