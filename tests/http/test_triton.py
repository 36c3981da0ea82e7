"""Against a real tritonserver: the same answers as its own, and tritonclient unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from modelium.http.answers import UpstreamFailed
from modelium.http.messages import InferRequest
from modelium.http.rpc.channels import Channels
from modelium.http.streams import Streams
from tests.http.conftest import Surface
from tests.http.test_kserve import ask
from tests.http.tritonserver import NAMES, Triton, free_ports
from tests.http.upstreams import scripted

FLOATS = b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1,3],"data":[1,2,3]}]}'
PIECES = "/v2/models/pieces/infer"
TEXTS = b'{"inputs":[{"name":"INPUT0","datatype":"BYTES","shape":[2],"data":["a","\\u00e9"]}]}'

SAME = [
    ("POST", "/v2/models/identity/infer", FLOATS, {}),
    ("POST", "/v2/models/identity/versions/1/infer", FLOATS, {}),
    ("POST", "/v2/models/identity/infer", FLOATS[:-2] + b',"parameters":{"binary_data_output":true}]}', {}),
    ("POST", "/v2/models/identity/infer", FLOATS[:-1] + b',"parameters":{"binary_data_output":true}}', {}),
    ("POST", "/v2/models/identity/infer", FLOATS, {"Accept-Encoding": "gzip"}),
    ("POST", "/v2/models/identity/infer", np.arange(6, dtype=np.float32).tobytes(),
     {"Inference-Header-Content-Length": "0"}),
    ("POST", "/v2/models/identity/versions/7/infer", FLOATS, {}),
    ("POST", "/v2/models/identity/infer", b'{"inputs":[]}', {}),
    ("POST", "/v2/models/identity/infer", b"", {}),
    ("POST", "/v2/models/echo/infer", TEXTS, {}),
    ("POST", "/v2/models/pieces/generate", b'{"text_input":"hi","count":1}', {}),
    ("POST", "/v2/models/pieces/generate", b'{"text_input":"hi","count":2}', {}),
    ("POST", "/v2/models/pieces/generate_stream", b'{"text_input":"hi","count":3}', {}),
    ("POST", "/v2/models/pieces/generate_stream", b'{"text_input":"hi","count":-1}', {}),
    ("POST", "/v2/models/pieces/versions/1/generate_stream", b'{"text_input":"hi"}', {}),
    ("GET", "/v2/models/identity", None, {}),
    ("GET", "/v2/models/identity/versions/1", None, {}),
    ("GET", "/v2/models/identity/config", None, {}),
    ("GET", "/v2/models/identity/versions/1/ready", None, {}),
    ("GET", "/v2/models/identity/versions/7/ready", None, {}),
    ("GET", "/v2/health/live", None, {}),
    ("GET", "/v2/health/ready", None, {}),
    ("GET", "/v2/logging", None, {}),
    ("GET", "/v2/trace/setting", None, {}),
    ("GET", "/v2/models/identity/trace/setting", None, {}),
    ("GET", "/v2/systemsharedmemory/status", None, {}),
    ("GET", "/v2/cudasharedmemory/status", None, {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "headers"), SAME)
async def test_the_answer_is_tritons_own(
    surface: Surface, real: Triton, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    answers = []
    for url in (real.url, surface.url):
        async with surface.client.request(
            method, url + path, data=body, headers=headers, skip_auto_headers=["Accept-Encoding"]
        ) as response:
            kept = ("Content-Type", "Content-Encoding", "Inference-Header-Content-Length", "Transfer-Encoding")
            answers.append((response.status, {k: response.headers.get(k) for k in kept}, await response.read()))
    direct, through = answers
    if direct[0] == 500 and b"failed to parse" in direct[2]:
        direct = (400, *direct[1:])
    assert through == direct


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "Application/X-WWW-Form-Urlencoded; a=b"])
async def test_a_long_body_that_curl_calls_a_form(surface: Surface, real: Triton, kind: str) -> None:
    """Triton 2.51 by itself ends with a segmentation fault here."""
    form = {"Content-Type": kind}
    _, before, _ = await ask(surface, "GET", "/v2/models/identity/stats")
    status, answer, _ = await ask(
        surface, "POST", "/v2/models/identity/infer", data=FLOATS + b" " * 5_000_000, headers=form
    )
    assert (status, answer["outputs"][0]["data"]) == (200, [1, 2, 3])
    _, after, _ = await ask(surface, "GET", "/v2/models/identity/stats")
    assert before["model_stats"][0]["inference_count"] + 1 == after["model_stats"][0]["inference_count"]


async def test_statistics(surface: Surface, real: Triton) -> None:
    await ask(surface, "POST", "/v2/models/identity/infer", data=FLOATS)
    _, found, _ = await ask(surface, "GET", "/v2/models/stats")
    assert {stats["name"] for stats in found["model_stats"]} == set(NAMES)
    _, found, _ = await ask(surface, "GET", "/v2/models/identity/stats")
    assert found["model_stats"][0]["inference_stats"]["success"]["count"] >= 1


# --------------------------------------------------------------------------- tritonclient


def drive_sync(url: str) -> None:
    client = sync_client.InferenceServerClient(url.removeprefix("http://"), concurrency=4)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("identity")
    assert client.is_model_ready("identity", "1") and not client.is_model_ready("nope")
    assert client.get_server_metadata()["name"] == "triton"
    assert client.get_model_metadata("identity")["inputs"][0]["shape"] == [-1, -1]
    assert client.get_model_config("identity")["max_batch_size"] == 8
    assert {entry["name"]: entry["version"] for entry in client.get_model_repository_index()}["identity"] == "1"
    data = np.random.default_rng(7).normal(size=(4, 1000)).astype(np.float32)
    for binary_in in (True, False):
        for binary_out in (True, False):
            tensor = sync_client.InferInput("INPUT0", list(data.shape), "FP32")
            tensor.set_data_from_numpy(data, binary_data=binary_in)
            output = sync_client.InferRequestedOutput("OUTPUT0", binary_data=binary_out)
            for packing in ({}, {"request_compression_algorithm": "gzip", "response_compression_algorithm": "deflate"}):
                result = client.infer("identity", [tensor], outputs=[output], request_id="7", **packing)
                assert np.array_equal(result.as_numpy("OUTPUT0"), data)
                assert result.get_response()["id"] == "7"
    tensor = sync_client.InferInput("INPUT0", [1, data.size], "FP32")
    tensor.set_data_from_numpy(data.reshape(1, -1))
    waiting = [client.async_infer("identity", [tensor]) for _ in range(8)]
    assert all(np.array_equal(w.get_result().as_numpy("OUTPUT0"), data.reshape(1, -1)) for w in waiting)
    large = np.arange(3_000_000, dtype=np.float32).reshape(1, -1)
    tensor = sync_client.InferInput("INPUT0", list(large.shape), "FP32")
    tensor.set_data_from_numpy(large)
    assert np.array_equal(client.infer("identity", [tensor]).as_numpy("OUTPUT0"), large)
    texts = np.array([b"", "é".encode(), b"\xff\x00"], dtype=object)
    tensor = sync_client.InferInput("INPUT0", [3], "BYTES")
    tensor.set_data_from_numpy(texts)
    assert client.infer("echo", [tensor]).as_numpy("OUTPUT0").tolist() == texts.tolist()
    wrong = sync_client.InferInput("NOPE", [1, 1], "FP32")
    wrong.set_data_from_numpy(np.ones((1, 1), np.float32))
    _raises(lambda: client.infer("identity", [wrong]), "NOPE")
    _raises(lambda: client.infer("nope", [tensor]), "no model named nope")
    client.load_model("identity", config='{"max_batch_size": 8}')
    client.unload_model("echo")
    client.load_model("echo")
    _raises(lambda: client.load_model("nope"), "no model named nope")
    assert client.get_inference_statistics("identity")["model_stats"][0]["name"] == "identity"
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    assert client.get_log_settings()["log_error"] is True
    assert client.get_system_shared_memory_status() == []
    client.close()


def _raises(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InferenceServerException, match=words):
        call()


async def test_tritonclient_works_unchanged(surface: Surface, real: Triton) -> None:
    await asyncio.to_thread(drive_sync, surface.url)
    assert ("load", "identity", None, {"config": '{"max_batch_size": 8}'}) in surface.service.calls
    for name in ("identity", "echo"):
        assert surface.service.usage.model(name).in_flight == 0


async def test_tritonclients_asyncio_half_works_unchanged(surface: Surface, real: Triton) -> None:
    async with aio_client.InferenceServerClient(surface.url.removeprefix("http://")) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready("identity")
        assert (await client.get_model_metadata("identity"))["name"] == "identity"
        assert (await client.get_model_config("identity"))["max_batch_size"] == 8
        data = np.arange(12, dtype=np.float32).reshape(4, 3)
        tensor = aio_client.InferInput("INPUT0", [4, 3], "FP32")
        tensor.set_data_from_numpy(data)
        results = await asyncio.gather(*(client.infer("identity", [tensor]) for _ in range(20)))
        assert all(np.array_equal(result.as_numpy("OUTPUT0"), data) for result in results)
        packed = await client.infer(
            "identity", [tensor], request_compression_algorithm="gzip", response_compression_algorithm="gzip"
        )
        assert np.array_equal(packed.as_numpy("OUTPUT0"), data)
        with pytest.raises(InferenceServerException, match="no model named nope"):
            await client.infer("nope", [tensor])


# --------------------------------------------------------------------------- decoupled


def asked(text: str, count: int | None = None) -> bytes:
    inputs: list[dict[str, Any]] = [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text]}]
    if count is not None:
        inputs.append({"name": "count", "datatype": "INT32", "shape": [1], "data": [count]})
    return json.dumps({"id": "x7", "inputs": inputs}).encode()


@pytest.mark.parametrize("path", ["/v2/models/pieces/infer", "/v2/models/pieces/versions/1/infer"])
async def test_infer_answers_for_decoupled_models(surface: Surface, real: Triton, path: str) -> None:
    status, answer, _ = await ask(surface, "POST", path, data=asked("hi"))
    assert (status, answer) == (
        200,
        {
            "model_name": "pieces",
            "model_version": "1",
            "id": "x7",
            "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["hi 0.hi 1.hi 2."]}],
        },
    )
    status, answer, _ = await ask(surface, "POST", path, data=asked("numbers", 1))
    assert (status, [output["data"] for output in answer["outputs"]]) == (200, [["numbers 0."], [0]])
    status, answer, _ = await ask(surface, "POST", path, data=asked("none", 0))
    assert (status, answer["outputs"]) == (200, [])
    status, answer, _ = await ask(surface, "POST", path, data=asked("numbers", 2))
    assert (status, "generate_stream" in answer["error"]) == (400, True)
    status, answer, _ = await ask(surface, "POST", path, data=asked("hi", -1))
    assert (status, "count is negative" in answer["error"]) == (400, True)
    status, answer, _ = await ask(surface, "POST", path, data=b'{"inputs": []}')
    assert (status, "inputs" in answer["error"]) == (400, True)
    status, answer, _ = await ask(surface, "POST", path, data=asked("raise"))
    assert (status, "it broke" in answer["error"]) == (500, True)
    status, answer, _ = await ask(surface, "POST", path, data=b"x")
    assert (status, "expected JSON" in answer["error"]) == (400, True)
    usage = surface.service.usage.model("pieces")
    assert (usage.in_flight, usage.failures) == (0, 1)


async def test_a_version_that_is_not_there(surface: Surface, real: Triton) -> None:
    status, answer, _ = await ask(surface, "POST", "/v2/models/pieces/versions/9/infer", data=asked("hi"))
    assert (status, "version 9" in answer["error"]) == (404, True)


async def test_tritonclient_asks_a_decoupled_model_in_binary(surface: Surface, real: Triton) -> None:
    async with aio_client.InferenceServerClient(surface.url.removeprefix("http://")) as client:
        text = aio_client.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"\xff"], dtype=object))
        for wanted in (None, [aio_client.InferRequestedOutput("text_output", binary_data=True)]):
            result = await client.infer("pieces", [text], outputs=wanted)
            assert result.as_numpy("text_output").tolist() == [b"\xff 0.\xff 1.\xff 2."]


async def test_a_client_that_leaves_ends_its_inference(surface: Surface, real: Triton) -> None:
    """The model has one instance: the second request is answered because the first ended long before its time."""
    usage = surface.service.usage.model("pieces")
    asking = asyncio.create_task(surface.client.post(f"{surface.url}{PIECES}", data=asked("slow", 10_000)).__aenter__())
    while not usage.in_flight:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # until it is in the model, which nothing tells
    asking.cancel()
    while usage.in_flight:
        await asyncio.sleep(0.01)
    assert (await ask(surface, "POST", PIECES, data=asked("hi", 1)))[0] == 200
    assert usage.failures == 0


async def test_a_client_that_leaves_a_stream(surface: Surface, real: Triton) -> None:
    usage = surface.service.usage.model("pieces")
    body = b'{"text_input":"slow","count":20}'
    async with surface.client.post(f"{surface.url}/v2/models/pieces/generate_stream", data=body) as response:
        assert (await response.content.readline()).startswith(b"data:")
        response.close()
    while usage.in_flight:
        await asyncio.sleep(0.01)
    assert (await ask(surface, "POST", PIECES, data=asked("hi", 1)))[0] == 200
    assert usage.failures == 0


async def test_a_grpc_address_where_nobody_is_yet(surface: Surface, real: Triton) -> None:
    (port,) = free_ports(1)
    surface.service.routes["pieces"].endpoints = {"kserve-http": real.url, "kserve-grpc": f"127.0.0.1:{port}"}
    for _ in range(5):
        status, answer, headers = await ask(surface, "POST", PIECES, data=asked("hi"))
        assert (status, headers["Retry-After"], "nothing was sent" in answer["error"]) == (503, "1", True)
    assert surface.service.poked == ["triton"] * 5
    target = int(real.grpc.rpartition(":")[2])

    async def to_triton(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(_pipe(reader, there_writer), _pipe(there_reader, writer))

    async with await asyncio.start_server(to_triton, "127.0.0.1", port):
        assert (await ask(surface, "POST", PIECES, data=asked("hi")))[0] == 200  # at once, without a back-off


async def test_a_channel_that_is_closed_under_a_call_is_an_error() -> None:
    """Not a cancellation, which would leave the client without an answer."""
    arrived = asyncio.Event()

    async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.read(1)
        arrived.set()
        await asyncio.Event().wait()

    channels = Channels()
    streams = Streams(channels)
    async with scripted(says_nothing) as url:
        asking = asyncio.create_task(streams.infer(url.removeprefix("http://"), "m", "", InferRequest([])))
        await arrived.wait()
        await channels.close()
        with pytest.raises(UpstreamFailed, match="the service ends"):
            await asking


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


# --------------------------------------------------------------------------- the simple form


async def test_predict_on_a_real_model(surface: Surface, real: Triton) -> None:
    status, answer, _ = await ask(surface, "POST", "/predict/identity", data=b'{"inputs": [1, 2, 3]}')
    assert (status, answer) == (200, {"model": "identity", "version": "1", "outputs": {"OUTPUT0": [1.0, 2.0, 3.0]}})
    named = b'{"inputs": {"INPUT0": [[1, 2], [3, 4]]}}'
    status, answer, _ = await ask(surface, "POST", "/predict/identity", data=named)
    assert (status, answer["outputs"]) == (200, {"OUTPUT0": [[1.0, 2.0], [3.0, 4.0]]})
    status, answer, _ = await ask(surface, "POST", "/predict/identity", data=b'{"inputs": {"x": 1}}')
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert answer["error"]["message"] == "there is no input 'x'; expected inputs: INPUT0 (FP32 [-1, -1])"
    status, answer, _ = await ask(surface, "POST", "/predict/echo", data='{"text": ["a", "é"]}'.encode())
    assert (status, answer["text"]) == (200, ["a", "é"])
    two, negative = (b'{"text": "hi", "parameters": {"count": %d}}' % count for count in (2, -1))
    status, answer, _ = await ask(surface, "POST", "/predict/pieces", data=two)
    assert (status, answer["text"], answer["outputs"]) == (200, "hi 0.hi 1.", {"text_output": "hi 0.hi 1."})
    status, answer, _ = await ask(surface, "POST", "/predict/pieces", data=negative)
    assert (status, "count is negative" in answer["error"]["message"]) == (400, True)


async def test_events_of_a_stream_arrive_one_by_one(surface: Surface, real: Triton) -> None:
    async with aiohttp.ClientSession() as client:
        body = b'{"text_input":"hi","count":3}'
        async with client.post(f"{surface.url}/v2/models/pieces/generate_stream", data=body) as response:
            lines = [line async for line in response.content if line.strip()]
    assert [json.loads(line.removeprefix(b"data: "))["text_output"] for line in lines] == ["hi 0.", "hi 1.", "hi 2."]
