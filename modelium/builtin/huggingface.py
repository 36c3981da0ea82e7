"""Hugging Face folders: what they are, by config.json and the headers of their safetensors files.

`Analysis.entry` is the path of config.json, so that its parent is the folder to load; `facts` holds:
`model_type`, `folder` (the parent of `entry`, empty for the drop itself), `weights` (`safetensors` or `pickle`),
`files` (names of the weight files), `dtypes` (bytes by safetensors dtype), `tokenizer`, `processor`, `chat_template`
(whether there is one), `quantization` (the method's name, or null), `layers`, `hidden_size`, `heads`, `kv_heads`,
`head_dim`, `kv_lora_rank` and `qk_rope_head_dim` (of latent attention), `vocab_size`, `max_length`, `labels` (how
many), and, for a class that is not served, `unsupported` (why).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modelium.api import Analysis, Completeness, Finding, Severity, hookimpl
from modelium.api.units import human
from modelium.builtin import hf_tasks
from modelium.builtin.files import MAX_JSON_BYTES, Entry, Truncated, files, read_json
from modelium.builtin.hf_folder import (
    Folder,
    Weights,
    find,
    find_weights,
    has_tokenizer,
    lacking,
    read_headers,
    whole_pickle,
)
from modelium.builtin.safetensors_header import NAMES, Header, read_header
from modelium.errors import ModelError

CONFIDENCE = 0.9
NESTED = 0.8
"""A model in a folder of the drop: what lies beside it may be what was meant."""

MAX_OTHER_BYTES = 1 << 20
"""Beyond it a JSON file that is not called a configuration is a vocabulary or an index."""

PACKED = frozenset({"U8", "I8", "I32", "U32", "I64", "F4"})
"""Dtypes in which quantised weights hold several numbers in one."""


# --------------------------------------------------------------------------- has it all arrived?


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Complete when every part of the weights has the size that its header announces, with its tokenizer."""
    try:
        folder = find(path)
    except Truncated as exc:
        return Completeness(complete=False, reason=exc.message, have_bytes=exc.have_bytes)
    if folder is None:
        return None
    try:
        weights = find_weights(folder)
    except Truncated as exc:
        return Completeness(complete=False, reason=exc.message, have_bytes=exc.have_bytes)
    have, want, reasons = _arrived(weights)
    if not weights.shards:
        reasons.append("no weights are there yet (model.safetensors)")
    if not reasons:
        missing = lacking(folder)
        reasons += [missing] if missing else []
    total = max(want, weights.total_bytes or 0) or None
    return Completeness(complete=not reasons, reason="; ".join(reasons[:3]), have_bytes=have, want_bytes=total)


def _arrived(weights: Weights) -> tuple[int, int, list[str]]:
    have = want = 0
    reasons: list[str] = []
    for name, entry in weights.shards.items():
        if entry is None:
            reasons.append(f"{name} is not there yet")
            continue
        have += entry.size
        try:
            if weights.kind == "safetensors":
                want += read_header(entry.path, entry.name).file_bytes
            else:
                whole_pickle(entry)
                want += entry.size
        except Truncated as exc:
            want += exc.want_bytes or entry.size
            reasons.append(exc.message)
        except ModelError:  # it will not get better by waiting: the analysis says why
            want += entry.size
    return have, want, reasons


# --------------------------------------------------------------------------- what is it?


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """Task, size and precision, from config.json and the weights' headers."""
    folder = find(path)
    if folder is None:
        return None
    task = hf_tasks.task_of(folder.config, folder.entries)
    weights = find_weights(folder)
    if not weights.shards:
        other = [n for n in folder.entries if n.startswith(("tf_model", "flax_model"))]
        found = f"; {other[0]} is for another framework: save the model with PyTorch" if other else ""
        raise ModelError(
            f"{path.name} has a config.json and no weights: model.safetensors, or parts named by "
            f"model.safetensors.index.json, were expected beside it{found}"
        )
    if task.task is not None and (missing := lacking(folder)):
        raise ModelError(f"{path.name} can't be served for {task.task}: {missing}")
    headers = _headers(weights)
    quantization = _quantization(folder)
    dtypes = sum((h.bytes_by_dtype() for h in headers.values()), Counter[str]())
    parameters = _parameters(headers, quantization)
    weights_bytes = sum(h.data_bytes for h in headers.values()) or sum(e.size for e in weights.shards.values() if e)
    dtype = NAMES.get(dtypes.most_common(1)[0][0]) if dtypes else None
    facts = {
        "model_type": folder.config.get("model_type"),
        "folder": folder.prefix.rstrip("/"),
        "weights": weights.kind,
        "files": list(weights.shards),
        "dtypes": dict(dtypes),
        "tokenizer": has_tokenizer(folder),
        "processor": folder.names("preprocessor_config.json") or folder.names("processor_config.json"),
        "chat_template": _has_chat_template(folder),
        "quantization": quantization,
        **_sizes(folder.config),
    }
    if task.unsupported:
        facts["unsupported"] = task.unsupported
    words = [task.architecture or "a Hugging Face model", f"{_count(parameters)} parameters" if parameters else ""]
    words += [quantization or dtype or "", human(weights_bytes)]
    return Analysis(
        analyzer="huggingface",
        format="huggingface",
        summary=", ".join(w for w in words if w),
        confidence=NESTED if folder.prefix else CONFIDENCE,
        task=task.task,
        architecture=task.architecture,
        entry=f"{folder.prefix}config.json",
        weights_bytes=weights_bytes,
        parameters=parameters,
        dtype=dtype,
        facts=facts,
    )


def _headers(weights: Weights) -> dict[str, Header]:
    """Of safetensors; a pickle is opened by the converter alone, and here only seen to be whole."""
    if weights.kind == "safetensors":
        return read_headers(weights)
    for name, entry in weights.shards.items():
        if entry is None:
            raise ModelError(f"{name}, which the index names, is missing")
        whole_pickle(entry)
    return {}


def _parameters(headers: Mapping[str, Header], quantization: str | None) -> int | None:
    """How many numbers the model has; not told where quantised weights pack several into one."""
    if not headers:
        return None
    if quantization and any(dtype in PACKED for h in headers.values() for dtype, _ in h.shapes.values()):
        return None
    return sum(h.parameters for h in headers.values())


def _quantization(folder: Folder) -> str | None:
    found = folder.config.get("quantization_config")
    if isinstance(found, dict):
        return str(found.get("quant_method") or "unnamed")[:40]
    if isinstance(folder.config.get("quantization"), dict):
        return "mlx"
    return "gptq" if "quantize_config.json" in folder.entries else None


def _has_chat_template(folder: Folder) -> bool:
    if folder.names("chat_template.jinja") or folder.names("chat_template.json"):
        return True
    entry = folder.entries.get("tokenizer_config.json")
    return entry is not None and entry.size <= MAX_JSON_BYTES and b'"chat_template"' in entry.path.read_bytes()


_SIZES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "vocab_size": ("vocab_size",),
    "max_length": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
}
"""One word for what families of models call differently in their config.json."""


def _sizes(config: Mapping[str, Any]) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for fact, keys in _SIZES.items():
        values = (config.get(key) for key in keys)
        found[fact] = next((v for v in values if type(v) is int and 0 < v < 2**31), None)
    labels = config.get("id2label")
    found["labels"] = len(labels) if isinstance(labels, dict) else None
    return found


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


# --------------------------------------------------------------------------- does it ask for code of its own?


@hookimpl
def modelium_scan(path: Path) -> Iterable[Finding]:
    """Custom code that configuration files name, and indexes that lead out of their folder."""
    if not path.is_dir():
        return []
    found = files(path)
    triton = any(e.name == "config.pbtxt" for e in found)
    return list(_scan(found, Severity.WARN if triton else Severity.REFUSE))


def _scan(found: Iterable[Entry], severity: Severity) -> Iterator[Finding]:
    for entry in found:
        named = entry.base.endswith("config.json")
        if not entry.base.endswith(".json") or (entry.size > MAX_OTHER_BYTES and not named):
            continue
        try:
            value = read_json(entry.path, entry.name)
        except ModelError as exc:
            if named and entry.size > MAX_JSON_BYTES:
                yield Finding(severity=severity, code="too_large", path=entry.name, message=exc.message)
            continue  # whoever needs it says what is wrong with it
        for key, code in _custom_code(value):
            yield Finding(
                severity=severity,
                code="custom_code",
                path=entry.name,
                message=f"{entry.name} asks for code of its own ({key}: {code}), which would run with "
                "`trust_remote_code`; Modelium never runs it. If transformers itself has this architecture, "
                f"remove `{key}` from the file and drop the model again; otherwise export the model to ONNX",
            )


def _custom_code(value: Any) -> Iterator[tuple[str, str]]:
    """Keys by which transformers finds code to run, with what they name."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        if not isinstance(item, dict):
            continue
        for key, inner in item.items():
            if key in ("auto_map", "custom_pipelines") and inner:
                yield key, json.dumps(inner)[:120]
            elif key in ("attn_implementation", "experts_implementation") and "/" in str(inner):
                yield key, str(inner)[:120]  # a kernel fetched from the Hub, which is code
            elif isinstance(inner, dict | list):
                waiting.append(inner)


__all__ = ["modelium_analyze", "modelium_completeness", "modelium_scan"]
