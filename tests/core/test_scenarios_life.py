"""Files, runtimes and models made of others, as a person would tell of them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from modelium.api.types import Observation, ObservedModel
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.states import RuntimeState, State, Want
from modelium.core.world import Failure
from tests.core.test_scenarios import booked, make

# --------------------------------------------------------------------------- models made of others


def ensemble(limit: int = 100, **policy: object):  # type: ignore[no-untyped-def]
    sim = make(limit, **policy)
    sim.accept("p", memory=30)
    sim.accept("q", memory=20)
    sim.accept("w", memory=5, parts=("p", "q"))
    return sim


def test_an_ensemble_loads_after_its_parts() -> None:
    sim = ensemble()
    ticket = sim.ask("w")
    assert sim.states() == {"p": "LOADING", "q": "LOADING", "w": "QUEUED"}
    assert "waits for its parts: p, q" in sim.world.models["w"].reason
    sim.run()
    assert sim.loads == ["p", "q", "w"]
    assert sim.answer(ticket) == "granted"


def test_an_ensemble_goes_as_a_group_the_whole_first() -> None:
    sim = ensemble()
    sim.load("w")
    sim.wait(31)
    sim.accept("big", memory=90)
    sim.ask("big")
    assert sim.states() == {"big": "QUEUED", "p": "DRAINING", "q": "DRAINING", "w": "DRAINING"}
    parts = [p for p in sim.pending if isinstance(p.order, i.CloseRoute) and p.order.name in "pq"]
    for p in parts:
        sim.complete(p)
    assert sim.states() == {"big": "QUEUED", "p": "DRAINING", "q": "DRAINING", "w": "DRAINING"}
    sim.run()
    assert sim.states() == {"big": "READY", "p": "COLD", "q": "COLD", "w": "COLD"}


@pytest.mark.parametrize(("size", "gone"), [(38, "w"), (40, "w"), (45, "qw"), (80, "pqw"), (95, "pqsw")])
def test_only_as_much_of_a_group_goes_as_is_needed(size: int, gone: str) -> None:
    """An ensemble of 5 with parts of 30 and 20, another model of 10 that was used after it, 35 free."""
    sim = ensemble()
    sim.load("w")
    sim.wait(1)
    sim.accept("s", memory=10)
    sim.load("s")
    sim.wait(31)
    sim.accept("new", memory=size)
    sim.ask("new")
    assert "".join(sorted(n for n, m in sim.world.models.items() if m.state is State.DRAINING)) == gone


def test_a_part_shared_by_two_ensembles_goes_with_the_last() -> None:
    """The wholes themselves hold nothing: all the memory is their shared part's."""
    sim = make()
    sim.accept("shared", memory=60)
    for name in ("v", "w"):
        sim.accept(name, memory=0, parts=("shared",))
        sim.load(name)
    sim.accept("other", memory=30)
    sim.load("other")
    sim.wait(31)
    sim.use("other")
    sim.accept("new", memory=70)
    sim.ask("new")
    sim.run()
    assert sim.states() == {"new": "READY", "other": "READY", "shared": "COLD", "v": "COLD", "w": "COLD"}


def test_a_part_in_use_by_a_pinned_ensemble_stays() -> None:
    sim = ensemble(60)
    sim.pin("w")
    sim.run()
    sim.wait(2000)
    assert sim.states() == {"p": "READY", "q": "READY", "w": "READY"}
    assert sim.answer(sim.unload("p")) == "model_conflict"
    sim.accept("new", memory=40)
    ticket = sim.ask("new", deadline_s=60)
    sim.wait(61)
    assert sim.answer(ticket) == "deadline_passed"
    assert sim.states()["p"] == "READY"


def test_an_idle_ensemble_goes_before_its_parts() -> None:
    sim = ensemble()
    sim.load("w")
    sim.wait(605)
    assert sim.states() == {"p": "READY", "q": "READY", "w": "DRAINING"}
    sim.run()
    sim.wait(11)
    sim.run()
    assert sim.states() == {"p": "COLD", "q": "COLD", "w": "COLD"}


def test_an_ensemble_fails_with_its_parts_reason() -> None:
    sim = ensemble()
    sim.accept("q", memory=20, revision="2", bad=True)
    ticket = sim.ask("w")
    sim.run()
    assert sim.message(ticket) == "w is made of q: it is bad"
    assert sim.state("p") is State.READY or sim.state("p") is State.COLD
    sim.accept("x", parts=("missing",))
    assert "no such model in the repository" in sim.message(sim.ask("x"))
    sim.accept("me", parts=("you",))
    sim.accept("you", parts=("me",))
    assert "is made of itself" in sim.message(sim.ask("me"))


def test_an_ensemble_that_came_before_its_parts_loads_when_the_last_is_there() -> None:
    sim = make()
    sim.accept("w", parts=("p", "q"), dropped=True)
    for name in ("p", "q"):
        assert sim.state("w") is State.FAILED
        sim.accept(name, dropped=True)
    sim.run()
    assert sim.states() == {"p": "READY", "q": "READY", "w": "READY"}


def test_an_ensemble_whose_part_comes_back_is_not_loaded_for_nobody() -> None:
    sim = make()
    sim.accept("w", parts=("p",))
    assert sim.answer(sim.ask("w")) == "part_missing"
    sim.accept("p")
    sim.run()
    assert sim.states() == {"p": "COLD", "w": "COLD"}
    ticket = sim.ask("w")
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_part_that_failed_with_its_runtime_is_waited_for() -> None:
    sim = ensemble()
    sim.load("p")
    sim.crash()
    ticket = sim.ask("w")
    sim.wait(2)
    sim.run()
    sim.wait(2)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_parts_of_two_ensembles_do_not_evict_each_other_for_ever() -> None:
    """Each fits alone, both do not: the one that came first is loaded first, and then the other."""
    sim = make(100, min_resident_s=0)
    for whole, parts in (("v", ("a", "b")), ("w", ("c", "d"))):
        for part in parts:
            sim.accept(part, memory=40)
        sim.accept(whole, memory=10, parts=parts)
    first, second = sim.ask("v", deadline_s=1000), sim.ask("w", deadline_s=1000)
    for _ in range(100):
        sim.run()
        sim.wait(1)
        if sim.answer(first) == "granted":
            sim.end("v")
    assert (sim.answer(first), sim.answer(second)) == ("granted", "granted")
    assert sim.grants[0][1] == first
    assert len(sim.loads) <= 8


def test_the_largest_part_is_placed_first_and_a_small_one_moves_for_it() -> None:
    sim = make(100)
    sim.foreign.append(0)
    sim.policy = type(sim.policy)(budgets={"cpu:0": 100, "cpu:1": 60})
    sim.see_devices()
    sim.accept("a", memory=40)
    sim.accept("z", memory=90)
    sim.accept("w", memory=0, parts=("a", "z"))
    sim.load("w")
    where = {n: sim.world.models[n].booking[0][0] for n in ("a", "z")}
    assert where == {"a": "cpu:1", "z": "cpu:0"}
    assert sim.loads == ["z", "a", "w"]
    sim.unload("w")
    sim.run()
    for name in ("a", "z"):
        sim.unload(name)
        sim.run()
    sim.load("a")
    assert sim.world.models["a"].booking[0][0] == "cpu:0"
    sim.wait(31)
    sim.load("w")


def test_a_removed_part_stays_while_what_is_made_of_it_is_loaded() -> None:
    sim = ensemble()
    sim.load("w")
    sim.remove("p")
    assert sim.state("p") is State.READY
    assert "removed from the repository, and still part of w" in sim.world.models["p"].reason
    assert sim.answer(sim.ask("p")) == "model_not_found"
    assert sim.answer(sim.ask("w")) == "granted"
    sim.end("w")
    sim.unload("w")
    sim.run()
    assert sim.states() == {"q": "READY", "w": "COLD"}
    assert "no such model" in sim.message(sim.ask("w"))


def stuck_whole():  # type: ignore[no-untyped-def]
    """`w` could not be unloaded, and its part, which was to go with it, waits for it to be gone."""
    sim = make()
    sim.accept("p", memory=60)
    sim.accept("w", memory=5, parts=("p",))
    sim.load("w")
    sim.wait(31)
    sim.accept("big", memory=100)
    ticket = sim.ask("big")
    for name in ("p", "w"):
        sim.complete(next(p for p in sim.pending if p.order.name == name))
    sim.fail(next(p for p in sim.pending if isinstance(p.order, i.Unload)))
    assert sim.states() == {"big": "QUEUED", "p": "DRAINING", "w": "FAILED"}
    return sim, ticket


def test_a_part_goes_on_once_a_stuck_whole_turns_out_to_be_gone() -> None:
    sim, ticket = stuck_whole()
    sim.wait(60)
    assert sim.state("p") is State.DRAINING
    del sim.real["r"].models["w"]
    sim.see_runtime()
    assert sim.states() == {"big": "QUEUED", "p": "UNLOADING", "w": "COLD"}
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_part_is_taken_back_once_a_stuck_whole_turns_out_to_be_loaded() -> None:
    sim, ticket = stuck_whole()
    sim.see_runtime()
    assert sim.states() == {"big": "QUEUED", "p": "READY", "w": "READY"}
    sim.wait(40)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_part_whose_drain_is_overdue_waits_for_its_whole() -> None:
    sim = make()
    sim.accept("p", memory=60)
    sim.accept("w", memory=5, parts=("p",))
    sim.load("w", finish=False)
    sim.use("p")
    sim.wait(31)
    sim.accept("big", memory=100)
    sim.ask("big")
    sim.wait(16)
    assert sim.states() == {"big": "QUEUED", "p": "DRAINING", "w": "DRAINING"}
    sim.wait(31)
    assert sim.states() == {"big": "QUEUED", "p": "DRAINING", "w": "UNLOADING"}
    sim.run()
    sim.wait(11)
    sim.run()
    assert sim.state("big") is State.READY


def test_a_whole_that_is_wanted_again_is_not_taken_back_without_its_parts() -> None:
    sim = ensemble()
    sim.load("w")
    sim.wait(31)
    sim.accept("big", memory=90)
    waiter = sim.ask("big")
    ticket = sim.ask("w")
    sim.withdraw(waiter)
    assert sim.states() == {"big": "COLD", "p": "DRAINING", "q": "DRAINING", "w": "DRAINING"}
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_part_that_drains_for_nobody_is_taken_back_for_its_whole() -> None:
    sim = ensemble()
    sim.load("p")
    sim.wait(601)
    assert sim.state("p") is State.DRAINING
    sim.ask("w")
    assert sim.state("p") is State.READY
    sim.run()
    assert sim.loads == ["p", "q", "w"]


def test_a_part_that_a_waiting_whole_needs_is_not_let_go() -> None:
    """Neither for being idle, nor with another whole that it is a part of, nor for who comes later."""
    sim = make(min_resident_s=0)
    sim.accept("p", memory=40)
    sim.accept("v", memory=10, parts=("p",))
    sim.load("v")
    sim.accept("used", memory=50)
    sim.load("used", finish=False)
    sim.accept("z", memory=50)
    sim.accept("w", memory=0, parts=("p", "z"))
    ticket = sim.ask("w", deadline_s=5000)
    sim.wait(1)
    sim.accept("late", memory=30)
    sim.ask("late", deadline_s=5000)
    sim.wait(13)
    assert sim.states()["p"] == "READY"
    sim.end("used")
    sim.wait(1)
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert sim.loads.count("p") == 1


def test_an_idle_part_stays_while_its_whole_waits_for_room() -> None:
    sim = make()
    sim.accept("p", memory=10)
    sim.load("p")
    sim.accept("kept", memory=80, pinned=True)
    sim.run()
    sim.accept("w", memory=20, parts=("p",))
    sim.ask("w", deadline_s=5000)
    sim.wait(2000)
    assert sim.states() == {"kept": "READY", "p": "READY", "w": "QUEUED"}
    assert sim.world.models["p"].since == 1000.0


def test_what_fails_lends_its_age_to_nobody() -> None:
    """A pinned whole that has waited for ever fails each time it is tried, and its part, which somebody has only just
    asked for, evicts nobody in use for that."""
    sim = make(10)
    sim.accept("p", memory=10)
    sim.accept("w", memory=0, parts=("p", "missing"), pinned=True)
    sim.accept("busy", memory=10)
    sim.load("busy", finish=False)
    sim.wait(70)
    sim.ask("p")
    failures = sim.world.models["w"].failures
    sim.wait(14)
    assert sim.world.models["w"].failures == failures + 1
    assert sim.state("busy") is State.READY
    sim.wait(2)
    assert sim.state("busy") is State.DRAINING


def test_a_lost_part_comes_back_for_what_is_made_of_it() -> None:
    sim = ensemble()
    sim.load("w")
    sim.wait(400)
    del sim.real["r"].models["p"]
    sim.see_runtime()
    assert sim.states() == {"p": "LOADING", "q": "READY", "w": "READY"}
    sim.wait(2)
    sim.run()
    assert sim.states() == {"p": "READY", "q": "READY", "w": "READY"}


# --------------------------------------------------------------------------- files that change


def test_changed_files_load_beside_the_old_where_there_is_room() -> None:
    sim = make()
    sim.accept("a", memory=40)
    sim.load("a")
    sim.change("a", memory=50)
    assert booked(sim) == (90, 0, 0)
    assert sim.use("a")
    sim.end("a")
    sim.run()
    assert sim.world.models["a"].loaded_revision == "2"
    assert booked(sim) == (50, 0, 0)
    assert sim.loads == ["a", "a"]


def test_a_runtime_that_can_not_tell_is_booked_by_estimates() -> None:
    sim = make()
    sim.blind = True
    sim.accept("a", memory=40)
    sim.load("a")
    assert booked(sim) == (40, 0, 0)
    sim.see_runtime()
    assert booked(sim) == (40, 0, 0)
    sim.change("a", memory=50)
    sim.run()
    assert booked(sim) == (50, 0, 0)
    assert not sim.world.models["a"].estimate.measured


def test_changed_files_load_after_the_old_where_there_is_none() -> None:
    sim = make()
    sim.accept("a", memory=60)
    sim.load("a", finish=False)
    sim.change("a")
    assert sim.state("a") is State.DRAINING
    ticket = sim.ask("a")
    assert sim.answer(ticket) == "waits"
    sim.end("a")
    sim.run()
    assert sim.world.models["a"].loaded_revision == "2"
    assert sim.answer(ticket) == "granted"


def test_a_failed_replacement_keeps_the_old() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.change("a", bad=True)
    sim.run()
    assert sim.state("a") is State.READY
    assert sim.world.models["a"].loaded_revision == "1"
    assert "the old ones still serve: it is bad" in sim.world.models["a"].reason
    assert booked(sim) == (10, 0, 0)
    sim.wait(100)
    assert sim.loads == ["a", "a"]
    sim.change("a")
    sim.run()
    assert sim.world.models["a"].loaded_revision == "3"


def test_a_whole_that_gets_another_part_is_loaded_after_it() -> None:
    sim = ensemble()
    sim.load("w")
    sim.accept("z", memory=10)
    sim.accept("w", memory=5, parts=("p", "z"), revision="2")
    sim.run()
    assert sim.loads == ["p", "q", "w", "z", "w"]
    assert sim.world.models["w"].loaded_revision == "2"


def test_a_whole_whose_new_part_is_missing_serves_as_it_was() -> None:
    sim = ensemble()
    sim.load("w")
    sim.accept("w", memory=5, parts=("p", "missing"), revision="2")
    sim.wait(50)
    assert sim.state("w") is State.READY
    assert "not all that they are made of can be loaded" in sim.world.models["w"].reason
    assert sim.answer(sim.unload("q")) == "model_conflict"
    sim.accept("missing", memory=1)
    sim.load("missing")
    sim.run()
    assert sim.world.models["w"].loaded_revision == "2"
    assert sim.answer(sim.unload("q")) == "waits"


def test_replacements_wait_for_their_turn() -> None:
    sim = make(max_concurrent_loads=1)
    for name in ("a", "b", "c"):
        sim.accept(name, memory=10)
        sim.load(name)
    for name in ("a", "b", "c"):
        sim.change(name)
    assert len(sim.pending) == 1
    assert "wait for their turn" in sim.world.models["b"].reason
    sim.run()
    assert {m.loaded_revision for m in sim.world.models.values()} == {"2"}


def test_a_replacement_that_is_given_up_with_its_model_is_not_forgotten() -> None:
    """Somebody unloads a model whose new files are loading, and thinks better of it: only an unload ends that load."""
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a", finish=False)
    sim.change("a")
    gone = sim.unload("a")
    sim.withdraw(gone)
    ticket = sim.ask("a")
    assert sim.state("a") is State.DRAINING
    sim.end("a")
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert sim.world.models["a"].loaded_revision == "2"
    assert booked(sim) == (10, 0, 0)


def test_what_old_files_took_says_nothing_of_new_ones() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.ask("a")
    sim.change("a", memory=50)
    sim.files["a"].real = 10
    sim.complete(sim.pending[0])
    assert sim.world.models["a"].estimate.memory_bytes == 50
    assert booked(sim) == (10 + 50, 0, 0)


def test_a_replacement_that_can_never_fit_keeps_the_old() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.change("a", memory=120)
    assert sim.state("a") is State.READY
    assert "can never fit" in sim.world.models["a"].reason
    sim.wait(100)
    assert sim.state("a") is State.READY


def test_a_replacement_that_its_runtime_failed_is_tried_again_later() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.change("a")
    sim.fail(sim.pending[0], runtime_lost=True)
    assert not sim.pending
    sim.wait(4)
    assert not sim.pending
    sim.wait(2)
    sim.run()
    assert sim.world.models["a"].loaded_revision == "2"


def test_files_that_change_again_while_they_load() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.change("a")
    sim.change("a")
    sim.complete(sim.pending[0])
    assert sim.world.models["a"].loaded_revision == "2"
    sim.run()
    assert sim.world.models["a"].loaded_revision == "3"


def test_what_is_loading_beside_stays_booked_until_it_is_given_up() -> None:
    sim = make()
    sim.accept("a", memory=40)
    sim.load("a", finish=False)
    sim.change("a")
    assert booked(sim) == (80, 0, 0)
    sim.unload("a")
    assert booked(sim) == (80, 0, 80)
    sim.end("a")
    sim.run()
    assert booked(sim) == (0, 0, 0)


def test_a_replacement_that_never_ends_is_given_up() -> None:
    sim = make(load_timeout_s=60)
    sim.accept("a", memory=10)
    sim.load("a")
    sim.change("a")
    (replacement,) = sim.pending
    sim.wait(61)
    (given_up,) = sim.pending
    assert given_up.late and given_up.order is replacement.order
    assert sim.world.models["a"].op == 0
    assert "did not load within 60 s" in sim.world.models["a"].reason
    assert booked(sim) == (10, 0, 0)


def test_parameters_reload_and_are_not_undone_by_a_plain_load() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    ticket = sim.ask("a", person=True, parameters={"config": "x"})
    other = sim.ask("a")
    assert (sim.answer(ticket), sim.answer(other)) == ("waits", "granted")
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert sim.loads == ["a", "a"]
    assert sim.answer(sim.ask("a", person=True)) == "granted"
    assert sim.answer(sim.ask("a", person=True, parameters={"config": "x"})) == "granted"
    assert sim.world.models["a"].parameters == {"config": "x"}
    sim.unload("a")
    sim.end("a")
    sim.run()
    assert sim.world.models["a"].parameters == {}


def test_parameters_that_come_while_it_loads_are_loaded_before_they_are_granted() -> None:
    sim = make()
    sim.accept("a", memory=10)
    plain = sim.ask("a")
    ticket = sim.ask("a", person=True, parameters={"config": "x"})
    sim.complete(sim.pending[0])
    assert (sim.answer(plain), sim.answer(ticket)) == ("granted", "waits")
    sim.run()
    assert sim.answer(ticket) == "granted"
    held = sim.world.models["a"].held
    assert held is not None and held.parameters == {"config": "x"}


def test_a_request_may_bring_parameters_too() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    ticket = sim.ask("a", parameters={"config": "x"})
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert sim.world.models["a"].use.in_flight == 1


def test_parameters_that_do_not_load_are_forgotten() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    ticket = sim.ask("a", person=True, parameters={"config": "x"})
    sim.fail(sim.pending[0])
    assert sim.answer(ticket) == "load_rejected"
    assert sim.world.models["a"].parameters == {}
    sim.change("a")
    sim.run()
    assert sim.world.models["a"].loaded_revision == "2"


def test_a_changed_plan_moves_a_model_to_another_runtime() -> None:
    sim = make()
    sim.happen(e.RuntimeAdded(sim.now, "s"))
    sim.real["s"] = type(sim.real["r"])()
    sim.run()
    sim.accept("a", memory=10)
    sim.load("a", finish=False)
    sim.accept("a", memory=10, runtime="s", revision="2")
    assert sim.state("a") is State.DRAINING
    sim.end("a")
    sim.run()
    assert (sorted(sim.real["r"].models), sorted(sim.real["s"].models)) == ([], ["a"])


def test_files_that_turn_bad_serve_until_they_are_unloaded() -> None:
    sim = make()
    sim.accept("a")
    sim.load("a")
    sim.happen(e.ModelInvalid(sim.now, "a", Failure("model_invalid", "half of it is missing")))
    assert sim.state("a") is State.READY
    assert sim.answer(sim.ask("a")) == "granted"
    sim.end("a")
    sim.unload("a")
    sim.run()
    assert sim.state("a") is State.INVALID
    assert sim.message(sim.ask("a")) == "half of it is missing"
    sim.accept("a", revision="2")
    sim.load("a")


@pytest.mark.parametrize("when", ["COLD", "QUEUED", "LOADING", "READY", "DRAINING", "UNLOADING", "FAILED"])
def test_removal_in_each_state(when: str) -> None:
    sim = make(max_concurrent_loads=1)
    sim.accept("a", memory=10)
    sim.accept("b", memory=10)
    ticket = None
    match when:
        case "QUEUED":
            sim.ask("b")
            ticket = sim.ask("a")
        case "LOADING":
            ticket = sim.ask("a")
        case "READY":
            sim.load("a")
        case "DRAINING":
            sim.load("a", finish=False)
            sim.unload("a")
        case "UNLOADING":
            sim.load("a")
            sim.unload("a")
            sim.complete(sim.pending[0])
        case "FAILED":
            ticket = sim.ask("a")
            sim.fail(sim.pending[0])
            ticket = None
    assert str(sim.state("a")) == when
    sim.remove("a")
    if ticket is not None:
        assert sim.answer(ticket) == "model_not_found"
    while sim.in_flight.get("a"):
        sim.end("a")
    sim.run()
    assert "a" not in sim.world.models
    assert not sim.real["r"].models.get("a")
    assert booked(sim)[0] == (10 if when == "QUEUED" else 0)
    sim.settle()


def test_what_is_removed_and_comes_back_before_it_is_unloaded() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a", finish=False)
    sim.remove("a")
    assert sim.answer(sim.ask("a")) == "model_not_found"
    sim.accept("a", memory=10, revision="2", dropped=True, pinned=True)
    ticket = sim.ask("a")
    sim.end("a")
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert sim.world.models["a"].loaded_revision == "2"
    assert sim.world.models["a"].pinned


# --------------------------------------------------------------------------- runtimes


def test_a_crash_with_requests_in_flight_and_requests_waiting() -> None:
    sim = make()
    for name in ("used", "idle", "kept", "late"):
        sim.accept(name, memory=10)
    sim.pin("kept")
    sim.load("used")
    sim.load("idle")
    sim.wait(301)
    sim.load("used", finish=False)
    waiting = sim.ask("late")
    sim.crash()
    assert set(sim.states().values()) == {"FAILED"}
    assert booked(sim) == (0, 0, 0)
    assert not sim.open
    assert sim.answer(waiting) == "waits"
    sim.wait(3)
    sim.run()
    sim.wait(3)
    sim.run()
    assert sim.states() == {"idle": "COLD", "kept": "READY", "late": "READY", "used": "READY"}
    assert sim.answer(waiting) == "granted"
    assert sim.answer(sim.ask("idle")) == "waits"
    sim.run()
    assert sim.state("idle") is State.READY


def test_a_model_that_takes_its_runtime_down_again_and_again_is_failed() -> None:
    sim = make(crash_budget=99)
    sim.accept("evil", memory=10)
    ticket = sim.ask("evil", deadline_s=10_000)
    for _ in range(4):
        sim.wait(70)
        while any(isinstance(p.order, i.StartRuntime) for p in sim.pending):
            sim.complete(next(p for p in sim.pending if isinstance(p.order, i.StartRuntime)))
        sim.wait(2)
        if sim.state("evil") is State.LOADING:
            sim.crash()
    assert sim.answer(ticket) == "runtime_unavailable"
    assert sim.world.models["evil"].want is Want.NONE


@pytest.mark.parametrize("person", [False, True])
def test_a_crash_loop_is_left_alone_for_a_while_or_until_a_person_loads(person: bool) -> None:
    sim = make(crash_budget=3)
    sim.accept("a", memory=10)
    sim.load("a")
    sim.crash()
    waiting = sim.ask("a", deadline_s=10_000)
    for _ in range(2):
        sim.wait(70)
        sim.complete(next(p for p in sim.pending if isinstance(p.order, i.StartRuntime)))
        sim.crash()
    runtime = sim.world.runtimes["r"]
    assert runtime.given_up
    assert runtime.reason == "3 failures within 600 s; it does not answer"
    assert sim.answer(waiting) == "runtime_unavailable"
    assert "r is down: 3 failures" in sim.message(sim.ask("a"))
    sim.wait(599)
    assert not [p for p in sim.pending if isinstance(p.order, i.StartRuntime)]
    if person:
        ticket = sim.ask("a", person=True)
        sim.wait(0.1)
    else:
        sim.wait(2)
        ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert sim.world.runtimes["r"].state is RuntimeState.UP
    sim.crash()
    assert not sim.world.runtimes["r"].given_up  # it has its whole budget again


def test_a_runtime_that_does_not_come_up_yet_is_tried_for_ever() -> None:
    sim = make(crash_budget=3)
    sim.accept("a")
    sim.crash()
    ticket = sim.ask("a", deadline_s=10_000)
    for _ in range(20):
        sim.wait(61)
        sim.fail(sim.pending[-1])
    sim.wait(61)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_runtime_that_is_set_up_wrongly_is_left_down_at_once() -> None:
    sim = make()
    sim.accept("a")
    sim.crash()
    sim.wait(2)
    sim.fail(sim.pending[-1], config=True)
    assert sim.world.runtimes["r"].given_up
    sim.accept("d", dropped=True)
    assert sim.state("d") is State.FAILED


def test_a_model_that_was_lost_with_its_runtime_may_be_asked_for_at_once() -> None:
    sim = make()
    sim.accept("a")
    sim.load("a")
    sim.crash()
    ticket = sim.ask("a")
    assert sim.answer(ticket) == "waits"
    sim.wait(3)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_contact_lost_and_found_again_adopts() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.tell_down()
    assert sim.state("a") is State.FAILED
    sim.wait(2)
    sim.run()
    assert sim.state("a") is State.READY
    assert sim.loads == ["a"]


def test_after_a_restart_of_the_service_what_is_loaded_is_adopted() -> None:
    sim = make()
    sim.real["r"].models.update({n: (("cpu:0", 30),) for n in ("a", "old", "foreign")})
    sim.tell_down()
    for name, revision in (("a", "1"), ("gone", "1"), ("old", "0")):
        sim.accept(name, memory=20, was_loaded=True, loaded_revision=revision)
    waiting = sim.ask("gone")
    assert set(sim.states().values()) == {"RECOVERING"}
    sim.wait(2)
    sim.complete(next(p for p in sim.pending if isinstance(p.order, i.StartRuntime)))
    assert sim.states() == {"a": "READY", "gone": "LOADING", "old": "READY"}
    assert booked(sim)[0] == 30 + 30 + 20 + 20  # `old` is stale: its new files load beside it
    assert sim.world.runtimes["r"].foreign == ("foreign",)
    sim.run()
    assert sim.answer(waiting) == "granted"
    assert sorted(sim.loads) == ["gone", "old"]


def test_after_a_restart_of_the_service_what_broke_meanwhile_is_loaded_again() -> None:
    sim = make()
    sim.real["r"].models["a"] = (("cpu:0", 30),)
    sim.real["r"].broken.add("a")
    sim.tell_down()
    sim.accept("a", was_loaded=True)
    waiting = sim.ask("a")
    sim.wait(2)
    sim.complete(next(p for p in sim.pending if isinstance(p.order, i.StartRuntime)))
    assert sim.state("a") is State.LOADING
    sim.run()
    assert sim.answer(waiting) == "granted"


def test_one_that_is_accepted_after_its_runtime_is_up_is_adopted_at_the_next_look() -> None:
    sim = make()
    sim.real["r"].models["a"] = (("cpu:0", 10),)
    sim.accept("a", was_loaded=True)
    sim.accept("b", was_loaded=True)
    gone = sim.unload("b")
    sim.see_runtime()
    assert sim.states() == {"a": "READY", "b": "COLD"}
    assert sim.answer(gone) == "granted"


def test_unload_and_removal_while_nobody_knows() -> None:
    sim = make()
    sim.tell_down()
    sim.real["r"].models.update({n: (("cpu:0", 10),) for n in ("a", "b")})
    for name in ("a", "b"):
        sim.accept(name, was_loaded=True)
    gone = sim.unload("a")
    sim.remove("b")
    sim.wait(2)
    sim.run()
    assert sim.answer(gone) == "granted"
    assert sim.states() == {"a": "COLD"}
    assert sim.real["r"].models == {}


def test_unloaded_behind_its_back_and_loaded_behind_its_back() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.wait(400)
    sim.real["r"].models.clear()
    sim.see_runtime()
    assert sim.state("a") is State.COLD
    assert booked(sim) == (0, 0, 0)
    sim.real["r"].models["a"] = (("cpu:0", 25),)
    sim.see_runtime()
    assert sim.state("a") is State.READY
    assert booked(sim) == (25, 0, 0)
    assert "a" in sim.open


def test_a_look_that_is_older_than_a_change_changes_nothing() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.look("r")
    sim.now += 1
    sim.load("a")
    sim.see()
    assert sim.state("a") is State.READY
    sim.now += 1
    sim.look("r")
    sim.now += 1
    sim.unload("a")
    sim.run()
    sim.see()
    assert sim.state("a") is State.COLD


def test_a_restart_by_somebody_else_is_noticed() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    sim.restart_silently()
    sim.see_runtime()
    assert sim.state("a") is State.FAILED
    assert sim.world.models["a"].want is Want.RESTORE
    sim.wait(3)
    sim.run()
    assert sim.state("a") is State.READY


def test_a_load_that_never_ends_fails_and_is_cleaned_up() -> None:
    sim = make(load_timeout_s=60)
    sim.accept("a", memory=10)
    ticket = sim.ask("a")
    sim.wait(61)
    assert sim.answer(ticket) == "load_timeout"
    assert sim.state("a") is State.UNLOADING
    assert booked(sim) == (10, 0, 10)
    sim.run()
    assert sim.state("a") is State.FAILED
    assert sim.answer(sim.ask("a")) == "load_timeout"
    sim.wait(6)
    sim.load("a")


def test_retries_come_later_and_later_and_only_for_who_asks() -> None:
    sim = make()
    sim.accept("a", bad=True)
    waits = []
    for _ in range(8):
        sim.ask("a")
        sim.run()
        waits.append(sim.world.models["a"].retry_at - sim.now)
        sim.wait(waits[-1] + 1)
        assert not sim.pending
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]


def test_a_load_that_works_ends_the_count_of_failures() -> None:
    sim = make()
    sim.accept("a", bad=True)
    for bad, retry_s in ((True, 5), (True, 10), (False, 0), (True, 5)):
        sim.files["a"].bad = bad
        sim.ask("a")
        sim.run()
        if bad:
            assert sim.world.models["a"].retry_at - sim.now == retry_s
            sim.wait(retry_s)
        else:
            sim.end("a")
            sim.unload("a")
            sim.run()


def test_a_pinned_model_that_fails_is_tried_again() -> None:
    sim = make()
    sim.accept("a", bad=True, pinned=True)
    sim.run()
    assert sim.state("a") is State.FAILED
    sim.files["a"].bad = False
    sim.wait(6)
    sim.run()
    assert sim.state("a") is State.READY


_REPLAY = """
import random, sys
from tests.core import actions
def walk(seed):
    numbers = random.Random(seed)
    sim = actions.a_sim(numbers.randrange)
    happen = sim.happen
    def noted(event):
        out = happen(event)
        print(out)
        return out
    sim.happen = noted
    for _ in range(600):
        numbers.choice(actions.OFTEN if numbers.random() < 0.75 else actions.SELDOM)(sim, numbers.randrange)
for seed in range(12, 15):
    walk(seed)
"""


def test_the_same_events_give_the_same_instructions_in_every_process() -> None:
    """Names hash differently in each process: nothing that is decided may hang on it."""
    told = [
        subprocess.run(
            [sys.executable, "-c", _REPLAY],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0].count("Load(") > 10


def test_a_runtime_that_is_stuck_is_started_anew_without_a_lost_request() -> None:
    sim = make()
    for name in ("busy", "idle", "kept", "wedged"):
        sim.accept(name, memory=20, pinned=name == "kept")
    sim.run()
    sim.load("idle")
    sim.wait(400)
    sim.load("busy", finish=False)
    ticket = sim.ask("wedged")
    sim.fail(sim.pending[-1], runtime_lost=True, recycle=True)
    assert sim.world.runtimes["r"].recycle == "it failed"
    assert set(sim.states().values()) == {"DRAINING", "FAILED"}
    late = sim.ask("idle")
    sim.wait(1)
    sim.run()
    assert sim.states() == {"busy": "DRAINING", "idle": "QUEUED", "kept": "QUEUED", "wedged": "QUEUED"}
    assert "waits for r, which is to be started anew: it failed" in sim.world.models["wedged"].reason
    sim.end("busy")
    sim.run()
    assert sim.world.runtimes["r"].state is RuntimeState.UP
    assert sim.real["r"].instance == 2
    sim.wait(1)
    sim.run()
    assert set(sim.states().values()) == {"READY"}
    assert (sim.answer(ticket), sim.answer(late)) == ("granted", "granted")


def test_an_unload_that_only_a_new_start_makes_possible() -> None:
    sim = make()
    sim.accept("busy", memory=20)
    sim.accept("wedged", memory=20)
    sim.load("busy")
    sim.load("wedged")
    sim.use("busy")
    sim.unload("wedged")
    sim.complete(sim.pending[-1])
    sim.fail(sim.pending[-1], recycle=True)
    assert sim.states() == {"busy": "DRAINING", "wedged": "FAILED"}
    sim.end("busy")
    sim.run()
    sim.wait(1)
    sim.run()
    assert (sim.states(), sim.real["r"].instance) == ({"busy": "READY", "wedged": "COLD"}, 2)


def test_nothing_is_drained_for_a_stuck_runtime_while_something_loads_there() -> None:
    sim = make(max_concurrent_loads=2)
    for name in ("served", "slow", "wedged"):
        sim.accept(name, memory=20)
    sim.load("served")
    sim.ask("slow")
    sim.ask("wedged")
    slow, wedged = sim.pending
    sim.fail(wedged, runtime_lost=True, recycle=True)
    sim.wait(100)
    assert (sim.state("served"), sim.state("slow")) == (State.READY, State.LOADING)
    assert sim.use("served")
    sim.end("served")
    sim.complete(slow)
    assert sim.state("served") is State.DRAINING
    sim.settle()


def test_wholes_of_wholes_go_before_a_stuck_runtime() -> None:
    sim = make()
    sim.accept("p", memory=10)
    sim.accept("w", memory=10, parts=("p",))
    sim.accept("x", memory=10, parts=("w",))
    sim.accept("wedged", memory=10)
    sim.load("x")
    sim.ask("wedged")
    sim.fail(sim.pending[-1], runtime_lost=True, recycle=True)
    sim.run()
    assert sim.world.runtimes["r"].state is RuntimeState.UP and sim.real["r"].instance == 2
    sim.settle()


def test_what_is_neither_ready_nor_gone_stays_on_the_books() -> None:
    sim = make()
    sim.accept("a", memory=60)
    sim.load("a")
    sim.unload("a")
    sim.complete(sim.pending[-1])
    sim.fail(sim.pending[-1])
    assert (sim.state("a"), booked(sim)[0]) == (State.FAILED, 60)
    shown = Observation(instance="1", models=(ObservedModel(name="a", ready=False, memory={"cpu:0": 60}),))
    sim.now += 1
    sim.happen(e.RuntimeObserved(sim.now, "r", 1, sim.now - 0.1, shown))
    assert (sim.state("a"), booked(sim)[0]) == (State.FAILED, 60)
    sim.now += 1
    sim.happen(e.RuntimeObserved(sim.now, "r", 1, sim.now - 0.1, Observation(instance="1")))
    assert (sim.state("a"), booked(sim)[0]) == (State.COLD, 0)


def test_a_stuck_runtime_of_somebody_else_is_left_alone() -> None:
    sim = make()
    sim.accept("a")
    sim.world = replace(
        sim.world, runtimes=sim.world.runtimes.set("r", replace(sim.world.runtimes["r"], external=True))
    )
    sim.ask("a")
    sim.fail(sim.pending[-1], runtime_lost=True, recycle=True)
    assert sim.world.runtimes["r"].state is RuntimeState.UP and not sim.world.runtimes["r"].recycle


def test_a_time_that_is_reached_is_not_waited_for_again() -> None:
    """120 s after 1960.034 is less than 120 s later, as floating-point numbers go."""
    sim = make(100)
    sim.accept("a")
    sim.load("a")
    sim.unload("a")
    sim.run()
    sim.now = 1960.0339999999999
    sim.ask("a", deadline_s=10_000)
    assert sim.now + 120 - sim.now < 120
    for _ in range(40):
        if sim.wake is not None and sim.state("a") is State.LOADING:
            sim.now = max(sim.now, sim.wake)
            sim.tick()
    assert sim.state("a") is State.UNLOADING and "given up to be loaded anew" in sim.world.models["a"].reason


def test_what_is_found_neither_loaded_nor_gone_for_long_has_its_runtime_begun_anew() -> None:
    sim = make()
    sim.accept("a", was_loaded=True)
    waiting = sim.ask("a")
    shown = Observation(instance="1", models=(ObservedModel(name="a", ready=False, memory={"cpu:0": 60}),))
    told = False
    for _ in range(70):
        runtime = sim.world.runtimes["r"]
        if runtime.state is not RuntimeState.UP or runtime.recycle:
            told = True
            break
        assert sim.state("a") is State.RECOVERING
        sim.happen(e.RuntimeObserved(sim.now, "r", runtime.epoch, sim.now, shown))
        sim.wait(1)
    assert told
    sim.run()
    assert (sim.state("a"), sim.answer(waiting)) == (State.READY, "granted")
