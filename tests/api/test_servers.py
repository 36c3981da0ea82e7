"""Servers of one model each, with real processes: a small server that does what its model's file says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from modelium.api import LoadRequest, Progress, RuntimeContext
from modelium.api.fakes import FakeProcesses, FakeSettings
from modelium.api.servers import ExternalServer, ModelServers, Server, ServerCommand
from modelium.api.testing import DriverContract, load_request, silent
from modelium.engine.processes import ProcessSupervisor
from modelium.errors import DriverError, LoadRejected, RuntimeUnavailable

SERVER = """
import http.server, json, os, subprocess, sys, time
does = json.load(open(sys.argv[2]))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(does.get("says", "hello from " + sys.argv[2]), flush=True)
if "ends" in does:
    sys.exit(does["ends"])
open(does.get("seen", os.devnull), "a").write("up\\n")
time.sleep(does.get("slow", 0))
open(does.get("seen", os.devnull), "a").write("serves\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = does.get(self.path, 200)
        if status == "end":
            os._exit(3)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"pid": os.getpid()}).encode())
    def log_message(self, *_): pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Small:
    """A `ServerKind`: what its model's file says, it does."""

    protocol = "kserve-http"
    health = "/health"

    def __init__(self) -> None:
        self.asked: list[DriverError | None] = []

    async def prepare(self) -> tuple[str, Mapping[str, Any]]:
        return "1.0", {"language": "python"}

    async def command(self, request: LoadRequest, port: int, former: DriverError | None) -> ServerCommand | None:
        self.asked.append(former)
        file = request.path
        if former is not None:
            file = file.with_suffix(".second")
            if not file.exists():
                return None
        argv = [sys.executable, "-c", SERVER, str(port), str(file)]
        return ServerCommand(argv, exclusive=request.devices, note="with less" if former else "")

    def progress(self, lines: Sequence[str]) -> Progress | None:
        return Progress(stage=lines[-1]) if lines else None

    def settled(self, lines: Sequence[str]) -> bool:
        return any("settled" in line for line in lines)

    def failure(self, request: LoadRequest, lines: Sequence[str]) -> DriverError:
        if any(line.startswith("bad") for line in lines):
            return LoadRejected(f"{request.name}: {lines[-1]}")
        return DriverError(f"{request.name}: its process has ended: {lines[-1] if lines else ''}", code="process_died")

    async def check(self, server: Server, request: LoadRequest, http: aiohttp.ClientSession) -> None:
        try:
            async with http.get(f"{server.base}/first") as answer:
                if answer.status != 200:
                    raise DriverError(f"{request.name} has no first answer")
        except aiohttp.ClientError as error:
            raise DriverError(f"{request.name} broke off its first answer: {error}") from error


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[ProcessSupervisor]:
    processes = ProcessSupervisor(tmp_path, state_dir=tmp_path / "processes", log_dir=tmp_path / "logs")
    yield processes
    for name in processes.names():
        await processes.stop(name, grace_s=0)


@pytest.fixture
def make_driver(tmp_path: Path, supervisor: ProcessSupervisor) -> Callable[[], ModelServers]:
    context = RuntimeContext(
        name="small",
        repository=tmp_path,
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "cache",
        settings=FakeSettings(),
        processes=supervisor,
        report=silent,
    )
    return lambda: ModelServers(context, Small())


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., LoadRequest]:
    def make(name: str, **does: Any) -> LoadRequest:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(does))
        return load_request(name, file)

    return make


@pytest.fixture
async def driver(make_driver: Callable[[], ModelServers]) -> AsyncIterator[ModelServers]:
    driver = make_driver()
    await driver.start()
    yield driver
    await driver.stop()
    await driver.close()


class TestContract(DriverContract):
    each_alone = True

    @pytest.fixture
    def good_model(self, model: Callable[..., LoadRequest]) -> LoadRequest:
        return model("good")

    @pytest.fixture
    def another_model(self, model: Callable[..., LoadRequest]) -> LoadRequest:
        return model("another")

    @pytest.fixture
    def bad_model(self, model: Callable[..., LoadRequest]) -> LoadRequest:
        return model("bad", ends=1, says="bad weights")

    @pytest.fixture
    def slow_model(self, model: Callable[..., LoadRequest]) -> LoadRequest:
        return model("slow", slow=5)

    @pytest.fixture
    def crash(self, supervisor: ProcessSupervisor) -> Callable[[], None]:
        def crash() -> None:
            for name in supervisor.names():
                record = supervisor.find(name)
                if record is not None:
                    os.killpg(record.pid, signal.SIGKILL)

        return crash


async def pid_of(endpoint: str) -> int:
    async with aiohttp.ClientSession() as http, http.get(f"{endpoint}/any") as answer:
        return int((await answer.json(content_type=None))["pid"])


async def test_each_model_answers_at_its_own_address(driver: ModelServers, model: Callable[..., LoadRequest]) -> None:
    first, second = await asyncio.gather(driver.load(model("a"), silent), driver.load(model("b"), silent))
    addresses = {first.endpoints[0].address, second.endpoints[0].address}
    assert len(addresses) == 2
    assert {await pid_of(address) for address in addresses} == {s.record.pid for s in driver._servers.values()}
    assert first.memory["cpu:0"] > 2**20


async def test_one_start_at_a_time_on_a_device_until_it_has_settled(
    driver: ModelServers, model: Callable[..., LoadRequest], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    await asyncio.gather(*(driver.load(model(name, slow=0.4, seen=str(seen)), silent) for name in ("a", "b", "c")))
    assert seen.read_text().split() == ["up", "serves"] * 3
    seen.unlink()
    await asyncio.gather(*(driver.load(model(n, slow=3, seen=str(seen), says="settled"), silent) for n in ("d", "e")))
    assert seen.read_text().split() == ["up", "up", "serves", "serves"]


async def test_a_failed_start_is_tried_once_more_where_that_may_help(
    driver: ModelServers, model: Callable[..., LoadRequest], tmp_path: Path
) -> None:
    request = model("large", ends=1, says="out of memory")
    with pytest.raises(DriverError, match="out of memory"):
        await driver.load(request, silent)
    (tmp_path / "large.second").write_text("{}")
    outcome = await driver.load(request, silent)
    assert outcome.note == "with less"
    assert await pid_of(outcome.endpoints[0].address)


async def test_one_that_is_up_and_dies_of_its_first_question_is_told_by_its_log(
    driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    with pytest.raises(LoadRejected, match="bad: no such kernel"):
        await driver.load(model("sudden", says="bad: no such kernel", **{"/first": "end"}), silent)


async def test_the_old_one_serves_until_its_successor_does(
    driver: ModelServers, model: Callable[..., LoadRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelium.api.servers.RETIRE_AFTER_S", 0.5)
    request = model("m")
    old = await driver.load(request, silent)
    before = await pid_of(old.endpoints[0].address)
    new = await driver.load(request.model_copy(update={"replace": True}), silent)
    assert new.endpoints != old.endpoints
    assert await pid_of(old.endpoints[0].address) == before
    after = await pid_of(new.endpoints[0].address)
    again = await driver.load(request.model_copy(update={"replace": True}), silent)
    assert await pid_of(again.endpoints[0].address) not in (before, after)
    await driver.unload("m")
    assert not driver._context.processes.names()


async def test_a_server_that_no_longer_answers_is_broken(
    driver: ModelServers, model: Callable[..., LoadRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelium.api.servers.ANSWERS_WITHIN_S", 0.2)
    await driver.close()
    await driver.start()
    await driver.load(model("m"), silent)
    record = driver._servers["m"].record
    os.kill(record.pid, signal.SIGSTOP)
    ready = [(await driver.observe()).models[0].ready for _ in range(5)]
    assert ready == [True] * 4 + [False]
    shown = (await driver.observe()).models[0]
    assert shown.broken and "does not answer" in shown.reason
    os.kill(record.pid, signal.SIGCONT)
    await driver.load(model("m"), silent)
    assert (await driver.observe()).models[0].ready


async def test_what_an_earlier_run_left_starting_is_ended(
    make_driver: Callable[[], ModelServers], driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    task = asyncio.create_task(driver.load(model("slow", slow=600), silent))
    while not driver._loading:
        await asyncio.sleep(0.01)
    second = make_driver()
    await second.start()
    assert not (await second.observe()).models
    with pytest.raises(DriverError):
        await task
    await second.close()


# --------------------------------------------------------------------------- somebody else's


@pytest.fixture
async def openai_server() -> AsyncIterator[tuple[str, list[str]]]:
    """Its URL, and the names of what it serves, which a test may change."""
    names = ["llm"]

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.get("/version", version)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", names
    await runner.cleanup()


def external(tmp_path: Path, endpoint: str) -> ExternalServer:
    context = RuntimeContext(
        name="box",
        repository=tmp_path,
        state_dir=tmp_path,
        cache_dir=tmp_path,
        settings=FakeSettings(),
        processes=FakeProcesses(),
        report=silent,
    )
    return ExternalServer(context, endpoint, name="vLLM")


async def test_an_external_server_shows_what_it_serves(tmp_path: Path, openai_server: tuple[str, list[str]]) -> None:
    url, names = openai_server
    driver = external(tmp_path, f"{url}/v1/")
    info = await driver.start()
    assert (info.name, info.version, info.external) == ("box", "0.32.0", True)
    (shown,) = (await driver.observe()).models
    assert (shown.name, shown.ready, shown.endpoints[0].address) == ("llm", True, url)
    assert (await driver.load(load_request("llm"), silent)).endpoints == shown.endpoints
    with pytest.raises(LoadRejected, match="does not serve other"):
        await driver.load(load_request("other"), silent)
    with pytest.raises(DriverError, match="not ours to unload"):
        await driver.unload("llm")
    names.clear()
    assert not (await driver.observe()).models
    await driver.unload("llm")
    await driver.close()


async def test_an_external_server_that_is_not_there_or_is_none(
    tmp_path: Path, openai_server: tuple[str, list[str]]
) -> None:
    url, _ = openai_server
    for endpoint, told in (("http://127.0.0.1:9", "no vLLM answers at"), (f"{url}/other", "answers 404")):
        driver = external(tmp_path, endpoint)
        with pytest.raises(RuntimeUnavailable, match=told):
            await driver.start()
        await driver.close()
