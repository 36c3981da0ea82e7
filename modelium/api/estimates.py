"""First estimates of what a model takes, for runtime backends; what was measured replaces them after the first load."""

from __future__ import annotations

from modelium.api.types import Analysis

READ_BYTES_PER_S = 500 * 2**20
"""How fast weights come from disk into memory, a cautious figure for a laptop's SSD."""

FP32_BYTES = 4
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}

LONGEST_CACHE_TOKENS = 4096
"""Tokens of all generations together for which there is to be room: more are rarely alive at once."""


def transformers_bytes(analysis: Analysis, device_kind: str) -> int:
    """Of a Hugging Face model in transformers: weights, and the cache of one that makes text.

    On a CPU the templates compute in FP32, whatever the checkpoint's own type.
    """
    weights = analysis.weights_bytes
    size = DTYPE_BYTES.get(analysis.dtype or "", FP32_BYTES)
    if device_kind == "cpu":
        weights = analysis.parameters * FP32_BYTES if analysis.parameters else weights * FP32_BYTES // size
        size = FP32_BYTES
    return weights + (_cache_bytes(analysis, size) if analysis.task == "text-generation" else 0)


def _cache_bytes(analysis: Analysis, size: int) -> int:
    """Of the keys and values of `LONGEST_CACHE_TOKENS`: layers * 2 * key-value heads * head size * bytes each."""
    facts = analysis.facts
    layers, heads, hidden = (facts.get(name) or 0 for name in ("layers", "heads", "hidden_size"))
    head = facts.get("head_dim") or (hidden // heads if heads else 0)
    tokens = min(facts.get("max_length") or LONGEST_CACHE_TOKENS, LONGEST_CACHE_TOKENS)
    return int(layers * 2 * (facts.get("kv_heads") or heads) * head * size * tokens)
