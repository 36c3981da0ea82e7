"""Sleep and waking. vLLM sleeps on GPUs alone: here a small server has its routes, and gives memory back."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from modelium_plugin_vllm.kind import VllmKind
from modelium_plugin_vllm.settings import VllmSettings
from modelium_plugin_vllm.sleeping import SleepingServers
from vllm_lab import Lab

from modelium.api import LoadRequest, Progress
from modelium.api.servers import ServerCommand
from modelium.api.testing import DriverContract, load_request, silent
from modelium.errors import DriverError, LoadRejected

SERVER = """
import http.server, json, sys, time, urllib.parse
does = json.load(open(sys.argv[2]))
print("hello from", sys.argv[2], flush=True)
if does.get("bad"):
    sys.exit("ValueError: Model architectures ['X'] are not supported for now.")
time.sleep(does.get("slow", 0))
weights = bytearray(b"x") * (64 * 2**20)
asleep = False

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global weights, asleep
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        print(self.path, body, flush=True)
        path, query = urllib.parse.urlsplit(self.path)[2:4]
        if does.get("deaf") == path:
            return self.say(500, {})
        if path == "/sleep":
            asleep, weights = not does.get("sleepless"), b""
        elif path == "/wake_up" and "weights" not in query:
            asleep, weights = False, bytearray(b"x") * (64 * 2**20)
        elif path == "/v1/completions" and (asleep or does.get("embeds")):
            return self.say(404, {})
        self.say(200, {})

    def do_GET(self):
        if json.load(open(sys.argv[2])).get("deaf") == self.path:
            time.sleep(600)
        self.say(200, {"is_sleeping": asleep} if self.path == "/is_sleeping" else {})

    def say(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_): pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Small(VllmKind):
    async def prepare(self) -> tuple[str, dict[str, object]]:
        return "1.0", {"installed": True}

    async def command(self, request: LoadRequest, port: int, former: DriverError | None) -> ServerCommand | None:
        return ServerCommand([sys.executable, "-c", SERVER, str(port), str(request.path)]) if former is None else None


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    await lab.end()


@pytest.fixture
def make_driver(lab: Lab) -> Callable[[], SleepingServers]:
    settings = VllmSettings()
    return lambda: SleepingServers(lab.context, Small(lab.context, settings), base_port=0, load_timeout_s=60)


@pytest.fixture
async def driver(make_driver: Callable[[], SleepingServers]) -> AsyncIterator[SleepingServers]:
    driver = make_driver()
    await driver.start()
    yield driver
    await driver.stop()
    await driver.close()


def model(folder: Path, name: str, **does: object) -> LoadRequest:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(does))
    return load_request(name, file)


class TestContract(DriverContract):
    each_alone = True

    @pytest.fixture
    def make_driver(self, make_driver: Callable[[], SleepingServers]) -> Callable[[], SleepingServers]:
        return make_driver

    @pytest.fixture
    def good_model(self, tmp_path: Path) -> LoadRequest:
        return model(tmp_path, "good")

    @pytest.fixture
    def another_model(self, tmp_path: Path) -> LoadRequest:
        return model(tmp_path, "another", embeds=True)

    @pytest.fixture
    def bad_model(self, tmp_path: Path) -> LoadRequest:
        return model(tmp_path, "bad", bad=True)

    @pytest.fixture
    def slow_model(self, tmp_path: Path) -> LoadRequest:
        return model(tmp_path, "slow", slow=5)

    @pytest.fixture
    def crash(self, lab: Lab) -> Callable[[], None]:
        return lab.crash


def asked(driver: SleepingServers, name: str) -> list[str]:
    return [line for line in driver.logs(name, 50) if line.startswith("/")]


async def test_what_each_level_asks_of_vllm(driver: SleepingServers, tmp_path: Path) -> None:
    for level in (1, 2):
        await driver.load(model(tmp_path, "m"), silent)
        await driver.park("m", level)
        await driver.wake("m", silent)
    first = '/v1/completions {"model": "m", "prompt": "Hello", "max_tokens": 1, "temperature": 0}'
    assert asked(driver, "m") == [
        first,
        "/sleep?level=1&mode=wait ",
        "/wake_up ",
        first,
        "/sleep?level=2&mode=wait ",
        "/wake_up?tags=weights ",
        '/collective_rpc {"method": "reload_weights"}',
        "/wake_up?tags=kv_cache ",
        first,
    ]


async def test_a_level_that_nobody_wrote_down_is_taken_for_the_deepest(
    driver: SleepingServers, make_driver: Callable[[], SleepingServers], tmp_path: Path, lab: Lab
) -> None:
    await driver.load(model(tmp_path, "m"), silent)
    await driver.park("m", 1)
    (lab.context.state_dir / "asleep.json").write_text("[")
    second = make_driver()
    await second.start()
    assert (await second.observe()).models[0].parked == 2
    await second.wake("m", silent)
    assert "/collective_rpc" in " ".join(asked(second, "m"))
    await second.close()


async def test_a_server_that_does_not_answer_is_taken_as_it_was_written_down(
    driver: SleepingServers,
    make_driver: Callable[[], SleepingServers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelium_plugin_vllm.sleeping.ANSWERS_WITHIN_S", 0.5)
    for name in ("parked", "awake", "also-parked"):
        await driver.load(model(tmp_path, name), silent)
    for name in ("parked", "also-parked"):
        await driver.park(name, 1)
    for name in ("parked", "awake"):
        model(tmp_path, name, deaf="/is_sleeping")
    second = make_driver()
    await second.start()
    assert {m.name: (m.ready, m.parked) for m in (await second.observe()).models} == {
        "parked": (False, 1), "awake": (True, 0), "also-parked": (False, 1),
    }  # fmt: skip
    model(tmp_path, "parked")
    await second.wake("parked", silent)
    assert asked(second, "parked")[-2] == "/wake_up "
    await second.close()


async def test_what_does_not_fall_asleep_or_wake_says_so(driver: SleepingServers, tmp_path: Path) -> None:
    await driver.load(model(tmp_path, "sleepless", sleepless=True), silent)
    with pytest.raises(DriverError, match="no sleep mode on this device"):
        await driver.park("sleepless", 1)
    assert (await driver.observe()).models[0].ready
    request = model(tmp_path, "deaf", deaf="/wake_up")
    await driver.load(request, silent)
    await driver.park("deaf", 1)
    with pytest.raises(DriverError, match="can't be put to sleep"):
        await driver.park("deaf", 1)
    with pytest.raises(DriverError, match="answers /wake_up with 500"):
        await driver.wake("deaf", silent)
    before = driver._servers["deaf"].record.pid
    await driver.load(request, silent)
    assert driver._servers["deaf"].record.pid != before, "started anew"
    assert all(m.ready for m in (await driver.observe()).models)


async def test_the_same_words_mean_the_same_errors(driver: SleepingServers, tmp_path: Path) -> None:
    with pytest.raises(LoadRejected, match="does not know the architecture"):
        await driver.load(model(tmp_path, "bad", bad=True), silent)


def test_it_is_chosen_by_the_settings(lab: Lab, tmp_path: Path) -> None:
    assert not isinstance(lab.driver(), SleepingServers)
    assert isinstance(Lab(tmp_path / "other", default_settings={"sleep": True}).driver(), SleepingServers)


async def test_of_two_that_fall_asleep_together_both_are_written_down(driver: SleepingServers, tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(4)]
    for name in names:
        await driver.load(model(tmp_path, name), silent)
    await asyncio.gather(*(driver.park(name, 1) for name in names))
    assert driver._read() == dict.fromkeys(names, 1)
    await asyncio.gather(*(driver.wake(name, silent) for name in names))
    assert driver._read() == {}


async def test_what_is_replaced_is_counted_until_it_has_ended(driver: SleepingServers, tmp_path: Path) -> None:
    request = model(tmp_path, "m")
    await driver.load(request, silent)
    alone = (await driver.observe()).models[0]
    told: list[Progress] = []
    both: list[int] = []

    async def look() -> None:
        while not any(progress.endpoints for progress in told):
            await asyncio.sleep(0.01)
        both.append((await driver.observe()).models[0].memory["cpu:0"])

    looking = asyncio.ensure_future(look())
    outcome = await driver.load(request.model_copy(update={"replace": True}), told.append)
    await looking
    (now,) = (await driver.observe()).models
    assert both[0] > 1.5 * now.memory["cpu:0"]
    assert now.endpoints == outcome.endpoints != alone.endpoints
    assert told[-1].endpoints == outcome.endpoints
