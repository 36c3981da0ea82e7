"""Models whose runtime speaks KServe over HTTP alone, over gRPC and OpenAI: a real tritonserver, its gRPC not told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton_client
from tritonclient.utils import InferenceServerException

from modelium.api import Tensor
from modelium.api.testing import eventually
from modelium.http.answers import UpstreamFailed
from modelium.http.messages import InferRequest
from modelium.http.over_generate import generate_body, response_of
from modelium.http.streams import InferenceFailed, to_proto
from modelium.http.tensors import TensorValue, to_json, to_raw
from tests.http.conftest import Rpc, Surface
from tests.http.fakes import FakeService
from tests.http.tritonserver import DECOUPLED, NAMES, Triton


@pytest.fixture
def real(service: FakeService, triton: Triton) -> Triton:
    service.runtime(kserve_http=triton.url)
    for name in NAMES:
        service.add(name, decoupled=name in DECOUPLED)
    return triton


@pytest.fixture
async def client(rpc: Rpc, real: Triton) -> AsyncIterator[Any]:
    async with triton_client.InferenceServerClient(rpc.address) as client:
        yield client


def tensor(name: str, values: Any, datatype: str) -> Any:
    array = np.array(values, dtype=object if datatype == "BYTES" else None)
    made = triton_client.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array.astype(object if datatype == "BYTES" else {"FP32": "f4", "BOOL": "?"}[datatype]))
    return made


async def test_grpc_is_answered_by_http(client: Any) -> None:
    answer = await client.infer("identity", [tensor("INPUT0", [[1, 2, 3]], "FP32")], request_id="7")
    assert answer.as_numpy("OUTPUT0").tolist() == [[1, 2, 3]] and answer.get_response().id == "7"
    metadata = await client.get_model_metadata("identity")
    assert (metadata.inputs[0].name, list(metadata.inputs[0].shape)) == ("INPUT0", [-1, -1])
    assert (await client.get_model_config("identity")).config.max_batch_size == 8
    assert await client.is_model_ready("identity")
    with pytest.raises(InferenceServerException, match=r"unexpected inference input .OTHER"):
        await client.infer("identity", [tensor("OTHER", [[1]], "FP32")])


def prompts(*texts: str) -> Any:
    async def messages() -> AsyncIterator[dict[str, Any]]:
        for text in texts:
            inputs = [tensor("text_input", [text], "BYTES"), tensor("stream", [True], "BOOL")]
            yield {"model_name": "writer", "inputs": inputs}

    return messages()


async def test_a_stream_of_grpc_comes_piece_by_piece(client: Any) -> None:
    found = [(answer, error) async for answer, error in client.stream_infer(prompts("a b"))]
    assert not any(error for _, error in found)
    texts = [answer.as_numpy("text_output").item().decode() for answer, _ in found]
    assert texts == [" a", " b", " a", " b", ""]
    assert found[-1][0].as_numpy("finish_reason").item() == b"length"


async def test_who_wants_to_know_the_last_is_told(rpc: Rpc, real: Triton) -> None:
    text = TensorValue("text_input", "BYTES", (1,), to_raw("text_input", "BYTES", (1,), ["a"]))
    message = to_proto("writer", "", InferRequest([text]))  # it asks for that
    answers = [answer.infer_response async for answer in rpc.stub.ModelStreamInfer(iter([message]))]
    assert [answer.parameters["triton_final_response"].bool_param for answer in answers] == [False, True]
    assert [len(answer.outputs) for answer in answers] == [4, 0]


async def test_what_is_wrong_with_one_message_is_in_band(client: Any) -> None:
    found = [(answer, error) async for answer, error in client.stream_infer(prompts("a fail"))]
    assert "told to fail" in str(found[-1][1])
    assert [answer.as_numpy("text_output").item() for answer, _ in found[:-1]] == [b" a"]


async def test_a_client_that_leaves_ends_its_generation(client: Any, surface: Surface) -> None:
    stream = client.stream_infer(prompts("slow"))
    await anext(aiter(stream))
    stream.cancel()

    async def over() -> bool:
        async with surface.client.post(f"{surface.url}/v2/models/writer/generate", json=asked) as answer:
            return bool((await answer.json())["text_output"] == " 0")

    asked = {"text_input": "running?", "max_tokens": 1}
    await eventually(over, "nothing is generated any more")


async def test_a_chat_is_streamed_piece_by_piece(surface: Surface, real: Triton) -> None:
    body = {"model": "writer", "messages": [{"role": "user", "content": "x y"}], "max_tokens": 3}
    url = f"{surface.url}/v1/chat/completions"
    async with surface.client.post(url, json=body) as answer:
        whole = await answer.json()
    assert whole["choices"][0]["message"]["content"] == " user:x user:y user:x"
    assert whole["usage"]["completion_tokens"] == 3
    async with surface.client.post(url, json={**body, "stream": True}) as answer:
        events = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
    assert events[-1].strip() == b"[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events[:-1]]
    assert [delta for delta in deltas if delta] == [" user:x", " user:y", " user:x"]


# --------------------------------------------------------------------------- as plain values

KNOWN = {
    "text": Tensor(name="text", datatype="BYTES", shape=(1,)),
    "rows": Tensor(name="rows", datatype="FP32", shape=(-1, 3)),
}


def test_a_request_becomes_one_object() -> None:
    inputs = [
        TensorValue("text", "BYTES", (1,), to_raw("text", "BYTES", (1,), ["é"])),
        TensorValue("stop", "BYTES", (2,), to_raw("stop", "BYTES", (2,), ["a", "b"])),
    ]
    request = InferRequest(inputs, "7", {"temperature": 0.5, "triton_enable_empty_final_response": True})
    assert json.loads(generate_body(request)) == {"text": "é", "stop": ["a", "b"], "temperature": 0.5, "id": "7"}


def test_an_object_becomes_a_response() -> None:
    response = response_of(
        "m", KNOWN, InferRequest([], "7"), b'{"model_version":"2","text":"a","rows":[1,2,3],"new":1}'
    )
    assert (response.version, response.id) == ("2", "7")
    assert {t.name: (t.shape, to_json(t)) for t in response.outputs} == {
        "text": ((1,), ["a"]), "rows": ((1, 3), [1, 2, 3]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "status"),
    [(b'{"error":"no"}', 400), (b'{"error":"Failed to process the request(s) for model m"}', 500)],
)
def test_an_error_in_band(data: bytes, status: int) -> None:
    with pytest.raises(InferenceFailed) as caught:
        response_of("m", KNOWN, InferRequest([]), data)
    assert caught.value.status == status


@pytest.mark.parametrize("data", [b"x", b"[1]", b"3", b'{"rows":["a"]}'])
def test_events_that_are_none(data: bytes) -> None:
    with pytest.raises(UpstreamFailed, match="answered wrongly"):
        response_of("m", KNOWN, InferRequest([]), data)
