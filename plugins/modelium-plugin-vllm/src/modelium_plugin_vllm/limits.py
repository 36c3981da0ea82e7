"""What vLLM can't serve, and over how many GPUs it can."""

from __future__ import annotations

from collections.abc import Iterator

from modelium.api import Analysis
from modelium_plugin_vllm.memory import head_size
from modelium_plugin_vllm.registry import Known

CPU_HEADS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Sizes of a head that vLLM's attention on CPUs computes (v1/attention/backends/cpu_attn.py); with others the first
request fails."""
CPU_QUANTIZATION = frozenset({"awq", "gptq", "compressed-tensors"})
"""Methods that it computes on CPUs (docs.vllm.ai, supported hardware of quantization)."""
INT4 = frozenset({"awq", "gptq"})
"""Those of four bits."""
UNREADABLE = frozenset({"mlx", "unnamed"})
"""Methods that are another library's own."""
COUNTS = (1, 2, 4, 8, 16)
"""Of GPUs that the layers of a model are divided over."""


def refusal(analysis: Analysis, vllm: Known | None, kind: str, *, embed: bool = False, int4: bool = True) -> str:
    """Why it can't be served on this kind of device, for a person; empty when it can.

    `vllm` is None where it can't be looked into. `int4`: a CPU computes with weights of four bits.
    """
    facts = analysis.facts
    method = facts.get("quantization")
    if vllm is not None and analysis.architecture not in (vllm.embed | vllm.generate if embed else vllm.generate):
        return f"it has no {analysis.architecture}"
    if facts.get("weights", "safetensors") != "safetensors":
        return "its weights are not in safetensors"
    if not facts.get("tokenizer"):
        return "it has no tokenizer"
    if method in UNREADABLE or (method and vllm is not None and vllm.quantization and method not in vllm.quantization):
        return f"it can't read weights that are quantised with {method}"
    if kind == "cpu":
        if method and method not in CPU_QUANTIZATION:
            return f"weights that are quantised with {method} take a GPU"
        if method in INT4 and not int4:
            return f"weights that are quantised with {method} take a processor with AVX-512, or a GPU"
        if (head := head_size(analysis)) not in CPU_HEADS and not facts.get("kv_lora_rank"):
            return f"its heads have {head} numbers, and on CPUs {', '.join(map(str, sorted(CPU_HEADS)))} are computed"
    return ""


def counts(analysis: Analysis, there: int, groups: int = 1) -> Iterator[int]:
    """Over how many of so many GPUs the heads can be divided, fewest first; the layers are divided over `groups`."""
    heads = analysis.facts.get("heads") or 1
    for count in COUNTS:
        if count * groups <= there and heads % count == 0:
            yield count * groups
