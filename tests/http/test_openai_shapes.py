"""OpenAI's bodies as inference requests and responses as OpenAI's objects, by table."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from modelium.api import Tensor
from modelium.errors import ModeliumError
from modelium.http.answers import BadRequest, UpstreamFailed, openai_shape
from modelium.http.messages import InferResponse
from modelium.http.openai import merged
from modelium.http.openai_common import SWITCHES, check_task, model_of, model_of_form
from modelium.http.openai_embeddings import embedder, embeddings_answer, embeddings_asked
from modelium.http.openai_text import (
    Choice,
    TextAnswer,
    TextAsked,
    chat_asked,
    completion_asked,
    text_request,
    usage_of,
)
from modelium.http.tensors import TensorValue, join_bytes, to_json


def tensor(name: str, datatype: str = "BYTES", *shape: int) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=shape or (1,))


HI = [{"role": "user", "content": "hi"}]
TEXT_OUTPUT = [tensor("text_output")]
TEMPLATE = [
    tensor("text_input"), tensor("messages"), tensor("input_ids", "INT64", -1), tensor("stream", "BOOL"),
    tensor("sampling_parameters"), tensor("max_tokens", "INT32"),
]  # fmt: skip


def chat(**more: Any) -> TextAsked:
    return chat_asked({"model": "m", "messages": HI, **more})


def refused(call: Any, *given: Any, **more: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        call(*given, **more)
    return caught.value


# --------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hi", "hi"),
        ("", ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([], ""),
    ],
)
def test_contents_are_text_or_parts_of_it(content: Any, expected: str) -> None:
    asked = chat(messages=[{"role": "user", "content": content, "name": "x"}])
    ((name, value),) = asked.prompts
    assert (name, json.loads(value)) == ("messages", [{"role": "user", "content": expected, "name": "x"}])


def test_a_message_that_only_called_a_tool_has_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    ((_, value),) = chat(messages=[message]).prompts
    assert json.loads(value) == [{**message, "content": ""}]


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (None, "messages", "found None"),
        ([], "messages", "found []"),
        ("hi", "messages", "found 'hi'"),
        (["hi"], "messages[0]", "found 'hi'"),
        ([*HI, {"content": "hi"}], "messages[1]", "with a 'role'"),
        ([{"role": "user"}], "messages[0].content", "found None"),
        ([{"role": "user", "content": 7}], "messages[0].content", "found 7"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content", "found 'hi'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
         "messages[0].content", "found 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content", "type 'text'"),
    ],
)  # fmt: skip
def test_other_messages_are_refused(messages: Any, param: str, words: str) -> None:
    error = refused(chat, messages=messages)
    assert error.fields["param"] == param
    assert words in error.message


BAD_PROMPTS: list[Any] = [None, [], [[]], 7, {}, ["a", 1], [1, "a"], [[1], "a"], [True], [1.5], ["a"] * 2049]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [("text_input", "hi")]),
        (["a", "b"], [("text_input", "a"), ("text_input", "b")]),
        ([1, 2], [("input_ids", [1, 2])]),
        ([[1, 2], [3]], [("input_ids", [1, 2]), ("input_ids", [3])]),
        *[(bad, None) for bad in BAD_PROMPTS],
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    if expected is None:
        assert refused(completion_asked, {"model": "m", "prompt": prompt}).fields["param"] == "prompt"
    else:
        assert completion_asked({"model": "m", "prompt": prompt}).prompts == expected


def test_what_clients_send_by_default_changes_nothing() -> None:
    defaults = {
        "n": 1, "logprobs": False, "top_logprobs": None, "stream": False, "stream_options": None, "user": "me",
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": None, "tool_choice": "auto",
        "response_format": {"type": "text"}, "stop": None, "seed": None, "temperature": None, "max_tokens": None,
        "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True, "echo": False,
        "best_of": 1, "suffix": None, "modalities": ["text"], "reasoning_effort": None,
    }  # fmt: skip
    assert chat(**defaults) == chat()
    assert (chat().sampling, chat().stream, chat().include_usage) == ({}, False, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("n", True), ("best_of", 3), ("logprobs", True), ("logprobs", 0), ("logprobs", 5),
        ("top_logprobs", 2), ("echo", True), ("suffix", "x"), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("functions", [{}]), ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}), ("modalities", ["audio"]), ("audio", {}),
        ("web_search_options", {}), ("reasoning_effort", "high"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(chat, **{name: value})
    assert error.fields["param"] == name
    assert repr(name) in error.message and json.dumps(value) in error.message


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_completion_tokens": 6, "max_tokens": 5}, {"max_tokens": 6}),
        ({"temperature": 0, "top_p": 1, "seed": 0, "stop": ["a"]},
         {"temperature": 0, "top_p": 1, "seed": 0, "stop": ["a"]}),
        ({"frequency_penalty": 0.5, "logit_bias": {"5": 1}}, {"frequency_penalty": 0.5, "logit_bias": {"5": 1}}),
        ({"top_k": 3, "something_new": 1}, {"top_k": 3, "something_new": 1}),
    ],
)  # fmt: skip
def test_what_says_how_to_generate_goes_to_the_model(given: Any, sampling: Any) -> None:
    assert chat(**given).sampling == sampling


@pytest.mark.parametrize(
    ("given", "param"),
    [({"stream": "yes"}, "stream"), ({"stream": 1}, "stream"), ({"stream_options": [1]}, "stream_options")],
)
def test_streams_are_asked_for_by_true(given: Any, param: str) -> None:
    assert refused(chat, **given).fields["param"] == param
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage


@pytest.mark.parametrize("name", [None, "", 7, ["m"], "a\nb", "\ud800"])
def test_the_model_must_be_named(name: Any) -> None:
    assert refused(model_of, {"model": name}).fields["param"] == "model"


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n\0\r\n\xff'
    b'\r\n--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
)


def test_the_model_of_a_form() -> None:
    assert model_of_form("multipart/form-data; boundary=x", FORM) == "whisper"
    assert model_of_form('multipart/form-data; boundary="x"; charset=utf-8', FORM) == "whisper"
    assert refused(model_of_form, "multipart/form-data; boundary=y", FORM).fields["param"] == "model"
    assert "boundary" in refused(model_of_form, "multipart/form-data", FORM).message


@pytest.mark.parametrize(
    ("task", "suited", "words"),
    [
        (None, "text", None), ("", "text", None), ("a-new-one", "text", None), ("text-generation", "text", None),
        ("feature-extraction", "text", "/v1/embeddings"), ("text-classification", "text", "/predict/m"),
        ("text-generation", "embeddings", "/v1/chat/completions"), ("image-classification", "embeddings", "/predict/m"),
        ("feature-extraction", "embeddings", None),
    ],
)  # fmt: skip
def test_tasks_have_routes_that_suit_them(task: str | None, suited: str, words: str | None) -> None:
    route = "/v1/embeddings" if suited == "embeddings" else "/v1/chat/completions or /v1/completions"
    if words is None:
        check_task("m", task, route)
    else:
        assert words in refused(check_task, "m", task, route).message


# --------------------------------------------------------------------------- text


def sent(inputs: list[Tensor], asked: TextAsked) -> dict[str, Any]:
    request = text_request("m", inputs, TEXT_OUTPUT, asked.prompts[0], asked)
    return {value.name: (list(value.shape), to_json(value)) for value in request.inputs}


def test_the_template_is_asked_by_its_inputs() -> None:
    sampling = '{"temperature": 0.5, "max_tokens": 3}'
    assert sent(TEMPLATE, chat(stream=True, temperature=0.5, max_completion_tokens=3)) == {
        "messages": ([1], [json.dumps(HI)]), "stream": ([1], [True]), "sampling_parameters": ([1], [sampling])
    }  # fmt: skip
    assert sent(TEMPLATE, completion_asked({"prompt": [7, 8]})) == {
        "input_ids": ([2], [7, 8]), "stream": ([1], [False])
    }  # fmt: skip


def test_models_without_sampling_parameters_are_asked_by_inputs_of_their_own() -> None:
    inputs = [tensor("prompt", "BYTES", -1, 1), tensor("max_tokens", "INT32", -1, 1)]
    assert sent(inputs, completion_asked({"prompt": "hi", "max_tokens": 5})) == {
        "prompt": ([1, 1], ["hi"]), "max_tokens": ([1, 1], [5])
    }  # fmt: skip
    for extra in ({"seed": 1}, {"prompt_": 1}):
        asked = completion_asked({"prompt": "hi", **extra})
        error = refused(text_request, "m", inputs, TEXT_OUTPUT, asked.prompts[0], asked)
        assert error.fields["param"] in extra
    asked = completion_asked({"prompt": "hi", "text_input": "other"})
    refused(text_request, "m", [tensor("text_input")], TEXT_OUTPUT, asked.prompts[0], asked)


def test_tritons_vllm_backend_is_told_to_tell_its_counts() -> None:
    inputs = [tensor("text_input"), *(tensor(name, "BOOL") for name in SWITCHES), tensor("lora_name")]
    found = sent(inputs, completion_asked({"prompt": "hi"}))
    assert found == {"text_input": ([1], ["hi"]), **{name: ([1], [True]) for name in SWITCHES}}


@pytest.mark.parametrize(
    ("inputs", "outputs", "asked", "words"),
    [
        (TEMPLATE, ["logits"], chat(), "makes no text: its outputs are logits; ask /predict/m"),
        (TEMPLATE, ["sentence_embedding"], chat(), "ask /v1/embeddings"),
        ([tensor("text_input")], ["text_output"], chat(), "takes no chats"),
        ([tensor("text_input")], ["text_output"], completion_asked({"prompt": [1]}), "takes no token ids"),
        ([tensor("x")], ["text_output"], completion_asked({"prompt": "a"}), "it has no input text_input"),
    ],
)
def test_models_that_make_no_text_of_it_say_so(
    inputs: list[Tensor], outputs: list[str], asked: TextAsked, words: str
) -> None:
    made = [tensor(name) for name in outputs]
    assert words in refused(text_request, "m", inputs, made, asked.prompts[0], asked).message


def response(
    text: bytes, reason: str | None = None, prompt: int | None = None, made: int | None = None
) -> InferResponse:
    outputs = [TensorValue("text_output", "BYTES", (1,), join_bytes([text]))]
    if reason is not None:
        outputs.append(TensorValue("finish_reason", "BYTES", (1,), join_bytes([reason.encode()])))
    for name, count in (("num_input_tokens", prompt), ("num_output_tokens", made)):
        if count is not None:
            outputs.append(TensorValue(name, "UINT32", (1,), count.to_bytes(4, "little")))
    return InferResponse("m", "1", outputs)


def test_a_choice_is_put_together() -> None:
    choice = Choice(0)
    last = response(b"!", "length", 7, 2)
    assert [choice.add(r) for r in (response(b"h\xc3"), response(b"\xa9", "None", 7, 1), last)] == ["h", "é", "!"]
    assert (choice.finish_reason, usage_of([choice])) == (
        "length", {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    )  # fmt: skip
    assert usage_of([choice, Choice(1)]) is None
    assert Choice(1).finish_reason == "stop"


def test_objects_of_a_chat() -> None:
    choice, answer = Choice(0), TextAnswer("id", 5, "m", chat(stream_options={"include_usage": True}))
    head = {"id": "id", "created": 5, "model": "m"}
    chunk = {**head, "object": "chat.completion.chunk", "usage": None}

    def one(delta: Any, reason: str | None = None) -> Any:
        return {**chunk, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    assert answer.begin(choice) == [one({"role": "assistant", "content": ""})]
    assert answer.text(choice, choice.add(response(b"hi", "stop", 1, 2))) == [one({"content": "hi"})]
    assert answer.text(choice, "") == []
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert answer.end([choice]) == [one({}, "stop"), {**chunk, "choices": [], "usage": usage}]
    assert answer.whole([choice]) == {
        **head, "object": "chat.completion", "usage": usage,
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "hi", "refusal": None}, "logprobs": None,
            "finish_reason": "stop",
        }],
    }  # fmt: skip


def test_objects_of_completions() -> None:
    choices, answer = [Choice(0), Choice(1)], TextAnswer("id", 5, "m", completion_asked({"prompt": ["a", "b"]}))
    head = {"id": "id", "object": "text_completion", "created": 5, "model": "m"}
    assert answer.begin(choices[0]) == []
    assert answer.text(choices[1], "x") == [
        {**head, "choices": [{"index": 1, "text": "x", "logprobs": None, "finish_reason": None}]}
    ]
    ends = [{**head, "choices": [{"index": i, "text": "", "logprobs": None, "finish_reason": "stop"}]} for i in (0, 1)]
    assert answer.end(choices) == ends
    choices[1].add(response(b"y"))
    assert [(c["index"], c["text"]) for c in answer.whole(choices)["choices"]] == [(0, ""), (1, "y")]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (404, "invalid_request_error"), (403, "permission_error"),
        (429, "rate_limit_error"), (500, "server_error"), (502, "server_error"), (503, "server_error"),
    ],
)  # fmt: skip
def test_errors(status: int, kind: str) -> None:
    error = ModeliumError("words", code="some_code", param="n")
    assert openai_shape(error, status) == {
        "error": {"message": "words", "type": kind, "param": "n", "code": "some_code"}
    }


# --------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"), ({"input": []}, "input"), ({"input": [1, 2]}, "input"), ({"input": [[1]]}, "input"),
        ({"input": ["a", 1]}, "input"), ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": "4"}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"), ({"input": "a", "truncate": True}, "truncate"),
    ],
)  # fmt: skip
def test_embeddings_that_can_not_be_made(body: Any, param: str) -> None:
    assert refused(embeddings_asked, {"model": "m", **body}).fields["param"] == param


ENCODER = [tensor("sentence_embedding", "FP32", -1, 2), tensor("attention_mask", "INT64", -1, -1)]


def test_texts_become_one_request() -> None:
    how = embedder("m", [tensor("text_input", "BYTES", -1, 1)], ENCODER)
    request = how.request(["a", "é"])
    assert [(v.name, v.shape, to_json(v)) for v in request.inputs] == [("text_input", (2, 1), ["a", "é"])]
    assert [(wanted.name, wanted.binary) for wanted in request.outputs] == [
        ("sentence_embedding", True), ("attention_mask", True)
    ]  # fmt: skip
    assert how.takes_many and not embedder("m", [tensor("text_input", "BYTES", 1)], ENCODER).takes_many


def test_vectors_and_tokens_are_read() -> None:
    how = embedder("m", [tensor("text_input", "BYTES", -1, 1)], ENCODER)
    vectors = np.array([[1, 2], [3, 4]], "<f2")
    mask = np.array([[1, 1, 0], [1, 1, 1]], "<i8")
    outputs = [
        TensorValue("sentence_embedding", "FP16", (2, 2), vectors.tobytes()),
        TensorValue("attention_mask", "INT64", (2, 3), mask.tobytes()),
    ]
    found, tokens = how.read(InferResponse("m", "1", outputs), 2)
    assert (found.tolist(), found.dtype.name, tokens) == ([[1, 2], [3, 4]], "float32", 5)
    assert how.read(InferResponse("m", "1", outputs[:1]), 2)[1] is None
    for wrong, count in ((outputs[1:], 2), (outputs, 3)):
        with pytest.raises(UpstreamFailed, match="expected sentence_embedding with"):
            how.read(InferResponse("m", "1", wrong), count)


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([tensor("text_input")], [tensor("text_output")], "ask /v1/chat/completions"),
        ([tensor("text_input")], [tensor("logits")], "ask /predict/m"),
        ([tensor("input_ids", "INT64", -1)], ENCODER, "ask /predict/m"),
    ],
)
def test_models_that_make_no_embeddings_say_so(inputs: list[Tensor], outputs: list[Tensor], words: str) -> None:
    assert words in refused(embedder, "m", inputs, outputs).message


def test_the_answer_has_both_forms() -> None:
    vectors = np.array([[1 / 3, 2], [3, 4]], np.float32)
    found = json.loads(embeddings_answer(embeddings_asked({"input": ["a", "b"]}), "m", vectors, 5))
    assert (found["object"], found["model"]) == ("list", "m")
    assert found["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert [(one["object"], one["index"]) for one in found["data"]] == [("embedding", 0), ("embedding", 1)]
    assert np.array_equal(np.array([one["embedding"] for one in found["data"]], np.float32), vectors)
    asked = embeddings_asked({"input": ["a", "b"], "encoding_format": "base64", "dimensions": 2})
    packed = json.loads(embeddings_answer(asked, "m", vectors, None))
    assert packed["usage"] is None
    assert b"".join(base64.b64decode(one["embedding"]) for one in packed["data"]) == vectors.tobytes()
    error = refused(embeddings_answer, embeddings_asked({"input": "a", "dimensions": 3}), "m", vectors, None)
    assert error.fields["param"] == "dimensions"


# --------------------------------------------------------------------------- several at once


class Sources:
    """Generators that count how many of them run."""

    def __init__(self, failing: int = -1) -> None:
        self.running = self.most = self.closed = 0
        self.failing = failing

    async def one(self, number: int) -> AsyncGenerator[str, None]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for step in range(3):
                await asyncio.sleep(0)
                if number == self.failing and step == 1:
                    raise UpstreamFailed("gone")
                yield f"{number}.{step}"
        finally:
            self.running -= 1
            self.closed += 1

    async def take(self, count: int, at_once: int, enough: int = 1000) -> list[tuple[int, str]]:
        found = []
        async with aclosing(merged([self.one(number) for number in range(count)], at_once)) as values:
            async for value in values:
                found.append(value)
                if len(found) == enough:
                    break
        return found


async def test_sources_are_merged_in_their_own_order() -> None:
    sources = Sources()
    found = await sources.take(7, 3)
    assert (sources.most, sources.running, sources.closed) == (3, 0, 7)
    assert sorted(found) == [(n, f"{n}.{step}") for n in range(7) for step in range(3)]
    for number in range(7):
        assert [text for n, text in found if n == number] == [f"{number}.{step}" for step in range(3)]


async def test_who_stops_early_closes_the_sources() -> None:
    sources = Sources()
    assert len(await sources.take(7, 3, enough=4)) == 4
    assert sources.running == 0 and sources.closed >= 3


async def test_one_that_fails_closes_the_others() -> None:
    sources = Sources(failing=1)
    with pytest.raises(UpstreamFailed, match="gone"):
        await sources.take(7, 3)
    assert sources.running == 0
