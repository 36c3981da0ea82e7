"""Models whose runtime speaks OpenAI alone are answered for by every surface, as one is that Triton serves."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc.aio as aio_client
import tritonclient.http as http_client
from tritonclient.grpc import service_pb2 as pb

from modelium.http.openai_common import SWITCHES
from modelium.http.settings import HttpSettings
from tests.http.conftest import Rpc, Surface
from tests.http.fakes import FakeService
from tests.http.openaiserver import OpenAIServer, openai_server
from tests.http.test_kserve import ask
from tests.http.test_rpc import rest
from tests.http.tritonserver import Triton

NAME = "speaker"
WAITS = b'{"text_input": "a wait b", "stream": true, "max_tokens": 3}'


@pytest.fixture
async def vllm(service: FakeService) -> AsyncIterator[OpenAIServer]:
    """A runtime that speaks OpenAI alone, with a model for text and one for embeddings READY in it."""
    async with openai_server(NAME, "vectors", "poet") as server:
        service.runtime("vllm", openai=server.url)
        for name in (NAME, "vectors"):
            service.add(name, runtime="vllm")
        service.tasks["vectors"] = "feature-extraction"
        yield server


async def post(surface: Surface, path: str, body: Any, **headers: str) -> tuple[int, str, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with surface.client.post(surface.url + path, data=data, headers=headers) as response:
        return response.status, response.headers["Content-Type"], await response.read()


async def predict(surface: Surface, body: Any, name: str = NAME) -> tuple[int, Any]:
    status, _, answer = await post(surface, f"/predict/{name}", body)
    return status, json.loads(answer)


# --------------------------------------------------------------------------- as one that Triton serves


CHAT = json.dumps([{"role": "user", "content": "hi there"}])
LESS = '{"max_tokens": 2, "stop": ["b"]}'


def given(name: str, value: Any, datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [1], "data": [value]}


SAME = [
    ("GET", "/ready", None),
    ("GET", "/versions/1/ready", None),
    ("POST", "/generate", {"text_input": "a b", "max_tokens": 4}),
    ("POST", "/generate", {"text_input": "a b", "max_tokens": 3, "id": "7", "unknown": 1}),
    ("POST", "/generate", {"text_input": ["a b"], "parameters": {"max_tokens": 2, "temperature": 0, "stream": False}}),
    ("POST", "/generate", {"text_input": "a b c", "sampling_parameters": LESS}),
    ("POST", "/generate", {"text_input": "a b c", "sampling_parameters": LESS, "max_tokens": 1}),
    ("POST", "/generate", {"text_input": "a end c", "max_tokens": 4}),
    ("POST", "/generate", {"messages": CHAT, "max_tokens": 4}),
    ("POST", "/generate", {"input_ids": [1, 2], "max_tokens": 1, "seed": 2**40}),
    ("POST", "/generate", {"text_input": "a", "max_tokens": 0}),
    ("POST", "/generate", {"text_input": "a", "parameters": {"temperature": -1}}),
    ("POST", "/generate", {"text_input": "a", "sampling_parameters": '{"top_p": 2.5}'}),
    ("POST", "/versions/1/generate", {"text_input": "a b", "max_tokens": 4}),
    ("POST", "/generate_stream", {"text_input": "a b", "max_tokens": 3, "stream": True}),
    ("POST", "/generate_stream", {"text_input": "a end", "max_tokens": 3, "stream": True}),
    ("POST", "/generate_stream", {"messages": CHAT, "max_tokens": 3, "stream": True}),
    ("POST", "/generate_stream", {"text_input": "a b", "max_tokens": 3}),
    ("POST", "/infer", {"inputs": [given("text_input", "a b"), given("max_tokens", 4, "INT32")], "id": "7"}),
    ("POST", "/infer", {"inputs": [given("text_input", "a b"), given("sampling_parameters", LESS)],
                        "outputs": [{"name": "finish_reason"}, {"name": "text_output"}]}),
    ("POST", "/infer", {"inputs": [given("text_input", "a b")], "parameters": {"max_tokens": 3}}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), SAME)
async def test_it_answers_as_triton(
    surface: Surface, real: Triton, vllm: OpenAIServer, method: str, path: str, body: Any
) -> None:
    found = []
    for name in ("writer", NAME):
        data = None if body is None else json.dumps(body).encode()
        url = f"{surface.url}/v2/models/{name}{path}"
        async with surface.client.request(method, url, data=data) as response:
            text = (await response.text()).replace(name, "NAME")
            found.append((response.status, response.headers["Content-Type"], parsed(text)))
    theirs, ours = found
    if body is not None and "input_ids" in body:
        assert ours[2][0].pop("output_ids") == 2  # the template has it too, and the test's writer has not
    assert ours == theirs


def parsed(text: str) -> list[Any]:
    """Each JSON object in an answer or a stream of events, without what tells the two runtimes apart."""
    found = [json.loads(one.removeprefix("data: ")) for one in text.split("\n\n") if one]
    return [one if not isinstance(one, dict) else unlike(one) for one in found]


def unlike(answer: dict[str, Any]) -> dict[str, Any]:
    for tensor in answer.get("outputs", []):
        if tensor["name"] == "output_ids" and "data" in tensor:
            tensor["data"] = []
    return {
        key: sorted(value, key=lambda t: t["name"]) if key == "outputs" else value
        for key, value in answer.items()
        if key != "platform"
    }


async def test_its_configuration_is_the_templates(surface: Surface, real: Triton, vllm: OpenAIServer) -> None:
    """And its metadata; what Triton's vLLM backend is sent besides comes last."""
    for version in ("", "/versions/1"):
        _, theirs, _ = await ask(surface, "GET", f"/v2/models/writer{version}")
        _, ours, _ = await ask(surface, "GET", f"/v2/models/{NAME}{version}")
        inputs, more = ours["inputs"][: len(theirs["inputs"])], ours["inputs"][len(theirs["inputs"]) :]
        assert {**ours, "inputs": inputs} == {**theirs, "name": NAME, "platform": "vllm"}
        assert [(tensor["name"], tensor["datatype"]) for tensor in more] == [(name, "BOOL") for name in SWITCHES]
    _, theirs, _ = await ask(surface, "GET", "/v2/models/writer/config")
    _, ours, _ = await ask(surface, "GET", f"/v2/models/{NAME}/config")
    assert (ours["name"], ours["backend"]) == (NAME, "vllm")
    for key in ("max_batch_size", "model_transaction_policy", "version_policy", "platform"):
        assert ours[key] == theirs[key]
    for key in ("input", "output"):
        tensors = [{k: v for k, v in tensor.items() if k in ours[key][0]} for tensor in theirs[key]]
        assert ours[key][: len(tensors)] == tensors
    assert [tensor["name"] for tensor in ours["input"] if not tensor["optional"]] == []


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a b", "parameters": {"max_tokens": 3}},
        {"inputs": {"text_input": "a b", "max_tokens": 2, "stop": ["b"]}},
        {"inputs": {"messages": CHAT}, "parameters": {"max_tokens": 1}},
        {"text": "a", "parameters": {"sampling_parameters": '{"max_tokens": 1}'}},
        {"text": ["a", "b"]},
    ],
)
async def test_predict_answers_as_with_triton(
    surface: Surface, real: Triton, vllm: OpenAIServer, body: dict[str, Any]
) -> None:
    (status, theirs), ours = await predict(surface, body, "writer"), await predict(surface, body)
    assert ours == (status, {**theirs, "model": NAME} if status == 200 else theirs)


def http_use(url: str) -> None:
    with http_client.InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_model_ready(NAME) and client.is_model_ready(NAME, "1") and not client.is_model_ready(NAME, "2")
        assert client.get_model_config(NAME)["model_transaction_policy"]["decoupled"]
        text = http_client.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array(["a b"], dtype=object))
        tokens = http_client.InferInput("max_tokens", [1], "INT32")
        tokens.set_data_from_numpy(np.array([3], dtype=np.int32))
        wanted = [
            http_client.InferRequestedOutput("text_output"),
            http_client.InferRequestedOutput("num_output_tokens"),
        ]
        answer = client.infer(NAME, [text, tokens], outputs=wanted)
        assert answer.as_numpy("text_output").tolist() == [b" a b a"]
        assert answer.as_numpy("num_output_tokens").tolist() == [3]
        assert answer.as_numpy("finish_reason") is None
        texts = http_client.InferInput("text_input", [2, 1], "BYTES")
        texts.set_data_from_numpy(np.array([["a"], ["b c"]], dtype=object))
        vectors = client.infer("vectors", [texts]).as_numpy("sentence_embedding")
        assert vectors.tolist() == np.array([[1, 1, 1 / 3], [3, 2, 1 / 3]], np.float32).tolist()


async def test_tritonclient_by_http(surface: Surface, vllm: OpenAIServer) -> None:
    await asyncio.to_thread(http_use, surface.url)


# --------------------------------------------------------------------------- embeddings


async def test_embeddings(surface: Surface, vllm: OpenAIServer) -> None:
    third = float(np.float32(1 / 3))
    status, answer = await predict(surface, {"text": "ab cd"}, "vectors")
    assert (status, answer["outputs"]) == (200, {"sentence_embedding": pytest.approx([5, 2, third])})
    status, answer = await predict(surface, {"inputs": {"text_input": [["a"], ["b c"]]}}, "vectors")
    assert answer["outputs"]["sentence_embedding"] == [pytest.approx([1, 1, third]), pytest.approx([3, 2, third])]
    _, metadata, _ = await ask(surface, "GET", "/v2/models/vectors")
    assert metadata["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1, 1]}]
    assert metadata["outputs"] == [{"name": "sentence_embedding", "datatype": "FP32", "shape": [-1, -1]}]
    status, _, body = await post(surface, "/v2/models/vectors/generate", {"text_input": "a"})
    assert (status, json.loads(body)["sentence_embedding"]) == (200, pytest.approx([1, 1, third]))
    assert {asked.path for asked in vllm.asked} == {"/v1/embeddings"}
    assert vllm.asked[1].body == {"model": "vectors", "input": ["a", "b c"], "encoding_format": "base64"}


async def test_many_embeddings(surface: Surface, vllm: OpenAIServer) -> None:
    texts = [[f"text {number}"] for number in range(2048)]
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [2048, 1], "data": texts}]
    status, _, body = await post(surface, "/v2/models/vectors/infer", {"inputs": inputs})
    (made,) = json.loads(body)["outputs"]
    assert (status, made["shape"], made["data"][-3:-1]) == (200, [2048, 3], [9, 2])


# --------------------------------------------------------------------------- pieces


async def test_pieces_come_as_they_are_made(surface: Surface, vllm: OpenAIServer, service: FakeService) -> None:
    url = f"{surface.url}/v2/models/{NAME}/generate_stream"
    async with surface.client.post(url, data=WAITS) as response:
        first = await response.content.readuntil(b"\n\n")
        assert json.loads(first.removeprefix(b"data: "))["text_output"] == " a"
        assert service.usage.model(NAME).in_flight == 1
        vllm.go_on.set()
        rest_ = parsed((await response.read()).decode())
    assert [one["text_output"] for one in rest_] == [" wait", " b", ""]
    assert (rest_[-1]["finish_reason"], rest_[-1]["num_output_tokens"]) == ("length", 3)
    usage = service.usage.model(NAME)
    assert (usage.in_flight, usage.requests, usage.failures) == (0, 1, 0)


@pytest.mark.parametrize("product", ["uvicorn", "llama.cpp"])
async def test_a_connection_that_is_closed_without_a_word_is_not_used_again(
    surface: Surface, vllm: OpenAIServer, product: str
) -> None:
    """As llama.cpp closes it after a stream."""
    vllm.product = product
    for _ in range(3):
        body = {"model": NAME, "prompt": "a", "stream": True}
        async with surface.client.post(f"{surface.url}/v1/completions", json=body) as response:
            assert (response.status, "Connection" in response.headers) == (200, False)
            await response.read()
        asked = {"text_input": "a", "stream": True, "max_tokens": 2}
        await post(surface, f"/v2/models/{NAME}/generate_stream", asked)
    ports = [one.port for one in vllm.asked]
    assert len(set(ports)) == 1 if product == "uvicorn" else len(set(ports[1:])) == 5  # the first tells what it is


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
async def test_who_leaves_ends_the_runtimes_work(
    surface: Surface, vllm: OpenAIServer, service: FakeService, path: str
) -> None:
    asking = asyncio.create_task(post(surface, f"/v2/models/{NAME}/{path}", WAITS))
    async with asyncio.timeout(10):
        while not vllm.asked:
            await asyncio.sleep(0.01)
        asking.cancel()
        await vllm.left.wait()
        while service.usage.model(NAME).in_flight:
            await asyncio.sleep(0.01)
    assert service.usage.model(NAME).failures == 0


# --------------------------------------------------------------------------- errors


ERRORS = [
    ({"text_input": ""}, 400, "Either prompt or prompt_embeds must be provided"),
    ({"text_input": "a", "max_tokens": 0}, 400, "max_tokens must be 1 or more, and is 0"),
    ({"text_input": "a", "max_tokens": 65}, 400, "cannot be greater than max_model_len=64"),
    ({"text_input": "a", "sampling_parameters": '{"min_p": 2}'}, 400, "min_p must be in [0, 1], got 2."),
    ({"input_ids": [1000]}, 400, "Token id 1000 is out of vocabulary"),
    ({"text_input": "a " * 64}, 400, "maximum context length is 64 tokens"),
    ({"messages": "[]"}, 400, "a list of at least one message"),
    ({"messages": '["hi"]'}, 400, "1 validation error"),
    ({"text_input": "a", "sampling_parameters": '{"lora_name": "nobody"}'}, 404, "`nobody` does not exist"),
    ({"text_input": "fail"}, 500, "EngineCore encountered an issue"),
    ({}, 400, "expected one of text_input, messages and input_ids"),
]


@pytest.mark.parametrize(("body", "status", "words"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_runtimes_errors_keep_their_meaning(
    surface: Surface, vllm: OpenAIServer, body: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    for path in ("generate", "generate_stream", "infer"):
        if path == "infer":
            values = {k: v if isinstance(v, list) else [v] for k, v in body.items()}
            datatypes = {"max_tokens": "INT32", "temperature": "FP32", "input_ids": "INT64"}
            inputs = [{**given(k, None, datatypes.get(k, "BYTES")), "data": v} for k, v in values.items()]
            data: Any = {"inputs": inputs, "parameters": {"stream": stream}}
        else:
            data = {**body, "stream": stream}
        found, kind, answer = await post(surface, f"/v2/models/{NAME}/{path}", data)
        assert (found, kind.partition(";")[0]) == (status, "application/json")
        assert words in json.loads(answer)["error"]
    found, told = await predict(surface, {"inputs": body, "parameters": {"stream": stream}})
    assert (found, words in told["error"]["message"]) == (status, True)
    usage = surface.service.usage.model(NAME)
    assert (usage.in_flight, usage.failures) == (0, 4 if status == 500 else 0)


async def test_an_error_in_a_stream_is_its_last_event(surface: Surface, vllm: OpenAIServer) -> None:
    status, kind, answer = await post(
        surface, f"/v2/models/{NAME}/generate_stream", {"text_input": "a fail", "stream": True}
    )
    first, last = (json.loads(one.removeprefix("data: ")) for one in answer.decode().split("\n\n") if one)
    assert (status, kind, first["text_output"]) == (200, "text/event-stream; charset=utf-8", " a")
    assert last == {"error": "EngineCore encountered an issue. See stack trace (above)."}
    usage = surface.service.usage.model(NAME)
    assert (usage.in_flight, usage.failures) == (0, 1)


async def test_inputs_that_are_not_there_are_told(surface: Surface, vllm: OpenAIServer) -> None:
    status, answer = await predict(surface, {"inputs": {"nope": 1}})
    assert (status, "there is no input 'nope'; expected inputs: text_input" in answer["error"]["message"]) == (
        400,
        True,
    )


async def test_clients_of_tritons_vllm_backend(surface: Surface, vllm: OpenAIServer) -> None:
    body = {"text_input": "a", "max_tokens": 1, "exclude_input_in_output": False, "return_finish_reason": True}
    status, _, answer = await post(surface, f"/v2/models/{NAME}/generate", body)
    assert (status, json.loads(answer)["text_output"]) == (200, "a a")


async def test_a_default_is_not_insisted_on(surface: Surface, vllm: OpenAIServer) -> None:
    """The runtime's context is shorter than the tokens that are asked for where the client names none."""
    status, answer = await predict(surface, {"text": "a"})
    assert (status, answer["outputs"]["num_output_tokens"]) == (200, 16)
    assert ["max_tokens" in asked.body for asked in vllm.asked] == [True, False]


@pytest.mark.parametrize("version", ["7", "x"])
async def test_there_is_one_version(surface: Surface, vllm: OpenAIServer, version: str) -> None:
    for method, path, expected in (
        ("POST", "infer", 404), ("POST", "generate", 404), ("GET", "config", 404), ("GET", "stats", 400),
        ("GET", "ready", 400),
    ):  # fmt: skip
        path = f"/v2/models/{NAME}/versions/{version}/{path}"
        status, answer, _ = await ask(surface, method, path, data=b'{"text_input": "a"}' if method == "POST" else None)
        assert (status, answer) == (expected, {"error": f"{NAME} has no version {version}: it has version 1"})
    assert vllm.asked == []


async def test_a_runtime_that_breaks_off(surface: Surface, vllm: OpenAIServer, service: FakeService) -> None:
    status, answer = await predict(surface, {"text": "a break"})
    assert (status, answer["error"]["code"]) == (502, "upstream_failed")
    status, _, body = await post(surface, f"/v2/models/{NAME}/generate", {"text_input": "a break"})
    assert (status, set(json.loads(body))) == (502, {"error"})
    url = f"{surface.url}/v2/models/{NAME}/generate_stream"
    async with surface.client.post(url, data=b'{"text_input": "a break", "stream": true}') as response:
        events, broken = b"", False
        try:
            async for piece in response.content.iter_any():
                events += piece
        except aiohttp.ClientPayloadError:
            broken = True
    first, last = (json.loads(one.removeprefix("data: ")) for one in events.decode().split("\n\n") if one)
    assert (first["text_output"], "broke off its answer" in last["error"], broken) == (" a", True, True)
    assert service.poked == ["vllm"] * 3
    assert (service.usage.model(NAME).failures, service.usage.model(NAME).in_flight) == (3, 0)


async def test_a_runtime_that_is_not_there(surface: Surface, service: FakeService) -> None:
    service.runtime("vllm", openai="http://127.0.0.1:1")
    service.add(NAME, runtime="vllm")
    status, _, body = await post(surface, f"/v2/models/{NAME}/generate_stream", {"text_input": "a", "stream": True})
    assert (status, "nothing was sent to it" in json.loads(body)["error"]) == (503, True)
    assert service.poked == ["vllm"]


@pytest.mark.parametrize("path", ["generate", "generate_stream", "infer"])
async def test_what_is_no_request(surface: Surface, vllm: OpenAIServer, path: str) -> None:
    for body in (b"x", b"[]", b'{"parameters": 5}', b'{"inputs": 5, "text_input": 5}'):
        status, _, answer = await post(surface, f"/v2/models/{NAME}/{path}", body)
        assert (status, list(json.loads(answer))) == (400, ["error"])
    assert vllm.asked == []


async def test_the_requests_id_and_trace_go_along(surface: Surface, vllm: OpenAIServer) -> None:
    told = {"X-Request-ID": "mine", "traceparent": "00-1-2-01", "Authorization": "x"}
    for path in ("generate", "generate_stream", "infer"):
        body = {"text_input": "a"} if path != "infer" else {"inputs": [given("text_input", "a")]}
        assert (await post(surface, f"/v2/models/{NAME}/{path}", body, **told))[0] == 200
        seen = vllm.asked[-1].headers
        assert {name: seen.get(name) for name in told} == {**told, "Authorization": None}


class TestStalled:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(client_stall_s=0.3)

    async def test_who_takes_nothing_is_let_go_of(
        self, surface: Surface, service: FakeService, vllm: OpenAIServer
    ) -> None:
        """An answer larger than all buffers on the way, of which the client reads nothing."""
        word = "x" * 2**20
        body = json.dumps({"text_input": word, "stream": True, "max_tokens": 60}).encode()
        host, port = surface.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v2/models/{NAME}/generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        async with asyncio.timeout(20):
            await vllm.left.wait()
            while service.usage.model(NAME).in_flight:
                await asyncio.sleep(0.01)
        writer.close()


# --------------------------------------------------------------------------- what is told of it


async def test_statistics_are_our_own_counts(surface: Surface, vllm: OpenAIServer, real: Triton) -> None:
    await predict(surface, {"text": "a"})
    await predict(surface, {"text": "fail"})
    _, one, _ = await ask(surface, "GET", f"/v2/models/{NAME}/stats")
    (stats,) = one["model_stats"]
    parts = stats["inference_stats"]
    assert (stats["name"], stats["version"], stats["inference_count"]) == (NAME, "1", 1)
    assert (parts["success"]["count"], parts["fail"]["count"]) == (1, 1)
    assert 0 < parts["success"]["ns"] < 60e9 and stats["last_inference"] > 1.7e12
    _, every, _ = await ask(surface, "GET", "/v2/models/stats")
    by = {one["name"]: one for one in every["model_stats"]}
    assert by[NAME] == stats and {"vectors", "writer"} < set(by)
    assert set(by["writer"]["inference_stats"]) == set(parts)
    surface.service.put(NAME, "DRAINING")
    assert (await ask(surface, "GET", f"/v2/models/{NAME}/stats"))[:2] == (200, one)
    surface.service.put(NAME, "COLD")
    assert (await ask(surface, "GET", f"/v2/models/{NAME}/stats"))[0] == 400
    _, every, _ = await ask(surface, "GET", "/v2/models/stats")
    assert NAME not in {one["name"] for one in every["model_stats"]}


async def test_the_index_has_its_version(surface: Surface, vllm: OpenAIServer) -> None:
    surface.service.put("vectors", "COLD")
    _, entries, _ = await ask(surface, "POST", "/v2/repository/index")
    assert {(one["name"], one["state"], one.get("version")) for one in entries} == {
        (NAME, "READY", "1"), ("vectors", "UNAVAILABLE", None)
    }  # fmt: skip


async def test_it_is_loaded_by_its_first_request(surface: Surface, vllm: OpenAIServer, service: FakeService) -> None:
    service.put(NAME, "COLD")
    asking = asyncio.create_task(predict(surface, {"text": "a", "parameters": {"max_tokens": 1}}))
    async with asyncio.timeout(10):
        while not service.waiting(NAME):
            await asyncio.sleep(0.01)
    service.put(NAME, "READY")
    assert (await asking)[1]["text"] == " a"


# --------------------------------------------------------------------------- adapters


async def test_an_adapter_is_asked_by_its_name(surface: Surface, vllm: OpenAIServer, service: FakeService) -> None:
    body = {"model": f"{NAME}:poet", "prompt": "a", "max_tokens": 1, "user": "ü"}
    status, _, answer = await post(surface, "/v1/completions", body, **{"Content-Type": "application/json"})
    assert (status, json.loads(answer)["model"]) == (200, "poet")
    assert vllm.asked[-1].body == {**body, "model": "poet"}
    assert service.usage.model(NAME).requests == 1
    status, _, answer = await post(
        surface, "/v1/completions", {**body, "model": f"{NAME}:other"}, **{"Content-Type": "application/json"}
    )
    assert (status, "`other` does not exist" in json.loads(answer)["error"]["message"]) == (404, True)
    sampling = json.dumps({"lora_name": "poet", "max_tokens": 1})
    assert (await predict(surface, {"text": "a", "parameters": {"sampling_parameters": sampling}}))[1]["text"] == " a"
    assert vllm.asked[-1].body["model"] == "poet"


async def test_whose_adapter_nobody_has(surface: Surface, vllm: OpenAIServer, real: Triton) -> None:
    body = {"model": "writer:poet", "messages": [{"role": "user", "content": "a"}]}
    status, answer, _ = await ask(surface, "POST", "/v1/chat/completions", data=json.dumps(body).encode())
    assert (status, "triton, which serves writer, has no adapters" in answer["error"]["message"]) == (400, True)
    body["model"] = "nobody:poet"
    assert (await ask(surface, "POST", "/v1/chat/completions", data=json.dumps(body).encode()))[0] == 404
    headers = {"Content-Encoding": "gzip"}
    packed = gzip.compress(json.dumps({**body, "model": f"{NAME}:poet"}).encode())
    status, answer, _ = await ask(surface, "POST", "/v1/chat/completions", data=packed, headers=headers)
    assert (status, "not packed" in answer["error"]["message"]) == (400, True)


async def test_a_model_with_a_colon_in_its_name_is_itself(surface: Surface, vllm: OpenAIServer) -> None:
    surface.service.add(f"{NAME}:poet", runtime="vllm")
    body = {"model": f"{NAME}:poet", "prompt": "a"}
    await ask(surface, "POST", "/v1/completions", data=json.dumps(body).encode())
    assert surface.service.usage.model(f"{NAME}:poet").requests == 1


# --------------------------------------------------------------------------- gRPC


def message(text: str, name: str = NAME, *, id: str = "", version: str = "", **inputs: Any) -> Any:
    request = pb.ModelInferRequest(model_name=name, id=id, model_version=version)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    for key, value in inputs.items():
        if isinstance(value, bool):
            request.inputs.add(name=key, datatype="BOOL", shape=[1]).contents.bool_contents.append(value)
        else:
            request.inputs.add(name=key, datatype="INT32", shape=[1]).contents.int_contents.append(value)
    return request


SAME_CALLS = [
    [message("a b", stream=True, max_tokens=3, id="7")],
    [message("a b", max_tokens=3), message("c", stream=True, max_tokens=2)],
    [message("a end", stream=True, max_tokens=5)],
]


@pytest.mark.parametrize("messages", SAME_CALLS)
async def test_streams_are_as_tritons(rpc: Rpc, real: Triton, vllm: OpenAIServer, messages: list[Any]) -> None:
    found = []
    for name in ("writer", NAME):
        for one in messages:
            one.model_name = name
        answers: list[Any] = []
        for one in messages:  # of several at once the order is open
            answers += [answer async for answer in rpc.stub.ModelStreamInfer(iter([one]))]
        for answer in answers:
            assert answer.infer_response.model_name == name
            answer.infer_response.model_name = ""
        found.append(answers)
    assert found[0] == found[1]


async def test_one_stream_may_ask_several_models(rpc: Rpc, real: Triton, vllm: OpenAIServer) -> None:
    vllm.go_on.set()
    asked = [message("a", "writer", id="1", max_tokens=1), message("b wait", id="2", max_tokens=2, stream=True)]
    asked += [message("a", "nobody", id="3"), message("c", id="4", max_tokens=1), message("d", "writer", id="5")]
    answers = [answer async for answer in rpc.stub.ModelStreamInfer(iter(asked))]
    by: dict[str, list[Any]] = {}
    for answer in answers:
        by.setdefault(answer.infer_response.id, []).append(answer)
    assert {id: len(found) for id, found in by.items()} == {"1": 1, "2": 3, "3": 1, "4": 1, "5": 1}
    assert "no model named nobody" in by["3"][0].error_message
    assert len({asked.headers["X-Request-ID"] for asked in vllm.asked}) == 2


async def test_pieces_of_a_stream_come_as_they_are_made(rpc: Rpc, vllm: OpenAIServer, service: FakeService) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.write(message("a wait b", stream=True, max_tokens=3))
    first = await call.read()
    assert first.infer_response.raw_output_contents[0] == b"\2\0\0\0 a"
    assert not first.infer_response.parameters["triton_final_response"].bool_param
    assert service.usage.model(NAME).in_flight == 1
    vllm.go_on.set()
    await call.done_writing()
    last = (await rest(call))[-1].infer_response
    assert last.parameters["triton_final_response"].bool_param
    assert service.usage.model(NAME).in_flight == 0


async def test_a_stream_that_is_left_ends_the_runtimes_work(rpc: Rpc, vllm: OpenAIServer, service: FakeService) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.write(message("a wait", stream=True))
    await call.read()
    call.cancel()
    async with asyncio.timeout(10):
        await vllm.left.wait()
        while service.usage.model(NAME).in_flight:
            await asyncio.sleep(0.01)


async def test_a_call_that_is_left_ends_the_runtimes_work(rpc: Rpc, vllm: OpenAIServer, service: FakeService) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.stub.ModelInfer(message("a wait"), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(10):
        await vllm.left.wait()
        while service.usage.model(NAME).in_flight:
            await asyncio.sleep(0.01)
    assert service.usage.model(NAME).failures == 0


async def test_messages_are_answered_side_by_side(rpc: Rpc, vllm: OpenAIServer) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.write(message("wait", id="slow", max_tokens=1))
    await call.write(message("a", id="quick", max_tokens=1))
    assert (await call.read()).infer_response.id == "quick"
    vllm.go_on.set()
    assert (await call.read()).infer_response.id == "slow"
    await call.done_writing()
    assert await rest(call) == []


async def test_calls(rpc: Rpc, real: Triton, vllm: OpenAIServer) -> None:
    async with aio_client.InferenceServerClient(rpc.address) as client:
        assert await client.is_model_ready(NAME) and await client.is_model_ready(NAME, "1")
        assert not await client.is_model_ready(NAME, "2")
        ours, theirs = await client.get_model_metadata(NAME), await client.get_model_metadata("writer")
        assert (ours.name, ours.platform, ours.versions) == (NAME, "vllm", ["1"])
        assert (ours.inputs[: len(theirs.inputs)], ours.outputs) == (theirs.inputs, theirs.outputs)
        config, other = (await client.get_model_config(NAME)).config, (await client.get_model_config("writer")).config
        assert (config.input[: len(other.input)], config.output) == (other.input, other.output)
        assert config.model_transaction_policy.decoupled and config.backend == "vllm"
        text = aio_client.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array(["a b"], dtype=object))
        tokens = aio_client.InferInput("max_tokens", [1], "INT32")
        tokens.set_data_from_numpy(np.array([3], dtype=np.int32))
        answer = await client.infer(NAME, [text, tokens], request_id="7")
        assert answer.get_response().id == "7"
        assert answer.as_numpy("text_output").tolist() == [b" a b a"]
        only = [aio_client.InferRequestedOutput("finish_reason")]
        assert [t.name for t in (await client.infer(NAME, [text, tokens], outputs=only)).get_response().outputs] == [
            "finish_reason"
        ]
        texts = aio_client.InferInput("text_input", [2, 1], "BYTES")
        texts.set_data_from_numpy(np.array([["a"], ["b c"]], dtype=object))
        assert (await client.infer("vectors", [texts])).as_numpy("sentence_embedding").shape == (2, 3)
        stats = {one.name: one for one in (await client.get_inference_statistics()).model_stats}
        assert {NAME, "vectors", "writer"} < set(stats)
        assert stats[NAME].inference_stats.success.count == 4  # its metadata and configuration were asked for too
        (one,) = (await client.get_inference_statistics(NAME)).model_stats
        assert one == stats[NAME]


async def test_each_call_has_an_id_that_the_runtime_knows(rpc: Rpc, vllm: OpenAIServer) -> None:
    for mine in ((("x-request-id", "mine"), ("traceparent", "00-1-2-01")), ()):
        call = rpc.stub.ModelInfer(message("a"), metadata=mine)
        told = dict(await call.initial_metadata())["x-request-id"]
        assert told == "mine" if mine else len(told) == 32
        await call
        assert vllm.asked[-1].headers["X-Request-ID"] == told
    assert vllm.asked[0].headers["traceparent"] == "00-1-2-01"


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (message(""), "INVALID_ARGUMENT", "Either prompt"),
        (message("fail"), "INTERNAL", "EngineCore encountered"),
        (message("a", version="7"), "NOT_FOUND", "has no version 7"),
        (message("a", nope=True), "INVALID_ARGUMENT", "has no input 'nope'"),
        (message("a break"), "UNAVAILABLE", "broke off|did not answer"),
    ],
)
async def test_errors_have_their_status(rpc: Rpc, vllm: OpenAIServer, request_: Any, code: str, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
        await rpc.stub.ModelInfer(request_)
    assert caught.value.code() is grpc.StatusCode[code]
    if code == "UNAVAILABLE":
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await rest(rpc.stub.ModelStreamInfer(iter([request_])))
        assert caught.value.code() is grpc.StatusCode[code]
        return
    call = rpc.stub.ModelStreamInfer(iter([request_, message("b", max_tokens=1)]))
    answers = {answer.error_message for answer in await rest(call)}
    assert "" in answers and any(words in one for one in answers)


async def test_values_that_are_not_what_they_are_said_to_be(rpc: Rpc, vllm: OpenAIServer) -> None:
    raw = pb.ModelInferRequest(model_name=NAME, raw_input_contents=[b"\1\0\0\0a"])
    for name in ("text_input", "stop"):
        raw.inputs.add(name=name, datatype="BYTES", shape=[1])
    half = pb.ModelInferRequest(model_name=NAME)
    half.inputs.add(name="text_input", datatype="FP16", shape=[1]).contents.fp32_contents.append(1)
    for wrong in (raw, half):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.stub.ModelInfer(wrong)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert vllm.asked == []
