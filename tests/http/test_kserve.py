"""KServe's and Triton's routes, where Modelium answers them itself or decides what happens first."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

import modelium
from modelium.errors import (
    DriverError,
    LoadRejected,
    ModelFailed,
    ModeliumError,
    ModelNotFound,
    NeverFits,
    QueueFull,
    RuntimeUnavailable,
)
from modelium.http.answers import BadRequest
from modelium.http.messages import InferResponse
from modelium.http.streams import join
from modelium.http.tensors import TensorValue, join_bytes
from tests.http.conftest import Surface
from tests.http.upstreams import Recorder, recording

BOUND = [  # all that needs the model loaded
    ("POST", "/v2/models/m/infer"),
    ("POST", "/v2/models/m/versions/3/infer"),
    ("POST", "/v2/models/m/generate"),
    ("POST", "/v2/models/m/generate_stream"),
    ("POST", "/v2/models/m/versions/3/generate"),
    ("POST", "/v2/models/m/versions/3/generate_stream"),
    ("GET", "/v2/models/m"),
    ("GET", "/v2/models/m/versions/3"),
    ("GET", "/v2/models/m/config"),
    ("GET", "/v2/models/m/versions/3/config"),
]


async def ask(surface: Surface, method: str, path: str, **how: Any) -> tuple[int, Any, Any]:
    how.setdefault("skip_auto_headers", ["Accept-Encoding"])
    async with surface.client.request(method, surface.url + path, **how) as response:
        body = await response.read()
        return response.status, json.loads(body) if body else None, response.headers


@pytest.mark.parametrize(("method", "path"), BOUND)
async def test_a_request_for_a_cold_model_waits_for_its_load(
    surface: Surface, upstream: Recorder, method: str, path: str
) -> None:
    service = surface.service
    service.put("m", "COLD")
    headers = {
        "x-modelium-deadline-s": "12.5", "x-modelium-priority": "3", "x-modelium-organisation": "team"
    }  # fmt: skip
    asking = [
        asyncio.create_task(surface.client.request(method, surface.url + path, headers=headers).__aenter__())
        for _ in range(5)
    ]
    while service.waiting("m") < 5:
        await asyncio.sleep(0.01)
    assert upstream.seen == []
    service.put("m", "READY")
    assert [response.status for response in await asyncio.gather(*asking)] == [200] * 5
    assert service.calls == [("acquire", "m", 12.5, 3, "team")] * 5
    assert [seen.target for seen in upstream.seen] == [path] * 5
    assert (service.usage.model("m").in_flight, service.usage.model("m").requests) == (0, 5)


@pytest.mark.parametrize(
    ("headers", "called"),
    [
        ({}, (None, 0, "")),
        ({"x-modelium-deadline-s": "1e9"}, (3600.0, 0, "")),
        ({"x-modelium-deadline-s": "0.001", "x-modelium-priority": "-99"}, (0.001, -10, "")),
        ({"x-modelium-priority": "99", "x-modelium-organisation": "é"}, (None, 10, "é")),
        ({"x-modelium-deadline-s": "soon"}, "x-modelium-deadline-s to be a number of seconds"),
        ({"x-modelium-deadline-s": "-1"}, "found '-1'"),
        ({"x-modelium-deadline-s": "nan"}, "found 'nan'"),
        ({"x-modelium-priority": "high"}, "x-modelium-priority to be a whole number"),
        ({"x-modelium-organisation": "x" * 65}, "at most 64 printable characters"),
    ],
)
async def test_what_headers_ask_for_is_bounded(
    surface: Surface, upstream: Recorder, headers: dict[str, str], called: tuple[Any, ...] | str
) -> None:
    surface.service.put("m", "COLD")
    surface.service.failures["m"] = QueueFull("full")
    status, answer, _ = await ask(surface, "POST", "/v2/models/m/infer", headers=headers)
    if isinstance(called, str):
        assert (status, surface.service.calls) == (400, [])
        assert called in answer["error"]
    else:
        assert (status, surface.service.calls) == (429, [("acquire", "m", *called)])


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("full"), 429, "1"),
        (QueueFull("full", retry_after_s=7.2), 429, "8"),
        (NeverFits("needs 3 of 2"), 507, None),
        (ModelFailed("it broke", retry_after_s=30), 503, "30"),
        (ModelFailed("it broke", code="load_rejected"), 503, None),
        (RuntimeUnavailable("triton is down"), 503, "1"),
        (ModelNotFound("no model m"), 404, None),
        (ModelFailed("its process died", code="process_died"), 503, None),
        (DriverError("could not install", code="install_failed"), 502, None),
        (ModeliumError("unknown kind", code="of_a_plugin"), 500, None),
    ],
)
async def test_errors_are_in_tritons_shape(
    surface: Surface, upstream: Recorder, error: ModeliumError, status: int, retry_after: str | None
) -> None:
    surface.service.put("m", "COLD")
    surface.service.failures["m"] = error
    found, answer, headers = await ask(surface, "POST", "/v2/models/m/infer", data=b"{}")
    assert (found, answer) == (status, {"error": error.message})
    assert headers.get("Retry-After") == retry_after
    assert headers["Content-Type"].startswith("application/json")
    assert surface.service.usage.model("m").results() == [("", (0, 0, 1))]


async def test_a_passed_deadline(surface: Surface, upstream: Recorder) -> None:
    surface.service.put("m", "COLD")
    headers = {"x-modelium-deadline-s": "0.05"}
    status, answer, headers_back = await ask(surface, "POST", "/v2/models/m/infer", headers=headers)
    assert (status, headers_back["Retry-After"]) == (503, "5")
    assert "was not READY" in answer["error"]


async def test_unknown_models_leave_no_series(surface: Surface) -> None:
    for method, path in BOUND:
        status, answer, _ = await ask(surface, method, f"/v2/models/nope{path.removeprefix('/v2/models/m')}")
        assert (status, answer) == (404, {"error": "there is no model named nope"})
    assert len(surface.service.usage) == 0


async def test_an_unexpected_error_is_one_line_in_the_log_and_none_of_it_on_the_wire(
    surface: Surface, upstream: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    surface.service.put("m", "COLD")
    surface.service.failures["m"] = KeyError("secret detail")  # type: ignore[assignment]
    status, answer, _ = await ask(surface, "POST", "/v2/models/m/infer")
    assert status == 500
    assert "secret" not in str(answer)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    request_id = record.args[0] if isinstance(record.args, tuple) else ""
    assert str(request_id) in answer["error"]
    assert record.exc_info is not None


async def test_an_unparsable_request_is_the_clients_fault(surface: Surface, upstream: Recorder) -> None:
    words = '{"error":"failed to parse the request JSON buffer: Invalid value. at 0"}'

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(status=500, text=words, content_type="application/json")

    upstream.answer = answer
    assert (await ask(surface, "POST", "/v2/models/m/infer", data=b"x"))[:2] == (400, json.loads(words))
    assert surface.service.usage.model("m").failures == 0


# --------------------------------------------------------------------------- readiness, statistics


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("READY", 200), ("COLD", 200), ("QUEUED", 200), ("LOADING", 200), ("DRAINING", 200), ("UNLOADING", 200),
        ("RECOVERING", 200), ("FAILED", 400), ("INVALID", 400), ("DISCOVERED", 400),
    ],
)  # fmt: skip
async def test_ready_means_that_a_request_would_be_answered(
    surface: Surface, upstream: Recorder, state: str, status: int
) -> None:
    surface.service.put("m", state)
    found, answer, headers = await ask(surface, "GET", "/v2/models/m/ready")
    assert (found, headers["x-modelium-state"]) == (status, state)
    assert answer is None if status == 200 else state in answer["error"]
    assert (await ask(surface, "GET", "/v2/models/m/versions/3/ready"))[0] == status
    assert [seen.target for seen in upstream.seen] == (["/v2/models/m/versions/3/ready"] if state == "READY" else [])
    assert surface.service.usage.model("m").requests == 0
    assert surface.service.calls == []


async def test_each_request_has_an_id_that_the_runtime_and_the_client_know(
    surface: Surface, upstream: Recorder
) -> None:
    for given in ("mine-1", "", "x" * 1000, "\u00fc"):
        _, _, headers = await ask(surface, "POST", "/v2/models/m/infer", data=b"{}", headers={"X-Request-ID": given})
        told = headers["X-Request-ID"]
        assert told == given if given == "mine-1" else len(told) == 32
        assert upstream.seen[-1].headers["X-Request-ID"] == told
    _, _, headers = await ask(surface, "GET", "/nothing", headers={"X-Request-ID": "mine-2"})
    assert headers["X-Request-ID"] == "mine-2"


async def test_an_unknown_model_is_not_ready(surface: Surface) -> None:
    assert (await ask(surface, "GET", "/v2/models/nope/ready"))[0] == 400


async def test_statistics_of_one_model_are_its_runtimes_and_no_use_of_it(surface: Surface, upstream: Recorder) -> None:
    for path in ("/v2/models/m/stats", "/v2/models/m/versions/2/stats"):
        assert (await ask(surface, "GET", path))[0] == 200
        assert upstream.seen[-1].target == path
    surface.service.put("m", "COLD")
    status, answer, _ = await ask(surface, "GET", "/v2/models/m/stats")
    assert (status, "only a loaded model" in answer["error"]) == (400, True)
    assert (len(upstream.seen), surface.service.usage.model("m").requests, surface.service.calls) == (2, 0, [])
    assert (await ask(surface, "GET", "/v2/models/nope/stats"))[0] == 404


async def test_statistics_of_all_are_those_of_all_runtimes(surface: Surface) -> None:
    async with recording() as one, recording() as two:

        async def first(request: web.Request, body: bytes) -> web.StreamResponse:
            return web.json_response({"model_stats": [{"name": "a"}, {"name": "b"}]})

        async def second(request: web.Request, body: bytes) -> web.StreamResponse:
            return web.json_response({"model_stats": [{"name": "c"}]})

        one.answer, two.answer = first, second
        surface.service.runtime("one", kserve_http=one.url)
        surface.service.runtime("two", kserve_http=two.url)
        surface.service.runtime("third", openai="http://127.0.0.1:1")
        status, answer, _ = await ask(surface, "GET", "/v2/models/stats")
        assert (status, answer) == (200, {"model_stats": [{"name": "a"}, {"name": "b"}, {"name": "c"}]})
        assert [seen.target for seen in one.seen] == ["/v2/models/stats"]

        async def broken(request: web.Request, body: bytes) -> web.StreamResponse:
            return web.Response(status=500)

        two.answer = broken
        status, answer, _ = await ask(surface, "GET", "/v2/models/stats")
        assert (status, "two answered 500" in answer["error"]) == (502, True)


# --------------------------------------------------------------------------- the server


async def test_the_server_tells_of_itself(surface: Surface) -> None:
    status, answer, _ = await ask(surface, "GET", "/v2")
    assert (status, answer["name"], answer["version"]) == (200, "modelium", modelium.__version__)
    assert "binary_tensor_data" in answer["extensions"]
    assert (await ask(surface, "GET", "/v2/health/live"))[:2] == (200, None)
    assert (await ask(surface, "GET", "/v2/health/ready"))[:2] == (200, None)
    surface.service.is_ready = False
    assert (await ask(surface, "GET", "/v2/health/ready"))[:2] == (400, None)
    assert (await ask(surface, "GET", "/v2/health/live"))[:2] == (200, None)


async def test_what_is_not_there(surface: Surface) -> None:
    assert (await ask(surface, "GET", "/v2/foo"))[0] == 404
    assert (await ask(surface, "GET", "/v2/health/live/"))[0] == 404
    status, answer, headers = await ask(surface, "GET", "/v2/models/m/infer")
    assert (status, headers["Allow"]) == (405, "POST")
    assert answer == {"error": "/v2/models/m/infer takes POST, not GET"}


@pytest.mark.parametrize(
    "path",
    [
        "/v2/systemsharedmemory/status", "/v2/systemsharedmemory/region/r/register", "/v2/cudasharedmemory/unregister",
        "/v2/trace/setting", "/v2/models/m/trace/setting", "/v2/logging",
    ],
)  # fmt: skip
async def test_a_runtimes_own_settings_go_to_the_one_there_is(surface: Surface, upstream: Recorder, path: str) -> None:
    assert (await ask(surface, "POST", path, data=b'{"a":1}'))[0] == 200
    assert (upstream.seen[0].target, upstream.seen[0].body) == (path, b'{"a":1}')
    surface.service.runtime("other", kserve_http="http://127.0.0.1:1")
    status, answer, _ = await ask(surface, "POST", path, data=b'{"a":1}')
    assert (status, "up are: triton, other" in answer["error"]) == (501, True)


# --------------------------------------------------------------------------- the repository


async def test_the_index_is_in_tritons_words(surface: Surface, upstream: Recorder) -> None:
    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        assert json.loads(body) == {"ready": True}
        return web.json_response(
            [
                {"name": "m", "version": "1", "state": "READY"},
                {"name": "m", "version": "2", "state": "READY"},
                {"name": "bare"},
            ]
        )

    upstream.answer = answer
    service = surface.service
    for name in ("COLD", "LOADING", "DRAINING", "FAILED", "QUEUED"):
        service.add(f"is-{name}", name)
    service.add("other")
    service.add("incoming/x.onnx", "DISCOVERED")
    status, index, _ = await ask(surface, "POST", "/v2/repository/index")
    assert status == 200
    assert index == [
        {"name": "is-COLD", "state": "UNAVAILABLE", "reason": "it is cold"},
        {"name": "is-DRAINING", "state": "UNLOADING", "reason": "it is draining"},
        {"name": "is-FAILED", "state": "UNAVAILABLE", "reason": "it is failed"},
        {"name": "is-LOADING", "state": "LOADING", "reason": "it is loading"},
        {"name": "is-QUEUED", "state": "LOADING", "reason": "it is queued"},
        {"name": "m", "state": "READY", "version": "1"},
        {"name": "m", "state": "READY", "version": "2"},
        {"name": "other", "state": "READY"},
    ]
    _, ready, _ = await ask(surface, "POST", "/v2/repository/index", data=b'{"ready": true}')
    assert ready == index[-3:]
    assert (await ask(surface, "POST", "/v2/repository/index", data=b'{"ready": 1}'))[0] == 400
    assert (await ask(surface, "POST", "/v2/repository/index", data=b"x"))[0] == 400


async def test_the_index_does_without_a_runtime_that_does_not_answer(surface: Surface) -> None:
    surface.service.runtime(kserve_http="http://127.0.0.1:1")
    surface.service.add("m")
    assert (await ask(surface, "POST", "/v2/repository/index"))[:2] == (200, [{"name": "m", "state": "READY"}])


async def test_load_and_unload(surface: Surface, upstream: Recorder) -> None:
    service = surface.service
    service.put("m", "COLD")
    load, unload = "/v2/repository/models/m/load", "/v2/repository/models/m/unload"
    body = json.dumps({"parameters": {"config": '{"max_batch_size": 4}', "x": 1}}).encode()
    assert (await ask(surface, "POST", load, data=body, headers={"x-modelium-deadline-s": "9"}))[:2] == (200, None)
    assert (await ask(surface, "POST", load))[:2] == (200, None)
    assert service.states["m"] == "READY"
    assert (await ask(surface, "POST", unload, data=b'{"parameters":{"unload_dependents":true}}'))[:2] == (200, None)
    assert service.states["m"] == "COLD"
    assert service.calls == [
        ("load", "m", 9.0, {"config": '{"max_batch_size": 4}', "x": 1}),
        ("load", "m", None, {}),
        ("unload", "m"),
    ]
    assert upstream.seen == []
    assert (await ask(surface, "POST", load.replace("/m/", "/nope/")))[0] == 404
    assert (await ask(surface, "POST", unload.replace("/m/", "/nope/")))[:2] == (200, None)
    service.failures["m"] = LoadRejected("bad config.pbtxt")
    assert (await ask(surface, "POST", load))[:2] == (400, {"error": "bad config.pbtxt"})
    service.failures["m"] = NeverFits("needs 3 of 2")
    assert (await ask(surface, "POST", load))[0] == 507


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"zz", "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"parameters": []}', "'parameters' to be an object"),
        (b'{"parameters": {"config": {}}}', "'config' to be a text"),
        (b'{"parameters": {"file:1/model.py": "eA=="}}', "served from the repository only"),
    ],
)
async def test_bad_load_parameters(surface: Surface, upstream: Recorder, body: bytes, words: str) -> None:
    status, answer, _ = await ask(surface, "POST", "/v2/repository/models/m/load", data=body)
    assert (status, words in answer["error"], surface.service.calls) == (400, True, [])


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
async def test_packed_bodies_are_unpacked_where_they_are_read(surface: Surface, upstream: Recorder, pack: Any) -> None:
    coding = {"Content-Encoding": "gzip" if pack is gzip.compress else "deflate"}
    body = pack(b'{"parameters": {"config": "{}"}}')
    assert (await ask(surface, "POST", "/v2/repository/models/m/load", data=body, headers=coding))[0] == 200
    assert surface.service.calls == [("load", "m", None, {"config": "{}"})]
    for wrong in (body[:-4], b"no", pack(b" " * 20_000_000)):
        status, answer, _ = await ask(surface, "POST", "/v2/repository/models/m/load", data=wrong, headers=coding)
        assert (status, "packed by" in answer["error"]) == (400, True)
    status, _, _ = await ask(
        surface, "POST", "/v2/repository/models/m/load", data=b"x", headers={"Content-Encoding": "br"}
    )
    assert status == 400


async def test_a_body_that_is_read_here_is_bounded(surface: Surface, upstream: Recorder) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * 2**20

    for large in (b" " * 17 * 2**20, pieces()):
        status, answer, _ = await ask(surface, "POST", "/v2/repository/models/m/load", data=large)
        assert (status, "max_json_bytes" in answer["error"]) == (413, True)
    assert (await ask(surface, "POST", "/v2/repository/models/m/load", data=b" " * 16 * 2**20))[0] == 200


# --------------------------------------------------------------------------- decoupled


def text(*pieces: bytes, name: str = "out", datatype: str = "BYTES") -> InferResponse:
    return InferResponse("m", "1", [TensorValue(name, datatype, (len(pieces),), join_bytes(pieces))])


def test_pieces_of_text_are_put_together() -> None:
    assert join("m", []) == InferResponse("m", "", [])
    one = text(b"a", b"b")
    assert join("m", [one]) is one
    joined = join("m", [text(b"a"), text(b"b"), text(b"c", name="other")])
    assert [(t.name, t.shape, t.raw) for t in joined.outputs] == [
        ("out", (1,), join_bytes([b"ab"])), ("other", (1,), join_bytes([b"c"]))
    ]  # fmt: skip
    for bad in (text(b"a", b"b"), text(b"abcd", datatype="FP32")):
        with pytest.raises(BadRequest, match="generate_stream"):
            join("m", [text(b"a"), bad])


@pytest.mark.parametrize(("headers", "query"), [({"x-modelium-wait": "0"}, ""), ({}, "?wait=0")])
async def test_who_does_not_wait_is_told_how_far_it_is(
    surface: Surface, upstream: Recorder, headers: dict[str, str], query: str
) -> None:
    surface.service.put("m", "LOADING")
    for path in ("/v2/models/m/infer", "/v2/models/m/generate", "/predict/m"):
        status, answer, got = await ask(surface, "POST", path + query, json={"inputs": []}, headers=headers)
        assert (status, got["Retry-After"]) == (503, "7")
        told = answer if path.startswith("/v2") else answer["error"]
        assert (told["state"], told["expected_s"], told["model"]) == ("LOADING", 7.0, "m")
    assert {call[0] for call in surface.service.calls} == {"load_soon"}
    surface.service.put("m", "READY")
    assert (await ask(surface, "POST", f"/v2/models/m/infer{query}", json={}, headers=headers))[0] == 200
    assert (await ask(surface, "POST", "/v2/models/m/infer?wait=maybe", json={}))[0] == 200


async def test_wait_is_yes_or_no(surface: Surface, upstream: Recorder) -> None:
    surface.service.put("m", "COLD")
    status, answer, _ = await ask(surface, "POST", "/v2/models/m/infer?wait=maybe", json={})
    assert (status, "to be 0 or 1, found 'maybe'" in answer["error"]) == (400, True)
