"""KServe v2 over HTTP, read and written: JSON, the binary tensor extension, and Triton's generate extension.

Formats: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .pb_utils import DTYPES, InferenceResponse, Tensor

HEADER_LENGTH = "Inference-Header-Content-Length"

BINARY_ONLY = ("binary_data", "binary_data_size", "binary_data_output")
"""Parameters that say how a message is laid out, and mean nothing to the model."""


class Problem(Exception):
    """A request that is refused, with the HTTP status for it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Field:
    """An input or an output as the model's configuration has it."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    """As clients see them: behind a batch dimension where the model has one."""
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives."""

    model: str
    version: str
    max_batch_size: int
    inputs: Mapping[str, Field]
    outputs: Mapping[str, Field]

    @classmethod
    def of(cls, model: str, version: str, config: Mapping[str, Any]) -> Signature:
        size = int(config.get("max_batch_size") or 0)
        return cls(
            model, version, size, _fields(config.get("input", ()), size), _fields(config.get("output", ()), size)
        )

    def metadata(self) -> dict[str, Any]:
        def listed(fields: Mapping[str, Field]) -> list[dict[str, Any]]:
            return [{"name": f.name, "datatype": f.datatype, "shape": list(f.dims)} for f in fields.values()]

        return {
            "name": self.model,
            "versions": [self.version],
            "platform": "python",
            "inputs": listed(self.inputs),
            "outputs": listed(self.outputs),
        }


@dataclass
class Asked:
    """An inference request."""

    inputs: list[Tensor]
    wanted: dict[str, bool] = field(default_factory=dict)
    """Names of the outputs, and whether in binary; empty: all of them."""
    binary: bool = False
    """The form of outputs that are not named."""
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    """The size of its batch."""


def _fields(tensors: Sequence[Mapping[str, Any]], max_batch_size: int) -> dict[str, Field]:
    batch = (-1,) if max_batch_size > 0 else ()
    return {
        tensor["name"]: Field(
            name=tensor["name"],
            datatype=kserve_type(tensor["data_type"]),
            dims=(*batch, *(int(size) for size in tensor["dims"])),
            optional=bool(tensor.get("optional", False)),
        )
        for tensor in tensors
    }


def kserve_type(name: str) -> str:
    """`TYPE_FP32` of a model configuration as KServe calls it."""
    return "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_")


# --------------------------------------------------------------------------- requests


def read_infer(body: bytes, header_length: int | None, signature: Signature) -> Asked:
    """The body of `infer`, checked against what the model takes. Raises `Problem`."""
    if header_length is not None and not 0 < header_length <= len(body):
        raise Problem(f"{HEADER_LENGTH} must be from 1 to the body's {len(body)} bytes, and is {header_length}")
    head = parse(body if header_length is None else body[:header_length])
    rest = _Rest(b"" if header_length is None else body[header_length:])
    parameters = _object(head, "parameters")
    asked = Asked(
        inputs=[_read_tensor(value, rest) for value in _objects(head, "inputs")],
        binary=bool(parameters.get("binary_data_output", False)),
        id=str(head.get("id", "")),
        parameters={name: value for name, value in parameters.items() if name not in BINARY_ONLY},
    )
    rest.check()
    for value in _objects(head, "outputs"):
        how = _object(value, "parameters")
        name = _text(value, "name")
        if name not in signature.outputs:
            raise Problem(
                f"unexpected inference output {name!r} for model {signature.model!r}: it has "
                f"{', '.join(signature.outputs)}"
            )
        for word in ("classification", "shared_memory_region"):
            if word in how:
                raise Problem(f"output {name!r}: {word} is not supported by Ray Serve's replicas")
        asked.wanted[name] = bool(how.get("binary_data", asked.binary))
    return check(asked, signature)


def read_generate(body: bytes, signature: Signature) -> Asked:
    """The body of `generate`: values by the inputs' names; others are parameters of the request."""
    head = parse(body)
    asked = Asked(inputs=[], id=str(head.pop("id", "")))
    lead = (1,) if signature.max_batch_size > 0 else ()
    values = {**_object(head, "parameters"), **{key: value for key, value in head.items() if key != "parameters"}}
    for name, value in values.items():
        known = signature.inputs.get(name)
        if known is None:
            asked.parameters[name] = value
        else:
            shape = (*lead, len(value) if isinstance(value, list) else 1)
            asked.inputs.append(Tensor.of(name, known.datatype, from_json(name, known.datatype, shape, value)))
    return check(asked, signature)


def check(asked: Asked, signature: Signature) -> Asked:
    """See that the model takes this, and how large its batch is. Raises `Problem`, in Triton's words."""
    seen: set[str] = set()
    model = signature.model
    for tensor in asked.inputs:
        name, known = tensor.name(), signature.inputs.get(tensor.name())
        if known is None:
            allowed = ", ".join(signature.inputs)
            raise Problem(f"unexpected inference input {name!r} for model {model!r}: it takes {allowed}")
        if name in seen:
            raise Problem(f"input {name!r} for model {model!r} was sent twice")
        seen.add(name)
        if tensor.datatype != known.datatype:
            raise Problem(
                f"inference input {name!r} data-type is {tensor.datatype!r}, but model {model!r} expects "
                f"{known.datatype!r}"
            )
        shape = tensor.shape()
        if len(shape) != len(known.dims) or any(d not in (-1, s) for s, d in zip(shape, known.dims, strict=True)):
            raise Problem(
                f"unexpected shape for input {name!r} for model {model!r}. Expected {_shape(known.dims)}, got "
                f"{_shape(shape)}"
            )
    missing = [name for name, known in signature.inputs.items() if not known.optional and name not in seen]
    if missing:
        raise Problem(
            f"expected {len(signature.inputs)} inputs but got {len(seen)} inputs for model {model!r}. Got input(s) "
            f"{sorted(seen)}, but missing required input(s) {missing}. Please provide all required input(s)."
        )
    if signature.max_batch_size > 0 and asked.inputs:
        sizes = {tensor.shape()[0] for tensor in asked.inputs}
        if len(sizes) > 1:
            raise Problem(f"all inputs of model {model!r} must have the same batch size, and have {sorted(sizes)}")
        asked.rows = sizes.pop()
        if not 1 <= asked.rows <= signature.max_batch_size:
            raise Problem(
                f"inference request batch-size must be from 1 to {signature.max_batch_size} for {model!r}, and is "
                f"{asked.rows}"
            )
    return asked


# --------------------------------------------------------------------------- responses


def write_infer(response: InferenceResponse, asked: Asked, signature: Signature) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON part where binary data follow it."""
    head: dict[str, Any] = {"model_name": signature.model, "model_version": signature.version}
    if asked.id:
        head["id"] = asked.id
    if response.parameters():
        head["parameters"] = json.loads(response.parameters())
    head["outputs"] = outputs = []
    behind: list[bytes] = []
    for tensor in response.output_tensors():
        if asked.wanted and tensor.name() not in asked.wanted:
            continue
        value: dict[str, Any] = {"name": tensor.name(), "datatype": tensor.datatype, "shape": tensor.shape()}
        if asked.wanted.get(tensor.name(), asked.binary):
            raw = to_binary(tensor)
            value["parameters"] = {"binary_data_size": len(raw)}
            behind.append(raw)
        else:
            value["data"] = to_json(tensor)
        outputs.append(value)
    text = json.dumps(head, ensure_ascii=False).encode()
    return (b"".join([text, *behind]), len(text)) if behind else (text, None)


def write_generate(response: InferenceResponse, asked: Asked, signature: Signature) -> bytes:
    """A response as one JSON object: an output of one element is a value, others are lists."""
    answer: dict[str, Any] = {"model_name": signature.model, "model_version": signature.version}
    if asked.id:
        answer["id"] = asked.id
    for tensor in response.output_tensors():
        data = to_json(tensor)
        answer[tensor.name()] = data[0] if len(data) == 1 else data
    return json.dumps(answer, ensure_ascii=False).encode()


def joined(responses: Sequence[InferenceResponse]) -> InferenceResponse:
    """Several responses of a decoupled model as one: pieces of text put together, of all else the last."""
    if len(responses) == 1:
        return responses[0]
    found: dict[str, Tensor] = {}
    for response in responses:
        for tensor in response.output_tensors():
            before = found.get(tensor.name())
            if before is not None and tensor.datatype == "BYTES" and tensor.values.size == before.values.size == 1:
                text = _bytes(tensor.name(), before.values.item()) + _bytes(tensor.name(), tensor.values.item())
                tensor = Tensor(tensor.name(), np.array([text], dtype=object).reshape(tensor.values.shape))
            found[tensor.name()] = tensor
    return InferenceResponse(list(found.values()))


# --------------------------------------------------------------------------- tensors


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Any:
    """An array of JSON values, flat or nested. Raises `Problem` when they are not what datatype and shape say."""
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = list(_flat(data))
        if not all(isinstance(element, str) for element in elements):
            raise Problem(f"input {name!r}: expected texts, as BYTES has")
        array = np.empty(len(elements), dtype=object)
        array[:] = [element.encode() for element in elements]
    else:
        try:
            array = np.asarray(data if isinstance(data, list) else [data])
            if array.dtype.kind == "f" and datatype in ("INT64", "UINT64"):
                array = np.asarray(data, dtype=object)  # numpy takes floats for integers on both sides of 2**63
        except ValueError:
            raise Problem(f"input {name!r}: expected regular lists, found some of unequal lengths") from None
        array = _converted(name, datatype, array)
    if array.size != count:
        raise Problem(f"input {name!r}: expected {count} elements for shape {list(shape)}, found {array.size}")
    return array.reshape(shape)


def _converted(name: str, datatype: str, array: Any) -> Any:
    kind = array.dtype.kind
    if kind == "O" and all(type(element) is int for element in array.flat):
        kind = "i"
    if datatype == "BF16":
        if kind not in "iuf":
            raise Problem(f"input {name!r}: expected numbers, as BF16 has")
        bits = array.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    dtype = _dtype(name, datatype)
    if dtype.kind == "b":
        good = kind == "b" or (kind in "iu" and bool(((array == 0) | (array == 1)).all()))
    elif dtype.kind == "f":
        good = kind in "iuf"
    else:
        bounds = np.iinfo(dtype)
        good = not array.size or (kind in "iu" and bounds.min <= array.min() and array.max() <= bounds.max)
    if array.size and not good:
        raise Problem(f"input {name!r}: expected values that {datatype} has, found {array.flat[0]!r:.40} among others")
    return array.astype(dtype)


def to_json(tensor: Tensor) -> list[Any]:
    """One flat list."""
    if tensor.datatype == "BYTES":
        return [_word(tensor.name(), element) for element in tensor.values.flat]
    if tensor.datatype == "BF16":
        return list((tensor.values.astype("<u4") << 16).view("<f4").reshape(-1).tolist())
    return list(tensor.values.reshape(-1).tolist())


def from_binary(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Any:
    """An array of the binary form: little-endian, C order; BYTES elements each behind their length in four bytes."""
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = list(_split(name, raw))
        if len(elements) != count:
            raise Problem(f"input {name!r}: expected {count} elements for shape {list(shape)}, found {len(elements)}")
        array = np.empty(count, dtype=object)
        array[:] = elements
        return array.reshape(shape)
    dtype = np.dtype("<u2") if datatype == "BF16" else _dtype(name, datatype)
    if len(raw) != count * dtype.itemsize:
        raise Problem(
            f"input {name!r}: expected {count * dtype.itemsize} bytes for {datatype} {list(shape)}, found {len(raw)}"
        )
    return np.frombuffer(raw, dtype).reshape(shape).copy()  # models may write into it


def to_binary(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return bytes(np.ascontiguousarray(tensor.values).tobytes())
    elements = [_bytes(tensor.name(), element) for element in tensor.values.flat]
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


# --------------------------------------------------------------------------- inside


class _Rest:
    """Binary data behind the JSON, taken piece by piece."""

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def take(self, name: str, size: Any) -> bytes:
        left = len(self._data) - self._at
        if type(size) is not int or not 0 <= size <= left:
            raise Problem(
                f"input {name!r}: binary_data_size must be a number of bytes that follow the JSON part ({left} do), "
                f"and is {size!r}"
            )
        self._at += size
        return self._data[self._at - size : self._at]

    def check(self) -> None:
        if left := len(self._data) - self._at:
            raise Problem(f"{left} bytes of binary data are left over: no input declares them")


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `Problem` for anything else."""
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise Problem(f"failed to parse the request JSON: {error}") from None
    if not isinstance(value, dict):
        raise Problem(f"expected a JSON object, found {type(value).__name__}")
    return value


def _read_tensor(value: Mapping[str, Any], rest: _Rest) -> Tensor:
    name, datatype, shape = _text(value, "name"), _text(value, "datatype"), value.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise Problem(f"input {name!r}: expected a shape, a list of numbers, found {shape!r:.80}")
    parameters = _object(value, "parameters")
    if "shared_memory_region" in parameters:
        raise Problem(f"input {name!r}: shared memory is not supported by Ray Serve's replicas: send the data")
    if "binary_data_size" in parameters:
        array = from_binary(name, datatype, shape, rest.take(name, parameters["binary_data_size"]))
    elif "data" in value:
        array = from_json(name, datatype, shape, value["data"])
    else:
        raise Problem(f"input {name!r}: expected data, or binary_data_size among its parameters, found neither")
    return Tensor.of(name, datatype, array)


def _objects(head: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    values = head.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise Problem(f"expected {key!r} to be a list of objects")
    return values


def _object(head: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = head.get(key, {})
    if not isinstance(value, dict):
        raise Problem(f"expected {key!r} to be an object, found {type(value).__name__}")
    return value


def _shape(sizes: Sequence[int]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise Problem(f"expected {key!r} of each input and output to be a text, found {found!r:.80}")
    return found


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    dtype = DTYPES.get(datatype)
    if dtype is None or datatype == "BYTES":
        raise Problem(f"input {name!r}: there is no datatype {datatype!r}: expected one of {', '.join(DTYPES)}, BF16")
    return dtype


def _flat(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for value in data:
            yield from _flat(value)
    else:
        yield data


def _split(name: str, raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        end = at + 4
        if end <= len(raw):
            at, end = end, end + struct.unpack_from("<I", raw, at)[0]
        if end > len(raw):
            raise Problem(f"input {name!r}: expected BYTES elements behind their length, found an element cut off")
        yield raw[at:end]
        at = end


def _bytes(name: str, element: Any) -> bytes:
    return bytes(element) if isinstance(element, bytes | bytearray | np.bytes_) else str(element).encode()


def _word(name: str, element: Any) -> str:
    try:
        return _bytes(name, element).decode()
    except UnicodeDecodeError:
        raise Problem(f"output {name!r} is no UTF-8 text, which JSON can't carry: ask for it in binary") from None
