"""What a model takes in memory, by its header: weights, the cache of keys and values, and the rest.

Caches as llama.cpp makes them (src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-hparams.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelium.api import Analysis
from modelium_plugin_llamacpp.gguf import TYPES, Header
from modelium_plugin_llamacpp.settings import ModelSettings

MIB = 2**20
UBATCH = 512
"""llama-server's own default of `--ubatch-size`."""
MAX_LAYERS = 1024
"""More than any model has."""
CELLS = 256
"""Caches are a multiple of so many tokens."""

# Measured on xllamacpp 2026.10 (CPU, Linux x86-64) with models of several widths, as the process's PSS less the
# buffers that llama.cpp tells of in its log.
OVERHEAD_BYTES = 25 * MIB
"""Of a server without a model: code, threads, HTTP."""
VOCABULARY_BYTES = 210
"""Of each token, and each merge of two tokens, in the tables that text is taken apart with."""

WINDOWED = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "gemma-embedding": 6}
"""Every so manieth layer sees all tokens and the others a window, where the header does not say (src/models/)."""


def shape(header: Header) -> dict[str, int]:
    """What `estimate` has to know of a model: numbers for each token (`k`, `v`, and `window_k`, `window_v` of layers
    that keep `window` tokens only), for each request (`state`), and for each token that is being computed (`width`)."""
    arch = header.text("general.architecture")

    def number(key: str) -> int:
        return _small(header.integer(f"{arch}.{key}"))

    layers = min(number("block_count"), MAX_LAYERS)
    embedding, heads = number("embedding_length"), _each(header, arch, "attention.head_count")
    kv_heads = _each(header, arch, "attention.head_count_kv") or heads
    recurrent = _recurrent(number("full_attention_interval"), layers, kv_heads)
    windowed = _windowed(header, arch, layers)
    head_size = embedding // max(heads[0], 1) if heads else 0
    k_size, v_size = number("attention.key_length") or head_size, number("attention.value_length") or head_size
    latent = header.integer(f"{arch}.attention.key_length_mla") is not None  # keys and values compressed into one
    sums = dict.fromkeys(("k", "v", "window_k", "window_v"), 0)
    for layer in range(layers - number("attention.shared_kv_layers")):
        if layer in recurrent:
            continue
        count = _at(kv_heads, layer)
        inside = layer in windowed
        k = (number("attention.key_length_swa") if inside else 0) or k_size
        v = (number("attention.value_length_swa") if inside else 0) or v_size
        sums["window_k" if inside else "k"] += count * k
        sums["window_v" if inside else "v"] += 0 if latent else count * v
    if header.values.get(f"{arch}.attention.causal") is False:  # it sees a text at once, and keeps nothing of it
        sums = dict.fromkeys(sums, 0)
    groups, inner, state = (number(f"ssm.{key}") for key in ("group_count", "inner_size", "state_size"))
    convolution = max(number("ssm.conv_kernel") - 1, 0) * (inner + 2 * groups * state)
    feed_forward = max(_each(header, arch, "feed_forward_length"), default=0)
    feed_forward = max(feed_forward, number("expert_feed_forward_length") * max(number("expert_used_count"), 1))
    return {
        **sums,
        "window": number("attention.sliding_window"),
        "state": len(recurrent) * (convolution + inner * state),
        "width": max(3 * feed_forward + 5 * embedding, 6 * embedding),
        "heads": heads[0] if heads else 0,
        "vocabulary": sum(header.lengths.get(f"tokenizer.ggml.{what}", 0) for what in ("tokens", "merges")),
    }


def _small(value: int | None) -> int:
    return value if value is not None and value < 2**24 else 0


def _each(header: Header, arch: str, key: str) -> Sequence[int]:
    """A number that may be one for all layers or one for each."""
    value = header.values.get(f"{arch}.{key}")
    values = value if isinstance(value, tuple) else (value,)
    return [_small(v) if type(v) is int and v >= 0 else 0 for v in values if v is not None]


def _at(values: Sequence[int], layer: int) -> int:
    return (values[layer] if layer < len(values) else values[-1]) if values else 0


def _recurrent(interval: int, layers: int, kv_heads: Sequence[int]) -> frozenset[int]:
    """The layers that keep a state of one size rather than keys and values."""
    if interval:
        return frozenset(layer for layer in range(layers) if (layer + 1) % interval)
    return frozenset(layer for layer in range(layers) if not _at(kv_heads, layer))


def _windowed(header: Header, arch: str, layers: int) -> frozenset[int]:
    if not header.integer(f"{arch}.attention.sliding_window"):
        return frozenset()
    pattern = header.values.get(f"{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return frozenset(layer for layer, inside in enumerate(pattern[:layers]) if inside)
    period = pattern if type(pattern) is int else WINDOWED.get(arch, 1)
    return frozenset(layer for layer in range(layers) if period <= 0 or layer % period < period - 1)


# --------------------------------------------------------------------------- with settings


def estimate(analysis: Analysis, settings: ModelSettings, *, embedding: bool) -> int:
    """Bytes on all devices together, once a prompt has been computed."""
    has: Mapping[str, Any] = analysis.facts["memory"]
    ubatch = ubatch_of(settings, embedding=embedding)
    cells = _padded(settings.ctx)
    window = min(cells, _padded(has["window"] + ubatch))
    k, v = (_bytes_of(kind) for kind in (settings.cache_type_k, settings.cache_type_v))
    one = cells * (has["k"] * k + has["v"] * v) + window * (has["window_k"] * k + has["window_v"] * v)
    return int(
        analysis.weights_bytes
        + settings.parallel * (one + 4 * has["state"])
        + _computing(has, settings, ubatch, cells)
        + OVERHEAD_BYTES
        + VOCABULARY_BYTES * has["vocabulary"]
    )


def _computing(has: Mapping[str, Any], settings: ModelSettings, ubatch: int, cells: int) -> int:
    """Of the buffers in which `ubatch` tokens are computed: float32 activations, and who sees whom."""
    mask = 2 * cells
    if settings.flash_attention == "off":
        mask += 4 * cells * (1 + has["heads"])
    return ubatch * int(4 * has["width"] + mask)


def ubatch_of(settings: ModelSettings, *, embedding: bool) -> int:
    """A text whose embedding is wanted has to be computed at once."""
    return settings.ubatch or (settings.ctx if embedding else min(UBATCH, settings.ctx))


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _bytes_of(cache_type: str) -> float:
    """Of one number."""
    sizes = {name.lower(): size / block for name, block, size in TYPES.values()}
    return sizes[cache_type]
