"""Triton's generate extension: one JSON object in, one out, or one for each piece.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelium.api import Tensor
from modelium.http.answers import BadRequest
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.tensors import TensorValue, to_json, to_raw


def generate_request(inputs: Sequence[Tensor], body: Mapping[str, Any]) -> InferRequest:
    """What has an input's name is that input; the rest are parameters."""
    nested = body.get("parameters", {})
    if not isinstance(nested, dict):
        raise BadRequest(f"expected 'parameters' to be an object, found {nested!r:.80}")
    id = body.get("id", "")
    if not isinstance(id, str):
        raise BadRequest(f"expected 'id' to be a text, found {id!r:.80}")
    known = {tensor.name: tensor for tensor in inputs}
    request = InferRequest([], id)
    for name, value in {**nested, **body}.items():
        if name in known:
            request.inputs.append(_tensor(known[name], value))
        elif name not in ("id", "parameters"):
            if not isinstance(value, bool | int | float | str):
                raise BadRequest(f"parameter {name!r}: expected a number, a text, true or false, found {value!r:.80}")
            request.parameters[name] = value
    return request


def _tensor(expected: Tensor, value: Any) -> TensorValue:
    """A value, or a flat list of them, in the shape that is expected."""
    elements = value if isinstance(value, list) else [value]
    fixed = math.prod(size for size in expected.shape if size >= 0)
    shape = tuple(len(elements) // fixed if size < 0 else size for size in expected.shape)
    if math.prod(shape) != len(elements) or expected.shape.count(-1) > 1:
        raise BadRequest(
            f"input {expected.name!r}: expected values for the shape {list(expected.shape)} (-1: any), "
            f"found {len(elements)}"
        )
    return TensorValue(
        expected.name, expected.datatype, shape, to_raw(expected.name, expected.datatype, shape, elements)
    )


def generate_answer(response: InferResponse) -> bytes:
    answer: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        answer["id"] = response.id
    for tensor in response.outputs:
        values = to_json(tensor)
        answer[tensor.name] = values[0] if len(values) == 1 else values
    return json.dumps(answer, ensure_ascii=False).encode()
