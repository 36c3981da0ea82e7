"""Reads the header of a GGUF file, and nothing of its data: what the model is, and how long the whole file must be.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, key-value pairs, tensor
infos, then the tensors one behind the other, each at a multiple of the alignment. A file comes from anybody: every
length is checked against the file's size and a bound before anything is read by it, and what nobody asks for is
skipped. What llama.cpp (ggml/src/gguf.cpp) refuses is refused here.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from modelium.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""They differ in the byte order that version 3 also allows; version 1 had shorter lengths, and no runtime reads it."""

MAX_KEYS = 10_000
MAX_KEY_BYTES = 1024
MAX_TENSORS = 200_000
MAX_NAME_BYTES = 64
"""ggml's GGML_MAX_NAME."""
MAX_DIMS = 4
MAX_TEXT_BYTES = 64 << 20
MAX_NUMBERS = 1 << 28
"""Of one array."""
MAX_WORDS = 3_000_000
"""Strings in all arrays together: each takes a look of its own, and the largest vocabularies with their merges have a
million."""
KEPT_BYTES = 512
"""Of a string that is kept; of a longer one, as a chat template, it is only kept that it is there."""
KEPT_NUMBERS = 2048
"""Of an array of numbers that is kept: one for each layer, say."""
MAX_ALIGNMENT = 1 << 20

CHUNK_BYTES = 1 << 18

Value = int | float | bool | str | tuple[int | float | bool, ...]

_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letters by gguf_metadata_value_type."""
_STRING, _ARRAY, _UINT32 = 8, 9, 4

TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""Name, numbers in a block and bytes of a block by ggml_type (ggml/include/ggml.h, gguf-py's GGML_QUANT_SIZES)."""


class Truncated(ModelError):
    """The file ends before its header or its data do; more may be on its way."""

    code = "truncated"

    def __init__(self, message: str, have_bytes: int, want_bytes: int | None = None):
        super().__init__(message, have_bytes=have_bytes, want_bytes=want_bytes)
        self.want_bytes = want_bytes


@dataclass(frozen=True, slots=True)
class Header:
    values: Mapping[str, Value]
    """Of scalars, short texts and short arrays of numbers."""
    lengths: Mapping[str, int]
    """Of arrays (elements) and of texts (bytes), those that are not kept included."""
    tensors: int
    parameters: int
    """Numbers in all tensors."""
    bytes_by_type: Mapping[str, int]
    """Of the types that are known here."""
    data_bytes: int
    """From the first tensor to the last one's end, or its begin where its type is not known here."""
    file_bytes: int | None
    """What the file must have at least; None where the last tensor's type is not known here."""
    size: int
    """What it has."""

    def integer(self, key: str) -> int | None:
        """A number that is whole and not negative; None when there is none."""
        value = self.values.get(key)
        return value if type(value) is int and value >= 0 else None

    def text(self, key: str) -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else ""


def read_header(path: Path, name: str | None = None) -> Header:
    """The header of a file whose data may still be arriving: compare `file_bytes` with `size`.

    Raises `Truncated` when it ends inside its header, `ModelError` when it is no GGUF file or says what can't be.
    """
    name = name or path.name
    try:
        found = path.stat()
        return _read(str(path), name, found.st_mtime_ns, found.st_size)
    except OSError as exc:
        raise ModelError(f"{name} can't be read: {exc.strerror}", code="unreadable") from exc


@lru_cache(maxsize=64)
def _read(path: str, name: str, mtime_ns: int, size: int) -> Header:
    del mtime_ns  # part of the cache's key: a header is read once, however often completeness is asked for
    with open(path, "rb", buffering=CHUNK_BYTES) as file:
        return _Reader(file, name, size).header()


class _Reader:
    def __init__(self, file: BinaryIO, name: str, size: int):
        self._file = file
        self._name = name
        self._size = size
        self._at = 0
        self._words = 0
        self._values: dict[str, Value] = {}
        self._lengths: dict[str, int] = {}

    def header(self) -> Header:
        if (start := self._take(4)) != MAGIC:
            raise ModelError(f"{self._name} is no GGUF file: it starts with {start!r}")
        version = self._number("I")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            what = "has the byte order of other processors" if big else f"has version {version} of GGUF"
            raise ModelError(f"{self._name} {what}, and llama.cpp reads versions 2 and 3: convert it again")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self._damaged(f"it announces {tensors} tensors and {keys} keys")
        for _ in range(keys):
            self._pair()
        return self._tensors(tensors)

    # ------------------------------------------------------------------ key-value pairs

    def _pair(self) -> None:
        key = self._take(self._bounded(MAX_KEY_BYTES, "a key")).decode("utf-8", "replace")
        if not key or key in self._values or key in self._lengths:
            raise self._damaged(f"the key {key!r:.80} is empty or there twice")
        kind = self._number("I")
        if kind == _STRING:
            length = self._length()
            self._lengths[key] = length
            if length <= KEPT_BYTES:
                self._values[key] = self._take(length).decode("utf-8", "replace")
            else:
                self._skip(length)
        elif kind == _ARRAY:
            self._array(key)
        elif kind in _FIXED:
            self._values[key] = self._one(_FIXED[kind])
        else:
            raise self._damaged(f"{key!r:.80} has the unknown type {kind}")
        if key == "general.alignment" and kind != _UINT32:
            raise self._damaged("general.alignment is no UINT32")

    def _array(self, key: str) -> None:
        kind, count = self._number("I"), self._number("Q")
        if count > MAX_NUMBERS:
            raise self._damaged(f"{key!r:.80} has {count} elements")
        self._lengths[key] = count
        if kind in _FIXED:
            size = struct.calcsize(_FIXED[kind])
            if count > (self._size - self._at) // size:
                raise self._ends()
            if count <= KEPT_NUMBERS:
                self._values[key] = struct.unpack(f"<{count}{_FIXED[kind]}", self._take(count * size))
            else:
                self._skip(count * size)
        elif kind == _STRING:
            self._words += count
            if self._words > MAX_WORDS:
                raise self._damaged(f"its arrays hold more than {MAX_WORDS} texts")
            self._skip_texts(count)
        else:
            raise self._damaged(f"{key!r:.80} is an array of type {kind}")

    # ------------------------------------------------------------------ tensors

    def _tensors(self, count: int) -> Header:
        alignment = self._values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}")
        parameters = end = last = 0
        known = True
        by_type: Counter[str] = Counter()
        for _ in range(count):
            tensor = self._take(self._bounded(MAX_NAME_BYTES - 1, "a tensor's name")).decode("utf-8", "replace")
            dims = [self._number("Q") for _ in range(self._number_up_to(MAX_DIMS, "dimensions"))]
            kind, offset = self._number("I"), self._number("Q")
            numbers = math.prod(dims)
            if numbers >= 2**63:
                raise self._damaged(f"the tensor {tensor!r:.80} has the impossible shape {dims}")
            # They lie one behind the other: only behind one of unknown size an offset can't be told.
            if offset != end and (known or offset < end):
                raise self._damaged(f"the tensor {tensor!r:.80} starts at {offset}, the one before ends at {end}")
            parameters += numbers
            known = kind in TYPES
            end = last = offset
            if known:
                type_name, block, block_bytes = TYPES[kind]
                if (dims[0] if dims else 1) % block:
                    raise self._damaged(f"the tensor {tensor!r:.80} ({type_name}) has rows of {dims[0]} numbers")
                size = numbers // block * block_bytes
                by_type[type_name] += size
                last = offset + size
                end = -(-last // alignment) * alignment
        begin = -(-self._at // alignment) * alignment
        return Header(
            values=self._values,
            lengths=self._lengths,
            tensors=count,
            parameters=parameters,
            bytes_by_type=dict(by_type),
            data_bytes=last,
            file_bytes=(begin + last if count else self._at) if known else None,
            size=self._size,
        )

    # ------------------------------------------------------------------ bytes

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._ends()
        found = self._file.read(count)
        if len(found) < count:  # it became shorter
            raise self._ends()
        self._at += count
        return found

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise self._ends()
        self._file.seek(count, 1)
        self._at += count

    def _skip_texts(self, count: int) -> None:
        """As `_skip` for each, but a hundred thousand of them in a few hundredths of a second."""
        chunk, at = b"", 0
        for _ in range(count):
            if len(chunk) - at < 8:
                chunk, at = chunk[at:] + self._file.read(CHUNK_BYTES), 0
            length = int.from_bytes(chunk[at : at + 8], "little")
            if length > MAX_TEXT_BYTES:
                raise self._damaged(f"a text has {length} bytes")
            self._at += 8 + length
            if self._at > self._size:
                raise self._ends()
            at += 8 + length
            if at > len(chunk):
                chunk, at = b"", 0
                self._file.seek(self._at)
        self._file.seek(self._at)

    def _one(self, letter: str) -> int | float | bool:
        (value,) = struct.unpack(f"<{letter}", self._take(struct.calcsize(letter)))
        return value  # type: ignore[no-any-return]

    def _number(self, letter: str) -> int:
        return int(self._one(letter))

    def _number_up_to(self, most: int, what: str) -> int:
        number = self._number("I")
        if number > most:
            raise self._damaged(f"a tensor has {number} {what}")
        return number

    def _length(self) -> int:
        return self._bounded(MAX_TEXT_BYTES, "a text")

    def _bounded(self, most: int, what: str) -> int:
        length = self._number("Q")
        if length > most:
            raise self._damaged(f"{what} has {length} bytes")
        return length

    def _ends(self) -> Truncated:
        return Truncated(
            f"{self._name} ends inside its header, at {self._size} bytes: copy it again, whole", self._size
        )

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self._name} is a damaged GGUF file: {what}")
