"""The service's own routes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from modelium.errors import NeverFits
from modelium.http.app import build_app, serving
from modelium.http.settings import HttpSettings
from tests.http.conftest import Surface
from tests.http.fakes import FakeService
from tests.http.test_kserve import ask
from tests.http.upstreams import Recorder


async def test_models(surface: Surface, upstream: Recorder) -> None:
    surface.service.add("cold", "COLD")
    surface.service.add("incoming/x.onnx", "INVALID")
    status, found, _ = await ask(surface, "GET", "/models")
    assert (status, [model["name"] for model in found]) == (200, ["cold", "incoming/x.onnx", "m"])
    assert found[2]["state"] == "READY"
    assert [m["name"] for m in (await ask(surface, "GET", "/models?state=cold"))[1]] == ["cold"]
    assert (await ask(surface, "GET", "/models?state=clod"))[0] == 400
    status, found, _ = await ask(surface, "GET", "/models/m")
    assert (status, found["path"]) == (200, "/root/repository/m")
    for path in ("/models/incoming/x.onnx", "/models/incoming%2Fx.onnx"):
        assert (await ask(surface, "GET", path))[1]["state"] == "INVALID"
    assert (await ask(surface, "GET", "/models/m/explain"))[1]["next"] == "a request loads it"


async def test_many_models_are_listed_without_holding_up_others(surface: Surface) -> None:
    for number in range(2000):
        surface.service.add(f"m{number:04}", "COLD")
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    view, at = surface.service.view, list[int]()
    surface.service.view = lambda name: (at.append(turns), view(name))[1]  # type: ignore[method-assign,func-returns-value]
    _, found, _ = await ask(surface, "GET", "/models")
    task.cancel()
    assert len(found) == 2000
    assert max(at.count(turn) for turn in set(at)) <= 50


async def test_errors_are_in_our_own_shape(surface: Surface, upstream: Recorder) -> None:
    for method, path in [("GET", "/models/x"), ("POST", "/models/x/load"), ("DELETE", "/models/x"),
                         ("GET", "/models/x/explain"), ("GET", "/models/x/logs")]:  # fmt: skip
        status, answer, _ = await ask(surface, method, path)
        assert (status, answer) == (404, {"error": {"code": "model_not_found", "message": "there is no model named x"}})
    surface.service.failures["m"] = NeverFits("needs 3 of 2", needs=3, limit=2)
    status, answer, _ = await ask(surface, "POST", "/models/m/load")
    assert (status, answer["error"]) == (507, {"code": "never_fits", "message": "needs 3 of 2", "needs": 3, "limit": 2})
    status, answer, _ = await ask(surface, "GET", "/nothing")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    status, answer, headers = await ask(surface, "PUT", "/models/m")
    assert (status, answer["error"]["code"], headers["Allow"]) == (405, "method_not_allowed", "DELETE, GET, HEAD")


async def test_orders(surface: Surface, upstream: Recorder) -> None:
    service = surface.service
    status, answer, _ = await ask(surface, "POST", "/models/m/unload")
    assert (status, answer["state"]) == (200, "COLD")
    status, answer, _ = await ask(surface, "POST", "/models/m/load", headers={"x-modelium-deadline-s": "5"})
    assert (status, answer["state"]) == (200, "READY")
    assert service.calls == [("unload", "m"), ("load", "m", 5.0, {})]
    assert (await ask(surface, "POST", "/models/m/pin"))[1] == {"name": "m", "pinned": True}
    assert service.pinned == {"m"}
    assert (await ask(surface, "DELETE", "/models/m"))[0] == 409
    assert (await ask(surface, "POST", "/models/m/unpin"))[1] == {"name": "m", "pinned": False}
    status, answer, _ = await ask(surface, "DELETE", "/models/m")
    assert (status, answer) == (200, {"name": "m", "moved_to": "/root/.modelium/trash/m"})
    assert service.names() == []


async def test_a_removal_goes_on_when_the_client_leaves(surface: Surface, upstream: Recorder) -> None:
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    remove = surface.service.remove

    async def slow(name: str) -> Any:
        begun.set()
        await go_on.wait()
        try:
            return await remove(name)
        finally:
            done.set()

    surface.service.remove = slow  # type: ignore[method-assign]
    asking = asyncio.create_task(surface.client.delete(f"{surface.url}/models/m").__aenter__())
    await begun.wait()
    asking.cancel()
    async with surface.client.get(f"{surface.url}/livez"):
        go_on.set()
    await asyncio.wait_for(done.wait(), 10)
    assert surface.service.names() == []


async def test_logs(surface: Surface, upstream: Recorder) -> None:
    async with surface.client.get(f"{surface.url}/models/m/logs?lines=2") as response:
        assert await response.text() == "m line 0\nm line 1\n"
        assert response.content_type == "text/plain"
    async with surface.client.get(f"{surface.url}/models/triton/logs") as response:
        assert len((await response.text()).splitlines()) == 200
    for wrong in ("0", "x", "-1", "10001"):
        assert (await ask(surface, "GET", f"/models/m/logs?lines={wrong}"))[0] == 400


async def test_plan(surface: Surface) -> None:
    status, answer, _ = await ask(surface, "POST", "/plan", data=b'{"path": "/tmp/x.onnx"}')
    assert (status, answer["name"], answer["plan"]["reason"]) == (200, "x.onnx", "it is one already")
    status, answer, _ = await ask(surface, "POST", "/plan", data=b'{"path": "/tmp/x.onnx", "name": "y"}')
    assert (status, answer["name"]) == (200, "y")
    for wrong in (b"", b'{"path": "x.onnx"}', b'{"path": 1}', b"x", b'{"path": "/x", "name": 1}'):
        assert (await ask(surface, "POST", "/plan", data=wrong))[0] == 400


async def test_the_service_shows_itself(surface: Surface, upstream: Recorder) -> None:
    service = surface.service
    service.add("sick", "FAILED")
    assert (await ask(surface, "GET", "/status"))[1]["devices"][0]["booked_bytes"] == 30
    assert (await ask(surface, "GET", "/plugins"))[1][0]["name"] == "bad"
    status, answer, _ = await ask(surface, "GET", "/health")
    assert (status, answer["status"], answer["ready"]) == (200, "degraded", True)
    assert answer["wrong"] == ["plugin bad is left out: it broke", "models FAILED: 1"]
    status, answer, _ = await ask(surface, "GET", "/check")
    assert (status, answer["ok"], [check["name"] for check in answer["checks"]]) == (200, False, ["repository", "gpu"])
    status, answer, _ = await ask(surface, "GET", "/")
    assert (status, answer["name"]) == (200, "modelium")
    for route in answer["routes"]:  # what is promised is there
        method, path = route.split(" ")
        path = path.replace("{model}", "m").replace("{name}", "m")
        if path not in ("/events", "/metrics"):
            body = b'{"path": "/x"}' if path == "/plan" else None
            async with surface.client.request(method, surface.url + path, data=body) as response:
                assert response.status not in (404, 405) or method == "DELETE", route
    async with surface.client.get(f"{surface.url}/readyz") as response:
        assert response.status == 200
    service.is_ready = False
    async with surface.client.get(f"{surface.url}/readyz") as response:
        assert response.status == 503
    async with surface.client.head(f"{surface.url}/livez") as response:
        assert response.status == 200


async def test_decisions(surface: Surface) -> None:
    for number in range(5):
        surface.service.tell("m" if number % 2 else "n", "COLD", "QUEUED", f"reason {number}")
    _, found, _ = await ask(surface, "GET", "/decisions")
    assert [d["reason"] for d in found] == [f"reason {n}" for n in range(5)]
    _, found, _ = await ask(surface, "GET", "/decisions?subject=m&limit=1")
    assert [d["reason"] for d in found] == ["reason 3"]


async def next_event(response: Any) -> dict[str, str]:
    """The next event that is no heartbeat."""
    while True:
        event: dict[str, str] = {}
        while line := (await response.content.readline()).decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            event[name] = value
        if set(event) - {""}:
            return event


async def test_events_as_they_happen(surface: Surface) -> None:
    async with surface.client.get(f"{surface.url}/events") as response:
        assert response.content_type == "text/event-stream"
        assert await response.content.readline() == b": connected\n"
        await response.content.readline()
        surface.service.tell("m", "COLD", "QUEUED", "asked for\nby somebody")
        event = await asyncio.wait_for(next_event(response), 10)
        assert (event["id"], event["event"]) == ("1", "transition")
        assert json.loads(event["data"])["data"]["reason"] == "asked for\nby somebody"
        assert await response.content.readline() == b": still here\n"


async def test_who_reads_too_slowly_is_told_what_is_missing(surface: Surface) -> None:
    async with surface.client.get(f"{surface.url}/events") as response:
        await response.content.readline()
        for number in range(1500):
            surface.service.tell("m", "COLD", "QUEUED", str(number))
        event = await asyncio.wait_for(next_event(response), 10)
        if event["id"] == "1":  # already on its way when the rest came
            event = await asyncio.wait_for(next_event(response), 10)
            assert event["event"] == "missed"
            assert int(json.loads(event["data"])["events"]) == 499
        else:
            assert event["id"] == "501"


async def test_open_feeds_do_not_hold_up_the_end(surface: Surface) -> None:
    response = await surface.client.get(f"{surface.url}/events")
    assert response.status == 200  # the fixture's end would take long if it held


@pytest.mark.parametrize("wanted", [False, True])
async def test_an_access_log_where_it_is_wanted(
    service: FakeService, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    caplog.set_level("INFO", "modelium.access")
    app = build_app(service, HttpSettings(access_log=wanted))  # type: ignore[arg-type]
    async with (
        serving(app, "127.0.0.1", 0, grace_s=0.1) as (host, port),
        aiohttp.ClientSession() as client,
        client.get(f"http://{host}:{port}/livez?x=1") as response,
    ):
        assert await response.text() == "ok\n"
    assert any('"GET /livez?x=1 HTTP/1.1" 200' in line for line in caplog.messages) is wanted
