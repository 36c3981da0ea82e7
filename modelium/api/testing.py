"""For the tests of drivers: a contract that every driver keeps. The fakes come with it.

Importing this needs pytest and pytest-asyncio; `modelium.api.fakes` needs neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from modelium.api.driver import Parks, RuntimeDriver
from modelium.api.fakes import FakeBackend, FakeDriver, FakeProcesses, FakeRuntime, Held, load_request, silent
from modelium.api.types import Layout, LoadRequest, ObservedModel, Offer, Plan
from modelium.errors import DriverError, LoadRejected, RuntimeUnavailable

__all__ = [
    "DriverContract",
    "FakeBackend",
    "FakeDriver",
    "FakeProcesses",
    "FakeRuntime",
    "Held",
    "eventually",
    "lay_out",
    "load_request",
    "plan_of",
    "silent",
]


async def eventually(check: Callable[[], Awaitable[bool]], what: str, bound_s: float = 60) -> None:
    """Ask again and again until `check` says yes; fail with `what` after `bound_s` seconds."""
    async with asyncio.timeout(bound_s) as bound:
        try:
            while not await check():
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            if bound.expired():
                pytest.fail(f"not within {bound_s} s: {what}")
            raise


def plan_of(offer: Offer, **settings: Any) -> Plan:
    """The plan that takes the offer, on the first kind of device, with `settings` put over its own."""
    return Plan(
        brain="test",
        runtime=offer.runtime,
        serving=offer.serving,
        device_kind=offer.device_kinds[0],
        devices=offer.devices,
        settings={**offer.settings, **settings},
        memory_bytes=offer.memory_bytes,
        load_s=offer.load_s,
        reason="a test wants it",
        confidence=1,
    )


def lay_out(layout: Layout, drop: Path, folder: Path) -> None:
    """Make a model's folder of a copy of the drop, as the engine makes it of the drop itself."""
    for to, source in layout.files.items():
        origin = drop if source == "." else drop / source
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, folder / to, dirs_exist_ok=True)
        else:
            shutil.copy(origin, folder / to)
    for to, text in layout.texts.items():
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / to).write_text(text, encoding="utf-8")


@pytest.mark.asyncio
class DriverContract:
    """What the engine relies on in every driver. Subclass it as `TestX` and give it these fixtures:

    - `make_driver`: a function that makes a driver; all that it makes talk to the same runtime (the same context);
    - `good_model`, `another_model`: `LoadRequest`s of two models that load;
    - `bad_model`: one that the runtime refuses;
    - `slow_model`: one whose load takes long enough to be cancelled, a few seconds;
    - `crash`: a function that ends the runtime with all its models, as `kill -9` would.

    Fixtures must end the runtime's processes when they are done with it. A driver that is `Parks` is held to that too,
    with `good_model`.
    """

    each_alone = False
    """Each model has processes of its own: `crash` ends those of all models, and there is no runtime to lose."""
    park_level = 1

    @pytest_asyncio.fixture
    async def driver(self, make_driver: Callable[[], RuntimeDriver]) -> AsyncIterator[RuntimeDriver]:
        driver = make_driver()
        await driver.start()
        yield driver
        await driver.start()
        for model in (await driver.observe()).models:
            await driver.unload(model.name)
        await driver.close()

    async def held(self, driver: RuntimeDriver, name: str) -> ObservedModel | None:
        """The model as the runtime shows it, None when it is not there."""
        return next((m for m in (await driver.observe()).models if m.name == name), None)

    async def test_start_twice_is_one_runtime(self, driver: RuntimeDriver) -> None:
        first, second = await driver.start(), await driver.start()
        assert first.instance == second.instance
        assert second.adopted
        assert second.endpoints or self.each_alone

    async def test_load_shows_and_unload_removes(self, driver: RuntimeDriver, good_model: LoadRequest) -> None:
        outcome = await driver.load(good_model, silent)
        assert all(size > 0 for size in outcome.memory.values())
        shown = await self.held(driver, good_model.name)
        assert shown is not None and shown.ready
        assert shown.endpoints == outcome.endpoints
        assert shown.endpoints or not self.each_alone
        await driver.unload(good_model.name)
        assert await self.held(driver, good_model.name) is None

    async def test_load_twice(self, driver: RuntimeDriver, good_model: LoadRequest) -> None:
        await driver.load(good_model, silent)
        await driver.load(good_model, silent)
        shown = await self.held(driver, good_model.name)
        assert shown is not None and shown.ready

    async def test_unload_of_the_unknown_is_no_error(self, driver: RuntimeDriver) -> None:
        outcome = await driver.unload("nobody-loaded-this")
        assert not outcome.residue

    async def test_bad_model_is_rejected_with_a_reason(self, driver: RuntimeDriver, bad_model: LoadRequest) -> None:
        with pytest.raises(LoadRejected) as caught:
            await driver.load(bad_model, silent)
        assert caught.value.message
        shown = await self.held(driver, bad_model.name)
        assert shown is None or not shown.ready

    async def test_a_bad_model_leaves_the_others_alone(
        self, driver: RuntimeDriver, good_model: LoadRequest, bad_model: LoadRequest
    ) -> None:
        await driver.load(good_model, silent)
        with pytest.raises(LoadRejected):
            await driver.load(bad_model, silent)
        shown = await self.held(driver, good_model.name)
        assert shown is not None and shown.ready

    async def test_two_at_once(
        self, driver: RuntimeDriver, good_model: LoadRequest, another_model: LoadRequest
    ) -> None:
        await asyncio.gather(driver.load(good_model, silent), driver.load(another_model, silent))
        ready = {m.name for m in (await driver.observe()).models if m.ready}
        assert {good_model.name, another_model.name} <= ready
        await asyncio.gather(driver.unload(good_model.name), driver.unload(another_model.name))
        left = {m.name for m in (await driver.observe()).models}
        assert not left & {good_model.name, another_model.name}

    async def test_cancelled_load_leaves_nothing(self, driver: RuntimeDriver, slow_model: LoadRequest) -> None:
        task = asyncio.create_task(driver.load(slow_model, silent))

        async def loading() -> bool:
            return await self.held(driver, slow_model.name) is not None

        await eventually(loading, f"{slow_model.name} shows while it loads")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await self.held(driver, slow_model.name) is None

    async def test_cancelled_at_once_leaves_nothing(self, driver: RuntimeDriver, slow_model: LoadRequest) -> None:
        for turns in (0, 1, 3, 10, 30):
            task = asyncio.create_task(driver.load(slow_model, silent))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await driver.unload(slow_model.name)
            assert await self.held(driver, slow_model.name) is None

    async def test_a_new_driver_adopts(
        self, driver: RuntimeDriver, make_driver: Callable[[], RuntimeDriver], good_model: LoadRequest
    ) -> None:
        before = await driver.start()
        await driver.load(good_model, silent)
        await driver.close()
        second = make_driver()
        info = await second.start()
        assert info.adopted and info.instance == before.instance
        shown = await self.held(second, good_model.name)
        assert shown is not None and shown.ready
        await second.close()

    async def test_crash_is_told_and_a_start_is_a_new_instance(
        self, driver: RuntimeDriver, crash: Callable[[], None], good_model: LoadRequest
    ) -> None:
        before = await driver.start()
        await driver.load(good_model, silent)
        crash()
        if self.each_alone:
            await self._lost_alone(driver, good_model)
            return
        with pytest.raises(RuntimeUnavailable):
            await driver.observe()
        with pytest.raises(RuntimeUnavailable):
            await driver.load(good_model, silent)
        after = await driver.start()
        assert after.instance != before.instance and not after.adopted
        assert await self.held(driver, good_model.name) is None
        await driver.load(good_model, silent)

    async def test_crash_in_mid_request(
        self, driver: RuntimeDriver, crash: Callable[[], None], good_model: LoadRequest
    ) -> None:
        info = await driver.start()
        outcome = await driver.load(good_model, silent)
        address = next(e.address for e in (*outcome.endpoints, *info.endpoints) if e.address.startswith("http://"))
        parts = urlsplit(address)
        if (parts.hostname or "").endswith(".invalid"):
            pytest.skip("nothing listens at its address")
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"POST /v2/models/none/infer HTTP/1.1\r\nHost: runtime\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        crash()
        async with asyncio.timeout(30):  # who waits is told by the connection's end
            with contextlib.suppress(ConnectionError):
                while await reader.read(4096):
                    pass
        writer.close()
        if self.each_alone:
            await self._lost_alone(driver, good_model)
        else:
            with pytest.raises(RuntimeUnavailable):
                await driver.observe()

    async def _lost_alone(self, driver: RuntimeDriver, model: LoadRequest) -> None:
        async def lost() -> bool:
            shown = await self.held(driver, model.name)
            return shown is None or bool(shown.broken and not shown.ready and shown.reason)

        await eventually(lost, f"{model.name} is told to be lost")
        await driver.load(model, silent)
        shown = await self.held(driver, model.name)
        assert shown is not None and shown.ready and not shown.broken

    async def test_crash_in_mid_load(
        self, driver: RuntimeDriver, crash: Callable[[], None], slow_model: LoadRequest
    ) -> None:
        task = asyncio.create_task(driver.load(slow_model, silent))

        async def loading() -> bool:
            return await self.held(driver, slow_model.name) is not None

        await eventually(loading, f"{slow_model.name} shows while it loads")
        crash()
        with pytest.raises(DriverError if self.each_alone else RuntimeUnavailable):
            await task

    @pytest_asyncio.fixture
    async def parks(self, driver: RuntimeDriver) -> Parks:
        if not isinstance(driver, Parks):
            pytest.skip("its models can't be parked")
        return driver

    async def test_a_parked_model_holds_less_and_wakes(
        self, driver: RuntimeDriver, parks: Parks, good_model: LoadRequest
    ) -> None:
        loaded = await driver.load(good_model, silent)
        parked = await parks.park(good_model.name, self.park_level)
        shown = await self.held(driver, good_model.name)
        assert shown is not None and not shown.ready and not shown.broken
        assert shown.parked == self.park_level
        for device in good_model.devices:
            assert parked.memory.get(device, 0) < loaded.memory.get(device, 1)
        woken = await parks.wake(good_model.name, silent)
        shown = await self.held(driver, good_model.name)
        assert shown is not None and shown.ready and not shown.parked
        assert shown.endpoints == woken.endpoints == loaded.endpoints

    async def test_what_is_not_there_is_neither_parked_nor_woken(self, parks: Parks) -> None:
        with pytest.raises(DriverError):
            await parks.park("nobody-loaded-this", self.park_level)
        with pytest.raises(DriverError):
            await parks.wake("nobody-loaded-this", silent)

    async def test_a_parked_model_is_unloaded_like_any(
        self, driver: RuntimeDriver, parks: Parks, good_model: LoadRequest
    ) -> None:
        await driver.load(good_model, silent)
        await parks.park(good_model.name, self.park_level)
        await driver.unload(good_model.name)
        assert await self.held(driver, good_model.name) is None

    async def test_a_load_has_a_parked_model_serve(
        self, driver: RuntimeDriver, parks: Parks, good_model: LoadRequest
    ) -> None:
        await driver.load(good_model, silent)
        await parks.park(good_model.name, self.park_level)
        await driver.load(good_model, silent)
        shown = await self.held(driver, good_model.name)
        assert shown is not None and shown.ready and not shown.parked

    async def test_a_new_driver_finds_a_parked_model_asleep(
        self,
        driver: RuntimeDriver,
        parks: Parks,
        make_driver: Callable[[], RuntimeDriver],
        good_model: LoadRequest,
    ) -> None:
        await driver.load(good_model, silent)
        await parks.park(good_model.name, self.park_level)
        await driver.close()
        second = make_driver()
        await second.start()
        shown = await self.held(second, good_model.name)
        assert shown is not None and not shown.ready and shown.parked == self.park_level
        assert isinstance(second, Parks)
        await second.wake(good_model.name, silent)
        shown = await self.held(second, good_model.name)
        assert shown is not None and shown.ready
        await second.close()

    async def test_logs(self, driver: RuntimeDriver, good_model: LoadRequest) -> None:
        await driver.load(good_model, silent)
        assert len(driver.logs(None, 5)) <= 5
        assert any(good_model.name in line for line in driver.logs(good_model.name, 50))
