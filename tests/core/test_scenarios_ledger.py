"""What takes too long, and what does not come back: told, and mended by the mildest means."""

from __future__ import annotations

import pytest

from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.states import RuntimeState, State
from modelium.core.world import Policy
from tests.core.sim import HOST, Sim
from tests.core.test_scenarios import booked, make


def tellings(sim: Sim, name: str) -> list[str]:
    told = [o.transition for _, out in sim.history for o in out if isinstance(o, i.Tell)]
    return [t.reason for t in told if t.subject == name and t.before == t.after]


def loaded_once(sim: Sim, took: float) -> None:
    """`a` was loaded in `took` seconds, and is COLD again."""
    sim.accept("a")
    sim.ask("a")
    sim.complete(sim.pending[-1], took)
    sim.end("a")
    sim.unload("a")
    sim.run()
    assert sim.state("a") is State.COLD


def test_what_can_not_be_told_apart_on_a_device_stays_booked() -> None:
    """As on a GPU whose driver knows no processes of a container: only the host's memory is measured."""
    sim = Sim(Policy(budgets={"cpu:0": 100}), levels=(1,))
    sim.run()
    sim.accept("a", memory=40)
    sim.ask("a")
    (load,) = sim.pending
    assert isinstance(load.order, i.Load)
    sim.pending.clear()
    sim.happen(e.Loaded(sim.now, "a", load.order.op, ((HOST, 3),), 1.0))
    model = sim.world.models["a"]
    assert model.booking == (("cpu:0", 40), (HOST, 3)) and model.measured == ((HOST, 3),)
    assert (model.estimate.memory_bytes, model.estimate.measured) == (40, False)
    sim.real["r"].models["a"] = ((HOST, 4),)
    sim.see_runtime()
    assert sim.world.models["a"].booking == (("cpu:0", 40), (HOST, 4))
    sim.real["r"].models["a"] = (("cpu:0", 50), (HOST, 4))
    sim.see_runtime()
    assert sim.world.models["a"].booking == (("cpu:0", 50), (HOST, 4))
    assert sim.world.models["a"].estimate.memory_bytes == 50


def test_what_may_grow_by_itself_stays_booked_in_full() -> None:
    """As replicas that come and go with the load."""
    sim = make(100)
    sim.accept("a", memory=40, real=10, elastic=True)
    sim.accept("b", memory=70)
    sim.load("a")
    assert booked(sim) == (40, 0, 0) and sim.world.models["a"].measured == (("cpu:0", 10),)
    assert sim.world.models["a"].estimate.memory_bytes == 40
    sim.use("a")
    ticket = sim.ask("b")
    assert sim.answer(ticket) == "waits"
    sim.real["r"].models["a"] = (("cpu:0", 50),)
    sim.see_runtime()
    assert booked(sim)[0] == 50 and sim.world.models["a"].estimate.memory_bytes == 50


def test_a_load_that_is_late_is_told_once_and_then_begun_anew_while_requests_wait() -> None:
    sim = make()
    loaded_once(sim, 30)
    ticket = sim.ask("a", deadline_s=3000)
    sim.wait(119)
    assert not tellings(sim, "a")
    sim.wait(2)
    assert [t.partition(",")[0] for t in tellings(sim, "a")] == ["late: its slowest load took 30 s"]
    sim.wait(100)
    assert sim.state("a") is State.LOADING and len(tellings(sim, "a")) == 1
    sim.wait(20)
    assert sim.state("a") is State.UNLOADING
    assert sim.answer(ticket) == "waits"
    sim.complete(sim.pending[-1])
    assert (sim.state("a"), sim.world.models["a"].late) == (State.LOADING, 1)
    sim.wait(239)
    assert len(tellings(sim, "a")) == 1  # the next one gets twice the time
    sim.complete(sim.pending[-1])
    assert sim.answer(ticket) == "granted"
    assert (sim.state("a"), sim.world.models["a"].late) == (State.READY, 0)


def test_a_load_without_a_history_has_the_whole_time() -> None:
    sim = make()
    sim.accept("a")
    sim.ask("a", deadline_s=3000)
    sim.wait(899)
    assert sim.state("a") is State.LOADING and not tellings(sim, "a")
    sim.wait(2)
    assert sim.state("a") is State.UNLOADING


def test_a_load_that_takes_a_few_seconds_more_is_not_late() -> None:
    sim = make()
    loaded_once(sim, 1)
    sim.ask("a")
    sim.wait(59)
    assert not tellings(sim, "a")


def test_an_unload_that_is_late_is_told_and_left_to_its_limit() -> None:
    sim = make()
    loaded_once(sim, 1)
    sim.load("a")
    sim.unload("a")
    sim.complete(sim.pending[-1])
    sim.wait(2)
    sim.complete(sim.pending[-1])
    sim.load("a")
    sim.unload("a")
    sim.complete(sim.pending[-1])
    sim.wait(61)
    assert [t.partition(" took")[0] for t in tellings(sim, "a")] == ["late: its slowest unload"]
    assert sim.state("a") is State.UNLOADING


def test_the_unload_of_a_load_that_was_given_up_says_nothing_of_how_long_unloads_take() -> None:
    sim = make()
    sim.accept("a")
    sim.withdraw(sim.ask("a"))
    assert sim.state("a") is State.LOADING
    sim.unload("a")
    assert sim.state("a") is State.UNLOADING
    sim.wait(100)
    sim.complete(sim.pending[-1])
    assert sim.world.runtimes["r"].slowest_unload_s == 0
    sim.load("a")
    sim.unload("a")
    sim.complete(sim.pending[-1])
    sim.wait(20)
    sim.complete(sim.pending[-1])
    assert sim.world.runtimes["r"].slowest_unload_s == 20


def test_what_could_not_be_unloaded_goes_with_its_runtime_once_others_wait_for_its_room() -> None:
    sim = make(unload_timeout_s=60)
    sim.accept("a", memory=60)
    sim.accept("used", memory=20)
    sim.accept("b", memory=60)
    sim.load("a")
    sim.load("used")
    sim.unload("a")
    sim.complete(sim.pending[-1])
    sim.wait(61)
    assert sim.state("a") is State.FAILED
    sim.wait(120)
    assert not sim.world.runtimes["r"].recycle  # it is in nobody's way
    ticket = sim.ask("b")
    sim.wait(11)
    assert "others wait for its room" in sim.world.runtimes["r"].recycle
    sim.run()
    sim.wait(1)
    sim.run()
    assert sim.real["r"].instance == 2
    assert sim.answer(ticket) == "granted"
    assert sim.state("a") is State.COLD


def stuck_beside(sim: Sim) -> None:
    """`a` could not be unloaded a while ago, and `used` is served beside it on the same device."""
    sim.accept("a", memory=60)
    sim.accept("used", memory=20)
    sim.load("a")
    sim.load("used", finish=False)
    sim.unload("a")
    sim.complete(sim.pending[-1])
    sim.wait(61)
    assert sim.state("a") is State.FAILED
    sim.wait(120)


def spared(sim: Sim) -> bool:
    return not sim.world.runtimes["r"].recycle and sim.state("used") is State.READY


def test_what_could_not_be_unloaded_is_not_in_the_way_of_who_waits_for_a_runtime() -> None:
    sim = Sim(Policy(budgets={"cpu:0": 100}, unload_timeout_s=60), runtimes=("r", "s"))
    sim.run()
    stuck_beside(sim)
    sim.crash("s")
    sim.accept("b", memory=60, runtime="s")
    ticket = sim.ask("b", deadline_s=3000)
    sim.wait(25)
    assert spared(sim) and sim.answer(ticket) == "waits"


def test_nor_of_who_waits_for_a_turn_or_for_parts() -> None:
    sim = make(unload_timeout_s=60, max_concurrent_loads=1)
    stuck_beside(sim)
    sim.accept("slow", memory=5)
    sim.accept("turn", memory=5)
    sim.accept("part", memory=5)
    sim.accept("whole", memory=5, parts=("part",))
    for name in ("slow", "turn", "whole"):
        sim.ask(name, deadline_s=3000)
    sim.wait(25)
    assert sim.states() | {"part": "QUEUED", "turn": "QUEUED", "whole": "QUEUED"} == sim.states()
    assert spared(sim)


def test_nor_of_who_waits_for_room_on_a_device_that_it_is_not_on() -> None:
    budgets = {"cpu:0": 100, "s/cpu:0": 100}
    sim = Sim(Policy(budgets=budgets, unload_timeout_s=60), runtimes=("r", "s"))
    sim.elsewhere = {"s"}
    sim.apart["s/cpu:0"] = "s"
    sim.see_devices()
    sim.run()
    stuck_beside(sim)
    sim.accept("full", memory=60, runtime="s", pinned=True)
    sim.run()
    sim.accept("b", memory=60, runtime="s")
    ticket = sim.ask("b", deadline_s=3000)
    sim.wait(25)
    assert spared(sim) and sim.answer(ticket) == "waits"


def test_nor_of_who_gets_the_room_of_others_in_time() -> None:
    sim = make(unload_timeout_s=60, drain_timeout_s=300)
    stuck_beside(sim)
    sim.accept("b", memory=30)
    ticket = sim.ask("b", deadline_s=3000)
    sim.wait(25)
    assert not sim.world.runtimes["r"].recycle and sim.state("used") is State.DRAINING
    sim.end("used")
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_nor_of_who_would_have_no_room_without_it_either() -> None:
    sim = make(unload_timeout_s=60)
    stuck_beside(sim)
    sim.pin("used")
    sim.accept("b", memory=90)
    sim.ask("b", deadline_s=3000)
    sim.wait(25)
    assert spared(sim) and "used is pinned" in sim.world.models["b"].reason


@pytest.mark.parametrize("kept, in_use, anew", [(39, False, False), (41, False, True), (41, True, False)])
def test_a_runtime_that_keeps_too_much_is_started_anew_when_it_is_idle(kept: int, in_use: bool, anew: bool) -> None:
    sim = make(max_residue_bytes=40)
    sim.accept("a", memory=20)
    sim.accept("b", memory=20)
    sim.kept["a"] = (("cpu:0", kept),)
    sim.load("a")
    sim.load("b")
    sim.wait(31)
    if in_use:
        sim.use("b")
    sim.unload("a")
    sim.run()
    assert sim.world.runtimes["r"].residue == (("cpu:0", kept),)
    sim.wait(31)
    sim.run()
    assert (sim.real["r"].instance == 2) is anew
    if anew:
        sim.wait(1)
        sim.run()
        assert sim.world.runtimes["r"].state is RuntimeState.UP
        assert not sim.world.runtimes["r"].residue
    if in_use:
        sim.end("b")
        sim.wait(41)
        sim.run()
        assert sim.real["r"].instance == 2
        sim.wait(1)
        sim.run()
        assert sim.state("b") is State.READY  # it had been used: it is back


def test_residue_adds_up_and_a_much_too_large_one_does_not_wait_for_quiet() -> None:
    sim = make(max_residue_bytes=40)
    sim.accept("a", memory=20)
    sim.accept("b", memory=20)
    sim.kept["a"] = (("cpu:0", 30),)
    for _ in range(3):
        sim.load("a")
        sim.load("b")
        sim.unload("a")
        sim.run()
    assert sim.world.runtimes["r"].residue == (("cpu:0", 90),)
    sim.use("b")
    sim.end("b")
    sim.wait(11)
    sim.run()
    assert sim.real["r"].instance == 2
    assert booked(sim)[0] <= 20


# --------------------------------------------------------------------------- measured loads that differ


def loaded_with(sim: Sim, *sizes: int) -> None:
    """`a` was loaded and took each of these, and is COLD again."""
    for size in sizes:
        sim.files["a"].real = size
        sim.load("a")
        sim.unload("a")
        sim.run()
    assert sim.state("a") is State.COLD


@pytest.mark.parametrize(
    ("free", "sizes", "books"),
    [
        (100, (50,), 50),
        (100, (50, 50), 50),
        (100, (48, 50), 50),
        (100, (53, 50), 53),  # the most that it ever took
        (100, (48, 53, 51), 53),
        (100, (80, 50), 55),  # one odd load costs no more than a tenth
        (51, (53, 50), 51),  # what is not free is not booked
        (50, (53, 50), 50),
    ],
)
def test_what_measured_loads_differed_by_is_booked_besides_where_it_is_free(
    free: int, sizes: tuple[int, ...], books: int
) -> None:
    sim = make()
    sim.accept("a", memory=40)
    loaded_with(sim, *sizes)
    sim.accept("b", memory=100 - free)
    sim.load("b")
    sim.ask("a")
    assert (sim.state("a"), booked(sim)[0]) == (State.LOADING, 100 - free + books)
    sim.run()
    assert (sim.state("a"), booked(sim)[0]) == (State.READY, 100 - free + sizes[-1])


def test_nobody_goes_for_what_loads_differ_by() -> None:
    sim = make()
    sim.accept("a", memory=40)
    loaded_with(sim, 54, 50)
    sim.accept("b", memory=50)
    sim.load("b")
    sim.wait(31)
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.states() == {"a": "READY", "b": "READY"}
