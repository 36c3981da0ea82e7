"""What a model takes in vLLM, and how large its cache of keys and values is to be.

Of vLLM in whatever process: what a process holds by itself on a CPU, its plugin says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelium.api import Analysis
from modelium_plugin_vllm.settings import EngineSettings

MIB = 2**20

WIDE = {"F64", "F32"}
PLAIN = {*WIDE, "F16", "BF16"}
"""Dtypes of safetensors that are computed in the served one; what is quantised stays as it is."""
NUMBER_BYTES = {"float64": 8, "float32": 4}
"""Of a checkpoint whose dtype is all that is known; two in others."""

LONGEST_ON_GPU, LONGEST_ON_CPU = 8192, 4096
"""Tokens of one request unless `max_model_len` says otherwise; longer ones take a larger cache."""
UNKNOWN_LENGTH = 2048
"""Tokens of one request where the model does not say how many it was trained for, as vLLM assumes then."""
BLOCK_TOKENS = 128
"""Of a block of the cache on a CPU (vLLM's platforms/cpu.py), where one more than requests need is kept; on GPUs blocks
are smaller."""

NO_CACHE_BYTES = MIB
"""For a model that keeps nothing: vLLM would lay claim to nearly all memory if nothing were said."""

USABLE = 0.9
"""Of a device: what models may have, unless a person says otherwise."""

# On a CPU: PSS of both processes with the smallest model, vLLM 0.32: 750 MiB while nobody else has their libraries in
# memory, 650 MiB where another model has.
ON_CPU_BYTES = 720 * MIB
# On a GPU: CUDA's context, its libraries, and the graphs that are captured, beside what vLLM itself accounts for.
ON_GPU_BYTES = 1024 * MIB

SMALL_GPU_BYTES = 70 * 2**30
BATCHED, BATCHED_ON_LARGE = 2048, 8192
"""Tokens that vLLM computes at once (its engine/arg_utils.py), on GPUs from `SMALL_GPU_BYTES` on more of them."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes on all devices together."""

    weights: int
    cache: int
    rest: int
    """Processes, libraries, and what a computation holds while it runs."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.rest


def width(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2


def head_size(analysis: Analysis) -> int:
    facts = analysis.facts
    heads, hidden = facts.get("heads") or 0, facts.get("hidden_size") or 0
    return int(facts.get("head_dim") or (hidden // heads if heads else 0))


def length(analysis: Analysis, settings: EngineSettings, kind: str) -> int:
    """Tokens of one request."""
    if settings.max_model_len is not None:
        return settings.max_model_len
    longest = LONGEST_ON_CPU if kind == "cpu" else LONGEST_ON_GPU
    return int(min(analysis.facts.get("max_length") or UNKNOWN_LENGTH, longest))


def token_bytes(analysis: Analysis, settings: EngineSettings, devices: int = 1) -> int:
    """Of the keys and values of one token in all layers, on all devices: a head that can't be divided is on each."""
    facts = analysis.facts
    layers = facts.get("layers") or 0
    size = 1 if settings.kv_cache_dtype.startswith("fp8") else width(settings.dtype)
    latent = facts.get("kv_lora_rank")
    if latent:  # keys and values compressed into one, which all heads read, and so all devices
        return int(layers * (latent + (facts.get("qk_rope_head_dim") or 0)) * size * devices)
    heads = facts.get("kv_heads") or facts.get("heads") or 0
    return int(layers * 2 * max(heads, devices) * head_size(analysis) * size)


def requests(analysis: Analysis, settings: EngineSettings, kind: str, devices: int, count: int) -> int:
    """Bytes of the cache for so many requests of full length."""
    tokens = length(analysis, settings, kind)
    blocks = count * -(-tokens // BLOCK_TOKENS) + 1
    return blocks * BLOCK_TOKENS * token_bytes(analysis, settings, devices)


def size(
    analysis: Analysis,
    settings: EngineSettings,
    kind: str,
    devices: int,
    device_bytes: int,
    *,
    embed: bool = False,
    packs: bool = True,
    on_cpu_bytes: int = ON_CPU_BYTES,
) -> Size:
    """For a model over so many devices of this kind with so many bytes each.

    `packs`: a CPU has arithmetic for the served dtype, so that weights are laid out for it. `on_cpu_bytes`: what the
    processes hold there without a model.
    """
    weights = _weights(analysis, settings)
    if kind == "cpu" and packs:
        # Words as they come in and as they go out are laid out beside the table that they are looked up in.
        table = (analysis.facts.get("vocab_size") or 0) * (analysis.facts.get("hidden_size") or 0)
        weights += (1 if embed else 2) * table * width(settings.dtype)
    rest = _rest(analysis, settings, kind, devices, device_bytes, on_cpu_bytes)
    cache = settings.kv_cache_memory_bytes
    if cache is None:
        count = 1 if embed else min(settings.concurrent, settings.max_num_seqs or settings.concurrent)
        least, wanted = (requests(analysis, settings, kind, devices, n) for n in (1, count))
        room = int(devices * device_bytes * USABLE) - weights - rest
        # An encoder, which has no heads for keys alone, sees a text at once and keeps nothing of it.
        encoder = embed and not analysis.facts.get("kv_heads")
        cache = NO_CACHE_BYTES if encoder else min(wanted, max(least, room))
    return Size(weights, cache, rest)


def _weights(analysis: Analysis, settings: EngineSettings) -> int:
    dtypes: Mapping[str, int] = analysis.facts.get("dtypes") or {}
    quantised = bool(analysis.facts.get("quantization"))
    served = width(settings.dtype)
    total = 0
    for dtype, held in dtypes.items():
        wide = 8 if dtype == "F64" else 4 if dtype in WIDE else 2
        total += held * served // wide if dtype in PLAIN else held
    if not dtypes:
        total = analysis.weights_bytes
        if not quantised:
            total = total * served // NUMBER_BYTES.get(analysis.dtype or "", 2)
    if settings.quantization and not quantised:
        total //= 2  # quantised to a byte as they come
    return total


def _rest(
    analysis: Analysis, settings: EngineSettings, kind: str, devices: int, device_bytes: int, on_cpu_bytes: int
) -> int:
    facts: Mapping[str, Any] = analysis.facts
    large = kind != "cpu" and device_bytes >= SMALL_GPU_BYTES
    tokens = settings.max_num_batched_tokens or (BATCHED_ON_LARGE if large else BATCHED)
    # At the peak: an MLP's two inner results, about three and a half times as wide as the model, its input and output.
    computed = tokens * 9 * (facts.get("hidden_size") or 0) * width(settings.dtype)
    if kind == "cpu":
        return on_cpu_bytes + computed
    # On GPUs vLLM tries out a whole batch, and the logits of as many sequences as there may be, twice.
    logits = 2 * (settings.max_num_seqs or 256) * (facts.get("vocab_size") or 0) * 4
    return devices * (ON_GPU_BYTES + computed + logits)
