"""Reads an ONNX file's structure without its weights, by walking the protobuf encoding.

A protobuf library takes a message whole: gigabytes of weights would be read, copied and held to learn a few shapes, and
a file cut short is only "not parsed". Walking the fields by their lengths skips the weights on disk, and shows exactly
how many bytes the file should have. What remains, a small message without numbers, is then parsed by the library.
The encoding: https://protobuf.dev/programming-guides/encoding/; the field numbers: onnx.proto of ONNX 1.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from modelium.builtin.files import Truncated
from modelium.errors import ModelError

MAX_SKELETON_BYTES = 256 << 20
"""A graph of a hundred thousand nodes has about 20 MB without weights."""

VERBATIM_BYTES = 512
"""Messages up to this length are taken as they are: walking into them would cost more than it saves."""

MAX_DEPTH = 100
"""protobuf's own limit on nested messages."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

MODEL: Mapping[int, int] = {
    1: _VARINT, 2: _BYTES, 3: _BYTES, 4: _BYTES, 5: _VARINT, 6: _BYTES, 7: _BYTES, 8: _BYTES, 14: _BYTES, 20: _BYTES,
    25: _BYTES, 26: _BYTES,
}  # fmt: skip
"""Fields of ModelProto and their wire types. A file that starts with anything else is no ONNX file."""
_GRAPH_FIELD, _OPSET_FIELD = 7, 8

INTO: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Tensor": {},
}
"""Fields, by message, that are walked into because weights may lie in them."""

DROP: Mapping[str, frozenset[int]] = {
    "Tensor": frozenset({4, 5, 6, 7, 9, 10, 11}),  # the numbers: float, int32, string, int64, raw, double, uint64
    "Attribute": frozenset({4, 7, 8, 9}),  # a string, lists of numbers and of strings
    "Node": frozenset({6, 9}),  # doc_string and metadata_props, where exporters put stack traces
}
"""Fields, by message, that are left out when they are long."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    message: bytes
    """A ModelProto without weights."""
    dropped_bytes: int
    """Of what was left out."""


class NotOnnx(ModelError):
    code = "not_onnx"


def check_whole(path: Path, name: str) -> None:
    """Raise `Truncated` unless the file's outermost fields are all there, `NotOnnx` when they are not ONNX's."""
    size = path.stat().st_size
    seen = set()
    with path.open("rb") as file:
        position = 0
        while position < size:
            field, _, end = _field(file, position, name)
            number = field >> 3
            if MODEL.get(number) != field & 7:
                raise NotOnnx(f"{name} is no ONNX file: at byte {position} it has what no ONNX model has")
            if end > size:
                raise Truncated(f"{name} has {size} of at least {end} bytes: copy it again, whole", size, end)
            seen.add(number)
            position = end
    if not {_GRAPH_FIELD, _OPSET_FIELD} <= seen:
        raise Truncated(f"{name} ends before its graph and operator set: it is cut short, or no ONNX model", size)


def read_skeleton(path: Path, name: str) -> Skeleton:
    """The model without its weights. Raises as `check_whole`, and `NotOnnx` when an inner message is damaged."""
    check_whole(path, name)
    walker = _Walker(name)
    with path.open("rb") as file:
        parts = walker.message(file, "Model", 0, path.stat().st_size, 0)
    return Skeleton(b"".join(parts), walker.dropped)


class _Walker:
    def __init__(self, name: str):
        self.name = name
        self.kept = 0
        self.dropped = 0

    def message(self, file: BufferedReader, kind: str, position: int, end: int, depth: int) -> list[bytes]:
        if depth > MAX_DEPTH:
            raise NotOnnx(f"{self.name} nests graphs more than {MAX_DEPTH} deep")
        into, drop = INTO[kind], DROP.get(kind, frozenset())
        parts: list[bytes] = []
        while position < end:
            tag, start, stop = _field(file, position, self.name)
            if stop > end:
                raise NotOnnx(f"{self.name} is damaged: a field at byte {position} reaches beyond its message")
            number, length = tag >> 3, stop - start
            if tag & 7 == _BYTES and length > VERBATIM_BYTES and number in into:
                inner = self.message(file, into[number], start, stop, depth + 1)
                parts += [encode_varint(tag), encode_varint(sum(map(len, inner))), *inner]
            elif tag & 7 == _BYTES and length > VERBATIM_BYTES and number in drop:
                self.dropped += length
            else:
                self._keep(stop - position)
                file.seek(position)
                parts.append(file.read(stop - position))
            position = stop
        return parts

    def _keep(self, count: int) -> None:
        self.kept += count
        if self.kept > MAX_SKELETON_BYTES:
            raise ModelError(
                f"{self.name} has more than {MAX_SKELETON_BYTES >> 20} MiB of graph beside its weights, "
                "more than can be looked at"
            )


def _field(file: BufferedReader, position: int, name: str) -> tuple[int, int, int]:
    """Tag, and where the field's payload begins and ends (the end may lie beyond the file's)."""
    file.seek(position)
    buffer = file.read(20)
    tag, used = _varint(buffer, 0, name)
    start = position + used
    match tag & 7:
        case 0:
            _, after = _varint(buffer, used, name)
            return tag, start, position + after
        case 1:
            return tag, start, start + 8
        case 2:
            length, after = _varint(buffer, used, name)
            return tag, position + after, position + after + length
        case 5:
            return tag, start, start + 4
    raise NotOnnx(f"{name} is no ONNX file: at byte {position} it has what protobuf does not know")


def _varint(buffer: bytes, place: int, name: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(buffer):
            raise Truncated(f"{name} ends inside a number: copy it again, whole", 0)
        byte = buffer[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise NotOnnx(f"{name} is no ONNX file: it has a number that is too long")


def encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
