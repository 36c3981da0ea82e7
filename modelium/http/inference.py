"""Inference that is asked for here rather than passed on, over whichever protocol answers for the model."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from modelium.api import Tensor
from modelium.engine.admission import Lease
from modelium.http import over_generate
from modelium.http.admission import GRPC, HTTP, endpoint, openai_alone
from modelium.http.answers import BadRequest, UpstreamFailed, check_process
from modelium.http.bodies import HEADER_LENGTH
from modelium.http.messages import InferRequest, InferResponse, decode_response, encode_request
from modelium.http.over_openai import OverOpenAI
from modelium.http.streams import InferenceFailed, Streams, join
from modelium.http.upstream import Upstream


class Inference:
    """Asks runtimes. All methods raise `InferenceFailed` with the status and words of the runtime's own error."""

    def __init__(self, upstream: Upstream, streams: Streams, over_openai: OverOpenAI):
        self._upstream = upstream
        self._streams = streams
        self._over_openai = over_openai

    async def infer(self, lease: Lease, request: InferRequest) -> InferResponse:
        """The answer to `request`; that of a decoupled model put together out of its pieces."""
        if openai_alone(lease.endpoints):
            return await self._over_openai.infer(lease, request)
        if lease.decoupled and GRPC in lease.endpoints:
            return join(lease.model, await self._streams.infer(lease.endpoints[GRPC], lease.model, "", request))
        request.binary_output = True
        body, header_length = encode_request(request)
        url = f"{_url(lease)}/infer"
        status, headers, answer = await self._upstream.ask(
            "POST", url, lease.model, body=body, header_length=header_length, headers=request.headers
        )
        if status != 200:
            check_process(answer, lease.model)
            raise _failed(status, answer)
        length = headers.get(HEADER_LENGTH)
        try:
            return decode_response(answer, int(length) if length is not None else None)
        except BadRequest as exc:
            raise UpstreamFailed(f"the runtime of {lease.model} answered wrongly: {exc.message}") from exc

    async def responses(self, lease: Lease, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """The answer to `request`, that of a decoupled model piece by piece. To be closed, as `Streams.stream` is."""
        if openai_alone(lease.endpoints):
            responses = self._over_openai.responses(lease, request)
        elif lease.decoupled and GRPC in lease.endpoints:
            responses = self._streams.stream(lease.endpoints[GRPC], lease.model, "", request)
        elif lease.decoupled:
            responses = over_generate.responses(self._upstream, lease, (await self.signature(lease))[1], request)
        else:
            yield await self.infer(lease, request)
            return
        async with aclosing(responses):
            async for response in responses:
                yield response

    async def signature(self, lease: Lease) -> tuple[list[Tensor], list[Tensor]]:
        """The model's inputs and outputs, by its metadata; which inputs are optional, that does not tell."""
        if openai_alone(lease.endpoints):
            interface = self._over_openai.interface(lease)
            return list(interface.inputs), list(interface.outputs)
        metadata = await self.metadata(lease)
        return [_tensor(value) for value in metadata["inputs"]], [_tensor(value) for value in metadata["outputs"]]

    async def metadata(self, lease: Lease) -> dict[str, Any]:
        """The model's metadata, as KServe has them."""
        if openai_alone(lease.endpoints):
            return self._over_openai.interface(lease).metadata(lease.model, lease.runtime)
        metadata: dict[str, Any] = await self._get(lease, "")
        return metadata

    async def optional_inputs(self, lease: Lease) -> frozenset[str]:
        """Names of inputs that may be left out, where the runtime tells by Triton's model configuration."""
        config = await self.config(lease)
        return frozenset(value["name"] for value in config.get("input", []) if value.get("optional"))

    async def max_batch_size(self, lease: Lease) -> int | None:
        """Where the runtime tells by Triton's model configuration; 0 is a model without batches."""
        size = (await self.config(lease)).get("max_batch_size")
        return size if isinstance(size, int) else None

    async def config(self, lease: Lease) -> dict[str, Any]:
        """Triton's model configuration; empty where the runtime has none."""
        if openai_alone(lease.endpoints):
            return self._over_openai.interface(lease).config(lease.model, lease.runtime)
        try:
            config: dict[str, Any] = await self._get(lease, "/config")
        except InferenceFailed:
            return {}
        return config

    async def _get(self, lease: Lease, what: str) -> Any:
        status, _, answer = await self._upstream.ask("GET", _url(lease) + what, lease.model)
        if status != 200:
            raise _failed(status, answer)
        try:
            return json.loads(answer)
        except ValueError as exc:
            raise UpstreamFailed(f"the runtime of {lease.model} answered with no JSON: {answer[:80]!r}") from exc


def _url(lease: Lease) -> str:
    return f"{endpoint(lease, HTTP)}/v2/models/{quote(lease.model, safe='')}"


def _tensor(value: dict[str, Any]) -> Tensor:
    return Tensor(name=value["name"], datatype=value["datatype"], shape=tuple(value["shape"]))


def _failed(status: int, answer: bytes) -> InferenceFailed:
    try:
        message = str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        message = answer[:500].decode("utf-8", "replace") or f"status {status} without a word"
    return InferenceFailed(message, status)
