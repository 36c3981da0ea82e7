"""vLLM inside Triton: by Triton's own `vllm` backend, else by a template for the Python backend with its interface.

On GPUs vLLM takes a share of each and gives what its weights leave to its cache: the share is computed at the load, for
the device that was booked, and goes along with the load request. It comes from `engine_bytes`, which is what the ledger
booked at first less what is outside of the share; later bookings are measured with that share, and to compute it from
them would feed each measurement into the next. On a CPU the cache has a size of its own, `kv_cache_memory_bytes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from modelium.api import Analysis, Device, Layout, LoadRequest, Offer, Plan, RuntimeInfo
from modelium.api.templates import render
from modelium_plugin_triton import modelconfig, vllm_environment
from modelium_plugin_triton.modelconfig import CONFIG
from modelium_plugin_triton.servings import MIB, READ_BYTES_PER_S, RUNTIME

NATIVE = "vllm"
"""Triton's backend, and the way of serving by it."""
TEMPLATE = "vllm-python"
SERVINGS = (NATIVE, TEMPLATE)
PACK = "vllm"
"""Not installed by us: an environment that somebody made (`vllm_environment`)."""

SEQUENCES = 4
"""As many generations of full length have room in the cache, where it fits; shorter ones are more."""
USABLE = 0.9
"""Of a device: what models may have unless somebody says otherwise."""
LONGEST_ON_GPU, LONGEST_ON_CPU = 8192, 4096
"""Tokens of one generation, prompt and all, unless `max_model_len` says otherwise; longer ones take a larger cache."""
LARGE_GPU_BYTES = 70 * 2**30
BATCHED, BATCHED_ON_LARGE_GPU = 2048, 8192
"""Tokens that vLLM computes at once, on GPUs from `LARGE_GPU_BYTES` on more of them (its engine/arg_utils.py)."""
SEQUENCES_ON_GPU = 256
"""Generations that it works on at once at least (there too)."""

OUTSIDE_BYTES = 1024 * MIB
"""On each GPU outside of vLLM's share: CUDA's context and what is captured in graphs."""
ON_CPU_BYTES = 850 * MIB
"""USS of both processes for a model of a few kilobytes: vLLM 0.32 for CPUs, with one process for engine and worker."""
LOAD_ON_CPU_S, LOAD_ON_GPU_S = 30.0, 60.0
"""Of a load without weights, on two cores; on a GPU with its graphs."""
BLOCK_TOKENS = 128
"""Of a block of the cache on a CPU (vLLM's platforms/cpu.py), where one more than requests need is kept."""

CPU_HEADS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Head sizes of vLLM's attention for CPUs (v1/attention/backends/cpu_attn.py); others fail at the first request."""
CPU_QUANTIZATIONS = frozenset({"awq", "gptq", "compressed-tensors"})
"""Methods that it computes on CPUs (docs.vllm.ai, quantization/supported hardware)."""
UNREADABLE = frozenset({"mlx", "unnamed"})
"""What is another library's own."""

ENGINE_SETTINGS = (
    "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "quantization", "kv_cache_dtype",
    "kv_cache_memory_bytes", "gpu_memory_utilization", "enforce_eager", "load_format",
)  # fmt: skip
"""Settings that are engine arguments of vLLM's as they are; `engine_args` may hold any other."""
BYTES = {"float32": 4, "float64": 8}
"""Of one number of a checkpoint; two in others. vLLM computes wide ones in two."""

DEVICES_PARAMETER = "GPU_DEVICE_IDS"

_GPU = re.compile(r"cuda:(\d+)$")


# --------------------------------------------------------------------------- what can be offered


def offers(analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> list[Offer]:
    """Native first; none where this Triton has neither backend nor environment, or vLLM does not know the model."""
    if runtime is None or not _is_for_it(analysis):
        return []
    gpus = [device for device in devices if device.kind == "cuda"] if runtime.facts.get("gpu", True) else []
    found = list(_over_gpus(NATIVE, analysis, gpus, _native_counts(analysis, gpus, runtime), runtime))
    environment = vllm_environment.of(runtime)
    if environment is not None and environment.knows(analysis.architecture):
        if not environment.cpu:
            found += _over_gpus(TEMPLATE, analysis, gpus, _counts(analysis, len(gpus)), runtime)
        elif not gpus and _cpu_can(analysis):
            found.append(_on_cpu(analysis, devices))
    return found


def _is_for_it(analysis: Analysis) -> bool:
    facts = analysis.facts
    return bool(
        analysis.format == "huggingface"
        and analysis.task == "text-generation"
        and facts.get("weights", "safetensors") == "safetensors"
        and facts.get("tokenizer")
        and not facts.get("unsupported")
        and facts.get("quantization") not in UNREADABLE
    )


def _cpu_can(analysis: Analysis) -> bool:
    quantization = analysis.facts.get("quantization")
    return _head(analysis) in CPU_HEADS and (quantization is None or quantization in CPU_QUANTIZATIONS)


def _counts(analysis: Analysis, gpus: int) -> Iterator[int]:
    """Over how many of so many GPUs the heads can be divided, fewest first."""
    heads = analysis.facts.get("heads") or 1
    for count in (1, 2, 4, 8):
        if count <= gpus and heads % count == 0:
            yield count


def _native_counts(analysis: Analysis, gpus: Sequence[Device], runtime: RuntimeInfo) -> Iterator[int]:
    """Where the backend is too old to be told which GPUs to spread over, it takes the first ones: over all or none."""
    if NATIVE in runtime.backends:
        for count in _counts(analysis, len(gpus)):
            if count in (1, len(gpus)) or runtime.facts.get("vllm_takes_devices"):
                yield count


def takes_devices(backends: Path) -> bool:
    """Whether the backend among these can be told which GPUs to spread over: newer ones have a parameter for it."""
    try:
        return DEVICES_PARAMETER in (backends / NATIVE / "model.py").read_text(encoding="utf-8")
    except OSError:
        return False


def _over_gpus(
    serving: str, analysis: Analysis, gpus: Sequence[Device], counts: Iterable[int], runtime: RuntimeInfo
) -> Iterator[Offer]:
    """Over as few as will do: over more it would only take more."""
    for count in counts:
        least = sorted((gpu.total_bytes for gpu in gpus), reverse=True)[count - 1]
        offer = _on_gpus(serving, analysis, count, least, runtime)
        yield offer
        if offer.memory_bytes <= count * int(USABLE * least):
            return


def _on_gpus(serving: str, analysis: Analysis, count: int, device_bytes: int, runtime: RuntimeInfo) -> Offer:
    length = _length(analysis, LONGEST_ON_GPU)
    without = _weights(analysis, 2) + count * _peak_on_gpu(analysis, device_bytes)
    sequence = length * _token_bytes(analysis, 2, count)
    inside = without + _cache(sequence, count * (int(USABLE * device_bytes) - OUTSIDE_BYTES) - without)
    return Offer(
        runtime=RUNTIME,
        serving=serving,
        native=serving == NATIVE,
        device_kinds=("cuda",),
        devices=count,
        memory_bytes=inside + count * OUTSIDE_BYTES,
        load_s=LOAD_ON_GPU_S + analysis.weights_bytes / READ_BYTES_PER_S,
        settings={
            **_settings(serving, length),
            "engine_bytes": -(-inside // count),
            "device_bytes": device_bytes,
            **({"repository": runtime.facts.get("repository")} if serving == NATIVE else {}),
        },
        note=_note(serving),
    )


def _on_cpu(analysis: Analysis, devices: Sequence[Device]) -> Offer:
    length = _length(analysis, LONGEST_ON_CPU)
    # Without arithmetic for it prompts are computed several times slower in two bytes than in four.
    width = 2 if computes_half() or analysis.facts.get("quantization") else 4
    without = ON_CPU_BYTES + _weights(analysis, width) + _computed(analysis, BATCHED, width)
    if width == 4 or computes_half():
        # Words as they come in and as they go out are laid out beside the table that they are looked up in.
        without += 2 * (analysis.facts.get("vocab_size") or 0) * (analysis.facts.get("hidden_size") or 0) * width
    host = max((int(USABLE * device.total_bytes) for device in devices if device.kind == "cpu"), default=0)
    cache = _cache(_cache_on_cpu(analysis, length, width), host - without)
    return Offer(
        runtime=RUNTIME,
        serving=TEMPLATE,
        memory_bytes=without + cache,
        load_s=LOAD_ON_CPU_S + analysis.weights_bytes / READ_BYTES_PER_S,
        settings={
            **_settings(TEMPLATE, length),
            "dtype": "auto" if width == 2 else "float32",
            "threads": 0,
            "kv_cache_memory_bytes": cache,
            # Compiling takes a compiler and minutes.
            "enforce_eager": True,
        },
        note=_note(TEMPLATE),
    )


def _cache(sequence: int, room: int) -> int:
    """For `SEQUENCES` of so many bytes, or fewer where there is less room, at least one."""
    return max(sequence, min(SEQUENCES * sequence, room))


def _settings(serving: str, length: int) -> dict[str, Any]:
    common = {"dtype": "auto", "max_model_len": length, "decoupled": True}
    return {**common, "packs": []} if serving == NATIVE else {**common, "packs": [PACK], "max_tokens": 256}


def _note(serving: str) -> str:
    return "Triton's vllm backend" if serving == NATIVE else "vLLM in Triton's python backend"


# --------------------------------------------------------------------------- what it takes


def _weights(analysis: Analysis, width: int) -> int:
    """Computed in so many bytes each, save quantised ones."""
    if analysis.facts.get("quantization"):
        return analysis.weights_bytes
    return analysis.weights_bytes * width // BYTES.get(analysis.dtype or "", 2)


def _head(analysis: Analysis) -> int:
    facts = analysis.facts
    heads, hidden = facts.get("heads") or 0, facts.get("hidden_size") or 0
    return int(facts.get("head_dim") or (hidden // heads if heads else 0))


def _token_bytes(analysis: Analysis, width: int, devices: int = 1) -> int:
    """Keys and values of one token in all layers, on all devices: a head that can't be divided is on each."""
    facts = analysis.facts
    layers = facts.get("layers") or 0
    if latent := facts.get("kv_lora_rank"):  # keys and values compressed into one, which all heads read
        return int(layers * (latent + (facts.get("qk_rope_head_dim") or 0)) * width * devices)
    heads = facts.get("kv_heads") or facts.get("heads") or 0
    return int(layers * 2 * max(heads, devices) * _head(analysis) * width)


def _cache_on_cpu(analysis: Analysis, length: int, width: int) -> int:
    """For one generation of that length."""
    return (-(-length // BLOCK_TOKENS) + 1) * BLOCK_TOKENS * _token_bytes(analysis, width)


def _length(analysis: Analysis, longest: int) -> int:
    return int(min(analysis.facts.get("max_length") or longest, longest))


@lru_cache(maxsize=1)
def computes_half(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has arithmetic for bfloat16, by the kernel's names of features on x86 and ARM."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    features = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(features.split())


def _computed(analysis: Analysis, tokens: int, width: int) -> int:
    """What the computation of so many tokens holds at its peak: an MLP's two inner results, about three and a half
    times as wide as the model, beside its input and output."""
    return int(tokens * 9 * (analysis.facts.get("hidden_size") or 0) * width)


def _peak_on_gpu(analysis: Analysis, device_bytes: int) -> int:
    """What vLLM finds by trying a whole batch out, with the logits of as many sequences as there may be, twice."""
    tokens = BATCHED_ON_LARGE_GPU if device_bytes >= LARGE_GPU_BYTES else BATCHED
    logits = 2 * SEQUENCES_ON_GPU * (analysis.facts.get("vocab_size") or 0) * 4
    return _computed(analysis, tokens, 2) + int(logits)


# --------------------------------------------------------------------------- the files, and what goes with the load


def layout(name: str, analysis: Analysis, plan: Plan) -> Layout:
    """The folder, which Triton alone could serve as well, with the share that the plan's device would get."""
    settings = plan.settings
    arguments = engine_args(plan)
    if plan.device_kind == "cpu":
        # A longer one of somebody's own must fit at least once.
        width = 4 if arguments.get("dtype") == "float32" else 2
        least = _cache_on_cpu(analysis, int(arguments["max_model_len"]), width)
        arguments["kv_cache_memory_bytes"] = max(int(arguments["kv_cache_memory_bytes"]), least)
    if plan.device_kind == "cuda":
        arguments.setdefault("gpu_memory_utilization", _share(plan, int(settings["device_bytes"])))
    if plan.serving == NATIVE:
        arguments = {"model": str(PurePosixPath(settings["repository"]) / name / "1" / _folder(analysis)), **arguments}
    values = {
        "name": name,
        "device_kind": plan.device_kind,
        "devices": plan.devices,
        "model_folder": str(_folder(analysis)),
        "max_tokens": settings.get("max_tokens", 256),
        "threads": settings.get("threads", 0),
        "engine_args": arguments,
    }
    return Layout(files={"1/model": "."}, texts=render(plan.serving, values))


def engine_args(plan: Plan) -> dict[str, Any]:
    """vLLM's own, by the plan's settings."""
    given = {name: plan.settings[name] for name in ENGINE_SETTINGS if plan.settings.get(name) is not None}
    spread = {"tensor_parallel_size": plan.devices} if plan.devices > 1 else {}
    return {**given, **spread, **(plan.settings.get("engine_args") or {})}


def load_parameters(request: LoadRequest, repository: Path, environment: Path | None) -> dict[str, Any]:
    """What goes with the load request, beside the client's own parameters. Reads the model's files.

    `repository` is the folder as the server sees it, `environment` what the template's models run in.
    """
    plan = request.plan
    text = (request.path / CONFIG).read_text(encoding="utf-8")
    config = modelconfig.parse_config(text)
    overridden = request.parameters.get("config")
    changed = modelconfig.from_json(overridden) if overridden is not None else modelconfig.copy(config)
    arguments: dict[str, Any] = {}
    numbers = [match[1] for device in request.devices if (match := _GPU.search(device))]
    if numbers:
        modelconfig.place(changed, [int(number) for number in numbers])
        total = min(request.device_bytes.get(device) or plan.settings["device_bytes"] for device in request.devices)
        arguments["gpu_memory_utilization"] = plan.settings.get("gpu_memory_utilization") or _share(plan, total)
    if len(numbers) > 1:
        key = DEVICES_PARAMETER if plan.serving == NATIVE else "devices"
        changed.parameters[key].string_value = ",".join(numbers)
    if plan.serving == NATIVE:
        arguments["model"] = str(repository / request.name / "1" / _folder(request.analysis))
        whole = json.loads((request.path / "1" / "model.json").read_text(encoding="utf-8")) | arguments
        # Triton takes no single file on top of those on disk: with one, it loads what came with the request alone.
        return {**request.parameters, "config": modelconfig.to_json(changed), "file:1/model.json": _bytes(whole)}
    if arguments:
        changed.parameters["engine_args"].string_value = json.dumps(arguments)
    if environment is not None:
        changed.parameters["EXECUTION_ENV_PATH"].string_value = str(environment)
    return {**request.parameters, "config": modelconfig.to_json(changed)}


def _share(plan: Plan, device_bytes: int) -> float:
    """vLLM's share of a device, as `gpu_memory_utilization` says it."""
    return round(min(int(plan.settings["engine_bytes"]) / device_bytes, 0.98), 4)


def _folder(analysis: Analysis) -> PurePosixPath:
    return PurePosixPath("model") / PurePosixPath(analysis.entry).parent


def _bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
