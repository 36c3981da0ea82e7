"""Room, demand and time, as a person would tell of them. Sizes are bytes of a device of 100, times seconds."""

from __future__ import annotations

import pytest

from modelium.core import events as e
from modelium.core.states import State
from modelium.core.world import Failure, Policy
from tests.core.sim import Sim


def make(limit: int = 100, **policy: object) -> Sim:
    """A device with room for `limit`, a runtime that is up."""
    sim = Sim(Policy(budgets={"cpu:0": limit}, **policy))  # type: ignore[arg-type]
    sim.run()
    return sim


def booked(sim: Sim) -> tuple[int, int, int]:
    account = sim.world.devices["cpu:0"]
    return account.booked_bytes, account.promised_bytes, account.reclaiming_bytes


# --------------------------------------------------------------------------- eviction


def test_swap_on_a_budget_for_one() -> None:
    sim = make(10)
    for name in ("a", "b"):
        sim.accept(name, memory=10)
    sim.load("a")
    sim.wait(31)
    ticket = sim.ask("b")
    assert sim.states() == {"a": "DRAINING", "b": "QUEUED"}
    assert booked(sim) == (10, 10, 10)
    sim.run()
    assert sim.states() == {"a": "COLD", "b": "READY"}
    assert sim.answer(ticket) == "granted"
    assert booked(sim) == (10, 0, 0)
    assert sim.world.models["a"].reason == "evicted for b"


def test_one_load_however_many_wait() -> None:
    sim = make()
    sim.accept("a")
    tickets = [sim.ask("a") for _ in range(50)]
    sim.run()
    assert sim.loads == ["a"]
    assert {sim.answer(t) for t in tickets} == {"granted"}
    assert sim.world.models["a"].use.in_flight == 50


def test_the_smallest_set_that_makes_room_goes() -> None:
    """10 + 20 + 60 are loaded, 10 are free, 60 are needed: the two that were used longest ago are not enough, and
    once the third must go, they may stay."""
    sim = make()
    for name, size in (("s", 10), ("m", 20), ("l", 60)):
        sim.accept(name, memory=size)
        sim.load(name)
        sim.wait(1)
    sim.accept("new", memory=60)
    sim.wait(40)
    sim.ask("new")
    assert sim.states() == {"l": "DRAINING", "m": "READY", "new": "QUEUED", "s": "READY"}


def test_the_least_recently_used_goes_first() -> None:
    sim = make()
    for name in ("a", "b", "c"):
        sim.accept(name, memory=30)
        sim.load(name)
        sim.wait(1)
    sim.use("a")
    sim.end("a")
    sim.wait(40)
    sim.accept("new", memory=30)
    sim.ask("new")
    assert sim.states() == {"a": "READY", "b": "DRAINING", "c": "READY", "new": "QUEUED"}


def test_a_policy_ranks_and_what_it_leaves_out_stays() -> None:
    sim = make(rank=lambda candidates, now: [c.name for c in candidates if c.name == "c"])
    for name in ("a", "b", "c"):
        sim.accept(name, memory=30)
        sim.load(name)
    sim.wait(40)
    sim.accept("new", memory=30)
    sim.ask("new")
    assert sim.state("c") is State.DRAINING
    sim.accept("big", memory=80)
    sim.ask("big")
    sim.wait(16)
    assert sim.states()["a"] == sim.states()["b"] == "READY"


def test_minimum_stay() -> None:
    """It goes the moment its stay is over, not at the next sweep: the core asks to be woken for that."""
    sim = make(10)
    for name in ("a", "b", "c"):
        sim.accept(name, memory=10)
    sim.wait(3)
    sim.load("a")
    sim.ask("b")
    sim.ask("c")
    sim.wait(29)
    assert sim.state("a") is State.READY
    assert "a stays 3 s more" in sim.world.models["b"].reason
    sim.wait(1.1)
    assert sim.state("a") is State.DRAINING


def test_what_was_dropped_and_never_used_has_no_minimum_stay_and_what_a_person_loaded_has() -> None:
    sim = make(10)
    sim.accept("dropped", memory=10, dropped=True)
    sim.accept("asked", memory=10)
    sim.run()
    assert sim.state("dropped") is State.READY
    sim.ask("asked", person=True)
    assert sim.state("dropped") is State.DRAINING
    sim.run()
    sim.accept("next", memory=10)
    sim.ask("next")
    assert sim.state("asked") is State.READY
    sim.wait(31)
    assert sim.state("asked") is State.DRAINING


def test_tiers_idle_quiet_hot_busy() -> None:
    """Each waiter takes from the lowest tier that makes room; hot and busy ones go only for who has waited long."""
    sim = make(40)
    for name in ("idle", "quiet", "hot", "busy"):
        sim.accept(name, memory=10)
        sim.load(name)
    sim.wait(290)
    sim.use("quiet")
    sim.end("quiet")
    for _ in range(60):
        sim.use("hot")
    while sim.in_flight["hot"]:
        sim.end("hot")
    sim.use("busy")
    sim.wait(11)
    for n in range(4):
        sim.accept(f"n{n}", memory=10)
    sim.ask("n0")
    assert sim.state("idle") is State.DRAINING
    sim.ask("n1")
    assert sim.state("quiet") is State.DRAINING
    sim.ask("n2")
    sim.ask("n3")
    assert (sim.state("hot"), sim.state("busy")) == (State.READY, State.READY)
    assert "busy is in use" in sim.world.models["n2"].reason
    sim.wait(14)
    assert (sim.state("hot"), sim.state("busy")) == (State.READY, State.READY)
    sim.wait(2)
    assert (sim.state("hot"), sim.state("busy")) == (State.DRAINING, State.DRAINING)
    assert not sim.ready_to_end() or all(getattr(p.order, "name", "") != "busy" for p in sim.ready_to_end())


def test_one_who_waits_behind_others_is_woken_for_when_it_has_waited_long() -> None:
    """The lower priority came first and ages first, though the look in between ends before it."""
    sim = make(20)
    for name in ("x", "y", "low", "high"):
        sim.accept(name, memory=10)
    sim.load("x", finish=False)
    sim.load("y", finish=False)
    sim.wait(31)
    sim.ask("low")
    sim.ask("low", deadline_s=12)
    sim.wait(1)
    sim.ask("high", priority=5)
    sim.wait(14.1)
    assert sim.state("x") is State.DRAINING
    assert sim.world.models["x"].reason == "evicted for low"


def test_an_old_claim_behind_another_keeps_its_room_too() -> None:
    """One claims the first device, the next the second: what is free there is nobody else's."""
    sim = Sim(Policy(budgets={"cpu:0": 100, "cpu:1": 60}), devices=2)
    sim.run()
    for name, size in (("x", 60), ("y", 50), ("a", 50), ("b", 55), ("c", 10)):
        sim.accept(name, memory=size)
    sim.load("x", finish=False)
    sim.load("y", finish=False)
    sim.ask("a")
    sim.wait(1)
    sim.ask("b")
    sim.wait(16)
    assert (sim.world.models["a"].promise, sim.world.models["b"].promise) == ((("cpu:0", 50),), (("cpu:1", 55),))
    sim.ask("c")
    assert sim.state("c") is State.QUEUED
    sim.accept("d", memory=10)
    sim.ask("d")
    assert sim.states() == {"a": "QUEUED", "b": "QUEUED", "c": "QUEUED", "d": "QUEUED", "x": "READY", "y": "READY"}


def test_what_was_wanted_idly_waits_anew_once_it_is_asked_for() -> None:
    """Long in the queue for being dropped in, and only just asked for: no claim on models in use yet."""
    sim = make(10)
    sim.accept("busy", memory=10)
    sim.load("busy", finish=False)
    sim.happen(e.RuntimeAdded(sim.now, "s"))
    sim.real["s"] = type(sim.real["r"])()
    sim.accept("d", memory=10, runtime="s", dropped=True)
    sim.wait(100)
    ticket = sim.ask("d")
    sim.complete(sim.pending[-1])
    assert sim.states() == {"busy": "READY", "d": "QUEUED"}
    sim.wait(16)
    assert sim.states() == {"busy": "DRAINING", "d": "QUEUED"}
    sim.end("busy")
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_busy_victim_finishes_first_and_is_cut_off_at_the_deadline() -> None:
    sim = make(10)
    for name in ("a", "b"):
        sim.accept(name, memory=10)
    sim.load("a", finish=False)
    sim.wait(31)
    sim.ask("b")
    sim.wait(16)
    assert sim.state("a") is State.DRAINING
    sim.wait(28)
    assert sim.state("a") is State.DRAINING
    sim.wait(2)
    assert sim.state("a") is State.UNLOADING
    assert "1 still in flight after 30 s" in sim.world.models["a"].reason


def test_pinned_and_always_loaded_stay() -> None:
    sim = make(20, always_loaded=("al*",))
    sim.accept("always", memory=10)
    sim.accept("pinned", memory=10, pinned=True)
    sim.accept("other", memory=10)
    sim.run()
    assert sim.states() == {"always": "READY", "other": "COLD", "pinned": "READY"}
    sim.wait(2000)
    ticket = sim.ask("other", deadline_s=100)
    sim.wait(99)
    assert sim.states() == {"always": "READY", "other": "QUEUED", "pinned": "READY"}
    assert "always is always loaded" in sim.world.models["other"].reason
    assert "pinned is pinned" in sim.world.models["other"].reason
    assert sim.answer(sim.unload("pinned")) == "model_conflict"
    assert sim.answer(sim.unload("always")) == "model_conflict"
    sim.wait(2)
    assert sim.answer(ticket) == "deadline_passed"


def test_what_is_always_loaded_and_does_not_fit_stands_in_nobodys_way() -> None:
    """Two residents of 60 on 100: the second is told so, and has no claim that keeps others out."""
    sim = make(always_loaded=("r*",))
    sim.accept("r1", memory=60)
    sim.accept("r2", memory=60)
    sim.accept("a", memory=40)
    sim.run()
    sim.wait(100)
    assert sim.states() == {"a": "COLD", "r1": "READY", "r2": "FAILED"}
    told = "r2 can never fit beside what is always loaded: needs 60 B; cpu:0 has a budget of 100 B less 60 B of r1"
    assert sim.world.models["r2"].reason == told
    sim.accept("b", memory=50)
    assert sim.answer(sim.ask("b")) == "never_fits"
    assert "needs 50 B; cpu:0 has a budget of 100 B less 60 B of r1" in sim.world.models["b"].reason
    sim.load("a")
    sim.settle()


def test_a_dropped_model_evicts_only_what_is_idle() -> None:
    sim = make(10)
    sim.accept("a", memory=10)
    sim.load("a")
    sim.wait(100)
    sim.accept("b", memory=10, dropped=True)
    assert sim.states() == {"a": "READY", "b": "COLD"}
    assert "no room to spare" in sim.world.models["b"].reason
    sim.wait(210)
    sim.accept("c", memory=10, dropped=True)
    assert sim.states() == {"a": "DRAINING", "b": "COLD", "c": "QUEUED"}


def test_a_rescan_never_loads_what_was_evicted() -> None:
    sim = make(10)
    for name in ("a", "b"):
        sim.accept(name, memory=10, dropped=True)
        sim.run()
        sim.rescan(name)
    assert sim.states() == {"a": "READY", "b": "COLD"}
    sim.ask("b")
    sim.run()
    for _ in range(3):
        sim.rescan("a")
        sim.wait(100)
    assert sim.states() == {"a": "COLD", "b": "READY"}
    assert sim.loads == ["a", "b"]


# --------------------------------------------------------------------------- sizes and limits


def test_never_fits_is_told_at_once_with_its_arithmetic() -> None:
    sim = make()
    sim.accept("big", memory=120)
    ticket = sim.ask("big")
    assert sim.answer(ticket) == "never_fits"
    assert sim.message(ticket) == "big can never fit: needs 120 B (estimated); cpu:0 has a budget of 100 B (of 100 B)"
    sim.accept("gpu", memory=1, kind="cuda")
    ticket = sim.ask("gpu")
    assert sim.message(ticket) == "gpu needs a device of kind cuda, and there is none"
    sim.accept("whole", memory=10, parts=("p", "q"))
    sim.accept("p", memory=50)
    sim.accept("q", memory=50)
    assert "need 110 B together, and the budget is 100 B" in sim.message(sim.ask("whole"))


def test_what_was_measured_is_booked_and_remembered() -> None:
    sim = make()
    sim.accept("a", memory=10, real=25)
    sim.load("a")
    assert booked(sim) == (25, 0, 0)
    assert sim.world.models["a"].estimate.measured
    sim.unload("a")
    sim.run()
    sim.ask("a")
    assert booked(sim) == (25, 0, 0)


def test_growth_over_the_limit_is_relieved_by_what_nobody_uses() -> None:
    sim = make()
    for name in ("a", "b"):
        sim.accept(name, memory=45)
        sim.load(name)
    sim.use("b")
    sim.wait(40)
    sim.real["r"].models["b"] = (("cpu:0", 70),)
    sim.see_runtime()
    assert booked(sim)[0] == 115
    sim.wait(10)
    assert sim.states() == {"a": "DRAINING", "b": "READY"}
    assert "15 B over its limit" in sim.world.models["a"].reason
    sim.run()
    assert booked(sim) == (70, 0, 0)


def test_memory_grows_on_the_books_and_does_not_shrink() -> None:
    sim = make()
    sim.accept("a", memory=10)
    sim.load("a")
    for shown, told in ((30, 30), (20, 30), (35, 35)):
        sim.real["r"].models["a"] = (("cpu:0", shown),)
        sim.see_runtime()
        assert booked(sim) == (told, 0, 0)
    sim.unload("a")
    sim.run()
    sim.ask("a")
    assert booked(sim) == (35, 0, 0)


def test_foreign_memory_shrinks_the_limit() -> None:
    sim = make(80)
    sim.accept("a", memory=50)
    sim.load("a")
    sim.foreign[0] = 60
    sim.see_devices()
    assert sim.world.devices["cpu:0"].limit_bytes == 40
    sim.wait(45)
    assert sim.state("a") is State.DRAINING
    sim.run()
    ticket = sim.ask("a")
    assert sim.state("a") is State.QUEUED
    assert "limit 40 B (budget 80 B, 60 B used beyond what is booked)" in sim.world.models["a"].reason
    sim.foreign[0] = 10
    sim.see_devices()
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_a_load_under_way_is_not_taken_for_foreign_memory() -> None:
    sim = make()
    sim.accept("a", memory=50)
    sim.ask("a")
    sim.foreign[0] = 45
    sim.see_devices()
    assert sim.world.devices["cpu:0"].unbooked_bytes == 0


def test_a_device_that_is_seen_late_has_its_bookings() -> None:
    sim = Sim(Policy(budgets={}), devices=0)
    sim.accept("a", memory=30, was_loaded=True)
    sim.real["r"].models["a"] = (("cpu:0", 30),)
    sim.run()
    assert sim.state("a") is State.READY
    sim.foreign = [0]
    sim.see_devices()
    assert booked(sim) == (30, 0, 0)


def test_the_device_with_most_room_is_taken() -> None:
    sim = Sim(Policy(budgets={"cpu:0": 50, "cpu:1": 80}), devices=2)
    sim.run()
    for name, size in (("a", 40), ("b", 45), ("c", 30)):
        sim.accept(name, memory=size)
        sim.load(name)
    where = {n: m.booking[0][0] for n, m in sim.world.models.items()}
    assert where == {"a": "cpu:1", "b": "cpu:0", "c": "cpu:1"}


# --------------------------------------------------------------------------- waiting


def test_backfill_goes_on_until_a_claim_is_old() -> None:
    """`big` waits for 80 of 100 while 60 are in use; small ones take what is free, until it has waited for 15 s."""
    sim = make()
    sim.accept("used", memory=60)
    sim.load("used", finish=False)
    sim.accept("big", memory=80)
    sim.ask("big")
    sim.wait(5)
    sim.accept("s1", memory=20)
    sim.load("s1", finish=False)
    sim.wait(11)
    assert sim.world.models["big"].promise == (("cpu:0", 80),)
    sim.accept("s2", memory=20)
    ticket = sim.ask("s2")
    assert sim.state("s2") is State.QUEUED
    sim.end("used")
    sim.end("s1")
    sim.wait(15)
    sim.run()
    assert sim.states() == {"big": "READY", "s1": "READY", "s2": "QUEUED", "used": "COLD"}
    sim.wait(20)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_two_old_claims_do_not_hold_each_other_up() -> None:
    sim = make()
    sim.accept("used", memory=100)
    sim.load("used", finish=False)
    for name in ("a", "b"):
        sim.accept(name, memory=80)
        sim.ask(name)
        sim.wait(1)
    sim.wait(20)
    sim.end("used")
    sim.wait(15)
    sim.run()
    assert sim.states() == {"a": "READY", "b": "QUEUED", "used": "COLD"}
    sim.end("a")
    sim.wait(50)
    sim.run()
    assert sim.state("b") is State.READY


def test_room_that_was_promised_to_one_who_left_is_free_again() -> None:
    sim = make()
    sim.accept("a", memory=100)
    sim.load("a")
    sim.wait(31)
    sim.accept("b", memory=100)
    left = sim.ask("b")
    assert sim.state("a") is State.DRAINING
    sim.withdraw(left)
    assert sim.states() == {"a": "DRAINING", "b": "COLD"}
    assert booked(sim) == (100, 0, 100)
    ticket = sim.ask("a")
    assert sim.state("a") is State.READY
    assert sim.answer(ticket) == "granted"


def test_a_draining_model_is_rescued_only_while_its_room_is_nobodys() -> None:
    sim = make()
    sim.accept("a", memory=100)
    sim.load("a")
    sim.wait(31)
    sim.accept("b", memory=100)
    waiter = sim.ask("b")
    ticket = sim.ask("a")
    assert sim.states() == {"a": "DRAINING", "b": "QUEUED"}
    sim.withdraw(waiter)
    assert sim.state("a") is State.READY
    assert sim.answer(ticket) == "granted"


def test_a_draining_model_that_a_person_unloads_is_not_rescued() -> None:
    sim = make()
    sim.accept("a")
    sim.load("a", finish=False)
    gone = sim.unload("a")
    ticket = sim.ask("a")
    assert sim.state("a") is State.DRAINING
    sim.end("a")
    sim.run()
    assert sim.answer(gone) == "granted"
    assert sim.answer(ticket) == "granted"
    assert sim.loads == ["a", "a"]


def test_deadlines() -> None:
    sim = make()
    sim.accept("a", memory=30)
    early, late = sim.ask("a", deadline_s=5), sim.ask("a", deadline_s=50)
    sim.wait(6)
    assert (sim.answer(early), sim.answer(late)) == ("deadline_passed", "waits")
    assert sim.message(early).startswith("a was not ready within 5 s (needs 30 B): it is LOADING")
    sim.run()
    assert sim.answer(late) == "granted"


def test_nobody_is_loaded_for_nobody() -> None:
    sim = make(max_concurrent_loads=1)
    for name in ("a", "b", "c"):
        sim.accept(name)
    sim.ask("a")
    b1, b2 = sim.ask("b"), sim.ask("b")
    sim.ask("c", deadline_s=3)
    sim.withdraw(b1)
    assert sim.state("b") is State.QUEUED
    sim.withdraw(b2)
    sim.wait(4)
    sim.run()
    assert sim.states() == {"a": "READY", "b": "COLD", "c": "COLD"}
    assert sim.loads == ["a"]


def test_who_left_while_it_was_unloaded_does_not_bring_it_back() -> None:
    sim = make()
    sim.accept("a")
    sim.load("a")
    sim.unload("a")
    sim.complete(sim.pending[0])
    ticket = sim.ask("a")
    sim.withdraw(ticket)
    sim.run()
    assert sim.state("a") is State.COLD
    assert sim.loads == ["a"]


def test_queue_limits() -> None:
    sim = make(max_queue=3, max_queue_per_model=2)
    for name in ("a", "b", "c"):
        sim.accept(name)
    sim.ask("a")
    sim.ask("a")
    third = sim.ask("a")
    assert (sim.answer(third), "max_queue_per_model" in sim.message(third)) == ("queue_full", True)
    sim.ask("b")
    fourth = sim.ask("c")
    assert (sim.answer(fourth), "(max_queue)" in sim.message(fourth)) == ("queue_full", True)
    sim.run()
    assert sim.answer(sim.ask("a")) == "granted"


def test_priorities_go_first_and_waiting_counts() -> None:
    sim = make(10, max_concurrent_loads=1, min_resident_s=0)
    for name in ("first", "low", "high"):
        sim.accept(name, memory=10)
    sim.ask("first")
    sim.ask("low", priority=0)
    sim.wait(1)
    sim.ask("high", priority=5)
    sim.complete(sim.pending[0])
    sim.end("first")
    sim.see_use()
    sim.wait(1)
    sim.run()
    assert sim.loads[:2] == ["first", "high"]
    sim.end("high")
    sim.wait(200)
    sim.run()
    assert sim.state("low") is State.READY


# --------------------------------------------------------------------------- idleness


@pytest.mark.parametrize(
    ("after_s", "pressure", "state"),
    [(299, False, "READY"), (299, True, "READY"), (310, False, "READY"), (310, True, "DRAINING"), (620, False, "COLD")],
)
def test_idle_rules(after_s: float, pressure: bool, state: str) -> None:
    """Up to the threshold of 300 s it stays, then it goes for what was only dropped in, and at twice that anyhow."""
    sim = make(10)
    sim.accept("a", memory=10)
    sim.load("a")
    sim.wait(after_s)
    if pressure:
        sim.accept("b", memory=10, dropped=True)
    else:
        sim.run()
    assert str(sim.state("a")) == state


def test_use_keeps_a_model() -> None:
    sim = make()
    sim.accept("a")
    sim.load("a")
    for _ in range(10):
        sim.wait(290)
        sim.use("a")
        sim.end("a")
    assert sim.state("a") is State.READY
    sim.use("a")
    sim.wait(2000)
    assert sim.state("a") is State.READY
    sim.end("a")
    sim.wait(590)
    assert sim.state("a") is State.READY
    sim.wait(30)
    sim.run()
    assert sim.state("a") is State.COLD
    assert sim.world.models["a"].reason.startswith("idle for 6")


def test_unloading_that_never_ends_is_told_and_believed_once_the_runtime_shows_it() -> None:
    sim = make(unload_timeout_s=60)
    sim.accept("a", memory=100)
    sim.load("a")
    gone = sim.unload("a")
    sim.complete(sim.pending[0])
    sim.lose(sim.pending[0], done=True)
    sim.wait(61)
    assert sim.answer(gone) == "driver"
    assert sim.state("a") is State.FAILED
    assert booked(sim) == (100, 0, 0)
    ticket = sim.ask("a")
    sim.see_runtime()
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert booked(sim) == (100, 0, 0)


def test_an_event_for_nobody_is_no_harm() -> None:
    sim = make()
    sim.happen(e.LoadFailed(sim.now, "nobody", 3, Failure("driver", "?")))
    sim.withdraw(77)
    assert sim.answer(sim.ask("nobody")) == "model_not_found"
    sim.happen(e.DropSeen(sim.now, "incoming/late", "2 of 3 files are here"))
    assert "2 of 3 files" in sim.message(sim.ask("late"))
