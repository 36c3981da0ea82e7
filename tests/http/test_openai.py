"""OpenAI's routes: whom they reach, how they fail, and the official client against a real tritonserver."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from aiohttp import web

from modelium.errors import (
    ModelFailed,
    ModeliumError,
    NeverFits,
    QueueFull,
    RuntimeUnavailable,
)
from modelium.http.openai import PASSED_ON
from tests.http.conftest import Surface
from tests.http.test_kserve import ask
from tests.http.tritonserver import Triton, free_ports
from tests.http.upstreams import Recorder, in_two_pieces, read_request, recording, scripted

CHAT = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi there"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI}, "/v1/completions": {"prompt": "hi there"}, "/v1/embeddings": {"input": "hi there"}
}  # fmt: skip


def packed(model: Any = "m", **more: Any) -> bytes:
    return json.dumps({"model": model, **more}).encode()


@pytest.fixture
async def speaks(surface: Surface) -> AsyncIterator[Recorder]:
    """A runtime that speaks OpenAI, with a model `m` READY in it; it gives back what it is sent."""
    async with recording() as recorder:
        surface.service.runtime("vllm", openai=recorder.url)
        surface.service.add("m", runtime="vllm")
        yield recorder


# --------------------------------------------------------------------------- models


async def test_models(surface: Surface) -> None:
    service = surface.service
    service.runtime(kserve_http="http://127.0.0.1:1")
    for name in ("b", "a"):
        service.add(name)
    for name, state in (("cold", "COLD"), ("bad", "INVALID"), ("new", "DISCOVERED"), ("incoming/x", "DISCOVERED")):
        service.add(name)
        service.put(name, state)
    status, found, _ = await ask(surface, "GET", "/v1/models")
    assert (status, found["object"]) == (200, "list")
    assert [one["id"] for one in found["data"]] == ["a", "b", "cold"]
    one = {"id": "cold", "object": "model", "created": 500, "owned_by": "modelium"}
    assert found["data"][2] == one
    assert (await ask(surface, "GET", "/v1/models/cold"))[:2] == (200, one)
    for name in ("bad", "nobody", "org/nobody", "incoming/x"):
        status, found, _ = await ask(surface, "GET", f"/v1/models/{name}")
        assert (status, found["error"]["code"]) == (404, "model_not_found")
    assert service.calls == []


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry_after"),
    [
        (QueueFull("full"), 429, "rate_limit_error", "queue_full", "1"),
        (RuntimeUnavailable("away", retry_after_s=2.2), 503, "server_error", "runtime_unavailable", "3"),
        (ModelFailed("broken", retry_after_s=30), 503, "server_error", "model_failed", "30"),
        (NeverFits("too large"), 507, "server_error", "never_fits", None),
    ],
)
async def test_errors_have_openais_shape(
    surface: Surface, upstream: Recorder, error: ModeliumError, status: int, kind: str, code: str, retry_after: Any
) -> None:
    surface.service.put("m", "COLD")
    surface.service.failures["m"] = error
    for path, body in BODIES.items():
        found = await ask(surface, "POST", path, data=packed(**body))
        assert found[:2] == (status, {"error": {"message": error.message, "type": kind, "param": None, "code": code}})
        assert found[2].get("Retry-After") == retry_after
    assert surface.service.usage.model("m").results() == [("", (0, 0, 3))]


@pytest.mark.parametrize(
    ("method", "path", "how", "status", "code", "param"),
    [
        ("POST", CHAT, {"data": packed("nobody", messages=HI)}, 404, "model_not_found", None),
        ("POST", "/v1/completions", {"data": packed("", prompt="a")}, 400, "bad_request", "model"),
        ("POST", "/v1/completions", {"data": packed("\ud800", prompt="a")}, 400, "bad_request", "model"),
        ("POST", "/v1/completions", {"data": packed("nobody\U0001f600", prompt="a")}, 404, "model_not_found", None),
        ("POST", "/v1/embeddings", {"data": b""}, 400, "bad_request", "model"),
        ("POST", CHAT, {"data": b"{"}, 400, "bad_request", None),
        ("POST", CHAT, {"data": b"[1]"}, 400, "bad_request", None),
        ("POST", CHAT, {"data": b" " * (16 * 2**20 + 1)}, 413, "too_large", None),
        ("POST", CHAT, {"data": b"x", "headers": {"Content-Encoding": "br"}}, 400, "bad_request", None),
        ("POST", CHAT, {"data": packed(messages=HI), "headers": {"Origin": "https://elsewhere.example"}}, 403,
         "forbidden", None),
        ("POST", CHAT, {"data": packed("cold", messages=HI), "headers": {"x-modelium-deadline-s": "soon"}}, 400,
         "bad_request", None),
        ("POST", CHAT, {"data": packed("cold", messages=HI), "headers": {"x-modelium-deadline-s": "0"}}, 503,
         "deadline_passed", None),
        ("GET", CHAT, {}, 405, "method_not_allowed", None),
        ("POST", "/v1/none-such", {"data": b"{}"}, 404, "not_found", None),
        ("POST", "/v1/audio/speech", {"data": packed("m", input="a")}, 400, "bad_request", "model"),
        ("POST", "/v1/rerank", {"data": packed("cold", query="a")}, 400, "bad_request", "model"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_told_in_openais_shape(
    surface: Surface, upstream: Recorder, method: str, path: str, how: Any, status: int, code: str, param: str | None
) -> None:
    surface.service.add("cold")
    surface.service.put("cold", "COLD")
    found, answer, _ = await ask(surface, method, path, **how)
    error = answer["error"]
    assert (found, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert upstream.seen == [] and surface.service.usage.model("m").in_flight == 0


@pytest.mark.parametrize(
    ("path", "body", "task", "words"),
    [
        (CHAT, {"messages": HI, "tools": [{}]}, None, "'tools' can't be served"),
        (CHAT, {"messages": HI, "n": 2}, "text-generation", "'n' can't be served"),
        (CHAT, {"messages": HI}, "feature-extraction", "asked for at /v1/embeddings"),
        ("/v1/completions", {"prompt": "a"}, "image-classification", "asked for at /predict/m"),
        ("/v1/embeddings", {"input": "a"}, "text-generation", "asked for at /v1/chat/completions"),
        ("/v1/score", {"text_1": "a"}, "text-classification", "runtimes that speak OpenAI themselves"),
    ],
)  # fmt: skip
async def test_nothing_is_loaded_for_what_would_be_refused(
    surface: Surface, upstream: Recorder, path: str, body: Any, task: str | None, words: str
) -> None:
    if task is not None:
        surface.service.tasks["m"] = task
    surface.service.put("m", "COLD")
    status, answer, _ = await ask(surface, "POST", path, data=packed(**body))
    assert status == 400
    assert words in answer["error"]["message"]
    assert surface.service.calls == []


async def test_a_runtime_that_is_not_known_yet_is_waited_for(surface: Surface) -> None:
    """It may speak OpenAI, and serve what KServe has no way to ask for."""
    service = surface.service
    service.add("m", runtime="vllm")
    service.put("m", "COLD")
    asking = asyncio.create_task(ask(surface, "POST", "/v1/score", data=packed(tools=[{}])))
    while not service.waiting("m"):
        await asyncio.sleep(0.01)
    async with recording() as recorder:
        service.runtime("vllm", openai=recorder.url)
        service.add("m", runtime="vllm")
        assert (await asking)[0] == 200
        assert [seen.target for seen in recorder.seen] == ["/v1/score"]


async def test_a_runtime_that_is_lost_is_told_of_once(surface: Surface) -> None:
    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)

    async with scripted(dies) as url:
        surface.service.runtime("vllm", openai=url)
        surface.service.add("m", runtime="vllm")
        status, answer, _ = await ask(surface, "POST", CHAT, data=packed(messages=HI))
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (502, "server_error", "upstream_failed")
    assert surface.service.poked == ["vllm"]
    usage = surface.service.usage.model("m")
    assert (usage.in_flight, usage.requests, usage.failures) == (0, 1, 1)


# --------------------------------------------------------------------------- a runtime that speaks OpenAI


@pytest.mark.parametrize("path", [*BODIES, *(f"/v1/{path}" for path in PASSED_ON)])
async def test_it_is_passed_every_byte(surface: Surface, speaks: Recorder, path: str) -> None:
    body = b'{ "tools" : [1],"n":3, "model":"m" }'  # no KServe could do it
    headers = {"Authorization": "Bearer x", "x-modelium-organisation": "team", "Content-Type": "application/json"}
    async with surface.client.post(f"{surface.url}{path}?a=%20b", data=body, headers=headers) as response:
        assert (response.status, await response.read()) == (200, body)
    (seen,) = speaks.seen
    assert (seen.target, seen.body) == (f"{path}?a=%20b", body)
    assert (seen.headers["Authorization"], seen.headers["Content-Length"]) == ("Bearer x", str(len(body)))
    assert surface.service.usage.model("m").results() == [("team", (1, 0, 0))]


async def test_a_packed_body_stays_packed(surface: Surface, speaks: Recorder) -> None:
    body = gzip.compress(packed(messages=HI))

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:10]
        yield body[10:]

    for data in (body, pieces()):
        headers = {"Content-Encoding": "gzip"}
        async with surface.client.post(surface.url + CHAT, data=data, headers=headers) as response:
            assert response.status == 200
    assert [seen.body for seen in speaks.seen] == [body, body]
    assert speaks.seen[1].headers["Content-Encoding"] == "gzip"


async def test_the_model_of_a_form_is_found(surface: Surface, speaks: Recorder) -> None:
    surface.service.put("m", "COLD")
    form = {"file": io.BytesIO(b"\0\xff" * 1000), "model": "m"}
    asking = asyncio.create_task(surface.client.post(f"{surface.url}/v1/audio/transcriptions", data=form).__aenter__())
    while not surface.service.waiting("m"):
        await asyncio.sleep(0.01)
    surface.service.put("m", "READY")
    async with await asking as response:
        assert response.status == 200
        assert await response.read() == speaks.seen[0].body
    assert b"\0\xff" * 1000 in speaks.seen[0].body


async def test_its_stream_passes_as_it_comes(surface: Surface, speaks: Recorder) -> None:
    go_on = asyncio.Event()
    speaks.answer = in_two_pieces(go_on, b"data: 1\n\n", b"data: [DONE]\n\n")
    usage = surface.service.usage.model("m")
    async with surface.client.post(surface.url + CHAT, data=packed(stream=True)) as response:
        assert await response.content.readany() == b"data: 1\n\n"
        assert usage.in_flight == 1
        go_on.set()
        assert await response.read() == b"data: [DONE]\n\n"
    assert (usage.in_flight, usage.failures) == (0, 0)


async def test_its_errors_pass_as_they_are(surface: Surface, speaks: Recorder) -> None:
    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"object": "error", "message": "its own"}, status=500)

    speaks.answer = answer
    status, found, _ = await ask(surface, "POST", CHAT, data=packed(messages=HI))
    assert (status, found) == (500, {"object": "error", "message": "its own"})
    assert surface.service.usage.model("m").failures == 1


# --------------------------------------------------------------------------- the official client, a real tritonserver


@pytest.fixture
async def client(surface: Surface, real: Triton) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{surface.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def drive_sync(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert "writer" in [model.id for model in client.models.list()]
        assert client.models.retrieve("embedder").object == "model"
        said = client.chat.completions.create(model="writer", messages=HI, max_completion_tokens=3, temperature=0)
        assert said.choices[0].message.content == " user:hi user:there user:hi"
        assert said.choices[0].finish_reason == "length"
        assert said.usage is not None and said.usage.total_tokens == 5
        with client.chat.completions.create(model="writer", messages=HI, stream=True) as stream:
            assert "".join(c.choices[0].delta.content or "" for c in stream) == " user:hi user:there" * 2
        assert client.completions.create(model="writer", prompt="a").choices[0].text == " a a a a"
        made = client.embeddings.create(model="embedder", input="ab cd")
        assert made.data[0].embedding[:2] == [5, 2]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")


async def test_the_client_works_unchanged(surface: Surface, real: Triton) -> None:
    await asyncio.to_thread(drive_sync, surface.url)
    usage = surface.service.usage.model("writer")
    assert (usage.in_flight, usage.requests, usage.failures) == (0, 3, 0)


async def test_a_chat(client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "the end"},
    ]
    said = await client.chat.completions.create(
        model="writer", messages=messages, max_tokens=9, seed=3, stop=["user:the"], user="me", logprobs=False, n=1,
        frequency_penalty=0, extra_body={"top_k": 5},
    )  # fmt: skip
    assert (said.object, said.model, said.id[:9]) == ("chat.completion", "writer", "chatcmpl-")
    (choice,) = said.choices
    assert (choice.message.role, choice.message.content) == ("assistant", " system:be system:brief")
    assert choice.finish_reason == "stop"
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens, said.usage.total_tokens) == (4, 3, 7)


async def test_a_chat_streamed(client: openai.AsyncOpenAI) -> None:
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="writer", messages=HI, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert {(chunk.object, chunk.id, chunk.model) for chunk in chunks} == {
        ("chat.completion.chunk", chunks[0].id, "writer")
    }
    *texts, end, counts = chunks
    assert [c.choices[0].delta.content for c in texts] == ["", " user:hi", " user:there", " user:hi", " user:there"]
    assert [c.choices[0].delta.role for c in texts] == ["assistant", None, None, None, None]
    assert [c.choices[0].finish_reason for c in (*texts, end)] == [None] * 5 + ["length"]
    assert all(chunk.usage is None for chunk in (*texts, end))
    assert counts.usage is not None and counts.choices == []
    assert (counts.usage.prompt_tokens, counts.usage.completion_tokens) == (2, 4)


async def test_the_stream_on_the_wire(surface: Surface, real: Triton) -> None:
    async with surface.client.post(surface.url + CHAT, data=packed("writer", messages=HI, stream=True)) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        events = (await response.read()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


@pytest.mark.parametrize(
    ("prompt", "texts", "tokens"),
    [
        ("a b", [" a b a b"], 2),
        (["a", "b", "end"], [" a a a a", " b b b b", ""], 3),
        ([5, 6], [" #5 #6 #5 #6"], 2),
        ([[5], [6, 7]], [" #5 #5 #5 #5", " #6 #7 #6 #7"], 3),
        ([f"w{number}" for number in range(20)], [f" w{number}" * 4 for number in range(20)], 20),
    ],
)
async def test_completions(client: openai.AsyncOpenAI, prompt: Any, texts: list[str], tokens: int) -> None:
    made = await client.completions.create(model="writer", prompt=prompt)
    assert [(choice.index, choice.text) for choice in made.choices] == list(enumerate(texts))
    assert [c.finish_reason for c in made.choices] == ["length" if text else "stop" for text in texts]
    assert made.usage is not None and made.usage.prompt_tokens == tokens
    streamed = [""] * len(texts)
    reasons: dict[int, str | None] = {}
    async for chunk in await client.completions.create(model="writer", prompt=prompt, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
        reasons[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert (streamed, [reasons[c.index] for c in made.choices]) == (texts, [c.finish_reason for c in made.choices])


async def test_a_model_that_tells_text_alone(surface: Surface, client: openai.AsyncOpenAI) -> None:
    made = await client.completions.create(model="pieces", prompt="hi")
    assert (made.choices[0].text, made.choices[0].finish_reason, made.usage) == ("hi 0.hi 1.hi 2.", "stop", None)
    with pytest.raises(openai.BadRequestError, match="no input for 'max_tokens'"):
        await client.completions.create(model="pieces", prompt="hi", max_tokens=3)
    odd = packed("pieces", prompt="hi", **{"\ud800": 1})
    status, answer, _ = await ask(surface, "POST", "/v1/completions", data=odd)
    assert (status, answer["error"]["param"]) == (400, "?"), "what no text can hold is told of all the same"
    with pytest.raises(openai.BadRequestError, match="takes no chats"):
        await client.chat.completions.create(model="pieces", messages=HI)


@pytest.mark.parametrize("form", ["float", "base64", None])
async def test_embeddings(client: openai.AsyncOpenAI, form: Any) -> None:
    """The model takes three texts at a time."""
    more = {} if form is None else {"encoding_format": form}
    texts = [f"a {'b' * number}" for number in range(8)]
    made = await client.embeddings.create(model="embedder", input=texts, **more)
    vectors = [one.embedding for one in made.data]
    if form == "base64":
        vectors = [list(struct.unpack("<4f", base64.b64decode(v))) for v in vectors]  # type: ignore[arg-type]
    assert [one.index for one in made.data] == list(range(8))
    assert [vector[0] for vector in vectors] == [len(text) for text in texts]
    assert [vector[3] for vector in vectors] == [3, 3, 3, 3, 3, 3, 2, 2]
    assert vectors[0][2] == pytest.approx(1 / 3, abs=1e-7)
    assert made.usage.prompt_tokens == sum(len(text.split()) for text in texts) == made.usage.total_tokens
    one = await client.embeddings.create(model="embedder", input="a b c", dimensions=4)
    assert (len(one.data), one.usage.prompt_tokens) == (1, 3)


Call = Callable[[openai.AsyncOpenAI], Any]


def chatting(**more: Any) -> Call:
    return lambda client: client.chat.completions.create(**{"model": "writer", "messages": HI, **more})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (chatting(model="embedder"), "makes no text: its outputs are .*; ask /v1/embeddings"),
        (chatting(model="identity"), "makes no text: its outputs are OUTPUT0; ask /predict/identity"),
        (chatting(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "'text'.*found 'image_url'"),
        (chatting(messages=[{"role": "user", "content": " "}]), "the prompt is empty"),
        (chatting(n=2), "'n' can't be served"),
        (chatting(tools=[{"type": "function", "function": {"name": "f"}}]), "'tools' can't be served"),
        (chatting(logprobs=True), "'logprobs' can't be served"),
        (chatting(response_format={"type": "json_object"}), "'response_format' can't be served"),
        (chatting(temperature=-1), "temperature must be 0 or more"),
        (chatting(frequency_penalty=0.5), "frequency_penalty.*doesn't know"),
        (chatting(max_tokens=0, stream=True), "max_tokens must be 1 or more"),
        (lambda c: c.completions.create(model="writer", prompt=["a", ""]), "the prompt is empty"),
        (lambda c: c.completions.create(model="writer", prompt="a", logprobs=0), "'logprobs' can't be served"),
        (lambda c: c.embeddings.create(model="writer", input="a"), "ask /v1/chat/completions or /v1/completions"),
        (lambda c: c.embeddings.create(model="embedder", input=[1, 2]), "found token ids"),
        (lambda c: c.embeddings.create(model="embedder", input="a", dimensions=3), "4 dimensions"),
    ],
)  # fmt: skip
async def test_what_can_not_be_answered_says_why(
    surface: Surface, client: openai.AsyncOpenAI, call: Call, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        await call(client)
    assert caught.value.type == "invalid_request_error"
    usages = [surface.service.usage.model(name) for name in ("writer", "embedder", "identity")]
    assert [(usage.in_flight, usage.failures) for usage in usages] == [(0, 0)] * 3


async def test_an_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model named nobody") as caught:
        await chatting(model="nobody")(client)
    assert caught.value.code == "model_not_found"


async def test_an_error_in_a_stream_is_its_last_event(surface: Surface, client: openai.AsyncOpenAI) -> None:
    body = packed("writer", prompt="one fail", stream=True)
    async with surface.client.post(f"{surface.url}/v1/completions", data=body) as response:
        first, last, rest = (await response.read()).decode().split("\n\n")
    assert (response.status, json.loads(first.removeprefix("data: "))["choices"][0]["text"]) == (200, " one")
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "told to fail", "type": "invalid_request_error", "param": None, "code": "inference_failed"
    }  # fmt: skip
    assert rest == ""
    texts = []
    with pytest.raises(openai.APIError, match="told to fail"):
        async for chunk in await client.completions.create(model="writer", prompt="one fail", stream=True):
            texts.append(chunk.choices[0].text)
    assert texts == [" one"]
    assert surface.service.usage.model("writer").in_flight == 0


async def running(client: openai.AsyncOpenAI) -> int:
    """How many generations of `writer` are under way."""
    made = await client.completions.create(model="writer", prompt="running?", max_tokens=1)
    return int(made.choices[0].text)


async def until_none_runs(surface: Surface, client: openai.AsyncOpenAI) -> None:
    usage = surface.service.usage.model("writer")
    while await running(client) or usage.in_flight:
        await asyncio.sleep(0.02)
    assert usage.failures == 0


SLOW: dict[str, Any] = {"model": "writer", "prompt": "slow", "max_tokens": 1_000_000}
"""Hours of work."""


async def test_who_leaves_a_stream_ends_its_generation(surface: Surface, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(**SLOW, stream=True)
    assert (await anext(aiter(stream))).choices[0].text == " slow", "the first comes long before the last"
    assert (surface.service.usage.model("writer").in_flight, await running(client)) == (1, 1)
    await stream.close()
    await until_none_runs(surface, client)


async def test_who_leaves_several_prompts_ends_them_all(surface: Surface, client: openai.AsyncOpenAI) -> None:
    for stream in (True, False):
        asking: asyncio.Task[Any]
        asking = asyncio.create_task(client.completions.create(**{**SLOW, "prompt": ["slow"] * 3}, stream=stream))
        while await running(client) < 3:
            await asyncio.sleep(0.02)
        if stream:
            await (await asking).close()
        else:
            asking.cancel()
        await until_none_runs(surface, client)


async def test_one_that_fails_ends_the_others(surface: Surface, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="told to fail"):
        await client.completions.create(**{**SLOW, "prompt": ["slow", "fail", "slow"]})
    await until_none_runs(surface, client)


async def test_chats_at_once(surface: Surface, client: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> str:
        messages: list[Any] = [{"role": "user", "content": f"w{number}"}]
        stream = await client.chat.completions.create(model="writer", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert await asyncio.gather(*map(one, range(20))) == [f" user:w{number}" * 4 for number in range(20)]
    assert surface.service.usage.model("writer").in_flight == 0


@pytest.mark.parametrize("prompt", ["a", ["a"] * 5])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_grpc_address_where_nobody_is(
    surface: Surface, client: openai.AsyncOpenAI, real: Triton, prompt: Any, stream: bool
) -> None:
    (port,) = free_ports(1)
    surface.service.routes["writer"].endpoints = {"kserve-http": real.url, "kserve-grpc": f"127.0.0.1:{port}"}
    with pytest.raises(openai.InternalServerError, match="nothing was sent") as caught:
        await client.completions.create(model="writer", prompt=prompt, stream=stream)
    assert (caught.value.status_code, caught.value.response.headers["Retry-After"]) == (503, "1")
    assert surface.service.poked == ["triton"]
    usage = surface.service.usage.model("writer")
    assert (usage.in_flight, usage.failures) == (0, 1)


async def test_the_first_chat_loads_a_cold_model(surface: Surface, client: openai.AsyncOpenAI) -> None:
    service = surface.service
    service.put("writer", "COLD")
    headers = {"x-modelium-deadline-s": "7", "x-modelium-organisation": "team"}
    asking = [asyncio.create_task(chatting(stream=stream, extra_headers=headers)(client)) for stream in (True, False)]
    while service.waiting("writer") < 2:
        await asyncio.sleep(0.01)
    service.put("writer", "READY")
    streamed, whole = await asyncio.gather(*asking)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in streamed]) == " user:hi user:there" * 2
    assert whole.choices[0].message.content == " user:hi user:there" * 2
    assert service.calls == [("acquire", "writer", 7.0, 0, "team")] * 2
    assert service.usage.model("writer").results() == [("team", (2, 0, 0))]
