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
from pathlib import Path
from typing import Any

from modelium_plugin_vllm import arguments, cpu, limits, memory
from modelium_plugin_vllm.limits import refusal
from modelium_plugin_vllm.settings import DEVICE_BYTES, REPOSITORY, EngineSettings, engine_settings

from modelium.api import DEFAULT_SETTINGS, Analysis, Device, Layout, LoadRequest, Offer, Plan, RuntimeInfo
from modelium.api.estimates import READ_BYTES_PER_S
from modelium.api.templates import model_folder, render
from modelium_plugin_triton import modelconfig, vllm_environment
from modelium_plugin_triton.modelconfig import CONFIG
from modelium_plugin_triton.servings import MIB, RUNTIME

NATIVE = "vllm"
"""Triton's backend, and the way of serving by it."""
TEMPLATE = "vllm-python"
SERVINGS = (NATIVE, TEMPLATE)
PACK = "vllm"
"""Not installed by us: an environment that somebody made (`vllm_environment`)."""

ON_CPU_BYTES = 850 * MIB
"""USS of both processes for a model of a few kilobytes, Triton's stub and the engine, which takes the worker in: vLLM
0.32 for CPUs."""
LOAD_ON_CPU_S, LOAD_ON_GPU_S = 30.0, 60.0
"""Of a load without weights, on two cores; on a GPU with its graphs."""

ENGINE_BYTES = "engine_bytes"
"""A plan's setting: what vLLM itself gets of each GPU, without what it does not account for."""
DEVICES_PARAMETER = "GPU_DEVICE_IDS"

_GPU = re.compile(r"cuda:(\d+)$")


# --------------------------------------------------------------------------- what can be offered


def offers(analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> list[Offer]:
    """Native first; none where this Triton has neither backend nor environment, or vLLM does not know the model.

    Raises `ModelError` for wrong settings, where there would be an offer.
    """
    if runtime is None or not _is_for_it(analysis):
        return []
    gpus = [device for device in devices if device.kind == "cuda"] if runtime.facts.get("gpu", True) else []
    environment = vllm_environment.of(runtime)
    if not gpus:
        if environment is None or not environment.cpu:
            return []
        features = cpu.features()
        if refusal(analysis, environment.known, "cpu", int4=cpu.computes_int4(features)):
            return []
        return [_on_cpu(analysis, _defaults(runtime), devices, bf16=cpu.computes_bf16(features))]
    native = NATIVE in runtime.backends and not refusal(analysis, None, "cuda")
    template = environment is not None and not environment.cpu and not refusal(analysis, environment.known, "cuda")
    if not native and not template:
        return []
    settings = _defaults(runtime)
    over = list(limits.counts(analysis, len(gpus), settings.pipeline_parallel_size))
    found: list[Offer] = []
    if native:
        found += _over_gpus(NATIVE, analysis, settings, gpus, _native_counts(over, gpus, runtime), runtime)
    if template:
        found += _over_gpus(TEMPLATE, analysis, settings, gpus, over, runtime)
    return found


def _defaults(runtime: RuntimeInfo) -> EngineSettings:
    return engine_settings(runtime.facts.get(DEFAULT_SETTINGS) or {})


def _is_for_it(analysis: Analysis) -> bool:
    return (
        analysis.format == "huggingface"
        and analysis.task == "text-generation"
        and not analysis.facts.get("unsupported")
    )


def _native_counts(over: Iterable[int], gpus: Sequence[Device], runtime: RuntimeInfo) -> Iterator[int]:
    """Where the backend is too old to be told which GPUs to spread over, it takes the first ones: over all or none."""
    for count in over:
        if count in (1, len(gpus)) or runtime.facts.get("vllm_takes_devices"):
            yield count


def takes_devices(backends: Path) -> bool:
    """Whether the backend among these can be told which GPUs to spread over: newer ones have a parameter for it."""
    try:
        return DEVICES_PARAMETER in (backends / NATIVE / "model.py").read_text(encoding="utf-8")
    except OSError:
        return False


def _over_gpus(
    serving: str,
    analysis: Analysis,
    settings: EngineSettings,
    gpus: Sequence[Device],
    over: Iterable[int],
    runtime: RuntimeInfo,
) -> Iterator[Offer]:
    """Over as few as will do: over more it would only take more."""
    for count in over:
        least = sorted((gpu.total_bytes for gpu in gpus), reverse=True)[count - 1]
        offer = _on_gpus(serving, analysis, settings, count, least, runtime)
        yield offer
        if offer.memory_bytes <= count * int(memory.USABLE * least):
            return


def _on_gpus(
    serving: str, analysis: Analysis, settings: EngineSettings, count: int, device_bytes: int, runtime: RuntimeInfo
) -> Offer:
    size = memory.size(analysis, settings, "cuda", count, device_bytes).total
    return Offer(
        runtime=RUNTIME,
        serving=serving,
        native=serving == NATIVE,
        device_kinds=("cuda",),
        devices=count,
        memory_bytes=size,
        load_s=LOAD_ON_GPU_S + analysis.weights_bytes / READ_BYTES_PER_S,
        settings={
            **_settings(serving, memory.length(analysis, settings, "cuda")),
            ENGINE_BYTES: -(-size // count) - memory.ON_GPU_BYTES,
            DEVICE_BYTES: device_bytes,
            **({REPOSITORY: runtime.facts.get("repository")} if serving == NATIVE else {}),
        },
        note=_note(serving),
    )


def _on_cpu(analysis: Analysis, settings: EngineSettings, devices: Sequence[Device], *, bf16: bool) -> Offer:
    if settings.dtype == "auto" and not bf16 and not analysis.facts.get("quantization"):
        # Without arithmetic for it prompts are computed several times slower in two bytes than in four.
        settings = settings.model_copy(update={"dtype": "float32"})
    packs = bf16 or settings.dtype == "float32"
    host = max((device.total_bytes for device in devices if device.kind == "cpu"), default=0)
    size = memory.size(analysis, settings, "cpu", 1, host, packs=packs, on_cpu_bytes=ON_CPU_BYTES)
    return Offer(
        runtime=RUNTIME,
        serving=TEMPLATE,
        memory_bytes=size.total,
        load_s=LOAD_ON_CPU_S + analysis.weights_bytes / READ_BYTES_PER_S,
        settings={
            **_settings(TEMPLATE, memory.length(analysis, settings, "cpu")),
            "dtype": settings.dtype,
            "threads": 0,
            "kv_cache_memory_bytes": size.cache,
            # Compiling takes a compiler and minutes.
            "enforce_eager": True,
        },
        note=_note(TEMPLATE),
    )


def _settings(serving: str, length: int) -> dict[str, Any]:
    common = {"dtype": "auto", "max_model_len": length, "decoupled": True}
    return {**common, "packs": []} if serving == NATIVE else {**common, "packs": [PACK], "max_tokens": 256}


def _note(serving: str) -> str:
    return "Triton's vllm backend" if serving == NATIVE else "vLLM in Triton's python backend"


# --------------------------------------------------------------------------- the files, and what goes with the load


def layout(name: str, analysis: Analysis, plan: Plan) -> Layout:
    """The folder, which Triton alone could serve as well, with the share that the plan's device would get."""
    settings = plan.settings
    engine = engine_args(analysis, plan)
    if plan.device_kind == "cuda":
        engine.setdefault("gpu_memory_utilization", _share(plan, int(settings[DEVICE_BYTES])))
    if plan.serving == NATIVE:
        engine = {"model": str(Path(settings[REPOSITORY], name, "1", model_folder(analysis))), **engine}
    values = {
        "name": name,
        "device_kind": plan.device_kind,
        "devices": plan.devices,
        "model_folder": str(model_folder(analysis)),
        "max_tokens": settings.get("max_tokens", 256),
        "threads": settings.get("threads", 0),
        "engine_args": engine,
    }
    return Layout(files={"1/model": "."}, texts=render(plan.serving, values))


def engine_args(analysis: Analysis, plan: Plan) -> dict[str, Any]:
    """vLLM's own, by the plan's settings. Raises `ModelError` for wrong ones."""
    settings = engine_settings(plan.settings)
    cache = settings.kv_cache_memory_bytes
    if plan.device_kind == "cpu" and cache is not None:
        # A longer one of somebody's own must fit at least once.
        least = memory.requests(analysis, settings, plan.device_kind, plan.devices, 1)
        settings = settings.model_copy(update={"kv_cache_memory_bytes": max(cache, least)})
    engine = arguments.engine_args(analysis, settings, plan.device_kind, plan.devices)
    share = plan.settings.get("gpu_memory_utilization")
    own = plan.settings.get("engine_args") or {}
    return {**engine, **({} if share is None else {"gpu_memory_utilization": share}), **own}


def load_parameters(request: LoadRequest, repository: Path, environment: Path | None) -> dict[str, Any]:
    """What goes with the load request, beside the client's own parameters. Reads the model's files.

    `repository` is the folder as the server sees it, `environment` what the template's models run in.
    """
    plan = request.plan
    text = (request.path / CONFIG).read_text(encoding="utf-8")
    config = modelconfig.parse_config(text)
    overridden = request.parameters.get("config")
    changed = modelconfig.from_json(overridden) if overridden is not None else modelconfig.copy(config)
    engine: dict[str, Any] = {}
    numbers = [match[1] for device in request.devices if (match := _GPU.search(device))]
    if numbers:
        modelconfig.place(changed, [int(number) for number in numbers])
        total = min(request.device_bytes.get(device) or plan.settings[DEVICE_BYTES] for device in request.devices)
        engine["gpu_memory_utilization"] = plan.settings.get("gpu_memory_utilization") or _share(plan, total)
    if len(numbers) > 1:
        key = DEVICES_PARAMETER if plan.serving == NATIVE else "devices"
        changed.parameters[key].string_value = ",".join(numbers)
    if plan.serving == NATIVE:
        engine["model"] = str(repository / request.name / "1" / model_folder(request.analysis))
        whole = json.loads((request.path / "1" / "model.json").read_text(encoding="utf-8")) | engine
        # Triton takes no single file on top of those on disk: with one, it loads what came with the request alone.
        return {**request.parameters, "config": modelconfig.to_json(changed), "file:1/model.json": _bytes(whole)}
    if engine:
        changed.parameters["engine_args"].string_value = json.dumps(engine)
    if environment is not None:
        changed.parameters["EXECUTION_ENV_PATH"].string_value = str(environment)
    return {**request.parameters, "config": modelconfig.to_json(changed)}


def _share(plan: Plan, device_bytes: int) -> float:
    """vLLM's own, of a device that may have another size than the planned one."""
    return arguments.share(int(plan.settings[ENGINE_BYTES]), device_bytes)


def _bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
