"""KServe v2 inference messages over HTTP: JSON, and JSON with binary tensors behind it.

Formats: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelium.http.answers import REQUEST_ID, BadRequest
from modelium.http.tensors import Parameters, Raw, TensorValue, check_raw, to_json, to_raw

_HTTP_ONLY = ("binary_data", "binary_data_size", "binary_data_output")
"""Parameters that say how a message is laid out over HTTP and mean nothing beyond it."""


@dataclass(slots=True)
class WantedOutput:
    name: str
    binary: bool
    parameters: Parameters = field(default_factory=dict)


@dataclass(slots=True)
class InferRequest:
    inputs: list[TensorValue]
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    outputs: list[WantedOutput] = field(default_factory=list)
    """Empty: all of them."""
    binary_output: bool = False
    """The form of outputs that are not named."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the client's request, that go along with this one."""

    def on_behalf(self, headers: Mapping[str, str]) -> InferRequest:
        """This request, composed for a client's, with headers of that (`answers.along`), and its id."""
        self.headers, self.id = headers, headers[REQUEST_ID]
        return self


@dataclass(slots=True)
class InferResponse:
    model: str
    version: str
    outputs: list[TensorValue]
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    final: bool = False
    """No other follows; told where the response was composed here."""


def decode_request(body: bytes, header_length: int | None = None) -> InferRequest:
    """An inference request, JSON or (with `header_length`, the `Inference-Header-Content-Length`) JSON and binary."""
    head, rest = _split(body, header_length)
    binary_output = bool(_parameters(head).get("binary_data_output", False))
    request = InferRequest(
        inputs=[_decode_tensor(value, "input", rest) for value in _objects(head, "inputs")],
        id=_text(head, "id"),
        parameters=_plain(_parameters(head)),
        binary_output=binary_output,
    )
    if rest:
        raise BadRequest(f"expected binary data for the inputs that declare it, found {len(rest)} bytes more")
    for value in _objects(head, "outputs"):
        parameters = _parameters(value)
        binary = bool(parameters.get("binary_data", binary_output))
        request.outputs.append(WantedOutput(_text(value, "name", "an output"), binary, _plain(parameters)))
    return request


def encode_request(request: InferRequest) -> tuple[bytes, int]:
    """The request with all inputs in binary; the second value is the `Inference-Header-Content-Length`."""
    head: dict[str, Any] = {"inputs": [_describe(tensor, binary=True) for tensor in request.inputs]}
    if request.id:
        head["id"] = request.id
    parameters = {**request.parameters, **({"binary_data_output": True} if request.binary_output else {})}
    if parameters:
        head["parameters"] = parameters
    if request.outputs:
        head["outputs"] = [
            {"name": wanted.name, "parameters": {**wanted.parameters, "binary_data": wanted.binary}}
            for wanted in request.outputs
        ]
    return _join(head, [tensor.raw for tensor in request.inputs])


def decode_response(body: bytes, header_length: int | None = None) -> InferResponse:
    head, rest = _split(body, header_length)
    return InferResponse(
        model=_text(head, "model_name"),
        version=_text(head, "model_version"),
        outputs=[_decode_tensor(value, "output", rest) for value in _objects(head, "outputs")],
        id=_text(head, "id"),
        parameters=_plain(_parameters(head)),
    )


def encode_response(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """The response with each output in the form that `request` asks for; no header length when none is binary."""
    wanted = {output.name: output.binary for output in request.outputs}
    binary = [wanted.get(tensor.name, request.binary_output) for tensor in response.outputs]
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = response.parameters
    head["outputs"] = [
        _describe(tensor, binary=as_binary) for tensor, as_binary in zip(response.outputs, binary, strict=True)
    ]
    pairs = zip(response.outputs, binary, strict=True)
    body, length = _join(head, [tensor.raw for tensor, as_binary in pairs if as_binary])
    return body, length if any(binary) else None


# --------------------------------------------------------------------------- inside


class _Rest:
    """Binary data behind the JSON, taken piece by piece."""

    def __init__(self, data: memoryview | None):
        self.data = data
        self._at = 0

    def __len__(self) -> int:
        return 0 if self.data is None else len(self.data) - self._at

    def take(self, name: str, size: object) -> memoryview:
        if self.data is None or type(size) is not int or not 0 <= size <= len(self):
            raise BadRequest(
                f"tensor {name!r}: expected binary_data_size to be a number of bytes that follow the JSON part "
                f"({len(self)} do), found {size!r}"
            )
        self._at += size
        return self.data[self._at - size : self._at]


def _split(body: bytes, header_length: int | None) -> tuple[dict[str, Any], _Rest]:
    if header_length is not None and not 0 < header_length <= len(body):
        raise BadRequest(
            f"expected Inference-Header-Content-Length from 1 to the body's {len(body)} bytes, found {header_length}"
        )
    try:
        head = json.loads(body if header_length is None else body[:header_length])
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"expected JSON, found something else: {exc}") from None
    if not isinstance(head, dict):
        raise BadRequest(f"expected a JSON object, found {type(head).__name__}")
    return head, _Rest(None if header_length is None else memoryview(body)[header_length:])


def _join(head: dict[str, Any], raws: list[Raw | None]) -> tuple[bytes, int]:
    text = json.dumps(head, ensure_ascii=False).encode()
    return b"".join([text, *(raw for raw in raws if raw is not None)]), len(text)


def _decode_tensor(value: dict[str, Any], what: str, rest: _Rest) -> TensorValue:
    name = _text(value, "name", f"an {what}")
    datatype = _text(value, "datatype", f"{what} {name!r}")
    shape = value.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise BadRequest(f"{what} {name!r}: expected a shape, a list of numbers that are not negative, found {shape!r}")
    parameters = _parameters(value)
    tensor = TensorValue(name, datatype, tuple(shape), None, _plain(parameters))
    if "binary_data_size" in parameters:
        tensor.raw = rest.take(name, parameters["binary_data_size"])
        check_raw(tensor)
    elif "data" in value:
        tensor.raw = to_raw(name, datatype, shape, value["data"])
    elif "shared_memory_region" not in parameters:
        raise BadRequest(f"{what} {name!r}: expected data, or binary_data_size among its parameters, found neither")
    return tensor


def _describe(tensor: TensorValue, *, binary: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    parameters = dict(tensor.parameters)
    if tensor.raw is not None and binary:
        parameters["binary_data_size"] = len(tensor.raw)
    if parameters:
        value["parameters"] = parameters
    if tensor.raw is not None and not binary:
        value["data"] = to_json(tensor)
    return value


def _objects(head: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = head.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise BadRequest(f"expected {key!r} to be a list of objects")
    return values


def _parameters(value: dict[str, Any]) -> Parameters:
    parameters = value.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest(f"expected 'parameters' to be an object, found {type(parameters).__name__}")
    return parameters


def _plain(parameters: Parameters) -> Parameters:
    return {key: value for key, value in parameters.items() if key not in _HTTP_ONLY}


def _text(value: dict[str, Any], key: str, of: str = "") -> str:
    """A text under `key`; needed when `of` says whose it is."""
    text = value.get(key, None if of else "")
    if not isinstance(text, str):
        raise BadRequest(f"expected {key!r}{f' of {of}' if of else ''} to be a text, found {text!r}")
    return text
