"""Directories of language models' own backends, TensorRT-LLM and vLLM: what they take of GPUs.

Their `instance_group` says nothing of it: TensorRT-LLM's is KIND_CPU, vLLM's KIND_MODEL. They fill what they are let
have of a GPU with their cache, so that it is their settings that count. Both are read as their backends read them:
https://github.com/triton-inference-server/tensorrtllm_backend/blob/main/docs/model_config.md and
https://github.com/triton-inference-server/vllm_backend.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelium.api import Device
from modelium.errors import ModelError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

TENSORRT_LLM, VLLM = "tensorrtllm", "vllm"

ENGINE_PATH = "gpt_model_path"
"""The parameter that names the folder of the engines. With `backend: "python"` TensorRT-LLM's own runtime reads it."""
OVERHEAD_BYTES = 1024 * 2**20
"""On each GPU beside weights and cache, for a first estimate: CUDA's context, buffers, graphs."""
FREE_SHARE = 0.9
"""Of what the weights leave free, for TensorRT-LLM's cache, unless it is told otherwise."""
VLLM_SHARE = 0.9
"""Of a whole GPU, for vLLM, unless it is told otherwise."""

CACHE_BYTES = {"FP8": 1, "INT8": 1}
"""Of one number in a cache that is quantised by that algorithm; of others two, or four in float32."""

MAX_JSON_BYTES = 8 << 20

PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
"""What is to be filled in in the templates of TensorRT-LLM's directories."""
FILL = "fill it in first, as the tensorrtllm backend's tools/fill_template.py does"

_PARTS = re.compile(r"""\b(?:preproc|postproc)_model_name\s*=\s*["']([\w.-]+)["']""")


@dataclass(frozen=True, slots=True)
class Gpus:
    """What a model takes of each of its GPUs."""

    devices: int = 1
    weights_bytes: int = 0
    """On all together."""
    cache_bytes: int | None = None
    """On all together, where that is a fixed number."""
    share: float | None = None
    """Of a whole GPU, for weights and cache."""
    free_share: float | None = None
    """Of what the weights leave free, for the cache alone."""

    def bytes(self, gpus: Sequence[Device], overhead_bytes: int) -> int:
        """On all of its GPUs together; by the smallest of those it can be put on."""
        totals = sorted((gpu.total_bytes for gpu in gpus), reverse=True)[: self.devices]
        total = min(totals, default=0)
        if self.share is not None:
            return self.devices * (int(self.share * total) + overhead_bytes)
        known = self.weights_bytes + self.devices * overhead_bytes
        free = max(0, total - known // self.devices) * self.devices
        taken = int(free * self.free_share) if self.free_share is not None else free
        return known + (min(taken, self.cache_bytes) if self.cache_bytes is not None else taken)


def unfilled(config: ModelConfig) -> str:
    """Why it can't be served as it is: something that it can't do without is still to be filled in."""
    needed = {"backend": config.backend, ENGINE_PATH: _parameter(config, ENGINE_PATH, raw=True)}
    if not needed[ENGINE_PATH]:
        needed["tokenizer_dir"] = _parameter(config, "tokenizer_dir", raw=True)
    for name, value in needed.items():
        if found := PLACEHOLDER.search(value):
            return f"config.pbtxt has the placeholder {found[0]} for {name}: {FILL}"
    return ""


def gpus_of(config: ModelConfig, backend: str, versions: Sequence[Path]) -> Gpus | None:
    """What a directory with these served versions takes of GPUs; None for other backends' directories.

    Raises `ModelError` for a `model.json` or an engine's `config.json` that can't be read.
    """
    if backend == VLLM:
        return _vllm(versions)
    folder = _parameter(config, ENGINE_PATH)
    return _tensorrt_llm(config, versions) if backend == TENSORRT_LLM or folder else None


def unseen(config: ModelConfig, versions: Sequence[Path]) -> str:
    """The folder of engines that it names and that can't be seen from here; empty where all is well."""
    folder = _parameter(config, ENGINE_PATH)
    return folder if folder and not _engines(config, versions) else ""


def parts(config: ModelConfig, versions: Sequence[Path]) -> tuple[str, ...]:
    """The models that TensorRT-LLM's BLS model calls: one by its parameters, the others by name in its code."""
    if "tensorrt_llm_model_name" not in config.parameters:
        return ()
    found = [_parameter(config, "tensorrt_llm_model_name") or "tensorrt_llm"]
    found.append(_parameter(config, "tensorrt_llm_draft_model_name"))
    for version in versions:
        for file in (version / "model.py", *sorted(version.glob("lib/*.py"))):
            named = _PARTS.findall(_text(file))
            found += named
            if named:
                break
    return tuple(dict.fromkeys(name for name in found if name))


# --------------------------------------------------------------------------- TensorRT-LLM


def _tensorrt_llm(config: ModelConfig, versions: Sequence[Path]) -> Gpus:
    engines = _engines(config, versions)
    weights = sum(engine.stat().st_size for engine in engines)
    tokens, share = _number(config, "max_tokens_in_paged_kv_cache"), _number(config, "kv_cache_free_gpu_mem_fraction")
    cache = None
    if engines and tokens:
        cache = int(tokens * _token_bytes(_json(engines[0].parent / "config.json").get("pretrained_config") or {}))
    return Gpus(
        devices=max(1, len(engines)),
        weights_bytes=weights,
        cache_bytes=cache,
        free_share=FREE_SHARE if share is None else share,
    )


def _engines(config: ModelConfig, versions: Sequence[Path]) -> list[Path]:
    """The engine of each rank, where the configuration says they are, else in a version's folder.

    A path into the model's own folder may name the place where that will be.
    """
    named = _parameter(config, ENGINE_PATH)
    for folder in (*([Path(named)] if named.startswith("/") else []), *versions):
        if found := sorted(folder.glob("rank*.engine")):
            return found
    return []


def _token_bytes(config: Mapping[str, Any]) -> float:
    """Keys and values of one token in all layers."""
    try:
        heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
        size = int(config.get("head_size") or config["hidden_size"] // config["num_attention_heads"])
        layers = int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        raise ModelError(f"the engine's config.json lacks {exc}: build the engine again with trtllm-build") from exc
    algorithm = (config.get("quantization") or {}).get("kv_cache_quant_algo")
    return layers * 2 * heads * size * CACHE_BYTES.get(str(algorithm), 4 if config.get("dtype") == "float32" else 2)


# --------------------------------------------------------------------------- vLLM


def _vllm(versions: Sequence[Path]) -> Gpus:
    if not versions:
        return Gpus(share=VLLM_SHARE)
    engine = _json(versions[-1] / "model.json")
    try:
        devices = int(engine.get("tensor_parallel_size") or 1) * int(engine.get("pipeline_parallel_size") or 1)
        return Gpus(devices=devices, share=float(engine.get("gpu_memory_utilization") or VLLM_SHARE))
    except (TypeError, ValueError) as exc:
        raise ModelError(f"model.json should hold vLLM's engine arguments: {exc}") from exc


# --------------------------------------------------------------------------- reading


def _parameter(config: ModelConfig, name: str, *, raw: bool = False) -> str:
    """A parameter's text; empty where it is not there, or was never filled in, which the backend takes for the same."""
    value = str(config.parameters[name].string_value) if name in config.parameters else ""
    return value if raw or not PLACEHOLDER.search(value) else ""


def _number(config: ModelConfig, name: str) -> float | None:
    value = _parameter(config, name)
    try:
        return float(value) if value else None
    except ValueError as exc:
        raise ModelError(f"config.pbtxt: the parameter {name} should be a number, and is {value!r}") from exc


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file))
    except ValueError as exc:
        raise ModelError(f"{file.parent.name}/{file.name} should be JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise ModelError(f"{file.parent.name}/{file.name} should be a JSON object")
    return found


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
