"""Decoupled models whose runtime speaks KServe over HTTP alone (Ray Serve), piece by piece, by Triton's generate
extension: server-sent events, each with a response as one JSON object.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from aiohttp import hdrs

from modelium.api import Tensor
from modelium.engine.admission import Lease
from modelium.http.admission import HTTP, endpoint
from modelium.http.answers import BadRequest, UpstreamFailed
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.over_openai import Events, failure
from modelium.http.streams import InferenceFailed, status_in_band
from modelium.http.tensors import TensorValue, to_json, to_raw
from modelium.http.upstream import Upstream

OWN = frozenset({"id", "model_name", "model_version"})
"""What an answer holds besides the outputs."""


async def responses(
    upstream: Upstream, lease: Lease, outputs: Sequence[Tensor], request: InferRequest
) -> AsyncGenerator[InferResponse, None]:
    """The responses to `request` as they come; the last is empty and marked. Leaving early ends the runtime's work.

    Raises `InferenceFailed` with the status and words of the runtime's own error.
    """
    path = f"/v2/models/{quote(lease.model, safe='')}/generate_stream"
    headers = {**request.headers, hdrs.CONTENT_TYPE: "application/json"}
    events, known = Events(), {tensor.name: tensor for tensor in outputs}
    base, body = endpoint(lease, HTTP), generate_body(request)
    async with upstream.posting(base, path, lease.model, body=body, headers=headers) as (status, pieces):
        if status != 200:
            raise failure(lease.model, status, b"".join([piece async for piece in pieces]))
        async for piece in pieces:
            for data in events.feed(piece):
                yield response_of(lease.model, known, request, data)
    yield InferResponse(lease.model, "", [], request.id, final=True)


def generate_body(request: InferRequest) -> bytes:
    """Inputs and parameters as one object: one element as a value, several as a list."""
    body: dict[str, Any] = {name: value for name, value in request.parameters.items() if not name.startswith("triton_")}
    for tensor in request.inputs:
        values = to_json(tensor)
        body[tensor.name] = values[0] if len(values) == 1 else values
    if request.id:
        body["id"] = request.id
    return json.dumps(body).encode()


def response_of(model: str, known: Mapping[str, Tensor], request: InferRequest, data: bytes) -> InferResponse:
    """One event. Raises `InferenceFailed` for an error in band."""
    try:
        answer = json.loads(data)
        if "error" in answer:
            raise InferenceFailed(str(answer["error"]), status_in_band(str(answer["error"])))
        wanted = {output.name for output in request.outputs} or known.keys()
        found = {name: value for name, value in answer.items() if name not in OWN and name in wanted}
        outputs = [_tensor(known[name], value) for name, value in found.items()]
        return InferResponse(model, str(answer.get("model_version", "")), outputs, request.id)
    except (ValueError, TypeError, KeyError, AttributeError, BadRequest) as exc:
        raise UpstreamFailed(f"the runtime of {model} answered wrongly: {data!r:.200}") from exc


def _tensor(expected: Tensor, value: Any) -> TensorValue:
    """JSON tells no shapes: values are taken to be in one row."""
    elements = value if isinstance(value, list) else [value]
    shape = (1,) * (len(expected.shape) - 1) + (len(elements),)
    return TensorValue(
        expected.name, expected.datatype, shape, to_raw(expected.name, expected.datatype, shape, elements)
    )
