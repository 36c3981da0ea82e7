"""A Hugging Face folder as it lies on disk: which folder it is, which files are its weights, and what it lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelium.builtin import hf_tasks
from modelium.builtin.files import Entry, Truncated, files, read_object
from modelium.builtin.safetensors_header import Header, read_header
from modelium.builtin.torch_file import Kind, kind_of, open_zip, read_checkpoint
from modelium.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
"""The names that transformers looks for, in this order (transformers/utils/__init__.py)."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = (
    "training_args", "optimizer", "scheduler", "rng_state", "scaler", "consolidated", "adapter_model", "openvino_",
)  # fmt: skip
"""What trainers and other tools leave beside the weights, by the start of the name."""

EXPORTS = (".onnx", ".gguf", "openvino_model.xml")
"""Ends of the names of models that may have the configuration of what they were made from beside them."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?:safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Weights:
    kind: str
    """`safetensors`, `pickle`, or nothing when there are none."""
    shards: Mapping[str, Entry | None]
    """By file name; None for one that the index names and that is not there."""
    tensors: Mapping[str, str]
    """The index's table of tensors and their files; empty without an index."""
    total_bytes: int | None = None
    """By the index."""


@dataclass(frozen=True, slots=True)
class Folder:
    drop: Path
    prefix: str
    """Of the folder that holds config.json, relative to the drop; empty or ending in `/`."""
    entries: Mapping[str, Entry]
    """The files directly in it, by name."""
    config: Mapping[str, Any]
    others: Sequence[Entry]
    """The files of the drop that lie elsewhere."""

    @property
    def path(self) -> Path:
        return self.drop / self.prefix

    def names(self, *wanted: str) -> bool:
        return all(name in self.entries for name in wanted)


def find(drop: Path) -> Folder | None:
    """The Hugging Face model in a dropped folder, which may lie in a folder in it; None when there is none.

    Raises `Truncated` when its config.json is cut short, `ModelError` when it is no JSON.
    """
    if not drop.is_dir():
        return None
    found = files(drop)
    names = {e.name for e in found}
    if "config.pbtxt" in names or "model_index.json" in names:  # a Triton model; a diffusers pipeline
        return None
    configs = sorted((e for e in found if e.base == "config.json"), key=lambda e: e.name.count("/"))
    top = [e for e in configs if e.name.count("/") == configs[0].name.count("/") <= 3]
    if len(top) != 1:
        return None
    config = read_object(top[0].path, top[0].name)
    if not isinstance(config.get("architectures"), list) and not isinstance(config.get("model_type"), str):
        return None
    prefix = top[0].name.removesuffix("config.json")
    entries = {e.base: e for e in found if e.name == prefix + e.base}
    folder = Folder(drop, prefix, entries, config, [e for e in found if e.name != prefix + e.base])
    if any(e.base.endswith(EXPORTS) for e in found) and not find_weights(folder).shards:
        return None  # an export that keeps the configuration beside it
    return folder


def find_weights(folder: Folder) -> Weights:
    """Which files hold the weights, as transformers would choose; safetensors first.

    Raises `Truncated` or `ModelError` when an index can't be read, or names files outside the folder.
    """
    entries = folder.entries
    if SINGLE in entries:
        return Weights("safetensors", {SINGLE: entries[SINGLE]}, {})
    if INDEX in entries:
        return _indexed(folder, INDEX, "safetensors")
    loose = sorted(n for n in entries if n.endswith(".safetensors") and not n.startswith(NO_WEIGHTS))
    if loose:
        return _loose(entries, loose)
    if PICKLE_SINGLE in entries:
        return Weights("pickle", {PICKLE_SINGLE: entries[PICKLE_SINGLE]}, {})
    if PICKLE_INDEX in entries:
        return _indexed(folder, PICKLE_INDEX, "pickle")
    loose = sorted(n for n in entries if n.endswith(PICKLE_SUFFIXES) and not n.startswith(NO_WEIGHTS))
    if len(loose) == 1:
        return Weights("pickle", {loose[0]: entries[loose[0]]}, {})
    if len(loose) > 1:
        raise ModelError(
            f"the folder holds {len(loose)} files that may be its weights ({', '.join(loose[:4])}): "
            f"keep one of them, or name them by a {PICKLE_INDEX}"
        )
    return Weights("", {}, {})


def _loose(entries: Mapping[str, Entry], names: Sequence[str]) -> Weights:
    shard = _SHARD.fullmatch(names[0])
    if shard:
        raise Truncated(
            f"{names[0]} is one of {int(shard['count'])} parts, and {INDEX}, which says what is in which, is missing",
            sum(entries[n].size for n in names),
        )
    raise ModelError(
        f"transformers reads weights from {SINGLE}, and the folder holds {', '.join(names[:4])}: "
        "rename the one to be served"
    )


def _indexed(folder: Folder, name: str, kind: str) -> Weights:
    index = read_object(folder.entries[name].path, name)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{name} has no `weight_map`, which says what tensor is in which file: it is damaged")
    wanted: dict[str, Entry | None] = {}
    for tensor, file in table.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise ModelError(
                f"{name} places tensor {tensor!r:.60} in {file!r:.80}, and a part must lie beside its index",
                code="unsafe_path",
            )
        wanted.setdefault(file, folder.entries.get(file))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = int(total) if isinstance(total, int | float) and 0 <= total < 2**63 else None
    return Weights(kind, dict(sorted(wanted.items())), table, size)


def read_headers(weights: Weights) -> dict[str, Header]:
    """The headers of all safetensors parts.

    Raises `Truncated` for a part that is missing or cut short, `ModelError` for one that is wrong or lacks a tensor
    which the index places in it.
    """
    missing = [name for name, entry in weights.shards.items() if entry is None]
    if missing:
        here = sum(entry.size for entry in weights.shards.values() if entry)
        raise Truncated(
            f"{len(missing)} of {len(weights.shards)} parts that the index names are missing: {', '.join(missing[:4])}",
            here,
            weights.total_bytes,
        )
    headers = {name: read_header(entry.path, entry.name) for name, entry in weights.shards.items() if entry}
    for tensor, file in weights.tensors.items():
        if tensor not in headers[file].shapes:
            raise ModelError(f"the index places tensor {tensor!r:.80} in {file}, which does not hold it: it is damaged")
    return headers


def whole_pickle(entry: Entry) -> None:
    """Raise `Truncated` when a pickled file of weights is cut short, as far as it says how long it is."""
    kind = kind_of(entry.path)
    if kind is Kind.LEGACY:
        read_checkpoint(entry.path)
    elif kind in (Kind.CHECKPOINT, Kind.TORCHSCRIPT, Kind.ZIP):
        with open_zip(entry.path, entry.name):
            pass
    elif entry.size == 0:
        raise Truncated(f"{entry.name} is empty", 0)


def lacking(folder: Folder) -> str:
    """What the folder lacks beside its weights to be served for its task, for a person; empty when nothing."""
    task = hf_tasks.task_of(folder.config, folder.entries).task
    if task == "image-classification":
        if folder.names("preprocessor_config.json") or folder.names("processor_config.json"):
            return ""
        return "preprocessor_config.json, which says how an image is prepared, is missing"
    if task is None or has_tokenizer(folder):
        return ""
    return "the tokenizer is missing (tokenizer.json, tokenizer.model, vocab.txt, or vocab.json with merges.txt)"


_BYTE_LEVEL = frozenset({"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"})
"""Tokenizers that work on bytes, and so have no file of their own."""

_VOCABULARIES = (
    ("tokenizer.json",), ("tokenizer.model",), ("spiece.model",), ("sentencepiece.bpe.model",), ("vocab.txt",),
    ("vocab.json", "merges.txt"), ("tekken.json",), ("tokenizer.model.v3",), ("vocab.bpe", "encoder.json"),
)  # fmt: skip


def has_tokenizer(folder: Folder) -> bool:
    if any(folder.names(*group) for group in _VOCABULARIES) or any(n.endswith(".tiktoken") for n in folder.entries):
        return True
    if "tokenizer_config.json" not in folder.entries:
        return False
    config = read_object(folder.entries["tokenizer_config.json"].path)
    return config.get("tokenizer_class") in _BYTE_LEVEL
