"""Reads the header of a safetensors file, and nothing of its data: it says every tensor's place and the file's size.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian length, that many bytes of
JSON, then the data, without holes or overlaps. The library maps the whole file and says only that a file is broken;
here a file that is still arriving has to be told from one that never was right.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from modelium.api.units import human
from modelium.builtin.files import Truncated
from modelium.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of each dtype."""

NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
         "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8"}  # fmt: skip
"""PyTorch's words for dtypes that weights are kept in."""


@dataclass(frozen=True, slots=True)
class Header:
    shapes: Mapping[str, tuple[str, tuple[int, ...]]]
    """Dtype and shape of each tensor."""
    file_bytes: int
    """What the whole file must have."""
    data_bytes: int

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes.values())

    def bytes_by_dtype(self) -> Counter[str]:
        count: Counter[str] = Counter()
        for dtype, shape in self.shapes.values():
            count[dtype] += math.prod(shape) * BITS[dtype] // 8
        return count


def read_header(path: Path, name: str | None = None) -> Header:
    """The header of a whole file.

    Raises `Truncated` when the file is shorter than its header says, `ModelError` when it can't be a safetensors file
    or says what can't be.
    """
    name = name or path.name
    try:
        found = path.stat()
        header = _parse(str(path), name, found.st_mtime_ns, found.st_size)
    except OSError as exc:
        raise ModelError(f"{name} can't be read: {exc.strerror}", code="unreadable") from exc
    if found.st_size < header.file_bytes:
        raise Truncated(
            f"{name} has {human(found.st_size)} of the {human(header.file_bytes)} that its header announces "
            f"({found.st_size} of {header.file_bytes} bytes): copy it again, whole",
            found.st_size,
            header.file_bytes,
        )
    if found.st_size > header.file_bytes:
        raise ModelError(
            f"{name} has {found.st_size} bytes, and its header accounts for {header.file_bytes}: it is damaged"
        )
    return header


@lru_cache(maxsize=256)
def _parse(path: str, name: str, mtime_ns: int, size: int) -> Header:
    del mtime_ns  # part of the cache's key: a header is read once, however often completeness is asked for
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise Truncated(f"{name} has {size} bytes, less than the shortest safetensors file", size)
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ModelError(f"{name} is no safetensors file: it does not start with the length of a header")
        if size >= 9 and file.read(1) != b"{":
            raise ModelError(f"{name} is no safetensors file: its header is not a JSON object")
        if size < 8 + length:
            raise Truncated(f"{name} ends inside its header, at {size} of at least {8 + length} bytes", size)
        text = b"{" + file.read(length - 1)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{name} is no safetensors file: its header is not JSON ({exc})") from exc
    table.pop("__metadata__", None)
    shapes, data_bytes = _check(table, name)
    return Header(shapes, 8 + length + data_bytes, data_bytes)


def _check(table: Mapping[str, Any], name: str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: list[tuple[int, int, str]] = []
    for tensor, entry in table.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise ModelError(f"{name}: the header's entry for {tensor!r:.80} lacks a dtype, shape or place")
        if dtype not in BITS:
            raise ModelError(f"{name}: tensor {tensor!r:.80} has the unknown dtype {dtype!r:.40}")
        if len(shape) > 64 or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in shape):
            raise ModelError(f"{name}: tensor {tensor!r:.80} has the impossible shape {shape[:8]}")
        bits = math.prod(shape) * BITS[dtype]
        if bits % 8 or end - begin != bits // 8 or begin < 0:
            raise ModelError(
                f"{name}: tensor {tensor!r:.80} ({dtype} {shape!r:.80}) needs {bits // 8} bytes, and its place is "
                f"{begin} to {end}"
            )
        shapes[tensor] = (dtype, tuple(shape))
        places.append((begin, end, tensor))
    position = 0
    for begin, end, tensor in sorted(places):
        if begin != position:
            raise ModelError(f"{name}: tensor {tensor!r:.80} starts at {begin}, and the one before ends at {position}")
        position = end
    return shapes, position
