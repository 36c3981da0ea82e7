"""KServe's inference made OpenAI's requests, and OpenAI's answers made KServe's, as plain values."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelium.api import Tensor
from modelium.http.answers import BadRequest, UpstreamFailed
from modelium.http.generate import generate_answer, generate_request
from modelium.http.interfaces import EMBEDDING, TEXT, interface_of
from modelium.http.messages import InferRequest, InferResponse, WantedOutput
from modelium.http.over_openai import (
    MAX_TOKENS,
    Events,
    Writing,
    embedding_call,
    embedding_response,
    failure,
    text_call,
)
from modelium.http.streams import InferenceFailed
from modelium.http.tensors import TensorValue, to_array, to_json, to_raw

KNOWN = {tensor.name: tensor for tensor in TEXT.inputs}


def tensor(name: str, *values: Any) -> TensorValue:
    datatype = KNOWN[name].datatype
    return TensorValue(name, datatype, (len(values),), to_raw(name, datatype, (len(values),), list(values)))


def asked(parameters: dict[str, Any] | None = None, **inputs: Any) -> InferRequest:
    values = [tensor(name, *(value if isinstance(value, list) else [value])) for name, value in inputs.items()]
    return InferRequest(values, "id", parameters or {})


def outputs(response: InferResponse) -> dict[str, Any]:
    return {tensor.name: to_json(tensor) for tensor in response.outputs}


# --------------------------------------------------------------------------- the question


DEFAULT = {"model": "m", "stream": False, "max_tokens": MAX_TOKENS}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("request_", "path", "body"),
    [
        (asked(text_input="hi"), "completions", {**DEFAULT, "prompt": "hi"}),
        (asked(text_input="hi", stream=True), "completions", {**DEFAULT, **STREAM, "prompt": "hi"}),
        (asked({"stream": True}, text_input="hi"), "completions", {**DEFAULT, **STREAM, "prompt": "hi"}),
        (asked({"stream": True}, text_input="hi", stream=False), "completions", {**DEFAULT, "prompt": "hi"}),
        (asked(input_ids=[1, 2]), "completions", {**DEFAULT, "prompt": [1, 2], "return_token_ids": True}),
        (asked(messages=json.dumps(CHAT)), "chat/completions", {**DEFAULT, "messages": CHAT}),
        (asked(text_input="a", max_tokens=7, seed=2**40, top_k=-1, stop=["x", "y"]), "completions",
         {**DEFAULT, "prompt": "a", "max_tokens": 7, "seed": 2**40, "top_k": -1, "stop": ["x", "y"]}),
        (asked(text_input="a", temperature=0.5, sampling_parameters='{"temperature": 0, "max_tokens": 3, "min_p": 1}'),
         "completions", {**DEFAULT, "prompt": "a", "temperature": 0.5, "max_tokens": 3, "min_p": 1}),
        (asked({"temperature": 1, "priority": 3, "sequence_id": 7, "triton_enable_empty_final_response": True},
               text_input="a", sampling_parameters='{"temperature": 0}'),
         "completions", {**DEFAULT, "prompt": "a", "temperature": 1}),
        (asked(text_input="a", sampling_parameters='{"lora_name": "poet", "n": 1, "seed": null}'),
         "completions", {**DEFAULT, "model": "poet", "prompt": "a"}),
        (asked(text_input="a", stream=True, exclude_input_in_output=True, return_num_input_tokens=False),
         "completions", {**DEFAULT, **STREAM, "prompt": "a"}),
        (asked({"exclude_input_in_output": True, "return_finish_reason": True}, messages=json.dumps(CHAT)),
         "chat/completions", {**DEFAULT, "messages": CHAT}),
        (asked(text_input="a", repetition_penalty=2),
         "completions", {**DEFAULT, "prompt": "a", "repetition_penalty": 2, "repeat_penalty": 2}),
    ],
)  # fmt: skip
def test_an_inference_becomes_a_completion(request_: InferRequest, path: str, body: dict[str, Any]) -> None:
    TEXT.check("m", request_)
    call = text_call("m", request_, pieces=True)
    assert (call.path, call.body) == (f"/v1/{path}", body)
    assert text_call("m", request_, pieces=False).body.get("stream") is False


def test_what_nobody_asked_for_is_not_insisted_on() -> None:
    first, second = (json.loads(body) for body in text_call("m", asked(text_input="a"), pieces=True).bodies())
    assert first.pop("max_tokens") == MAX_TOKENS
    assert first == second
    (only,) = text_call("m", asked(text_input="a", max_tokens=5), pieces=True).bodies()
    assert json.loads(only)["max_tokens"] == 5


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (asked(), "expected one of text_input, messages and input_ids, found none"),
        (asked(text_input="a", messages="[]"), "found messages and text_input"),
        (asked(text_input="a", sampling_parameters="x"), "sampling_parameters to be a JSON object"),
        (asked(text_input="a", sampling_parameters="[1]"), "found '[1]'"),
        (asked(text_input="a", sampling_parameters='{"n": 2}'), "'n' is no sampling parameter"),
        (asked(text_input="a", sampling_parameters='{"model": "other"}'), "'model' is no sampling parameter"),
        (asked({"stream_options": "x"}, text_input="a"), "'stream_options' is no sampling parameter"),
        (asked({"stream": "yes"}, text_input="a"), "expected 'stream' to be true or false"),
        (asked(text_input="a", exclude_input_in_output=False, stream=True), "only a whole answer to text_input"),
        (asked({"exclude_input_in_output": False}, input_ids=[1]), "only a whole answer to text_input"),
        (asked(messages="hello"), "expected messages to be JSON"),
        (asked(messages="[]"), "a list of at least one message, found '[]'"),
        (asked(messages='{"role": "user"}'), "a list of at least one message"),
        (asked(text_input="a", max_tokens=0), "max_tokens must be 1 or more, and is 0"),
        (asked(text_input="a", temperature=-1), "temperature must be 0 or more, and is -1.0"),
        (asked({"top_p": 0}, text_input="a"), "top_p must be more than 0 and at most 1, and is 0"),
        (
            asked(text_input="a", sampling_parameters='{"repetition_penalty": 0}'),
            "repetition_penalty must be more than",
        ),
        (InferRequest([TensorValue("text_input", "BYTES", (1,), b"\1\0\0\0\xff")]), "expected text in UTF-8"),
    ],
)
def test_what_can_not_be_asked_is_told(request_: InferRequest, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        text_call("m", request_, pieces=True)
    assert words in caught.value.message


def test_an_answer_may_repeat_its_prompt() -> None:
    call = text_call("m", asked(text_input="a ", exclude_input_in_output=False), pieces=False)
    assert call.before == "a " and call.body == {**DEFAULT, "prompt": "a "}
    answer = {"choices": [{"text": "b", "finish_reason": "stop"}]}
    assert outputs(Writing("m", asked()).whole(answer, call.before))["text_output"] == ["a b"]


def test_numbers_that_json_has_not() -> None:
    with pytest.raises(BadRequest, match="finite"):
        text_call("m", asked(text_input="a", sampling_parameters='{"min_p": NaN}'), pieces=True).bodies()


def shaped(name: str, datatype: str, *shape: int, **parameters: Any) -> TensorValue:
    return TensorValue(name, datatype, shape, b"", parameters)


@pytest.mark.parametrize(
    ("interface", "inputs", "wanted", "words"),
    [
        (TEXT, [shaped("nope", "BYTES", 1)], [], "m has no input 'nope': it takes text_input, messages"),
        (TEXT, [shaped("text_input", "INT32", 1)], [], "expected BYTES of shape [1] (-1: any), found INT32 of shape"),
        (TEXT, [shaped("text_input", "BYTES", 2)], [], "found BYTES of shape [2]"),
        (TEXT, [shaped("text_input", "BYTES", 1, 1)], [], "found BYTES of shape [1, 1]"),
        (TEXT, [], [WantedOutput("nope", True)], "m has no output 'nope': it has text_output, finish_reason"),
        (TEXT, [], [WantedOutput("text_output", True, {"classification": 2})], "classification is Triton's"),
        (TEXT, [shaped("stop", "BYTES", 9, shared_memory_region="r")], [], "shared_memory_region is Triton's"),
        (EMBEDDING, [], [], "m: the input 'text_input' is missing"),
        (EMBEDDING, [shaped("text_input", "BYTES", 2)], [], "found BYTES of shape [2]"),
    ],
)
def test_names_datatypes_and_shapes_are_the_models(
    interface: Any, inputs: list[TensorValue], wanted: list[WantedOutput], words: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        interface.check("m", InferRequest(inputs, outputs=wanted))
    assert words in caught.value.message


def test_many_texts_become_embeddings() -> None:
    raw = to_raw("text_input", "BYTES", (2, 1), ["a", "b"])
    request = InferRequest([TensorValue("text_input", "BYTES", (2, 1), raw)], parameters={"dimensions": 8})
    EMBEDDING.check("m", request)
    body = {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}
    assert (embedding_call("m", request).path, embedding_call("m", request).body) == ("/v1/embeddings", body)
    for bad, words in (({"model": "x"}, "'model' is no parameter"), ({}, "1 to 2048 texts at once, found 0")):
        values = TensorValue("text_input", "BYTES", (0, 1), b"") if not bad else request.inputs[0]
        with pytest.raises(BadRequest, match=words):
            embedding_call("m", InferRequest([values], parameters=bad))


# --------------------------------------------------------------------------- the answer


def test_an_answer_becomes_a_response() -> None:
    answer = {
        "choices": [{"index": 0, "text": "hé", "finish_reason": "length", "token_ids": [5, 6]}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    response = Writing("m", asked(input_ids=[1])).whole(answer)
    assert (response.model, response.version, response.id) == ("m", "1", "id")
    assert outputs(response) == {
        "text_output": ["hé"], "finish_reason": ["length"], "num_input_tokens": [3], "num_output_tokens": [2],
        "output_ids": [5, 6],
    }  # fmt: skip
    assert {(t.name, t.datatype) for t in response.outputs} == {(t.name, t.datatype) for t in TEXT.outputs}
    only = InferRequest([], outputs=[WantedOutput("finish_reason", True)])
    assert outputs(Writing("m", only).whole(answer)) == {"finish_reason": ["length"]}


@pytest.mark.parametrize("content", [None, "", "hi"])
def test_a_chats_answer(content: str | None) -> None:
    answer = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    found = outputs(Writing("m", asked()).whole(answer))
    assert found == {"text_output": [content or ""], "finish_reason": ["stop"]}  # llama.cpp may tell no counts


def test_events_become_responses() -> None:
    writing = Writing("m", asked())
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": None},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
    ]
    pieces = [writing.piece(event) for event in events]
    assert [outputs(piece) if piece else None for piece in pieces] == [
        None, {"text_output": ["a"]}, {"text_output": ["b"]}, None
    ]  # fmt: skip
    assert outputs(writing.end()) == {
        "text_output": [""], "finish_reason": ["stop"], "num_input_tokens": [1], "num_output_tokens": [2]
    }  # fmt: skip


def test_a_stream_that_only_stops_is_not_over() -> None:
    writing = Writing("m", asked())
    writing.piece({"choices": [{"text": "a"}]})
    with pytest.raises(UpstreamFailed, match="in the middle"):
        writing.end()


@pytest.mark.parametrize("answer", [{}, {"choices": 5}, {"choices": [5]}, {"choices": [{"delta": 1}]}])
def test_what_is_no_answer_is_the_runtimes_fault(answer: dict[str, Any]) -> None:
    with pytest.raises(UpstreamFailed, match="the runtime of m answered wrongly"):
        Writing("m", asked()).whole(answer)


@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_are_in_order(packed: bool) -> None:
    def vector(*values: float) -> Any:
        array = np.array(values, "<f4")
        return base64.b64encode(array.tobytes()).decode() if packed else array.tolist()

    data = [{"index": 1, "embedding": vector(1 / 3, 4)}, {"index": 0, "embedding": vector(1, 2)}]
    response = embedding_response("m", InferRequest([]), json.dumps({"data": data}).encode())
    (found,) = response.outputs
    assert (found.name, found.datatype, found.shape) == ("sentence_embedding", "FP32", (2, 2))
    assert to_array(found).tolist() == np.array([[1, 2], [1 / 3, 4]], "<f4").tolist()
    for wrong in (b"no", b"{}", b'{"data": []}', b'{"data": [{"index": 0}]}'):
        with pytest.raises(UpstreamFailed, match="answered wrongly"):
            embedding_response("m", InferRequest([]), wrong)


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (400, b'{"error": {"message": "no such", "type": "BadRequestError", "param": null, "code": 400}}', "no such"),
        (404, b'{"object": "error", "message": "no such", "code": 404}', "no such"),
        (404, b'{"detail": "Not Found"}', "Not Found"),
        (422, b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (500, b'{"error": "bad"}', "bad"),
        (503, b"Loading model", "Loading model"),
        (500, b"", "status 500 without a word"),
    ],
)
def test_errors_keep_their_words(status: int, answer: bytes, words: str) -> None:
    found = failure("m", status, answer)
    assert isinstance(found, InferenceFailed)
    assert (found.status, found.message) == (status, words)
    assert isinstance(failure("m", 307, b""), UpstreamFailed)


@given(st.data())
def test_events_are_found_however_they_arrive(data: st.DataObject) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    lines = [": ping", "", "data: one", "", "event: x", "data:two", "data: more", "id: 7", "", "data: [DONE]", "", ""]
    stream = end.join(lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    events, found = Events(), []
    for begin, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += events.feed(stream[begin:stop])
    assert found == [b"one", b"two\nmore", b"[DONE]"]


def test_an_endless_event_ends() -> None:
    events = Events()
    with pytest.raises(UpstreamFailed, match="server-sent events of at most"):
        for _ in range(17):
            events.feed(b"x" * 2**20)


# --------------------------------------------------------------------------- what such a model is


def test_the_task_says_what_a_model_is_like() -> None:
    assert interface_of("feature-extraction") is EMBEDDING
    assert interface_of("text-generation") is interface_of(None) is TEXT


# --------------------------------------------------------------------------- Triton's generate


@pytest.mark.parametrize(
    ("body", "inputs", "parameters"),
    [
        ({"text_input": "a"}, {"text_input": ["a"]}, {}),
        ({"text_input": ["a"], "seed": 3, "other": 1.5}, {"text_input": ["a"], "seed": [3]}, {"other": 1.5}),
        ({"text_input": "a", "parameters": {"stream": True, "x": "y"}}, {"text_input": ["a"], "stream": [True]},
         {"x": "y"}),
        ({"stop": ["a", "b"], "id": "7"}, {"stop": ["a", "b"]}, {}),
    ],
)  # fmt: skip
def test_generate(body: dict[str, Any], inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
    request = generate_request(TEXT.inputs, body)
    assert {t.name: to_json(t) for t in request.inputs} == inputs
    assert (request.parameters, request.id) == (parameters, body.get("id", ""))
    TEXT.check("m", request)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text_input": ["a", "b"]}, "input 'text_input': expected values for the shape [1] (-1: any), found 2"),
        ({"text_input": 5}, "expected texts, as BYTES has, found 5"),
        ({"text_input": None}, "expected texts"),
        ({"max_tokens": "2"}, "expected integers, as INT32 has, found texts"),
        ({"max_tokens": 2.5}, "found fractions"),
        ({"other": [1]}, "parameter 'other': expected a number, a text, true or false, found [1]"),
        ({"parameters": 5}, "expected 'parameters' to be an object"),
        ({"id": 7}, "expected 'id' to be a text"),
    ],
)
def test_generate_says_what_is_wrong(body: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        generate_request(TEXT.inputs, body)
    assert words in caught.value.message


def test_generate_takes_batches() -> None:
    (found,) = generate_request(EMBEDDING.inputs, {"text_input": ["a", "b"]}).inputs
    assert found.shape == (2, 1)
    with pytest.raises(BadRequest, match="expected values for the shape"):
        generate_request([Tensor(name="x", datatype="FP32", shape=(-1, 2))], {"x": [1, 2, 3]})


def test_generates_answer() -> None:
    values = [TensorValue("a", "BYTES", (1,), b"\1\0\0\0x"), TensorValue("b", "INT32", (2,), b"\1\0\0\0\2\0\0\0")]
    answer = {"model_name": "m", "model_version": "1", "id": "7", "a": "x", "b": [1, 2]}
    assert json.loads(generate_answer(InferResponse("m", "1", values, "7"))) == answer
