"""KServe v2 tensors: JSON, binary and numpy, one into another.

A tensor's value is held as the protocol's binary form (little-endian, C order; BYTES elements each behind their length
in four bytes), since it can express all that the others can. The format:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modelium.http.answers import BadRequest

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""numpy's names for KServe's. BF16, the upper half of a float32, and BYTES have none."""

Parameters = dict[str, Any]
Raw = bytes | memoryview


@dataclass(slots=True)
class TensorValue:
    """A named tensor; `raw` is None where the value is elsewhere (shared memory)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: Raw | None
    parameters: Parameters = field(default_factory=dict)


def to_raw(name: str, datatype: str, shape: Sequence[int], data: Any) -> bytes:
    """JSON data, flat or nested, as the binary form. `BadRequest` when it is not what datatype and shape say."""
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = [_as_bytes(name, element) for element in _flat(data)]
        _expect(len(elements) == count, name, f"{count} elements for shape {list(shape)}", f"{len(elements)}")
        return join_bytes(elements)
    array = as_array(name, datatype, data)
    _expect(array.size == count, name, f"{count} elements for shape {list(shape)}", f"{array.size}")
    return from_array(name, datatype, array)


def as_array(name: str, datatype: str, data: Any) -> npt.NDArray[Any]:
    """Nested lists as an array of whatever type holds them; numbers meant for `datatype` stay exact."""
    try:
        array = np.asarray(data)
        if array.dtype.kind == "f" and datatype in ("INT64", "UINT64"):
            array = np.asarray(data, dtype=object)  # numpy takes floats for integers on both sides of 2**63
    except ValueError:
        raise BadRequest(f"tensor {name!r}: expected regular lists, found some of unequal lengths") from None
    return array


def from_array(name: str, datatype: str, array: npt.NDArray[Any]) -> bytes:
    """An array of any number type as the binary form of `datatype`, where every element can be expressed in it."""
    if not array.size:
        return b""
    kind = array.dtype.kind
    if datatype == "BF16":
        _expect(kind in "iuf", name, "numbers", array.dtype.name)
        return _round_to_bf16(array.astype("<f4"))
    dtype = _dtype(name, datatype)
    if dtype.kind == "b":
        good = kind == "b" or (kind in "iu" and bool(((array == 0) | (array == 1)).all()))
        _expect(good, name, "true or false", array.dtype.name)
    elif dtype.kind == "f":
        _expect(kind in "iuf", name, f"numbers, as {datatype} has", _kind(array))
    else:
        if kind == "O" and all(type(element) is int for element in array.flat):
            kind = "u"  # integers that no one numpy type holds together
        _expect(kind in "iu", name, f"integers, as {datatype} has", _kind(array))
        bounds = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        _expect(
            bounds.min <= low and high <= bounds.max,
            name, f"values from {bounds.min} to {bounds.max}, as {datatype} has", f"{low} to {high}",
        )  # fmt: skip
    with np.errstate(over="ignore"):  # a float too large becomes infinite, as everywhere else
        return array.astype(dtype, copy=False).tobytes()


def to_array(tensor: TensorValue) -> npt.NDArray[Any]:
    """The value as an array of its shape; BF16 widened to float32, BYTES as objects of type bytes."""
    raw = check_raw(tensor)
    if tensor.datatype == "BYTES":
        array = np.empty(math.prod(tensor.shape), dtype=object)
        array[:] = list(split_bytes(tensor.name, raw))
        return array.reshape(tensor.shape)
    if tensor.datatype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tensor.shape)
    return np.frombuffer(raw, dtype=_dtype(tensor.name, tensor.datatype)).reshape(tensor.shape)


def to_json(tensor: TensorValue) -> list[Any]:
    """The value as KServe's JSON has it: one flat list."""
    if tensor.datatype == "BYTES":
        return [_as_text(tensor.name, element) for element in split_bytes(tensor.name, check_raw(tensor))]
    flat: list[Any] = to_array(tensor).reshape(-1).tolist()
    return flat


def check_raw(tensor: TensorValue) -> Raw:
    """The binary form, once it is known to be as long as datatype and shape say."""
    raw = tensor.raw
    if raw is None:
        raise BadRequest(f"tensor {tensor.name!r} has no data")
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        found = sum(1 for _ in split_bytes(tensor.name, raw))
        _expect(found == count, tensor.name, f"{count} elements for shape {list(tensor.shape)}", f"{found}")
    else:
        size = 2 if tensor.datatype == "BF16" else _dtype(tensor.name, tensor.datatype).itemsize
        what = f"{count * size} bytes for {tensor.datatype} {list(tensor.shape)}"
        _expect(len(raw) == count * size, tensor.name, what, f"{len(raw)}")
    return raw


def join_bytes(elements: Iterable[bytes]) -> bytes:
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def split_bytes(name: str, raw: Raw) -> Iterator[bytes]:
    view, at = memoryview(raw), 0
    while at < len(view):
        end = at + 4
        if end <= len(view):
            at, end = end, end + struct.unpack_from("<I", view, at)[0]
        if end > len(view):
            raise BadRequest(f"tensor {name!r}: expected BYTES elements behind their length, found an element cut off")
        yield bytes(view[at:end])
        at = end


# --------------------------------------------------------------------------- inside


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise BadRequest(f"tensor {name!r}: expected one of {', '.join(DTYPES)}, BF16, BYTES, found {datatype!r}")
    return dtype


def _expect(good: bool, name: str, expected: str, found: str) -> None:
    if not good:
        raise BadRequest(f"tensor {name!r}: expected {expected}, found {found}")


def _kind(array: npt.NDArray[Any]) -> str:
    return {"U": "texts", "O": "a mixture", "f": "fractions", "b": "true or false"}.get(array.dtype.kind, "others")


def _flat(data: Any) -> Iterator[Any]:
    stack = [iter((data,))]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()


def _as_bytes(name: str, element: Any) -> bytes:
    if isinstance(element, bytes):
        return element
    try:
        return element.encode()  # type: ignore[no-any-return]
    except (AttributeError, UnicodeEncodeError):
        pass
    raise BadRequest(f"tensor {name!r}: expected texts, as BYTES has, found {element!r:.80}")


def _as_text(name: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise BadRequest(
            f"tensor {name!r} holds bytes that are no UTF-8 text and have no JSON form: ask for it as binary_data"
        ) from None


def _round_to_bf16(array: npt.NDArray[Any]) -> bytes:
    """To the nearest, ties to even; a NaN stays one."""
    bits = array.view("<u4")
    rounded = ((bits.astype("<u8") + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype("<u2").tobytes()
