"""KServe's answers about one model that are composed here, where the model's runtime speaks OpenAI alone."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing

from aiohttp import web

from modelium.engine.admission import Lease
from modelium.errors import ModeliumError
from modelium.http.answers import along, error_answer, json_answer, kserve_shape, status_of
from modelium.http.bodies import HEADER_LENGTH, BodyStalled, header_length, read_body, read_object
from modelium.http.generate import generate_answer, generate_request
from modelium.http.inference import Inference
from modelium.http.interfaces import check_version
from modelium.http.messages import InferRequest, InferResponse, decode_request, encode_response
from modelium.http.over_openai import OverOpenAI
from modelium.http.settings import HttpSettings
from modelium.http.streams import InferenceFailed
from modelium.http.upstream import StreamBroken, break_off

log = logging.getLogger(__name__)


def inferred(response: InferResponse, wanted: InferRequest) -> web.Response:
    """KServe's answer to `wanted`, its outputs in the forms that it asks for."""
    body, length = encode_response(response, wanted)
    if length is None:
        return web.Response(body=body, content_type="application/json")
    return web.Response(body=body, headers={HEADER_LENGTH: str(length)}, content_type="application/octet-stream")


class Composed:
    def __init__(self, settings: HttpSettings, inference: Inference, over_openai: OverOpenAI):
        self._settings = settings
        self._inference = inference
        self._over_openai = over_openai
        self._by_path = {
            "infer": self._infer,
            "generate": self._generate,
            "generate_stream": self._generate_stream,
            "config": self._config,
        }

    async def answer(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        """To whatever is asked of one model under `/v2`."""
        route = request.match_info.route.resource
        assert route is not None
        try:
            check_version(lease.model, request.match_info.get("version", ""))
            return await self._by_path.get(route.canonical.rpartition("/")[2], self._metadata)(request, lease)
        except InferenceFailed as exc:
            return error_answer(request, exc, exc.status)

    async def _metadata(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        return json_answer(self._over_openai.interface(lease).metadata(lease.model, lease.runtime))

    async def _config(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        return json_answer(self._over_openai.interface(lease).config(lease.model, lease.runtime))

    async def _infer(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        wanted = decode_request(await read_body(request), header_length(request))
        wanted.headers = along(request)
        return inferred(await self._inference.infer(lease, wanted), wanted)

    async def _generate(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        response = await self._inference.infer(lease, await self._wanted(request, lease))
        return web.Response(body=generate_answer(response), content_type="application/json")

    async def _generate_stream(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        """Server-sent events. What fails before the first is an ordinary error; after it, the last event tells."""
        wanted = await self._wanted(request, lease)
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        try:
            async with aclosing(self._inference.responses(lease, wanted)) as responses:
                async for response in responses:
                    if not stream.prepared:
                        await stream.prepare(request)
                    await self._write(stream, generate_answer(response))
        except BodyStalled:
            raise
        except ModeliumError as exc:
            if not stream.prepared:
                raise
            await self._write(stream, json.dumps(kserve_shape(exc, status_of(exc))).encode())
            if not isinstance(exc, InferenceFailed):
                log.warning("%s: its runtime was lost while it answered: %s", lease.model, exc.message)
                break_off(request, request.version < (1, 1))
                raise StreamBroken(exc.message) from exc
            lease.release(ok=exc.status < 500)
        await stream.write_eof()
        return stream

    async def _wanted(self, request: web.Request, lease: Lease) -> InferRequest:
        body = await read_object(request)
        wanted = generate_request(self._over_openai.interface(lease).inputs, body)
        wanted.headers = along(request)
        return wanted

    async def _write(self, stream: web.StreamResponse, event: bytes) -> None:
        stall_s = self._settings.client_stall_s
        try:
            async with asyncio.timeout(stall_s):
                await stream.write(b"data: " + event + b"\n\n")
        except TimeoutError:
            raise BodyStalled(f"the client took nothing of the answer for {stall_s:g} s") from None
