"""An OpenAI server as vLLM is one, for tests: its routes, the shapes of its answers and the words of its errors (0.32).

It writes as the model `writer` of `tritonserver` does, the words of its prompt again and again, a word a token, so that
what is asked of the two by KServe can be compared. Prompts with `end` end there; at `wait` it waits to be told to go
on, at `break` the connection breaks, at `fail` the stream tells of an error.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web
from multidict import CIMultiDict

CONTEXT = 64
"""Tokens, those of prompt and answer together."""
VOCABULARY = 1000


class Refused(Exception):
    def __init__(self, message: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass
class Asked:
    path: str
    headers: CIMultiDict[str]
    body: dict[str, Any]
    port: int
    """Of the connection's other end, which tells connections apart."""


@dataclass
class OpenAIServer:
    models: tuple[str, ...]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    product: str = "uvicorn"
    """What it calls itself."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client left while it was answered."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            if request.content_type != "application/json":
                raise Refused("Unsupported Media Type: Only 'application/json' is allowed", 415)
            body = await request.json()
            assert request.transport is not None
            port = request.transport.get_extra_info("peername")[1]
            self.asked.append(Asked(request.path, request.headers.copy(), body, port))
            if body.get("model") not in self.models:
                aliases = ", ".join(self.models)
                said = f"The model `{body.get('model')}` does not exist. Valid aliases: {aliases}."
                raise Refused(said, 404, "NotFoundError", "model")
            if request.path == "/v1/embeddings":
                return web.json_response(self.embeddings(body))
            return await self.write(request, body)
        except Refused as exc:
            return web.json_response(exc.body, status=exc.status)
        except asyncio.CancelledError:
            self.left.set()
            raise

    # ------------------------------------------------------------------ text

    async def write(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        chat = request.path == "/v1/chat/completions"
        words = prompt_of(body, chat)
        most = asked_tokens(body, len(words))
        head = {
            "id": "chatcmpl-1" if chat else "cmpl-1", "created": 1795884808, "model": body["model"],
            "object": ("chat.completion" if chat else "text_completion"),
        }  # fmt: skip
        if not body.get("stream"):
            made = [word async for word in self.made(request, words, most)]
            return web.json_response({**head, **whole(body, chat, words, made, reason_of(made, body))})
        if chat:
            head["object"] = "chat.completion.chunk"
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await stream.prepare(request)

        async def tell(data: dict[str, Any]) -> None:
            await stream.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        if chat:
            role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            await tell({**head, "choices": [{"index": 0, **role}], "prompt_token_ids": None, "prompt_text": None})
        made = []
        try:
            async for word in self.made(request, words, most):
                made.append(word)
                said = said_of(word, body)
                last = len(made) == most or reason_of(made, body) == "stop"
                more = {"delta": {"content": said}} if chat else {"text": said, "prompt_token_ids": None}
                ids = [len(word)] if body.get("return_token_ids") else None
                reason = reason_of(made, body) if last else None
                choice = {"index": 0, **more, "logprobs": None, "finish_reason": reason, "token_ids": ids}
                await tell({**head, "choices": [{**choice, "stop_reason": None}]})
        except Refused as exc:
            await tell(exc.body)
        else:
            if body.get("stream_options", {}).get("include_usage"):
                await tell({**head, "choices": [], "usage": usage(words, made), "system_fingerprint": "vllm-0.32.0-x"})
        await stream.write(b"data: [DONE]\n\n")
        return stream

    async def made(self, request: web.Request, words: list[str], most: int) -> AsyncIterator[str]:
        for word in itertools.islice(itertools.cycle(words), most):
            if word == "wait":
                await self.go_on.wait()
            if word == "break":
                assert request.transport is not None
                request.transport.close()
                await asyncio.Event().wait()
            if word == "fail":
                raise Refused("EngineCore encountered an issue. See stack trace (above).", 500, "InternalServerError")
            yield word
            if word == "end":
                return

    # ------------------------------------------------------------------ embeddings

    def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if "" in texts:
            raise Refused("please provide at least one prompt")
        data = [{"index": n, "object": "embedding", "embedding": vector(t, body)} for n, t in enumerate(texts)]
        tokens = sum(len(text.split()) for text in texts)
        counts = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        return {
            "id": "embd-1", "object": "list", "created": 1795884808, "model": body["model"], "data": data,
            "usage": counts,
        }  # fmt: skip


def prompt_of(body: dict[str, Any], chat: bool) -> list[str]:
    if chat:
        if not all(isinstance(message, dict) for message in body["messages"]):
            said = "{'type': 'dict_type', 'loc': 'body.messages.0', 'msg': 'Input should be a valid dictionary'}"
            raise Refused(f"1 validation error:\n  {said}", 400, "Bad Request", "body.messages.0")
        return [f"{m['role']}:{word}" for m in body["messages"] for word in m["content"].split()]
    prompt = body["prompt"]
    if not prompt:
        message = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
        raise Refused(message, param="prompt")
    if isinstance(prompt, str):
        return list(prompt.split())
    for id in prompt:
        if id >= VOCABULARY:
            raise Refused(f"Token id {id} is out of vocabulary")
    return [f"#{id}" for id in prompt]


def asked_tokens(body: dict[str, Any], prompt_tokens: int) -> int:
    """How many to make at most."""
    if (min_p := body.get("min_p")) is not None and not 0 <= min_p <= 1:
        raise Refused(f"min_p must be in [0, 1], got {min_p}. (parameter=min_p, value={min_p})", param="min_p")
    if body.get("stream_options") and not body.get("stream"):
        said = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise Refused(said, param="stream_options")
    most = int(body.get("max_tokens", 16))
    if most < 1:
        said = f"max_tokens must be at least 1, got {most}. (parameter=max_tokens, value={most})"
        raise Refused(said, param="max_tokens")
    if most > CONTEXT:
        said = f"max_tokens={most} cannot be greater than max_model_len={CONTEXT}. Please request fewer output tokens."
        raise Refused(f"{said} (parameter=max_tokens, value={most})", param="max_tokens")
    if prompt_tokens >= CONTEXT:
        said = (
            f"This model's maximum context length is {CONTEXT} tokens. However, your prompt contains at least "
            f"{CONTEXT + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
            f"length of the input prompt. (parameter=input_tokens, value={CONTEXT + 1})"
        )
        raise Refused(said, param="input_tokens")
    return min(most, CONTEXT - prompt_tokens)


def reason_of(made: list[str], body: dict[str, Any]) -> str:
    return "stop" if made[-1] == "end" or made[-1] in body.get("stop", []) else "length"


def said_of(word: str, body: dict[str, Any]) -> str:
    return "" if word == "end" or word in body.get("stop", []) else f" {word}"


def usage(words: list[str], made: list[str]) -> dict[str, Any]:
    total = len(words) + len(made)
    return {"prompt_tokens": len(words), "total_tokens": total, "completion_tokens": len(made)}


def whole(body: dict[str, Any], chat: bool, words: list[str], made: list[str], reason: str) -> dict[str, Any]:
    text = "".join(said_of(word, body) for word in made)
    message = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
    ids = [len(word) for word in made] if body.get("return_token_ids") else None
    choice = {
        "index": 0, **({"message": message} if chat else {"text": text}), "logprobs": None, "finish_reason": reason,
        "stop_reason": None, "token_ids": ids,
    }  # fmt: skip
    return {"choices": [choice], "usage": usage(words, made), "service_tier": None}


def vector(text: str, body: dict[str, Any]) -> Any:
    """Its length, its words, a third."""
    array = np.array([len(text), len(text.split()), 1 / 3], "<f4")
    return base64.b64encode(array.tobytes()).decode() if body.get("encoding_format") == "base64" else array.tolist()


@asynccontextmanager
async def openai_server(*models: str) -> AsyncIterator[OpenAIServer]:
    server = OpenAIServer(models)
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{rest:.*}", server.handle)

    async def sign(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = server.product

    app.on_response_prepare.append(sign)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
