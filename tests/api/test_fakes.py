"""The fake driver keeps the contract that real ones keep, and its script does what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from modelium.api.driver import RuntimeBackend, RuntimeDriver
from modelium.api.testing import (
    DriverContract,
    FakeBackend,
    FakeDriver,
    FakeProcesses,
    FakeRuntime,
    load_request,
    silent,
)
from modelium.api.types import LoadRequest, Progress
from modelium.errors import LoadRejected, RuntimeUnavailable


class TestFakeDriverKeepsTheContract(DriverContract):
    @pytest.fixture
    def runtime(self) -> FakeRuntime:
        return FakeRuntime()

    @pytest.fixture
    def make_driver(self, runtime: FakeRuntime) -> Callable[[], RuntimeDriver]:
        return lambda: FakeDriver(runtime)

    @pytest.fixture
    def good_model(self) -> LoadRequest:
        return load_request("good")

    @pytest.fixture
    def another_model(self) -> LoadRequest:
        return load_request("another")

    @pytest.fixture
    def bad_model(self, runtime: FakeRuntime) -> LoadRequest:
        runtime.fail("load", LoadRejected("bad is bad"), "bad")
        return load_request("bad")

    @pytest.fixture
    def slow_model(self, runtime: FakeRuntime) -> LoadRequest:
        runtime.hold("load", "slow")
        return load_request("slow")

    @pytest.fixture
    def crash(self, runtime: FakeRuntime) -> Callable[[], None]:
        return runtime.crash


@pytest.mark.asyncio
async def test_a_held_load_ends_when_released() -> None:
    driver = FakeDriver()
    held = driver.runtime.hold("load", "m")
    await driver.start()
    told: list[Progress] = []
    load = asyncio.create_task(driver.load(load_request("m", memory_bytes=7), told.append))
    await held.arrived.wait()
    held.report(Progress(stage="reading", done=1, total=2))
    assert not load.done() and told[0].stage == "reading"
    held.release()
    assert (await load).memory == {"cpu:0": 7}
    assert driver.runtime.models["m"].ready


@pytest.mark.asyncio
async def test_lost_contact_fails_calls_and_keeps_models() -> None:
    driver = FakeDriver()
    rt = driver.runtime
    await driver.start()
    await driver.load(load_request("m"), silent)
    held = rt.hold("observe")
    observe = asyncio.create_task(driver.observe())
    await held.arrived.wait()
    rt.lose_contact()
    with pytest.raises(RuntimeUnavailable):
        await observe
    with pytest.raises(RuntimeUnavailable):
        await driver.start()
    rt.regain_contact()
    assert [m.name for m in (await driver.observe()).models] == ["m"]
    assert rt.starts == 1


@pytest.mark.asyncio
async def test_two_operations_on_one_model_are_a_broken_contract() -> None:
    driver = FakeDriver()
    held = driver.runtime.hold("load", "m")
    await driver.start()
    load = asyncio.create_task(driver.load(load_request("m"), silent))
    await held.arrived.wait()
    with pytest.raises(AssertionError, match="while loading"):
        await driver.unload("m")
    held.release()
    await load
    await driver.unload("m")
    assert driver.runtime.count("unload", "m") == 1


@pytest.mark.asyncio
async def test_fake_processes_forget_what_died() -> None:
    processes = FakeProcesses()
    record = await processes.spawn("a", ["true"], facts={"port": 1})
    assert processes.find("a") == record and record.facts == {"port": 1}
    processes.die("a")
    assert processes.find("a") is None
    await processes.stop("a")
    assert processes.stopped == ["a"]


def test_the_fake_backend_is_a_backend() -> None:
    assert isinstance(FakeBackend(), RuntimeBackend)
    assert isinstance(FakeDriver(), RuntimeDriver)
