"""Models that sleep instead of being unloaded, with the engine whole: a GPU of 1.5 MB, a host of 100 MB."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelium.api import Device
from modelium.api.fakes import FakeRuntime
from modelium.core.ticking import GONE_AFTER, GONE_AFTER_S
from modelium.engine.planner import PROCESS_BYTES
from modelium.errors import DriverError
from tests.engine.harness import MB, Rig, rig

ROOM = MB * 3 // 2
"""For one model, and what a sleeper may keep of the GPU."""


@pytest.fixture
async def r(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path, budget=ROOM, standby=(1, 2), min_resident_seconds=0) as made:
        yield made


async def use(r: Rig, name: str) -> None:
    (await r.service.acquire(name)).release()


async def swapped(r: Rig) -> None:
    """`a` was used, and is parked since `b` has its room."""
    await r.add("a")
    await use(r, "a")
    await r.add("b")
    await use(r, "b")
    await r.is_("a", "STANDBY")


async def test_evicted_it_sleeps_and_a_request_wakes_it(r: Rig) -> None:
    await swapped(r)
    view = r.service.view("a")
    assert view.state == "STANDBY" and view.devices == ("cpu:0",) and view.memory_bytes == MB // 2
    assert view.reason == "asleep at level 1, wakes in about 0.1 s; evicted for b"
    assert r.runtime.models["a"].parked == 1
    lease = await r.service.acquire("a")
    assert r.state("a") == "READY" and lease.endpoints["kserve-http"] == "http://fake.invalid"
    lease.release()
    assert r.runtime.count("load", "a") == 1 and r.runtime.count("wake", "a") == 1
    await r.is_("b", "STANDBY")
    assert r.runtime.count("unload") == 0


async def test_who_comes_while_it_wakes_or_falls_asleep_is_held(r: Rig) -> None:
    await r.add("a")
    await use(r, "a")
    await r.add("b")
    held = r.runtime.hold("park", "a")
    other = asyncio.ensure_future(r.service.acquire("b"))
    await held.arrived.wait()
    assert r.state("a") == "PARKING"
    r.clock.now += 1  # who comes later waits longer
    first = asyncio.ensure_future(r.service.acquire("a"))
    waking = r.runtime.hold("wake", "a")
    held.release()
    (await other).release()
    await waking.arrived.wait()
    second = asyncio.ensure_future(r.service.acquire("a"))
    await r.until(lambda: r.service.view("a").waiting == 2)
    assert r.state("a") == "LOADING" and not first.done()
    waking.release()
    for waiter in (first, second):
        (await waiter).release()
    assert r.runtime.count("load", "a") == 1


async def test_a_wake_that_fails_is_followed_by_a_load(r: Rig) -> None:
    await swapped(r)
    r.runtime.fail("wake", DriverError("it does not open its eyes"), "a")
    (await r.service.acquire("a")).release()
    assert (r.runtime.count("wake", "a"), r.runtime.count("unload", "a"), r.runtime.count("load", "a")) == (1, 1, 2)


async def test_a_parking_that_fails_is_an_unload(r: Rig) -> None:
    await r.add("a")
    await use(r, "a")
    await r.add("b")
    r.runtime.fail("park", RuntimeError("a bug"), "a")
    await use(r, "b")
    await r.is_("a", "COLD")
    assert "a bug" in r.reason("a") and r.runtime.count("unload", "a") == 1


async def test_what_it_takes_is_measured_kept_and_judged_by(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=ROOM, standby=(1,), min_resident_seconds=0) as r:
        r.runtime.parked_memory["a"] = {"cpu:0": MB // 4, "cuda:0": 0}
        await r.add("a", size=MB - 1)
        await use(r, "a")
        await r.add("b")
        await use(r, "b")
        await use(r, "a")
        told = await r.service.explain("a")
        assert told.measured is not None and told.measured.wake_s == {1: 0.25}
    async with rig(tmp_path, budget=ROOM, standby=(1,)) as r:
        await r.is_("a", "COLD")
        expected = r.engine.loop.world.models["a"].estimate.standby[0]
        assert (expected.level, expected.host_bytes, expected.wake_s) == (1, MB // 4, 0.25)
        fresh = r.engine.loop.world.models["b"].estimate.standby[0]
        assert fresh.host_bytes == MB // 2 and fresh.device_bytes == 0


async def test_before_it_was_tried_once_it_is_a_guess(r: Rig) -> None:
    await r.add("a")
    one, two = r.engine.loop.world.models["a"].estimate.standby
    assert (one.host_bytes, two.host_bytes) == (MB + MB // 10, MB // 10) and PROCESS_BYTES > MB
    assert one.wake_s < two.wake_s < 0.5


async def test_a_restart_of_modelium_finds_it_asleep(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    async with rig(tmp_path, budget=ROOM, standby=(1,), runtime=runtime, min_resident_seconds=0) as r:
        await swapped(r)
    async with rig(tmp_path, budget=ROOM, standby=(1,), runtime=runtime, min_resident_seconds=0) as r:
        await r.is_("a", "STANDBY")
        await r.is_("b", "READY")
        assert r.reason("a").endswith("it slept already")
        await use(r, "a")
        assert r.runtime.count("load", "a") == 1


async def test_unload_and_removal_end_a_sleeper(r: Rig) -> None:
    await swapped(r)
    await r.service.unload("a")
    assert r.state("a") == "COLD" and "a" not in r.runtime.models
    await use(r, "a")
    await r.is_("b", "STANDBY")
    await r.service.remove("b")
    assert r.state("b") == "-" and "b" not in r.runtime.models


async def test_a_runtime_that_dies_takes_its_sleepers_along(r: Rig) -> None:
    await swapped(r)
    r.crash()
    await r.is_("a", "COLD")
    assert r.engine.loop.world.devices["cpu:0"].booked_bytes == 0
    assert r.engine.store.loaded.get("a") is None


async def with_a_card(r: Rig) -> None:
    """Beside the GPU that all reach another one comes, which only the runtime lists, and `a` sleeps there."""
    r.runtime.devices = (
        Device(id="fake/cuda:0", kind="cuda", name="card", total_bytes=2 * ROOM, used_bytes=0, runtime="fake"),
    )
    await r.look()
    await r.until(lambda: "fake/cuda:0" in r.engine.loop.world.devices)
    await r.add("a")
    await use(r, "a")
    assert r.service.view("a").devices == ("fake/cuda:0",)
    r.advance(10_000)
    await r.is_("a", "STANDBY")


async def the_card_goes(r: Rig) -> None:
    r.runtime.devices = ()
    await r.look()
    for _ in range(GONE_AFTER):
        await r.engine._look_at_devices()
        r.clock.now += GONE_AFTER_S


async def test_its_device_is_gone_and_a_request_is_answered_from_another(r: Rig) -> None:
    await with_a_card(r)
    unload = r.runtime.hold("unload", "a")
    await the_card_goes(r)
    await unload.arrived.wait()
    assert r.state("a") == "UNLOADING" and r.reason("a") == "fake/cuda:0 is gone"
    waiter = asyncio.ensure_future(r.service.acquire("a"))
    await r.until(lambda: r.service.view("a").waiting == 1)
    unload.release()
    (await waiter).release()
    assert r.service.view("a").devices == ("cuda:0",) and r.runtime.count("wake") == 0
    assert r.engine.loop.world.devices["cpu:0"].booked_bytes == 0


async def test_its_device_goes_while_it_wakes(r: Rig) -> None:
    await with_a_card(r)
    wake = r.runtime.hold("wake", "a")
    waiter = asyncio.ensure_future(r.service.acquire("a"))
    await wake.arrived.wait()
    await the_card_goes(r)
    (await waiter).release()
    assert wake.cancelled and r.service.view("a").devices == ("cuda:0",)
    assert (r.runtime.count("unload", "a"), r.runtime.count("load", "a")) == (1, 2)


async def test_it_is_shown(r: Rig) -> None:
    await swapped(r)
    told = await r.service.explain("a")
    assert "a request wakes it in about" in told.next and "holds 500 kB on cpu:0" in told.room
    assert r.service.status().models == {"STANDBY": 1, "READY": 1}
    counted = r.service.usage.transitions
    assert counted.parks == {"a": {"evicted": 1}} and not counted.unloads
    await use(r, "a")
    assert counted.wakes == {"a": 1} and counted.last_wake_s.keys() == {"a"}
    assert sum(counted.load_seconds.counts) == 2, "a wake is no load"


async def test_no_level_no_sleep(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=MB, min_resident_seconds=0) as r:
        await r.add("a")
        await use(r, "a")
        await r.add("b")
        await use(r, "b")
        assert r.state("a") == "COLD" and r.runtime.count("park") == 0
