"""Writes a safetensors file from a checkpoint's storages, one at a time, so that memory stays far below its size.

The library's own writers want every tensor in memory at once, and refuse tensors that share memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, BinaryIO

from modelium.builtin.pickles import Storage, TensorView, item_bytes
from modelium.builtin.torch_file import Checkpoint
from modelium.errors import ConfigError, ModelError

CHUNK_BYTES = 16 << 20

MAX_GROWTH = 4
"""A view may show one number many times (a stride of 0). Tied weights double; beyond fourfold it would fill a disk."""


def tensor_bytes(view: TensorView) -> int:
    return math.prod(view.shape) * item_bytes(view.dtype)


def write_safetensors(checkpoint: Checkpoint, target: Path) -> int:
    """Write all tensors of `checkpoint`, contiguous, and return the bytes of their data.

    Tensors that share memory are written each for itself. Raises `ModelError` when the checkpoint's numbers are not
    there, `ModeliumError` (code `storage`) when `target` can't be written.
    """
    groups: dict[str, list[tuple[str, TensorView]]] = {}
    for name, view in checkpoint.tensors.items():
        groups.setdefault(view.storage.key, []).append((name, view))
    total = sum(tensor_bytes(view) for view in checkpoint.tensors.values())
    stored = sum(group[0][1].storage.nbytes for group in groups.values())
    if total > MAX_GROWTH * stored + CHUNK_BYTES:
        raise ModelError(
            f"{checkpoint.path.name} holds {stored} bytes of numbers, and its tensors would take {total}: "
            "no model repeats its weights like that"
        )
    try:
        with target.open("xb") as file:
            _put(file, _header([item for group in groups.values() for item in group]))
            for group in groups.values():
                with checkpoint.storage(group[0][1].storage) as source:
                    _copy(source, group, file, checkpoint.path.name)
    except OSError as exc:
        raise _cannot_write(target, exc) from exc
    return total


def _header(tensors: Sequence[tuple[str, TensorView]]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    position = 0
    for name, view in tensors:
        size = tensor_bytes(view)
        table[name] = {"dtype": view.dtype, "shape": view.shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, group: Sequence[tuple[str, TensorView]], file: IO[bytes], name: str) -> None:
    """Read one storage once, to its end, and write what its tensors show of it."""
    storage = group[0][1].storage
    if len(group) == 1 and _is_whole(group[0][1], storage):
        left = storage.nbytes
        while left:
            chunk = source.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ModelError(f"{name} ends inside its storage {storage.key}: copy it again, whole")
            _put(file, chunk)
            left -= len(chunk)
        source.read(1)  # at its end a zip's entry is checked against its sum
        return
    data = source.read(storage.nbytes)
    source.read(1)
    if len(data) != storage.nbytes:
        raise ModelError(f"{name} ends inside its storage {storage.key}: copy it again, whole")
    for _, view in group:
        _put(file, gather(data, view))


def gather(data: bytes, view: TensorView) -> bytes:
    """The tensor's numbers in row-major order; `view` was seen to lie within its storage."""
    if not math.prod(view.shape):
        return b""
    import numpy as np

    size = item_bytes(view.dtype)
    bits = f"<u{size}"  # numbers are moved as bits, whatever they mean
    flat = np.frombuffer(data, dtype=bits, count=len(data) // size)[view.offset :]
    strided = np.lib.stride_tricks.as_strided(flat, view.shape, [s * size for s in view.stride], writeable=False)
    return strided.tobytes()


def _is_whole(view: TensorView, storage: Storage) -> bool:
    """Whether the tensor is its storage, number by number."""
    contiguous, step = True, 1
    for count, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        contiguous = contiguous and (count == 1 or stride == step)
        step *= count
    return contiguous and view.offset == 0 and tensor_bytes(view) == storage.nbytes


def _put(file: IO[bytes], data: bytes) -> None:
    try:
        file.write(data)
    except OSError as exc:
        raise _cannot_write(Path(file.name), exc) from exc


def _cannot_write(target: Path, exc: OSError) -> ConfigError:
    return ConfigError(f"{target} can't be written: {exc.strerror}: make room; it is tried again", code="storage")


def write_index(target: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index of a model in several parts, as transformers reads it."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    target.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
