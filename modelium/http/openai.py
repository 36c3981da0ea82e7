"""OpenAI's API under `/v1`, so that a client written for it works by changing nothing but the base URL.

A runtime that speaks OpenAI itself is passed the request byte for byte. For all others the request is made an
inference over KServe, and the responses are made OpenAI's objects, in a stream one by one as they come. Either way the
model, which the body names, is loaded first when it has to be.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import orjson
from aiohttp import hdrs, web

from modelium.core.states import State
from modelium.engine.admission import Lease
from modelium.engine.views import ModelView
from modelium.errors import ModeliumError, ModelNotFound, RuntimeUnavailable
from modelium.http.admin import views
from modelium.http.admission import HTTP, OPENAI, acquire
from modelium.http.answers import UpstreamFailed, along, error_answer, json_answer, openai_shape, status_of
from modelium.http.bodies import parse_object, read_raw, unpacked
from modelium.http.inference import Inference
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.openai_common import EMBEDDINGS_ROUTE, TEXT_ROUTES, check_task, model_of, model_of_form, wrong
from modelium.http.openai_embeddings import EmbeddingsAsked, embedder, embeddings_answer, embeddings_asked
from modelium.http.openai_text import Choice, TextAnswer, TextAsked, chat_asked, completion_asked, text_request
from modelium.http.predict import PIECE
from modelium.http.settings import HttpSettings
from modelium.http.streams import InferenceFailed
from modelium.http.upstream import StreamBroken, Upstream

if TYPE_CHECKING:
    from modelium.engine.service import Service

T = TypeVar("T")

PASSED_ON = (
    "responses", "messages", "rerank", "score", "classify", "moderations", "images/generations", "images/edits",
    "audio/speech", "audio/transcriptions", "audio/translations",
)  # fmt: skip
"""Further routes, which only a runtime that speaks OpenAI can answer."""

AT_ONCE = 8
"""Prompts of one request that are under way at a time."""

NOT_USABLE = frozenset({State.DISCOVERED, State.INVALID})

Read = Callable[[dict[str, Any]], Any]
Answer = Callable[[web.Request, Lease, Any], Awaitable[web.StreamResponse]]


class OpenAI:
    """The routes under `/v1`."""

    def __init__(self, service: Service, settings: HttpSettings, upstream: Upstream, inference: Inference):
        self._service = service
        self._settings = settings
        self._upstream = upstream
        self._inference = inference

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completions),
            web.post(EMBEDDINGS_ROUTE, self.embeddings),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            *(web.post(f"/v1/{path}", self.passed_on) for path in PASSED_ON),
        ]

    # ------------------------------------------------------------------ models

    async def models(self, request: web.Request) -> web.Response:
        """All that a request could be for, loaded or not."""
        return json_answer({"object": "list", "data": [_shown(v) async for v in views(self._service) if _usable(v)]})

    async def model(self, request: web.Request) -> web.Response:
        view = self._service.view(request.match_info["name"])
        if not _usable(view):
            raise ModelNotFound(f"{view.name} is no usable model: {view.reason}", param="model")
        return json_answer(_shown(view))

    # ------------------------------------------------------------------ what is asked of a model

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, TEXT_ROUTES, chat_asked, self._text)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, TEXT_ROUTES, completion_asked, self._text)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, EMBEDDINGS_ROUTE, embeddings_asked, self._embeddings)

    async def passed_on(self, request: web.Request) -> web.StreamResponse:
        def refuse(body: dict[str, Any]) -> None:
            raise wrong(
                "model",
                f"{request.path} is answered by runtimes that speak OpenAI themselves, and the runtime of this model "
                f"does not: ask {TEXT_ROUTES} or {EMBEDDINGS_ROUTE}",
            )

        return await self._serve(request, "", refuse, self._text)

    async def _serve(self, request: web.Request, suited: str, read: Read, answer: Answer) -> web.StreamResponse:
        """Find the model, hold it, and pass the request on, or `answer` what `read` makes of the body."""
        raw = await read_raw(request)
        content_type = request.headers.get(hdrs.CONTENT_TYPE, "")
        if content_type.startswith("multipart/form-data"):
            body: dict[str, Any] = {"model": model_of_form(content_type, unpacked(request, raw))}
        else:
            body = parse_object(unpacked(request, raw))
        name, adapter = self._named(model_of(body))

        def refuse_early() -> None:
            """No load for a request that its runtime will not answer anyway."""
            task = self._task_over_kserve(name)
            if task is not None:
                read(body)
                check_task(name, task, suited)

        lease = await acquire(self._service, self._settings, request.headers, name, request.query, refuse_early)
        try:
            if adapter:
                raw = for_adapter(request, lease, body, adapter)
            if (base := lease.endpoints.get(OPENAI)) is not None:
                stream = body.get("stream") is True
                response = await self._upstream.forward(request, base, name, body=raw, stream=stream)
            else:
                response = await answer(request, lease, read(body))
            lease.release(ok=response.status < 500)
            return response
        except (ModeliumError, StreamBroken) as exc:
            self._settle(lease, exc)
            if isinstance(exc, InferenceFailed):
                return error_answer(request, exc, exc.status)
            raise
        finally:
            lease.release()  # the client left, which is no failure of the model's

    def _named(self, name: str) -> tuple[str, str]:
        """The model that a request names, and the adapter: `NAME:ADAPTER` where no model is called so."""
        if ":" not in name:
            return name, ""
        try:
            return self._service.view(name).name, ""
        except ModelNotFound:
            name, _, adapter = name.partition(":")
            return name, adapter

    def _settle(self, lease: Lease, exc: ModeliumError | StreamBroken) -> None:
        """Give the lease back with what became of it."""
        if isinstance(exc, UpstreamFailed | RuntimeUnavailable | StreamBroken):
            self._service.poke(lease.runtime)
        lease.release(ok=not isinstance(exc, StreamBroken) and _status(exc) < 500)

    def _task_over_kserve(self, name: str) -> str | None:
        """The task of a model that is not loaded, empty where nobody knows it; None where its runtime may speak OpenAI,
        or nothing is known of it."""
        try:
            view = self._service.view(name)
        except ModelNotFound:
            return None
        info = next((each.info for each in self._service.runtimes if each.name == view.runtime), None)
        if info is None or info.endpoint(OPENAI) or not info.endpoint(HTTP):
            return None
        return view.task or ""

    # ------------------------------------------------------------------ over KServe

    async def _text(self, request: web.Request, lease: Lease, asked: TextAsked) -> web.StreamResponse:
        inputs, outputs = await self._inference.signature(lease)
        headers = along(request)
        requests = [
            text_request(lease.model, inputs, outputs, prompt, asked).on_behalf(headers) for prompt in asked.prompts
        ]
        choices = [Choice(index) for index in range(len(requests))]
        prefix = "chatcmpl" if asked.chat else "cmpl"
        answer = TextAnswer(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), lease.model, asked)
        sources = [self._inference.responses(lease, one) for one in requests]
        async with aclosing(merged(sources, AT_ONCE)) as responses:
            if asked.stream:
                return await self._stream(request, lease, answer, choices, responses)
            async for index, response in responses:
                choices[index].add(response)
        return _json(orjson.dumps(answer.whole(choices)))

    async def _stream(
        self,
        request: web.Request,
        lease: Lease,
        answer: TextAnswer,
        choices: Sequence[Choice],
        responses: AsyncGenerator[tuple[int, InferResponse], None],
    ) -> web.StreamResponse:
        """Server-sent events. What fails before the first is an ordinary error; after it, the last event tells."""
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        try:
            async for index, response in responses:
                choice = choices[index]
                chunks = [] if choice.texts else answer.begin(choice)
                chunks += answer.text(choice, choice.add(response))
                if not stream.prepared:
                    await stream.prepare(request)
                if chunks:
                    await stream.write(_events(chunks))
        except ModeliumError as exc:
            if not stream.prepared:
                raise
            try:
                await stream.write(_events([openai_shape(exc, _status(exc))]))
            finally:
                self._settle(lease, exc)
        else:
            if not stream.prepared:
                await stream.prepare(request)
            await stream.write(_events(answer.end(choices)) + b"data: [DONE]\n\n")
        await stream.write_eof()
        return stream

    async def _embeddings(self, request: web.Request, lease: Lease, asked: EmbeddingsAsked) -> web.StreamResponse:
        how = embedder(lease.model, *await self._inference.signature(lease))
        size = 1
        if how.takes_many and len(asked.texts) > 1:
            size = await self._inference.max_batch_size(lease) or len(asked.texts)
        parts = [asked.texts[at : at + size] for at in range(0, len(asked.texts), size)]
        found: list[Any] = [None] * len(parts)
        headers = along(request)
        sources = [self._inferred(lease, how.request(part).on_behalf(headers)) for part in parts]
        async with aclosing(merged(sources, AT_ONCE)) as responses:
            async for index, response in responses:
                found[index] = how.read(response, len(parts[index]))
        vectors = np.concatenate([vectors for vectors, _ in found])
        counts = [count for _, count in found]
        tokens = None if None in counts else sum(counts)
        if vectors.size > PIECE:
            return _json(await asyncio.to_thread(embeddings_answer, asked, lease.model, vectors, tokens))
        return _json(embeddings_answer(asked, lease.model, vectors, tokens))

    async def _inferred(self, lease: Lease, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        yield await self._inference.infer(lease, request)


def for_adapter(request: web.Request, lease: Lease, body: dict[str, Any], adapter: str) -> bytes:
    """The body for a runtime that serves an adapter beside its model, by the adapter's own name."""
    if OPENAI not in lease.endpoints:
        raise wrong("model", f"{lease.runtime}, which serves {lease.model}, has no adapters: leave {adapter!r} out")
    plain = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() == "identity"
    if not plain or request.content_type.startswith("multipart/"):
        raise wrong("model", f"expected a request for the adapter {adapter!r} as JSON, not packed")
    return json.dumps({**body, "model": adapter}).encode()


def _usable(view: ModelView) -> bool:
    return view.state not in NOT_USABLE and "/" not in view.name  # a name with a slash is a drop that is no model yet


def _shown(view: ModelView) -> dict[str, Any]:
    created = int(view.created_at if view.created_at is not None else view.since)
    return {"id": view.name, "object": "model", "created": created, "owned_by": "modelium"}


def _status(exc: ModeliumError) -> int:
    return exc.status if isinstance(exc, InferenceFailed) else status_of(exc)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _events(values: Sequence[Any]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(value) + b"\n\n" for value in values)


async def merged(sources: Sequence[AsyncGenerator[T, None]], at_once: int) -> AsyncGenerator[tuple[int, T], None]:
    """What the sources give, each value with its source's number, `at_once` of them at a time.

    To be closed by who does not take all (`contextlib.aclosing`): that closes the sources.
    """
    coming = iter(enumerate(sources))
    running: dict[asyncio.Future[T], tuple[int, AsyncGenerator[T, None]]] = {}

    def go_on(number: int, source: AsyncGenerator[T, None]) -> None:
        running[asyncio.ensure_future(anext(source))] = number, source

    try:
        for number, source in islice(coming, at_once):
            go_on(number, source)
        while running:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, source = running.pop(task)
                try:
                    value = task.result()
                except StopAsyncIteration:
                    if (following := next(coming, None)) is not None:
                        go_on(*following)
                    continue
                yield number, value
                go_on(number, source)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for source in sources:
            await source.aclose()
