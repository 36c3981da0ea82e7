"""Servers that sleep, with real processes: each holds 64 MB for its weights, and lets go of them when it is told to."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from modelium.api import LoadRequest, Parks, RuntimeContext
from modelium.api.fakes import FakeSettings
from modelium.api.parking import ParkingServers
from modelium.api.servers import ModelServers, Server, ServerCommand
from modelium.api.testing import load_request, silent
from modelium.engine.processes import ProcessSupervisor
from modelium.errors import DriverError
from tests.api import test_servers as base
from tests.api.test_servers import supervisor  # noqa: F401  (a fixture)

SERVER = """
import http.server, json, os, sys, time
does = json.load(open(sys.argv[2]))
print("hello from " + sys.argv[2], flush=True)
if "ends" in does:
    print(does["says"], flush=True)
    sys.exit(does["ends"])
time.sleep(does.get("slow", 0))
weights, woken = bytearray(b"w") * (64 << 20), []

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global weights
        path, _, level = self.path.partition("?level=")
        status = does.get(path, 200)
        if status == 200 and path == "/sleep":
            weights = None
        elif status == 200 and path == "/wake_up":
            weights = bytearray(b"w") * (64 << 20)
            woken.append(int(level))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"pid": os.getpid(), "sleeps": weights is None, "woken": woken}).encode())
    def log_message(self, *_): pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Sleepy(base.Small):
    """A `ParkingKind`."""

    async def command(self, request: LoadRequest, port: int, former: DriverError | None) -> ServerCommand | None:
        return None if former else ServerCommand([sys.executable, "-c", SERVER, str(port), str(request.path)])

    async def park(self, server: Server, level: int, http: aiohttp.ClientSession) -> None:
        await self._tell(server, f"/sleep?level={level}", http)

    async def wake(self, server: Server, level: int, http: aiohttp.ClientSession) -> None:
        await self._tell(server, f"/wake_up?level={level}", http)

    async def asleep(self, server: Server, http: aiohttp.ClientSession) -> bool:
        return bool((await self._tell(server, "/is_sleeping", http))["sleeps"])

    async def _tell(self, server: Server, what: str, http: aiohttp.ClientSession) -> dict[str, Any]:
        async with http.get(server.base + what) as answer:
            if answer.status != 200:
                raise DriverError(f"{server.model} answers {answer.status} to {what}")
            return dict(await answer.json(content_type=None))


@pytest.fixture
def make_driver(tmp_path: Path, supervisor: ProcessSupervisor) -> Callable[[], ParkingServers]:  # noqa: F811
    context = RuntimeContext(
        name="sleepy",
        repository=tmp_path,
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "cache",
        settings=FakeSettings(),
        processes=supervisor,
        report=silent,
    )
    return lambda: ParkingServers(context, Sleepy())


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., LoadRequest]:
    def make(name: str, **does: Any) -> LoadRequest:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(does))
        return load_request(name, file)

    return make


@pytest.fixture
async def driver(make_driver: Callable[[], ParkingServers]) -> AsyncIterator[ParkingServers]:
    driver = make_driver()
    await driver.start()
    yield driver
    await driver.stop()
    await driver.close()


class TestContract(base.TestContract):
    @pytest.fixture
    def crash(self, supervisor: ProcessSupervisor) -> Callable[[], None]:  # noqa: F811
        def crash() -> None:
            processes = [psutil.Process(r.pid) for name in supervisor.names() if (r := supervisor.find(name))]
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=30)

        return crash


async def told(driver: ParkingServers, name: str) -> dict[str, Any]:
    server = driver._servers[name]
    async with aiohttp.ClientSession() as http, http.get(f"{server.base}/any") as answer:
        return dict(await answer.json(content_type=None))


async def test_only_servers_that_can_park_say_so(driver: ParkingServers) -> None:
    assert isinstance(driver, Parks)
    assert not isinstance(ModelServers(driver._context, base.Small()), Parks)


async def test_how_deep_it_sleeps_is_known_after_a_restart(
    driver: ParkingServers, make_driver: Callable[[], ParkingServers], model: Callable[..., LoadRequest]
) -> None:
    for name, level in (("a", 1), ("b", 2)):
        await driver.load(model(name), silent)
        await driver.park(name, level)
    before = await told(driver, "a")
    second = make_driver()
    await second.start()
    assert {m.name: m.parked for m in (await second.observe()).models} == {"a": 1, "b": 2}
    for name in ("a", "b"):
        await second.wake(name, silent)
    assert await told(second, "a") == {**before, "sleeps": False, "woken": [1]}
    assert (await told(second, "b"))["woken"] == [2]
    await second.close()


async def test_put_to_sleep_by_somebody_it_is_taken_for_the_deepest(
    driver: ParkingServers, model: Callable[..., LoadRequest]
) -> None:
    await driver.load(model("a"), silent)
    async with aiohttp.ClientSession() as http, http.get(f"{driver._servers['a'].base}/sleep"):
        pass
    shown = (await driver.observe()).models[0]
    assert (shown.ready, shown.parked) == (False, 2)
    await driver.wake("a", silent)
    assert (await told(driver, "a"))["woken"] == [2]


async def test_a_load_of_one_that_does_not_wake_starts_it_anew(
    driver: ParkingServers, model: Callable[..., LoadRequest]
) -> None:
    request = model("a", **{"/wake_up": 500})
    await driver.load(request, silent)
    before = await told(driver, "a")
    await driver.park("a", 1)
    with pytest.raises(DriverError, match="500"):
        await driver.wake("a", silent)
    assert (await driver.observe()).models[0].parked == 1
    await driver.load(request, silent)
    after = await told(driver, "a")
    assert after["pid"] != before["pid"] and not after["sleeps"]


async def test_one_whose_process_ended_is_neither_parked_nor_asleep(
    driver: ParkingServers,
    model: Callable[..., LoadRequest],
    supervisor: ProcessSupervisor,  # noqa: F811
) -> None:
    await driver.load(model("a"), silent)
    await driver.park("a", 1)
    await supervisor.stop(driver._servers["a"].record.name, grace_s=0)
    shown = (await driver.observe()).models[0]
    assert shown.broken and not shown.parked
    with pytest.raises(DriverError, match="its process has ended"):
        await driver.wake("a", silent)
    with pytest.raises(DriverError):
        await driver.park("a", 1)
