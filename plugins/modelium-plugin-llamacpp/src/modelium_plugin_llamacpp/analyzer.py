"""GGUF models: what they are, by their headers.

`Analysis.entry` is the file to be loaded (empty when the drop is that file); `facts` holds: `files` (the model's
parts), `projector` (the file that turns images or sounds into tokens, or null), `quantization` (`Q4_K_M`, null for
plain floating point), `max_length` (tokens that it was trained for), `layers`, `hidden_size`, `vocab_size`,
`chat_template` (whether there is one), `pooling` (how one embedding is made of a text's tokens, null for a model that
makes text), `memory` (see `memory.shape`) and, for what is not served, `unsupported` (why).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from modelium.api import Analysis, Completeness, hookimpl
from modelium.api.units import human
from modelium.errors import ModelError
from modelium_plugin_llamacpp import memory
from modelium_plugin_llamacpp.drop import Drop, find
from modelium_plugin_llamacpp.gguf import Header, Truncated

FORMAT = "gguf"
ALONE = 0.9
IN_FOLDER = 0.85
"""Of a Hugging Face folder with safetensors as well, these are the weights."""

FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
"""By `general.file_type` (llama_ftype in include/llama.h)."""

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types that are no quantisation, in PyTorch's words."""

POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
"""By `pooling_type` (llama_pooling_type in include/llama.h)."""


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Complete when all parts are there, each as long as its header says."""
    try:
        drop = find(path)
    except Truncated as exc:
        return Completeness(complete=False, reason=exc.message, have_bytes=_have(exc))
    if drop is None or any(part.header.file_bytes is None for part in drop.files):
        return None
    have = sum(part.header.size for part in drop.files)
    want = sum(part.header.file_bytes or 0 for part in drop.files)
    reason = _short(drop)
    return Completeness(complete=not reason, reason=reason, have_bytes=have, want_bytes=max(want, have))


def _have(exc: Truncated) -> int:
    return int(exc.fields.get("have_bytes", 0))


def _short(drop: Drop) -> str:
    """The first file that is shorter than its header says, for a person; empty when none is."""
    for part in drop.files:
        want = part.header.file_bytes
        if want is not None and part.header.size < want:
            return (
                f"{part.name} has {human(part.header.size)} of the {human(want)} that its header announces: "
                "copy it again, whole"
            )
    return ""


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """Architecture, size, quantisation and what it takes in memory."""
    drop = find(path)
    if drop is None:
        return None
    if short := _short(drop):
        raise ModelError(short)
    header = drop.main.header
    arch = header.text("general.architecture")
    if not arch:
        raise ModelError(f"{drop.main.name} does not say of what architecture it is (general.architecture)")
    if not any(part.header.tensors for part in drop.parts):
        raise ModelError(f"{drop.main.name} holds no weights: it is a vocabulary alone")
    parameters = sum(part.header.parameters for part in drop.parts)
    weights = sum(part.header.data_bytes for part in drop.files)
    types = sum((Counter(dict(part.header.bytes_by_type)) for part in drop.parts), Counter[str]())
    main_type = types.most_common(1)[0][0] if types else None
    said = header.integer("general.file_type")
    kind = main_type if said is None else FILE_TYPES.get(said, main_type)
    context = header.integer(f"{arch}.context_length")
    pooling = _pooling(header, arch)
    unsupported = _unsupported(drop, pooling)
    name = header.text("general.name")
    words = [f"{name[:60]} ({arch})" if name else arch, f"{_count(parameters)} parameters", kind or ""]
    words += [human(weights), f"{context} tokens" if context else "", "with a projector" if drop.projector else ""]
    return Analysis(
        analyzer="gguf",
        format=FORMAT,
        summary=", ".join(w for w in words if w),
        confidence=ALONE if drop.alone else IN_FOLDER,
        task="feature-extraction" if pooling else "text-generation",
        architecture=arch,
        entry="" if drop.alone else drop.main.name,
        weights_bytes=weights,
        parameters=parameters,
        dtype=PLAIN.get(main_type or ""),
        facts={
            "files": [part.name for part in drop.parts],
            "projector": drop.projector.name if drop.projector else None,
            "quantization": None if kind in PLAIN else kind,
            "max_length": context,
            "layers": header.integer(f"{arch}.block_count"),
            "hidden_size": header.integer(f"{arch}.embedding_length"),
            "vocab_size": header.lengths.get("tokenizer.ggml.tokens"),
            "chat_template": "tokenizer.chat_template" in header.lengths,
            "pooling": pooling,
            "memory": memory.shape(header),
            **({"unsupported": unsupported} if unsupported else {}),
        },
    )


def _pooling(header: Header, arch: str) -> str | None:
    """How a model makes one embedding of a text; None for one that makes text."""
    said = POOLING.get(header.integer(f"{arch}.pooling_type") or 0, "none")
    if said != "none":
        return said
    sees_all = header.values.get(f"{arch}.attention.causal") is False
    return "mean" if sees_all else None


def _unsupported(drop: Drop, pooling: str | None) -> str:
    name, header = drop.main.name, drop.main.header
    if not header.text("tokenizer.ggml.model"):
        return (
            f"{name} has no tokenizer, so it is no language model (architecture "
            f"{header.text('general.architecture')!r:.60}), and llama.cpp serves no other"
        )
    if pooling == "rank":
        return f"{name} ranks texts, and Modelium has no route for that yet: serve a model that makes embeddings"
    return ""


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
