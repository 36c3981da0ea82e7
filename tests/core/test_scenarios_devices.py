"""Several devices: models that spread over some of them, and devices that only one runtime reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelium.core import instructions as i
from modelium.core.states import State
from modelium.core.ticking import GONE_AFTER, GONE_AFTER_S
from modelium.core.world import Failure, Policy
from tests.core.sim import Sim


def devices(count: int, budget: int = 100, **policy: object) -> Sim:
    budgets = {f"cpu:{n}": budget for n in range(count)}
    sim = Sim(Policy(budgets=budgets, **policy), devices=count)  # type: ignore[arg-type]
    sim.run()
    return sim


def booked(sim: Sim) -> list[int]:
    return [account.booked_bytes for _, account in sorted(sim.world.devices.items())]


# --------------------------------------------------------------------------- over several devices


def test_a_model_takes_an_equal_part_of_each_of_its_devices() -> None:
    sim = devices(3)
    sim.accept("big", memory=151, devices=2)
    sim.load("big")
    assert sim.world.models["big"].placed == ("cpu:0", "cpu:1")
    assert booked(sim) == [76, 76, 0]
    assert sim.world.models["big"].estimate.memory_bytes == 152


def test_it_takes_the_devices_with_the_most_room() -> None:
    sim = devices(3)
    sim.accept("one", memory=50)
    sim.load("one")
    sim.accept("big", memory=100, devices=2)
    sim.load("big")
    assert sim.world.models["big"].placed == ("cpu:1", "cpu:2")


@pytest.mark.parametrize(
    "count, memory, told",
    [
        (1, 100, "needs 2 devices of kind cpu with 50 B each (estimated); cpu:0 has a budget of 100 B"),
        (2, 202, "needs 2 devices of kind cpu with 101 B each"),
    ],
)
def test_what_never_fits_is_told_with_the_arithmetic_of_each(count: int, memory: int, told: str) -> None:
    sim = devices(count)
    sim.accept("big", memory=memory, devices=2)
    ticket = sim.ask("big")
    assert sim.answer(ticket) == "never_fits"
    assert told in sim.message(ticket)


def test_room_is_made_on_each_device_and_on_no_other() -> None:
    sim = devices(3)
    for name in ("a", "b", "c"):
        sim.accept(name, memory=60)
        sim.load(name)
        sim.wait(1)
    assert booked(sim) == [60, 60, 60]
    sim.wait(31)
    sim.use("c")
    sim.accept("big", memory=160, devices=2)
    ticket = sim.ask("big")
    drained = [o.name for _, out in sim.history for o in out if isinstance(o, i.CloseRoute)]
    assert sorted(drained) == ["a", "b"]
    assert [account.promised_bytes for _, account in sorted(sim.world.devices.items())] == [80, 80, 0]
    sim.run()
    assert sim.answer(ticket) == "granted"
    assert booked(sim) == [80, 80, 60]


def test_one_device_with_room_is_not_enough() -> None:
    sim = devices(2)
    sim.accept("a", memory=60)
    sim.load("a")
    sim.use("a")
    sim.accept("big", memory=100, devices=2)
    ticket = sim.ask("big")
    assert sim.state("big") is State.QUEUED
    sim.end("a")
    sim.wait(31)
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_what_it_holds_elsewhere_is_no_part_of_what_it_needs() -> None:
    """A model on a GPU holds host memory too, which is measured with it."""
    sim = devices(2, budget=90)
    sim.accept("a", memory=40)
    sim.ask("a")
    load = sim.pending[-1]
    sim.real["r"].models["a"] = (("cpu:0", 50), ("cpu:1", 5))
    sim.files["a"].real = 50
    sim.complete(load)
    sim.real["r"].models["a"] = (("cpu:0", 52), ("cpu:1", 5))
    sim.see_runtime()
    model = sim.world.models["a"]
    assert (model.booking, model.placed) == ((("cpu:0", 52), ("cpu:1", 5)), ("cpu:0",))
    assert model.estimate.memory_bytes == 52


def test_new_files_load_beside_the_old_ones_on_the_same_devices() -> None:
    sim = devices(2)
    sim.accept("big", memory=60, devices=2)
    sim.load("big")
    sim.change("big", memory=80)
    assert booked(sim) == [70, 70]
    sim.run()
    assert sim.world.models["big"].loaded_revision == "2"
    assert booked(sim) == [40, 40]


# --------------------------------------------------------------------------- devices of one runtime


def two_machines() -> Sim:
    """A machine with room for 100, where runtimes `r` and `s` are, and another one, which only `s` reaches."""
    sim = Sim(Policy(budgets={"cpu:0": 100, "s/cpu:0": 100}), runtimes=("r", "s"))
    sim.apart["s/cpu:0"] = "s"
    sim.see_devices()
    sim.run()
    return sim


def test_only_its_own_runtime_places_on_a_device() -> None:
    sim = two_machines()
    for name, runtime in (("a", "r"), ("b", "s")):
        sim.accept(name, memory=60, runtime=runtime)
        sim.load(name)
    assert {n: m.placed for n, m in sim.world.models.items()} == {"a": ("cpu:0",), "b": ("s/cpu:0",)}
    sim.accept("c", memory=40, runtime="r")
    sim.accept("d", memory=40, runtime="r")
    sim.load("c")
    sim.ask("d")
    assert sim.state("d") is State.QUEUED  # the room over there is none of its runtime's
    sim.accept("large", memory=101, runtime="r")
    assert sim.answer(sim.ask("large")) == "never_fits"


def test_what_is_too_large_here_goes_there() -> None:
    sim = Sim(Policy(budgets={"cpu:0": 50, "s/cpu:0": 100}), runtimes=("r", "s"))
    sim.apart["s/cpu:0"] = "s"
    sim.see_devices()
    sim.run()
    sim.accept("large", memory=80, runtime="s")
    sim.load("large")
    assert sim.world.models["large"].placed == ("s/cpu:0",)


def test_when_a_machine_goes_its_models_are_placed_elsewhere_if_they_are_wanted() -> None:
    sim = two_machines()
    sim.accept("local", memory=60, runtime="r")
    sim.load("local")
    sim.accept("used", memory=40, runtime="s")
    sim.accept("idle", memory=30, runtime="s")
    sim.load("used")
    sim.load("idle")
    assert {sim.world.models[n].placed for n in ("used", "idle")} == {("s/cpu:0",)}
    sim.wait(400)
    sim.use("used")
    sim.end("used")
    sim.lose_device("s/cpu:0")
    assert "s/cpu:0" not in sim.world.devices
    sim.wait(2)
    sim.run()
    assert sim.world.models["used"].placed == ("cpu:0",)
    assert sim.states() == {"idle": "COLD", "local": "READY", "used": "READY"}
    ticket = sim.ask("idle")
    sim.run()
    assert (sim.answer(ticket), sim.world.models["idle"].placed) == ("granted", ("cpu:0",))


def test_a_promise_on_a_machine_that_goes_is_void() -> None:
    sim = two_machines()
    sim.accept("a", memory=90, runtime="s")
    sim.accept("local", memory=90, runtime="r", pinned=True)
    sim.run()
    sim.load("a")
    sim.wait(31)
    sim.accept("b", memory=90, runtime="s")
    ticket = sim.ask("b")
    assert sim.world.models["b"].promise == (("s/cpu:0", 90),)
    sim.lose_device("s/cpu:0")
    assert not sim.world.models["b"].promise
    sim.wait(1)
    assert sim.answer(ticket) in ("waits", "never_fits")


def test_a_runtime_on_another_machine_reaches_only_what_is_there() -> None:
    sim = Sim(Policy(budgets={"cpu:0": 100, "s/cpu:0": 60}), runtimes=("r", "s"))
    sim.elsewhere = {"s"}
    sim.apart["s/cpu:0"] = "s"
    sim.see_devices()
    sim.run()
    for name in ("a", "b"):
        sim.accept(name, memory=40, runtime="s")
    sim.load("a")
    assert sim.world.models["a"].placed == ("s/cpu:0",)
    sim.ask("b")
    assert sim.state("b") is State.QUEUED
    sim.accept("large", memory=80, runtime="s")
    assert sim.answer(sim.ask("large")) == "never_fits"


def test_a_part_that_waits_for_what_is_made_of_it_goes_on_when_that_is_lost_with_its_machine() -> None:
    sim = two_machines()
    sim.accept("part", memory=60, runtime="r")
    sim.accept("whole", memory=90, runtime="s", parts=("part",))
    sim.load("whole")
    assert sim.world.models["whole"].placed == ("s/cpu:0",)
    sim.wait(31)
    sim.accept("big", memory=90, runtime="r")
    ticket = sim.ask("big")
    sim.complete(next(p for p in sim.pending if isinstance(p.order, i.CloseRoute) and p.order.name == "part"))
    assert sim.states() == {"big": "QUEUED", "part": "DRAINING", "whole": "DRAINING"}
    sim.lose_device("s/cpu:0")
    assert sim.state("part") is State.UNLOADING
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_what_sleeps_and_waits_is_booked_once_on_a_device_that_comes() -> None:
    sim = Sim(Policy(budgets={"cpu:0": 50}), runtimes=("r", "s"), levels=(1,), residue=10)
    sim.run()
    sim.real["s"].models["a"] = (("s/cpu:0", 60),)
    sim.real["s"].sleep("a", 1, (("host:0", 30), ("s/cpu:0", 10)))
    sim.accept("a", memory=40, runtime="s", was_loaded=True)
    sim.accept("busy", memory=40)
    sim.load("busy", finish=False)
    sim.see_runtime("s")
    sim.ask("a")
    assert sim.state("a") is State.STANDBY and sim.world.models["a"].tickets
    sim.policy = replace(sim.policy, budgets={"cpu:0": 50, "s/cpu:0": 10})
    sim.apart["s/cpu:0"] = "s"
    sim.see_devices()
    assert sim.world.devices["s/cpu:0"].booked_bytes == 10


# --------------------------------------------------------------------------- looks without a device


def in_use_there() -> Sim:
    """`a` is in use on the other machine, and this one is full."""
    sim = two_machines()
    sim.accept("full", memory=90, pinned=True)
    sim.run()
    sim.accept("a", memory=40, runtime="s")
    sim.load("a", finish=False)
    assert sim.world.models["a"].placed == ("s/cpu:0",)
    return sim


def test_what_is_loaded_on_a_device_that_a_look_misses_serves_on() -> None:
    sim = in_use_there()
    for _ in range(3):
        for _ in range(GONE_AFTER - 1):
            sim.see_devices(without="s/cpu:0")
            sim.now += GONE_AFTER_S
        sim.see_runtime("s")
        assert sim.state("a") is State.READY and "a" in sim.open
        sim.see_devices()
    assert not [o for _, out in sim.history for o in out if isinstance(o, i.CloseRoute)]
    assert (sim.world.devices["s/cpu:0"].missed, sim.world.devices["s/cpu:0"].booked_bytes) == (0, 40)


def test_several_looks_in_a_row_without_a_device_and_it_is_gone() -> None:
    sim = in_use_there()
    for _ in range(GONE_AFTER):
        sim.see_devices(without="s/cpu:0")
        sim.now += GONE_AFTER_S
    assert "s/cpu:0" not in sim.world.devices
    assert sim.world.models["a"].failure == Failure("runtime_unavailable", "s/cpu:0 is gone")


def test_many_looks_at_one_time_do_not_tell_that_a_device_is_gone() -> None:
    sim = in_use_there()
    for _ in range(2 * GONE_AFTER):
        sim.see_devices(without="s/cpu:0")
    sim.now += GONE_AFTER_S - 1
    sim.see_devices(without="s/cpu:0")
    assert sim.state("a") is State.READY and sim.world.devices["s/cpu:0"].booked_bytes == 40
    sim.now += 2
    sim.see_devices(without="s/cpu:0")
    assert "s/cpu:0" not in sim.world.devices


def test_nothing_is_placed_on_a_device_until_it_is_seen_again() -> None:
    sim = in_use_there()
    sim.see_devices(without="s/cpu:0")
    sim.accept("b", memory=60, runtime="s")
    sim.accept("large", memory=95, runtime="s", dropped=True)
    ticket = sim.ask("b")
    sim.wait(16)
    assert sim.answer(ticket) == "waits" and sim.state("large") is State.QUEUED
    assert sim.world.models["large"].reason == "waits for a device: s/cpu:0 is not seen at present"
    assert sim.state("a") is State.READY
    sim.see_devices()
    sim.run()
    assert sim.answer(ticket) == "granted"


def test_new_files_wait_until_the_device_of_the_old_ones_is_seen_again() -> None:
    sim = in_use_there()
    sim.end("a")
    sim.see_devices(without="s/cpu:0")
    sim.change("a")
    assert sim.state("a") is State.READY and "s/cpu:0 is not seen at present" in sim.world.models["a"].reason
    sim.see_devices()
    sim.run()
    assert sim.world.models["a"].loaded_revision == "2"


def test_what_sleeps_is_woken_once_its_device_is_seen_again() -> None:
    sim = Sim(Policy(budgets={"cpu:0": 50, "s/cpu:0": 100}), runtimes=("s",), levels=(1,))
    sim.apart["s/cpu:0"] = "s"
    sim.see_devices()
    sim.run()
    sim.accept("a", memory=60, runtime="s")
    sim.load("a")
    sim.wait(620)
    sim.run()
    assert sim.state("a") is State.STANDBY
    sim.see_devices(without="s/cpu:0")
    ticket = sim.ask("a")
    assert sim.state("a") is State.STANDBY and sim.answer(ticket) == "waits"
    sim.see_devices()
    sim.run()
    assert sim.answer(ticket) == "granted" and sim.world.models["a"].reason.startswith("woken")
