"""Servers of one model each, with real processes: a small server that does what its model's file says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from modelium.api import LoadOutcome, LoadRequest, Progress, RuntimeContext
from modelium.api.external import ExternalServer
from modelium.api.fakes import FakeProcesses, FakeSettings
from modelium.api.ports import listens
from modelium.api.servers import ModelServers, Server, ServerCommand
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


async def told_where(driver: ModelServers, request: LoadRequest) -> tuple[asyncio.Task[LoadOutcome], str]:
    """A replacement that has told where it answers from now on, while the old one is still to end."""
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def tell(progress: Progress) -> None:
        if progress.endpoints:
            told.set_result(progress.endpoints[0].address)

    loading = asyncio.ensure_future(driver.load(request.model_copy(update={"replace": True}), tell))
    return loading, await told


async def test_the_old_one_serves_until_its_successor_does(
    driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    request = model("m")
    old = (await driver.load(request, silent)).endpoints[0].address
    before = await pid_of(old)
    loading, new = await told_where(driver, request)
    assert new != old and await pid_of(old) == before
    after = await pid_of(new)
    assert (await loading).endpoints[0].address == new
    assert len(driver._context.processes.names()) == 1
    again = await driver.load(request.model_copy(update={"replace": True}), silent)
    assert await pid_of(again.endpoints[0].address) not in (before, after)
    await driver.unload("m")
    assert not driver._context.processes.names()


async def test_the_old_one_ends_though_nobody_waits_for_that(
    driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    await driver.load(model("m"), silent)
    loading, new = await told_where(driver, model("m"))
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert len(driver._context.processes.names()) == 1
    assert (await driver.observe()).models[0].endpoints[0].address == new


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


async def test_how_a_server_ended_is_told_where_it_is_known(
    driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    async def told(driver: ModelServers, name: str) -> str:
        async with asyncio.timeout(20):
            while not (shown := {m.name: m for m in (await driver.observe()).models}[name]).broken:
                await asyncio.sleep(0.01)
        return shown.reason

    await driver.load(model("killed", says="so far"), silent)
    os.kill(driver._servers["killed"].record.pid, signal.SIGKILL)
    assert await told(driver, "killed") == "its process was killed by signal 9; it said last: so far"
    address = (await driver.load(model("ends", says="so far", **{"/x": "end"}), silent)).endpoints[0].address
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get(f"{address}/x")
    assert await told(driver, "ends") == "its process ended with code 3; it said last: so far"


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


async def test_given_up_while_another_starts_on_its_second_device_it_lets_go_of_the_first(
    driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    turns = driver._context.starting
    await turns["b"].acquire()
    stages: list[str] = []
    both = model("both").model_copy(update={"devices": ("a", "b")})
    task = asyncio.create_task(driver.load(both, lambda progress: stages.append(progress.stage)))
    while not turns["a"].locked():
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert stages == ["waiting for another start on b"]
    assert not turns["a"].locked()
    turns["b"].release()
    await driver.load(both, silent)
    assert not turns["a"].locked() and not turns["b"].locked()


async def test_a_start_given_up_while_its_process_begins_leaves_none(
    driver: ModelServers, model: Callable[..., LoadRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = driver._context.processes
    spawn, begun = processes.spawn, asyncio.Event()

    async def begin(*args: Any, **options: Any) -> Any:
        """As the supervisor does: it is told of giving up when the process runs."""
        record = await spawn(*args, **options)
        begun.set()
        await asyncio.sleep(60)
        return record

    monkeypatch.setattr(processes, "spawn", begin)
    task = asyncio.create_task(driver.load(model("m"), silent))
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert not processes.names()


async def test_what_could_not_be_ended_is_shown_still(
    driver: ModelServers, model: Callable[..., LoadRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    await driver.load(model("m"), silent)
    processes = driver._context.processes
    stop = processes.stop

    async def fails(name: str, *, grace_s: float = 30) -> None:
        shown = (await driver.observe()).models[0]
        assert (shown.ready, shown.reason) == (False, "ending")
        raise DriverError(f"{name}: SIGKILL did not end it")

    monkeypatch.setattr(processes, "stop", fails)
    for _ in range(2):
        with pytest.raises(DriverError, match="SIGKILL did not end it"):
            await driver.unload("m")
        assert (await driver.observe()).models[0].memory["cpu:0"] > 2**20
    monkeypatch.setattr(processes, "stop", stop)
    await driver.unload("m")
    assert not processes.names() and not (await driver.observe()).models


async def test_of_two_that_an_earlier_run_left_the_newer_is_adopted(
    make_driver: Callable[[], ModelServers],
    driver: ModelServers,
    model: Callable[..., LoadRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelium.api.servers.RETIRE_AFTER_S", 600)
    await driver.load(model("m"), silent)
    loading, new = await told_where(driver, model("m"))
    assert len(driver._context.processes.names()) == 2
    second = make_driver()
    await second.start()
    (shown,) = (await second.observe()).models
    assert shown.endpoints[0].address == new
    assert second._context.processes.names() == ["small._2.m"]
    await second.unload("m")
    assert not second._context.processes.names()
    await second.close()
    loading.cancel()
    await asyncio.wait([loading])


async def test_one_that_is_too_busy_to_answer_is_adopted(
    make_driver: Callable[[], ModelServers],
    driver: ModelServers,
    model: Callable[..., LoadRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await driver.load(model("m"), silent)
    await driver.close()
    monkeypatch.setattr("modelium.api.servers.ANSWERS_WITHIN_S", 0.2)
    pid = driver._servers["m"].record.pid
    os.kill(pid, signal.SIGSTOP)
    second = make_driver()
    await second.start()
    os.kill(pid, signal.SIGCONT)
    (shown,) = (await second.observe()).models
    assert shown.ready and second._servers["m"].record.pid == pid
    await second.close()


async def test_runtimes_of_like_names_keep_apart(
    make_driver: Callable[[], ModelServers], driver: ModelServers, model: Callable[..., LoadRequest]
) -> None:
    await driver.load(model("m"), silent)
    context = replace(driver._context, name="small-2")
    other = ModelServers(context, Small())
    await other.start()
    assert not (await other.observe()).models
    await other.load(model("m"), silent)
    await driver.start()
    await driver.unload("m")
    assert (await other.observe()).models[0].ready
    await other.stop()
    await other.close()


async def test_another_server_on_its_port_is_not_taken_for_it(
    driver: ModelServers, model: Callable[..., LoadRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await driver.load(model("m"), silent)
    port = int(first.endpoints[0].address.rpartition(":")[2])
    pid = driver._servers["m"].record.pid
    assert listens(pid, port)
    assert not listens(os.getpid(), port + 1) and not listens(2**22 + 1, port)

    monkeypatch.setattr("modelium.api.servers.given_port", lambda *_: contextlib.nullcontext(port))
    other = ModelServers(replace(driver._context, name="other"), Small())
    await other.start()
    with pytest.raises(DriverError, match="in use"):
        await other.load(model("n"), silent)
    await other.close()


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
    for endpoint, told in (
        ("http://127.0.0.1:9", "no vLLM answers at .*: Connection refused$"),
        (f"{url}/other", "answers 404"),
    ):
        driver = external(tmp_path, endpoint)
        with pytest.raises(RuntimeUnavailable, match=told):
            await driver.start()
        await driver.close()
