"""`POST /predict/{model}`: one simple JSON form for every model.

    {"inputs": {"name": value, ...}}      or, where the model has one input that must be given, {"inputs": value}
    {"text": "..."}                       for models that take text
    {"...": ..., "parameters": {...}}     further inputs, or parameters of the request where no input has the name

A value is a number, a text, true or false, lists of lists of them, or `{"b64": "..."}` for bytes. Datatypes are the
model's own. A batch dimension that is missing is added, and taken off the answer again:

    {"model": "name", "version": "1", "outputs": {"name": nested lists}, "text": "..."}
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
from aiohttp import web

from modelium.api import Tensor
from modelium.engine.admission import Lease
from modelium.errors import RuntimeUnavailable
from modelium.http.admission import acquire
from modelium.http.answers import BadRequest, UpstreamFailed, along, error_answer
from modelium.http.bodies import read_json
from modelium.http.inference import Inference
from modelium.http.messages import InferRequest, InferResponse
from modelium.http.settings import HttpSettings
from modelium.http.streams import InferenceFailed
from modelium.http.tensors import TensorValue, as_array, from_array, join_bytes, to_array

if TYPE_CHECKING:
    from modelium.engine.service import Service

TEXT_INPUTS = ("text_input", "prompt", "text")
"""What models call the input that takes their text, Triton's own name first."""

PIECE = 2**18
"""Elements that are written as JSON at once: nobody else's turn comes meanwhile."""
LONG_BYTES = 128 * 1024
"""Outputs longer than this are written in a thread."""


@dataclass(slots=True)
class Asked:
    """What the body says, before anything is known of the model."""

    inputs: dict[str, Any] = field(default_factory=dict)
    bare: Any = None
    """A value without a name."""
    is_bare: bool = False
    is_text: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)


class Predict:
    """The route under `/predict`."""

    def __init__(self, service: Service, settings: HttpSettings, inference: Inference):
        self._service = service
        self._settings = settings
        self._inference = inference

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/predict/{model}", self.predict)]

    async def predict(self, request: web.Request) -> web.Response:
        asked = parse(await read_json(request))
        name = request.match_info["model"]
        lease = await acquire(self._service, self._settings, request.headers, name, request.query)
        ok = True
        try:
            return web.Response(body=await self._answer(lease, asked, along(request)), content_type="application/json")
        except InferenceFailed as exc:
            ok = exc.status < 500
            return error_answer(request, exc, exc.status)
        except (UpstreamFailed, RuntimeUnavailable):
            ok = False
            self._service.poke(lease.runtime)
            raise
        finally:
            lease.release(ok=ok)

    async def _answer(self, lease: Lease, asked: Asked, headers: Mapping[str, str]) -> bytes:
        inputs, _ = await self._inference.signature(lease)
        optional: frozenset[str] = frozenset()
        if len(inputs) > 1 and len(asked.inputs) < len(inputs):
            optional = await self._inference.optional_inputs(lease)
        request, added = build(inputs, optional, asked)
        response = await self._inference.infer(lease, request.on_behalf(headers))
        if sum(len(tensor.raw or b"") for tensor in response.outputs) > LONG_BYTES:
            return await asyncio.to_thread(render, response, added, asked.is_text)
        return render(response, added, asked.is_text)


# --------------------------------------------------------------------------- the question


def parse(body: Any) -> Asked:
    """The body's form. `BadRequest` when it has none of those above."""
    if not isinstance(body, dict):
        if body is None:
            raise BadRequest('expected {"inputs": ...} or {"text": "..."}, found nothing')
        return Asked(bare=body, is_bare=True)
    unknown = sorted(set(body) - {"inputs", "text", "parameters"})
    if unknown or ("inputs" in body) == ("text" in body):
        found = ", ".join(sorted(body)) or "an empty object"
        raise BadRequest(
            f'expected {{"inputs": ...}} or {{"text": "..."}}, with "parameters" if need be, found {found}'
        )
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest(f"expected 'parameters' to be an object, found {type(parameters).__name__}")
    if "text" in body:
        return Asked(bare=body["text"], is_bare=True, is_text=True, parameters=parameters)
    inputs = body["inputs"]
    if isinstance(inputs, dict) and set(inputs) != {"b64"}:
        return Asked(inputs=inputs, parameters=parameters)
    return Asked(bare=inputs, is_bare=True, parameters=parameters)


def build(inputs: Sequence[Tensor], optional: frozenset[str], asked: Asked) -> tuple[InferRequest, int]:
    """The request for a model with these inputs, and how many dimensions of size 1 were put before what was given."""
    known = {tensor.name: tensor for tensor in inputs}
    values = dict(asked.inputs)
    if asked.is_bare:
        values[_bare_name(inputs, optional, asked)] = asked.bare
    values |= {name: value for name, value in asked.parameters.items() if name in known}
    if unknown := sorted(set(values) - set(known)):
        raise BadRequest(f"there is no input {unknown[0]!r}; {_expected(inputs, optional)}")
    if missing := [name for name in known if name not in values and name not in optional]:
        raise BadRequest(f"the input {missing[0]!r} is missing; {_expected(inputs, optional)}")
    fitted = [fit(known[name], value) for name, value in values.items()]
    parameters = {name: value for name, value in asked.parameters.items() if name not in known}
    return InferRequest([tensor for tensor, _ in fitted], parameters=parameters), min((n for _, n in fitted), default=0)


def fit(expected: Tensor, value: Any) -> tuple[TensorValue, int]:
    """`value` as the tensor that is expected, and how many dimensions of size 1 were put before its own."""
    if expected.datatype == "BYTES":
        elements, found = _texts(expected, value)
        raw: Callable[[], bytes] = lambda: join_bytes(elements)  # noqa: E731
    else:
        array = _array(expected, value)
        found = array.shape
        raw = lambda: from_array(expected.name, expected.datatype, array)  # noqa: E731
    for shape in (found, (1,) * (len(expected.shape) - len(found)) + found):
        added = len(shape) - len(found)
        if _fits(shape, expected.shape) and (added <= 1 or not found):
            return TensorValue(expected.name, expected.datatype, shape, raw()), added
    batch = f", or {list(expected.shape[1:])} for a batch of one" if expected.shape[:1] in ((-1,), (1,)) else ""
    raise BadRequest(
        f"input {expected.name!r}: expected {expected.datatype} of shape {list(expected.shape)}{batch} (-1: any), "
        f"found shape {list(found)}"
    )


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (-1, s) for s, e in zip(shape, expected, strict=True))


def _array(expected: Tensor, value: Any) -> npt.NDArray[Any]:
    array = as_array(expected.name, expected.datatype, value)
    if array.dtype.kind not in "biuf" and not all(type(element) is int for element in array.flat):
        raise BadRequest(f"input {expected.name!r}: expected {expected.datatype}, found {value!r:.80}")
    return array


def _texts(expected: Tensor, value: Any) -> tuple[list[bytes], tuple[int, ...]]:
    """Elements and shape of nested lists of texts."""
    if isinstance(value, list):
        parts = [_texts(expected, item) for item in value]
        if len({shape for _, shape in parts}) > 1:
            raise BadRequest(f"input {expected.name!r}: expected regular lists, found some of unequal lengths")
        inner = parts[0][1] if parts else ()
        return [element for elements, _ in parts for element in elements], (len(parts), *inner)
    if isinstance(value, str):
        return [value.encode("utf-8", "replace")], ()
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
        try:
            return [base64.b64decode(value["b64"], validate=True)], ()
        except binascii.Error as exc:
            raise BadRequest(f"input {expected.name!r}: expected base64 under 'b64': {exc}") from None
    raise BadRequest(f"input {expected.name!r}: expected a text, found {value!r:.80}")


def _bare_name(inputs: Sequence[Tensor], optional: frozenset[str], asked: Asked) -> str:
    """The input that a value without a name is for."""
    if asked.is_text:
        texts = [tensor.name for tensor in inputs if tensor.datatype == "BYTES"]
        name = next((name for name in TEXT_INPUTS if name in texts), texts[0] if len(texts) == 1 else None)
        if name is None:
            raise BadRequest(f"this model has no one input for text; {_expected(inputs, optional)}")
        return name
    needed = [tensor.name for tensor in inputs if tensor.name not in optional and tensor.name not in asked.parameters]
    if len(needed) != 1:
        raise BadRequest(f"a value without a name needs a model with one input; {_expected(inputs, optional)}")
    return needed[0]


def _expected(inputs: Sequence[Tensor], optional: frozenset[str]) -> str:
    each = (
        f"{t.name} ({t.datatype} {list(t.shape)}{', may be left out' if t.name in optional else ''})" for t in inputs
    )
    return f"expected inputs: {', '.join(each)}"


# --------------------------------------------------------------------------- the answer


def render(response: InferResponse, added: int, is_text: bool) -> bytes:
    """The answer as JSON, without the dimensions that were added. May take long for large outputs."""
    outputs: dict[str, bytes] = {}
    for tensor in response.outputs:
        array = to_array(tensor)
        for _ in range(added):
            if array.ndim and array.shape[0] == 1:
                array = array.reshape(array.shape[1:])
        outputs[tensor.name] = _nested(array)
    parts = [f'"model": {json.dumps(response.model)}'.encode()]
    if response.version:
        parts.append(f'"version": {json.dumps(response.version)}'.encode())
    listed = b", ".join(json.dumps(name).encode() + b": " + text for name, text in outputs.items())
    parts.append(b'"outputs": {' + listed + b"}")
    if is_text and (text := _text_of(response, outputs)) is not None:
        parts.append(b'"text": ' + text)
    return b"{" + b", ".join(parts) + b"}"


def _text_of(response: InferResponse, outputs: Mapping[str, bytes]) -> bytes | None:
    texts = [tensor.name for tensor in response.outputs if tensor.datatype == "BYTES"]
    name = "text_output" if "text_output" in texts else texts[0] if len(texts) == 1 else None
    return None if name is None else outputs[name]


def _nested(array: npt.NDArray[Any]) -> bytes:
    """An array as nested lists, numbers in as few digits as their type needs; what is no finite number is null."""
    if array.dtype.kind == "O":
        return orjson.dumps(array.tolist(), default=_bytes)
    if array.size <= PIECE:
        return orjson.dumps(np.ascontiguousarray(array) if array.ndim else array[()], option=orjson.OPT_SERIALIZE_NUMPY)
    rows = PIECE // (array.size // len(array))
    if not rows:
        return b"[" + b",".join(_nested(part) for part in array) + b"]"
    parts = (_nested(array[start : start + rows])[1:-1] for start in range(0, len(array), rows))
    return b"[" + b",".join(parts) + b"]"


def _bytes(element: bytes) -> Any:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(element).decode()}
