"""Models that sleep instead of being unloaded. Sizes are bytes of a device of 100, beside it a host of 100; level 1
takes half of a model's size from the host, level 2 takes 2. A load takes 1 s, a wake is expected to take 0.2 s."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.standby import reuse
from modelium.core.states import RuntimeState, State, Want
from modelium.core.world import Estimate, Failure, Policy, Spec, Standby, Use
from tests.core.sim import HOST, File, Sim


def make(limit: int = 100, levels: tuple[int, ...] = (1,), residue: int = 0, **policy: object) -> Sim:
    fields: dict[str, object] = {"budgets": {"cpu:0": limit}, "min_resident_s": 0.0, **policy}
    sim = Sim(Policy(**fields), levels=levels, residue=residue)  # type: ignore[arg-type]
    sim.run()
    return sim


def asleep(sim: Sim, name: str = "a", memory: int = 60, uses: int = 1) -> None:
    """Have a model parked: it was used, and then idle for long."""
    sim.accept(name, memory=memory)
    sim.load(name)
    for _ in range(uses - 1):
        sim.use(name)
        sim.end(name)
    sim.wait(620)
    sim.run()
    assert sim.state(name) is State.STANDBY, sim.story(name)


def booked(sim: Sim, device: str = "cpu:0") -> tuple[int, int, int]:
    account = sim.world.devices[device]
    return account.booked_bytes, account.promised_bytes, account.reclaiming_bytes


def level(sim: Sim, name: str) -> int:
    parked = sim.world.models[name].parked
    return parked.level if parked is not None else 0


# --------------------------------------------------------------------------- to sleep, and awake


def test_evicted_it_sleeps_and_a_request_wakes_it() -> None:
    sim = make(60)
    for name in ("a", "b"):
        sim.accept(name, memory=60)
    sim.load("a")
    ticket = sim.ask("b")
    sim.complete(sim.pending[-1])
    assert sim.states() == {"a": "PARKING", "b": "QUEUED"}
    assert (booked(sim), booked(sim, HOST)) == ((60, 60, 60), (30, 0, 0))
    sim.run()
    assert sim.states() == {"a": "STANDBY", "b": "READY"}
    assert (booked(sim), booked(sim, HOST)) == ((60, 0, 0), (30, 0, 0))
    assert sim.answer(ticket) == "granted"
    assert sim.world.models["a"].reason == "asleep at level 1, wakes in about 0.2 s; evicted for b"
    sim.end("b")
    ticket = sim.ask("a")
    assert sim.states() == {"a": "STANDBY", "b": "DRAINING"}
    assert booked(sim) == (60, 60, 60)
    sim.run()
    assert sim.states() == {"a": "READY", "b": "STANDBY"}
    assert sim.answer(ticket) == "granted" and sim.loads == ["a", "b", "a"]
    assert sim.world.models["a"].reason == "woken in 1.00 s"


def test_what_it_leaves_on_its_device_is_no_room_for_others_and_none_that_it_needs() -> None:
    sim = make(100, residue=10)
    asleep(sim, memory=60)
    assert booked(sim) == (10, 0, 0)
    sim.accept("b", memory=30)
    sim.load("b")
    sim.use("b")
    ticket = sim.ask("a")
    assert "needs 50 B on cpu:0: limit 100 B less 40 B booked" in sim.world.models["a"].reason
    assert sim.state("a") is State.LOADING
    assert (booked(sim), booked(sim, HOST)) == ((90, 0, 0), (30, 0, 0))
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert (booked(sim), booked(sim, HOST)) == ((90, 0, 0), (0, 0, 0))


def test_wanted_while_it_falls_asleep_it_wakes_at_once() -> None:
    sim = make(60)
    for name in ("a", "b"):
        sim.accept(name, memory=60)
    sim.load("a")
    leaves = sim.ask("b")
    sim.complete(sim.pending[-1])
    ticket = sim.ask("a")
    sim.withdraw(leaves)
    assert sim.state("a") is State.PARKING
    sim.complete(sim.pending[-1])
    assert sim.state("a") is State.LOADING
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.state("b") is State.COLD


def test_it_waits_for_its_room_in_turn_and_ages_as_others_do() -> None:
    sim = make(100)
    asleep(sim, memory=60)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    ticket = sim.ask("a", deadline_s=100)
    assert sim.state("a") is State.STANDBY
    assert "busy is in use" in sim.world.models["a"].reason
    sim.wait(16)
    assert sim.state("busy") is State.DRAINING
    assert sim.world.models["a"].promise == (("cpu:0", 60),)
    sim.end("busy")
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_nobody_waits_for_it_any_more() -> None:
    sim = make(100)
    asleep(sim, memory=60)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    sim.withdraw(sim.ask("a"))
    assert sim.state("a") is State.STANDBY and "a" not in sim.world.queue
    assert sim.world.models["a"].reason == "asleep at level 1, wakes in about 0.2 s; nobody waits for it any more"
    assert sim.world.models["a"].want is Want.NONE


def test_two_wakes_at_a_time_and_no_more() -> None:
    sim = make(100)
    for name in ("a", "b", "c"):
        asleep(sim, name, memory=20)
    tickets = [sim.ask(name) for name in ("a", "b", "c")]
    assert sim.states() == {"a": "LOADING", "b": "LOADING", "c": "STANDBY"}
    assert "waits for its turn" in sim.world.models["c"].reason
    sim.run()
    assert {sim.answer(t) for t in tickets} == {"granted"}


def two_devices(busy: int) -> Sim:
    """`a` slept on the larger one, which others use now up to `busy`."""
    policy = Policy(budgets={"cpu:0": 50, "cpu:1": 100}, min_resident_s=0.0)
    sim = Sim(policy, devices=2, levels=(1,))
    sim.run()
    asleep(sim, memory=40)
    sim.accept("busy", memory=busy)
    sim.load("busy", finish=False)
    assert sim.world.models["busy"].booking == (("cpu:1", busy),)
    return sim


def test_it_wakes_where_it_slept_though_there_is_more_room_elsewhere() -> None:
    sim = two_devices(55)
    ticket = sim.ask("a")
    assert sim.state("a") is State.LOADING and sim.world.models["a"].booking == (("cpu:1", 40), (HOST, 30 - 10))
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_with_no_room_where_it_slept_it_is_loaded_anew_where_there_is_some() -> None:
    sim = two_devices(90)
    ticket = sim.ask("a")
    assert sim.state("a") is State.UNLOADING
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].booking == (("cpu:0", 40),)


def test_with_no_room_anywhere_it_sleeps_on_until_there_is_some() -> None:
    sim = two_devices(90)
    sim.accept("other", memory=20)
    sim.load("other", finish=False)
    ticket = sim.ask("a")
    assert sim.state("a") is State.STANDBY and "needs 40 B on cpu:1" in sim.world.models["a"].reason
    sim.wait(16)
    sim.end("busy")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.loads[-1] == "a"


def test_spread_over_two_devices_it_wakes_on_both() -> None:
    budgets = {"cpu:0": 60, "cpu:1": 100, "cpu:2": 100}
    sim = Sim(Policy(budgets=budgets), devices=3, levels=(1,), residue=5)
    sim.run()
    sim.accept("a", memory=80, devices=2)
    sim.load("a")
    assert sim.world.models["a"].booking == (("cpu:1", 40), ("cpu:2", 40))
    sim.wait(620)
    sim.complete(sim.pending[-1])
    assert (booked(sim, "cpu:1"), booked(sim, "cpu:2")) == ((40, 0, 37), (40, 0, 37))
    sim.run()
    assert sim.state("a") is State.STANDBY
    assert (booked(sim, "cpu:1"), booked(sim, "cpu:2"), booked(sim, HOST)) == ((5, 0, 0), (5, 0, 0), (40, 0, 0))
    ticket = sim.ask("a")
    assert (booked(sim, "cpu:0"), booked(sim, "cpu:1"), booked(sim, "cpu:2")) == ((0, 0, 0), (40, 0, 0), (40, 0, 0))
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].estimate.memory_bytes == 80


def test_on_another_machine_it_does_not_sleep_in_the_memory_of_this_one() -> None:
    sim = make()
    sim.accept("a", memory=60)
    sim.load("a")
    sim.world = replace(
        sim.world, runtimes=sim.world.runtimes.set("r", replace(sim.world.runtimes["r"], elsewhere=True))
    )
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.COLD


def test_a_wake_that_fails_is_followed_by_a_load_and_nobody_is_refused() -> None:
    sim = make()
    asleep(sim)
    tickets = [sim.ask("a"), sim.ask("a")]
    sim.fail(sim.pending[-1])
    assert sim.state("a") is State.UNLOADING
    assert "did not wake, and is loaded anew" in sim.world.models["a"].reason
    sim.run()
    assert {sim.answer(t) for t in tickets} == {"granted"}
    assert [type(o).__name__ for _, out in sim.history for o in out if isinstance(o, i.Wake | i.Load)][-2:] == [
        "Wake",
        "Load",
    ]
    assert not sim.world.models["a"].estimate.standby, "what failed once is not tried again"


def test_a_wake_that_never_ends_is_followed_by_a_load() -> None:
    sim = make(load_timeout_s=40)
    asleep(sim)
    ticket = sim.ask("a")
    sim.lose(sim.pending[-1])
    sim.wait(41)
    assert sim.state("a") is State.UNLOADING and sim.answer(ticket) == "waits"
    sim.run()
    assert sim.answer(ticket) == "granted"


@pytest.mark.parametrize(
    "wake_s, load_s, timeout_s, bound_s",
    [
        (0.2, 10, 900, 60),
        (25, 100, 900, 400),  # it may read the weights from the disk, as a load does
        (25, 100, 300, 300),
    ],
)
def test_a_wake_that_takes_far_longer_than_expected_is_given_up_for_a_load(
    wake_s: float, load_s: float, timeout_s: float, bound_s: float
) -> None:
    sim = make(load_timeout_s=timeout_s)
    file = File(Spec("r", "cpu", "1"), 60, 60)
    sim.files["a"] = file
    estimate = Estimate(60, 100.0, standby=(Standby(1, 30, 0, wake_s),))
    sim.happen(e.ModelAccepted(sim.now, "a", file.spec, estimate))
    sim.ask("a")
    sim.complete(sim.pending[-1], took=load_s)
    sim.end("a")
    sim.wait(620)
    sim.run()
    ticket = sim.ask("a", deadline_s=1000)
    wake = sim.pending[-1]
    assert isinstance(wake.order, i.Wake)
    sim.wait(bound_s - 1)
    assert sim.state("a") is State.LOADING
    sim.wait(2)
    assert sim.state("a") is State.UNLOADING and sim.answer(ticket) == "waits"
    told = f"did not wake, and is loaded anew: not within {bound_s:.0f} s, and expected were {wake_s:.1f} s"
    assert sim.world.models["a"].reason == told
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].reason.startswith("loaded")
    assert [s.level for s in sim.world.models["a"].estimate.standby] == [1], "slow once, it is tried again"


def test_a_wake_of_which_nothing_is_known_has_the_time_of_a_load() -> None:
    sim = make(levels=(1,))
    sim.real["r"].models["a"] = (("cpu:0", 60),)
    sim.real["r"].sleep("a", 2, ((HOST, 30),))
    sim.accept("a", memory=60, was_loaded=True)
    sim.see_runtime()
    ticket = sim.ask("a", deadline_s=1000)
    sim.wait(899)
    assert sim.state("a") is State.LOADING and sim.answer(ticket) == "waits"
    sim.wait(2)
    assert sim.state("a") is State.UNLOADING
    assert sim.world.models["a"].reason == "did not wake, and is loaded anew: not within 900 s"


@pytest.mark.parametrize("late", [False, True])
def test_a_parking_that_fails_or_never_ends_goes_on_to_the_unload(late: bool) -> None:
    sim = make(60)
    for name in ("a", "b"):
        sim.accept(name, memory=60)
    sim.load("a")
    ticket = sim.ask("b", deadline_s=1000)
    sim.complete(sim.pending[-1])
    if late:
        sim.lose(sim.pending[-1])
        sim.wait(181)
    else:
        sim.fail(sim.pending[-1])
    assert sim.states() == {"a": "UNLOADING", "b": "QUEUED"}
    assert (booked(sim), booked(sim, HOST)) == ((60, 60, 60), (30, 0, 30))
    sim.run()
    assert sim.states() == {"a": "COLD", "b": "READY"} and sim.answer(ticket) == "granted"
    assert not sim.world.models["a"].estimate.standby


# --------------------------------------------------------------------------- whether, and how deep


def test_what_nobody_used_is_unloaded() -> None:
    sim = make()
    sim.accept("a", memory=60, dropped=True)
    sim.run()
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.COLD


def test_without_a_budget_nothing_sleeps() -> None:
    sim = make(standby_budget_bytes=0)
    sim.accept("a", memory=60)
    sim.load("a")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.COLD


def test_by_default_half_of_what_is_free_of_the_host_is_for_sleepers() -> None:
    """90 of 100 may be booked: 45 may be slept in."""
    sim = make(200)
    sim.accept("a", memory=80)
    sim.accept("b", memory=20)
    for name in ("a", "b"):
        sim.load(name)
        sim.use(name)
    for name in ("a", "b"):
        sim.end(name)
    sim.wait(620)
    sim.run()
    assert booked(sim, HOST)[0] <= 45
    assert "STANDBY" in sim.states().values() and "COLD" in sim.states().values()


def test_level_1_while_the_weights_have_room_then_level_2() -> None:
    sim = make(100, levels=(1, 2), standby_budget_bytes=35)
    asleep(sim, "a", memory=60)
    asleep(sim, "b", memory=60)
    assert (level(sim, "a"), level(sim, "b")) == (1, 2)
    assert booked(sim, HOST)[0] == 32


def test_what_saves_more_for_the_memory_takes_the_place_of_what_saves_less() -> None:
    sim = make(100, standby_budget_bytes=35)
    asleep(sim, "a", memory=60)
    sim.wait(5000)
    sim.accept("b", memory=60)
    sim.load("b")
    sim.wait(620)
    assert sim.state("b") is State.DRAINING
    sim.complete(sim.pending[-1])
    assert sim.states() == {"a": "UNLOADING", "b": "PARKING"}
    sim.run()
    assert sim.states() == {"a": "COLD", "b": "STANDBY"}
    assert sim.world.models["a"].reason == "b is parked instead: it saves more time for the memory"


def test_what_saves_less_for_the_memory_is_unloaded() -> None:
    sim = make(100, standby_budget_bytes=35)
    asleep(sim, "a", memory=60, uses=50)
    sim.files["b"] = replace(sim.files["a"], memory=60, real=60)
    quick = Estimate(60, 1.0, standby=(Standby(1, 30, 0, 0.4),))
    sim.happen(e.ModelAccepted(sim.now, "b", Spec("r", "cpu", "1"), quick))
    sim.load("b")
    sim.wait(620)
    sim.run()
    assert sim.states() == {"a": "STANDBY", "b": "COLD"}


def test_a_wake_that_takes_nearly_as_long_as_a_load_is_not_worth_it() -> None:
    sim = make(100)
    sim.accept("a", memory=60)
    model = sim.world.models["a"]
    slow = tuple(replace(s, wake_s=0.6) for s in model.estimate.standby)
    sim.happen(e.ModelAccepted(sim.now, "a", replace(model.spec or Spec("r", "cpu", "1"), revision="2"),
                               replace(model.estimate, standby=slow)))  # fmt: skip
    sim.load("a")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.COLD


def test_measured_wakes_are_what_is_judged_by() -> None:
    sim = make()
    asleep(sim)
    sim.ask("a")
    sim.complete(sim.pending[-1], took=0.9)
    assert sim.world.models["a"].estimate.standby[0].wake_s == 0.9
    assert sim.world.models["a"].estimate.load_s == 1.0, "a wake is no load"
    sim.end("a")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.COLD


def test_a_model_whose_device_is_the_host_gains_nothing_by_sleeping() -> None:
    sim = make()
    sim.files["a"] = replace(sim_file(sim), spec=Spec("r", "host", "1"))
    sim.happen(e.ModelAccepted(sim.now, "a", Spec("r", "host", "1"), sim.estimate(40)))
    sim.load("a")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.COLD


def sim_file(sim: Sim):  # type: ignore[no-untyped-def]
    sim.accept("other", memory=40)
    return sim.files["other"]


def test_room_that_is_promised_comes_before_what_a_sleeper_would_keep() -> None:
    sim = make(60, residue=10)
    for name in ("a", "b"):
        sim.accept(name, memory=60)
    sim.load("a")
    sim.ask("b")
    sim.run()
    assert sim.states() == {"a": "COLD", "b": "READY"}


@pytest.mark.parametrize("what", ["unload", "remove", "invalid", "change", "recycle"])
def test_what_is_drained_for_anything_but_room_does_not_sleep(what: str) -> None:
    sim = make()
    sim.accept("a", memory=60)
    sim.load("a")
    match what:
        case "unload":
            sim.unload("a")
        case "remove":
            sim.remove("a")
        case "invalid":
            sim.happen(e.ModelInvalid(sim.now, "a", Failure("model_invalid", "half of it is missing")))
            sim.wait(620)
        case "change":
            sim.change("a", memory=70)
        case _:
            sim.accept("b", memory=10)
            sim.ask("b")
            sim.fail(sim.pending[-1], runtime_lost=True, recycle=True)
    sim.run()
    assert not [o for _, out in sim.history for o in out if isinstance(o, i.Park)]
    assert sim.state("a") is not State.STANDBY


# --------------------------------------------------------------------------- the host's memory, and the device's


def test_sleepers_are_the_first_to_go_for_one_who_needs_the_hosts_memory() -> None:
    sim = make()
    asleep(sim, "a", memory=60)
    sim.files["h"] = replace(sim.files["a"], spec=Spec("r", "host", "1"), memory=80, real=80)
    sim.happen(e.ModelAccepted(sim.now, "h", Spec("r", "host", "1"), Estimate(80, 1.0)))
    ticket = sim.ask("h")
    assert sim.states() == {"a": "UNLOADING", "h": "QUEUED"}
    assert sim.world.models["a"].reason == "evicted for h"
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.state("a") is State.COLD


def test_pressure_on_the_host_unloads_sleepers_the_least_worthy_first() -> None:
    sim = make(200, standby_budget_bytes=100)
    asleep(sim, "a", memory=40)
    sim.wait(3000)
    asleep(sim, "b", memory=40)
    sim.taken = 70
    sim.see_devices()
    sim.wait(11)
    assert sim.states() == {"a": "UNLOADING", "b": "STANDBY"}
    assert "over its limit" in sim.world.models["a"].reason


def test_a_sleeper_goes_for_the_little_that_it_keeps_of_the_device() -> None:
    sim = make(100, residue=10)
    asleep(sim, memory=60)
    sim.accept("big", memory=95)
    ticket = sim.ask("big")
    assert sim.states() == {"a": "UNLOADING", "big": "QUEUED"}
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_one_who_waits_behind_does_not_end_a_sleeper_that_waits_before() -> None:
    sim = make(100, residue=10)
    asleep(sim, memory=60)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    first = sim.ask("a")
    sim.accept("late", memory=90)
    sim.ask("late")
    assert sim.states() == {"a": "STANDBY", "busy": "READY", "late": "QUEUED"}
    sim.end("busy")
    sim.see_use()
    sim.wait(1)
    sim.run()
    assert sim.answer(first) == "granted"


def test_one_who_waits_before_ends_a_sleeper_that_waits_behind_and_it_is_loaded_after() -> None:
    sim = make(100, residue=10)
    asleep(sim, memory=60)
    sim.accept("big", memory=95)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    first, second = sim.ask("big", priority=5, deadline_s=1000), sim.ask("a", deadline_s=1000)
    sim.end("busy")
    sim.see_use()
    sim.wait(1)
    sim.run()
    assert sim.answer(first) == "granted"
    sim.end("big")
    sim.see_use()
    sim.wait(31)
    sim.run()
    assert sim.answer(second) == "granted"


def test_it_may_never_fit_any_more() -> None:
    sim = make(100)
    asleep(sim, memory=60)
    sim.policy = replace(sim.policy, budgets={"cpu:0": 50})
    sim.see_devices()
    ticket = sim.ask("a")
    assert sim.state("a") is State.UNLOADING
    sim.run()
    assert sim.state("a") is State.FAILED and sim.answer(ticket) == "never_fits"


# --------------------------------------------------------------------------- its ways out


def test_unload_asked_for_ends_it() -> None:
    sim = make()
    asleep(sim)
    ticket = sim.unload("a")
    sim.run()
    assert sim.state("a") is State.COLD and sim.answer(ticket) == "granted"


def test_pinned_it_wakes() -> None:
    sim = make()
    asleep(sim)
    sim.pin("a")
    sim.run()
    assert sim.state("a") is State.READY


def test_its_runtime_is_lost_and_nobody_wanted_it() -> None:
    sim = make()
    asleep(sim)
    sim.crash()
    assert sim.state("a") is State.COLD and booked(sim, HOST) == (0, 0, 0)


def test_its_runtime_is_lost_while_somebody_waits() -> None:
    sim = make(100)
    asleep(sim)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    ticket = sim.ask("a")
    sim.crash()
    assert sim.state("a") is State.QUEUED
    sim.wait(20)
    sim.run()
    sim.wait(40)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_its_runtime_is_started_anew() -> None:
    sim = make()
    asleep(sim)
    sim.accept("b", memory=10)
    sim.ask("b")
    sim.fail(sim.pending[-1], runtime_lost=True, recycle=True)
    assert sim.state("a") is State.UNLOADING
    sim.run()
    sim.wait(5)
    sim.run()
    assert sim.state("a") is State.COLD and sim.world.runtimes["r"].state is RuntimeState.UP
    assert sim.state("b") is State.READY


def test_its_files_change_while_somebody_waits() -> None:
    sim = make()
    asleep(sim)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    ticket = sim.ask("a")
    sim.change("a")
    sim.end("busy")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].loaded_revision == "2"


def test_after_a_restart_it_is_found_asleep_and_wakes_on_a_request() -> None:
    sim = make()
    sim.real["r"].models["a"] = (("cpu:0", 60),)
    sim.real["r"].sleep("a", 1, ((HOST, 30),))
    sim.accept("a", memory=60, was_loaded=True)
    sim.see_runtime()
    assert sim.state("a") is State.STANDBY
    assert sim.world.models["a"].reason.endswith("adopted: it slept already")
    assert (booked(sim), booked(sim, HOST)) == ((0, 0, 0), (30, 0, 0))
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.loads == ["a"]


def test_after_a_restart_what_changed_meanwhile_is_unloaded() -> None:
    sim = make()
    sim.real["r"].models["a"] = (("cpu:0", 60),)
    sim.real["r"].sleep("a", 1, ((HOST, 30),))
    sim.accept("a", memory=60, was_loaded=True, revision="2", loaded_revision="1")
    sim.see_runtime()
    sim.run()
    assert sim.state("a") is State.COLD


def test_put_to_sleep_by_somebody_it_is_woken_when_it_is_wanted() -> None:
    sim = make()
    sim.accept("a", memory=60)
    sim.load("a")
    sim.real["r"].sleep("a", 1, ((HOST, 30),))
    sim.see_runtime()
    assert sim.state("a") is State.FAILED and "somebody put it to sleep" in sim.world.models["a"].reason
    sim.see_runtime()
    sim.run()
    assert sim.state("a") is State.READY, "it was in use"


# --------------------------------------------------------------------------- its device goes, or is too small by now


APART = "s/cpu:0"


def two_machines(residue: int = 0, here: int = 100, there: int = 100, **policy: object) -> Sim:
    """A machine with a runtime `r`, and another one, which only runtime `s` reaches, with more room on it."""
    fields: dict[str, object] = {"budgets": {"cpu:0": here, APART: there}, "min_resident_s": 0.0, **policy}
    sim = Sim(Policy(**fields), runtimes=("r", "s"), levels=(1,), residue=residue)  # type: ignore[arg-type]
    sim.apart[APART] = "s"
    sim.see_devices()
    sim.run()
    sim.accept("full", memory=50)
    sim.load("full", finish=False)
    return sim


def asleep_there(sim: Sim) -> None:
    """`a` sleeps on the other machine."""
    sim.accept("a", memory=60, runtime="s")
    sim.load("a")
    assert sim.world.models["a"].placed == (APART,)
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.STANDBY, sim.story("a")


@pytest.mark.parametrize("residue", [0, 10])
def test_its_device_is_gone_and_it_is_unloaded(residue: int) -> None:
    sim = two_machines(residue)
    asleep_there(sim)
    sim.lose_device(APART)
    assert sim.state("a") is State.UNLOADING and sim.world.models["a"].reason == f"{APART} is gone"
    assert booked(sim, HOST) == (30, 0, 30)
    sim.run()
    assert sim.state("a") is State.COLD and booked(sim, HOST) == (0, 0, 0)
    sim.see_runtime("s")
    assert sim.state("a") is State.COLD and not sim.real["s"].asleep


@pytest.mark.parametrize("residue", [0, 10])
def test_its_device_is_gone_and_it_is_loaded_elsewhere_for_who_asks(residue: int) -> None:
    sim = two_machines(residue)
    asleep_there(sim)
    sim.lose_device(APART)
    sim.end("full")
    sim.see_use()
    ticket = sim.ask("a")
    assert sim.state("a") is State.UNLOADING
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].booking == (("cpu:0", 60),)
    assert not [o for _, out in sim.history for o in out if isinstance(o, i.Wake)]


@pytest.mark.parametrize("residue", [0, 10])
def test_its_device_goes_while_somebody_waits_for_its_room(residue: int) -> None:
    sim = two_machines(residue)
    asleep_there(sim)
    sim.accept("busy", memory=70, runtime="s")
    sim.load("busy", finish=False)
    assert sim.world.models["busy"].placed == (APART,)
    ticket = sim.ask("a")
    assert sim.state("a") is State.STANDBY
    sim.lose_device(APART)
    assert sim.state("a") is State.UNLOADING and sim.answer(ticket) == "waits"
    sim.end("full")
    sim.end("busy")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].booking == (("cpu:0", 60),)


def test_its_device_is_gone_and_there_is_no_other_for_it() -> None:
    sim = two_machines(here=55)
    asleep_there(sim)
    sim.lose_device(APART)
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "never_fits" and sim.state("a") is State.FAILED
    assert "needs 60 B" in sim.message(ticket) and APART not in sim.message(ticket)


@pytest.mark.parametrize("waited_for", [False, True])
def test_its_device_goes_while_it_falls_asleep(waited_for: bool) -> None:
    sim = two_machines()
    sim.accept("a", memory=60, runtime="s")
    sim.load("a")
    sim.wait(620)
    sim.complete(sim.pending[-1])
    assert sim.state("a") is State.PARKING
    ticket = sim.ask("a") if waited_for else 0
    sim.lose_device(APART)
    assert sim.state("a") is State.UNLOADING and booked(sim, HOST) == (30, 0, 30)
    sim.run()
    assert booked(sim, HOST) == (0, 0, 0)
    sim.end("full")
    sim.see_use()
    sim.wait(1)
    sim.run()
    assert sim.state("a") is (State.READY if waited_for else State.COLD)
    assert not waited_for or sim.answer(ticket) == "granted"


def test_its_device_goes_while_it_wakes() -> None:
    sim = two_machines()
    asleep_there(sim)
    ticket = sim.ask("a")
    assert sim.state("a") is State.LOADING
    sim.lose_device(APART)
    assert sim.state("a") is State.UNLOADING and sim.answer(ticket) == "waits"
    sim.end("full")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].booking == (("cpu:0", 60),)
    assert sim.world.models["a"].estimate.standby, "its level is not to blame"


@pytest.mark.parametrize("residue", [0, 10])
def test_its_device_goes_while_it_is_unloaded(residue: int) -> None:
    """What it holds of the host is booked until its process has ended."""
    sim = two_machines(residue)
    asleep_there(sim)
    ticket = sim.unload("a")
    sim.lose_device(APART)
    assert sim.state("a") is State.UNLOADING and sim.answer(ticket) == "waits" and booked(sim, HOST) == (30, 0, 30)
    sim.run()
    assert sim.state("a") is State.COLD and sim.answer(ticket) == "granted" and booked(sim, HOST) == (0, 0, 0)


def test_its_device_is_gone_and_its_unload_fails() -> None:
    sim = two_machines()
    asleep_there(sim)
    sim.lose_device(APART)
    sim.fail(sim.pending[-1])
    assert sim.state("a") is State.FAILED and booked(sim, HOST) == (30, 0, 0)
    sim.real["s"].drop("a")
    sim.see_runtime("s")
    assert sim.state("a") is State.COLD and booked(sim, HOST) == (0, 0, 0)


def test_one_of_its_devices_is_gone() -> None:
    sim = two_machines(here=55)
    sim.apart["s/cpu:1"] = "s"
    sim.see_devices()
    sim.accept("a", memory=80, runtime="s", devices=2)
    sim.load("a")
    assert sim.world.models["a"].placed == (APART, "s/cpu:1")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.STANDBY
    sim.lose_device("s/cpu:1")
    sim.run()
    assert sim.state("a") is State.COLD and booked(sim, APART) == (0, 0, 0) == booked(sim, HOST)
    ticket = sim.ask("a")
    assert sim.answer(ticket) == "waits" and "needs 40 B on cpu:0" in sim.world.models["a"].reason


def test_its_device_comes_back() -> None:
    sim = two_machines()
    asleep_there(sim)
    sim.lose_device(APART)
    sim.apart[APART] = "s"
    sim.see_devices()
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].booking == ((APART, 60),)
    assert (booked(sim, APART), booked(sim, HOST)) == ((60, 0, 0), (0, 0, 0))


def test_its_runtime_is_restarted_by_somebody() -> None:
    sim = make(100)
    asleep(sim)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    ticket = sim.ask("a", deadline_s=1000)
    sim.restart_silently()
    sim.see_runtime()
    assert booked(sim, HOST) == (0, 0, 0) and sim.state("a") is State.LOADING
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_its_runtime_is_lost_and_given_up_while_somebody_waits() -> None:
    sim = make(100, crash_budget=1)
    asleep(sim)
    sim.accept("busy", memory=60)
    sim.load("busy", finish=False)
    ticket = sim.ask("a")
    sim.crash()
    assert sim.answer(ticket) == "runtime_unavailable" and "r is down" in sim.message(ticket)
    assert booked(sim, HOST) == (0, 0, 0)


@pytest.mark.parametrize("while_", ["parking", "waking"])
def test_its_runtime_is_lost_on_its_way(while_: str) -> None:
    sim = make()
    sim.accept("a", memory=60)
    sim.load("a")
    sim.wait(620)
    sim.complete(sim.pending[-1])
    if while_ == "waking":
        sim.run()
    ticket = sim.ask("a")
    sim.crash()
    assert booked(sim, HOST) == (0, 0, 0) == booked(sim)
    sim.wait(20)
    sim.run()
    sim.wait(40)
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].parked is None


def shrink(sim: Sim, **budgets: int) -> None:
    sim.policy = replace(
        sim.policy, budgets={**sim.policy.budgets, **{k.replace("_", ":"): v for k, v in budgets.items()}}
    )
    sim.see_devices()


def test_what_it_keeps_of_its_device_counts_for_what_it_needs_of_it() -> None:
    """60 in all, of which it holds 10: 50 more would fit a budget of 55, and all of it does not."""
    sim = make(100, residue=10)
    asleep(sim, memory=60)
    shrink(sim, cpu_0=55)
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "never_fits" and sim.state("a") is State.FAILED


def two_shrunk(residue: int, limit: int, devices: int = 1) -> Sim:
    policy = Policy(budgets={"cpu:0": 90, "cpu:1": 100, "cpu:2": 90}, min_resident_s=0.0)
    sim = Sim(policy, devices=2 + (devices > 1), levels=(1,), residue=residue)
    sim.run()
    sim.accept("a", memory=60 if devices == 1 else 80, devices=devices)
    sim.load("a")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.STANDBY
    shrink(sim, cpu_1=limit)
    return sim


def is_loaded_elsewhere(sim: Sim, size: int) -> None:
    """On the first device, for who asks for it, once what loads there is done and may go."""
    ticket = sim.ask("a")
    assert sim.state("a") is State.UNLOADING and "loaded anew elsewhere" in sim.world.models["a"].reason
    sim.end("other")
    sim.see_use()
    sim.wait(1)
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].booking == (("cpu:0", size),)


@pytest.mark.parametrize(("residue", "limit"), [(0, 40), (10, 40), (10, 55)])
def test_it_never_fits_any_more_where_it_slept_and_is_loaded_where_room_can_be_made(residue: int, limit: int) -> None:
    sim = two_shrunk(residue, limit)
    sim.accept("other", memory=60)
    sim.load("other", finish=False)
    assert sim.world.models["other"].placed == ("cpu:0",)
    is_loaded_elsewhere(sim, 60)


def test_over_several_devices_it_is_loaded_anew_on_others() -> None:
    sim = two_shrunk(0, 30, devices=2)
    assert "cpu:1" in sim.world.models["a"].placed
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].placed == ("cpu:0", "cpu:2")


@pytest.mark.parametrize("always", [False, True])
def test_it_can_never_wake_beside_what_is_kept_and_is_loaded_elsewhere(always: bool) -> None:
    policy = Policy(always_loaded=("kept",) if always else (), budgets={"cpu:0": 80, "cpu:1": 100}, min_resident_s=0.0)
    sim = Sim(policy, devices=2, levels=(1,))
    sim.run()
    asleep(sim, memory=40)
    sim.accept("kept", memory=90, pinned=not always)
    sim.run()
    assert sim.world.models["kept"].placed == ("cpu:1",)
    sim.accept("other", memory=60)
    sim.load("other", finish=False)
    is_loaded_elsewhere(sim, 40)


def test_it_can_never_wake_beside_what_is_always_loaded_anywhere() -> None:
    sim = make(always_loaded=("kept",))
    asleep(sim, memory=60)
    sim.accept("kept", memory=50)
    sim.run()
    ticket = sim.ask("a")
    sim.run()
    assert sim.answer(ticket) == "never_fits" and "beside what is always loaded" in sim.message(ticket)
    assert sim.state("a") is State.FAILED and booked(sim, HOST) == (0, 0, 0)


def test_a_wake_that_fails_is_followed_by_one_load_and_the_reason_of_that_is_told() -> None:
    sim = make()
    asleep(sim)
    ticket = sim.ask("a")
    sim.files["a"].bad = True
    sim.fail(sim.pending[-1])
    sim.run()
    assert sim.answer(ticket) == "load_rejected" and sim.loads == ["a", "a", "a"]
    told = [o.transition.reason for _, out in sim.history for o in out if isinstance(o, i.Tell)]
    assert "did not wake, and is loaded anew: it failed" in told
    sim.wait(620)
    assert sim.loads == ["a", "a", "a"]


def test_a_runtime_lost_during_a_wake_is_no_fault_of_the_level() -> None:
    sim = make()
    asleep(sim)
    ticket = sim.ask("a")
    sim.fail(sim.pending[-1], runtime_lost=True)
    sim.wait(5)
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].estimate.standby


# --------------------------------------------------------------------------- how likely it is wanted again


def test_reuse_falls_with_idleness_and_rises_with_use() -> None:
    now, idle_s = 10_000.0, 300.0
    assert reuse(Use(), now, idle_s) == 0
    once, often = Use(0, 1, now - 60), Use(0, 100, now - 60)
    assert 0 < reuse(once, now, idle_s) < reuse(often, now, idle_s)
    assert reuse(often, now + 3600, idle_s) < reuse(often, now, idle_s)
    assert reuse(replace(often, qps=2.0), now, idle_s) == pytest.approx(2.0, rel=0.02)
