"""From a plan's settings to vLLM's arguments and environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from modelium.api import Analysis
from modelium.api.ports import HOST
from modelium.errors import LoadRejected
from modelium_plugin_vllm.cpu import cores
from modelium_plugin_vllm.environment import Vllm
from modelium_plugin_vllm.settings import MODULE_OF, EngineSettings, ModelSettings

SHARE = 0.98
"""Of a device, at most: vLLM asks for some room beside what it accounts for."""

SAFE = {
    # Nothing is fetched, and nobody is told.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    # Its processes talk to each other on loopback alone.
    "VLLM_HOST_IP": HOST,
    "VLLM_LOOPBACK_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Those who may ask are Modelium's to know; it asks itself, without a key.
    "VLLM_API_KEY": "",
    # Its processes call themselves something else, and would write that over the marks by which they are found.
    "SPT_NOENV": "1",
    # Seconds: a connection that it closes may have a request on its way.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    # Output is read as it comes.
    "PYTHONUNBUFFERED": "1",
}

FINISH_S = 25
"""A server that is told to end may finish what it is doing, less than `modelium.api.servers.GRACE_S` gives it."""

QUIET = "/health,/metrics,/is_sleeping"
"""Routes that are asked all the time, and would fill the log."""


def model_folder(folder: Path, analysis: Analysis) -> Path:
    """Where the model lies in its folder of the repository."""
    return folder / "1" / "model" / PurePosixPath(analysis.entry).parent


def share(each_bytes: float, device_bytes: float) -> float:
    """Of a device, as `gpu_memory_utilization` says it."""
    return round(min(each_bytes / device_bytes, SHARE), 4)


def engine_args(analysis: Analysis, settings: EngineSettings, kind: str, devices: int) -> dict[str, Any]:
    """vLLM's own names and values, without those that depend on where the model lies and what is booked for it."""
    groups = settings.pipeline_parallel_size
    values: dict[str, Any] = {
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes and settings.kv_cache_memory_bytes // devices,
        "kv_cache_dtype": settings.kv_cache_dtype if settings.kv_cache_dtype != "auto" else None,
        "tensor_parallel_size": devices // groups if devices > 1 else None,
        "pipeline_parallel_size": groups if groups > 1 else None,
        "load_format": settings.load_format if settings.load_format != "auto" else None,
        "enforce_eager": kind == "cpu" if settings.enforce_eager is None else settings.enforce_eager,
        "runner": "pooling" if analysis.task == "feature-extraction" else None,
    }
    if kind == "cpu":
        values["distributed_executor_backend"] = "uni"
    return {name: value for name, value in values.items() if value is not None and value is not False}


def server_args(analysis: Analysis, settings: ModelSettings, kind: str, devices: int) -> dict[str, Any]:
    """As `engine_args`, with what a server of its own can do besides."""
    values = engine_args(analysis, settings, kind, devices)
    if settings.lora_adapters:
        values |= {"enable_lora": True, "max_lora_rank": settings.max_lora_rank}
    if settings.sleep and kind == "cuda":
        values["enable_sleep_mode"] = True
    return values


def command_line(
    vllm: Vllm, launcher: Path, engine: Mapping[str, Any], settings: ModelSettings, *, name: str, model: Path, port: int
) -> list[str]:
    """Raises `LoadRejected` for a setting that this vLLM can't follow."""
    module = MODULE_OF.get(settings.load_format)
    if module is not None and module not in vllm.modules:
        raise LoadRejected(
            f"{name} is to be loaded with {settings.load_format}, and {vllm.python} has no {module}: install it there "
            f"(`{vllm.python} -m pip install {module.replace('_', '-')}`), or leave `load_format` out",
            code="load_format_missing",
        )
    argv = [str(vllm.python), str(launcher), "--model", str(model), "--served-model-name", name]
    argv += ["--host", HOST, "--port", str(port), "--disable-access-log-for-endpoints", QUIET]
    argv += ["--shutdown-timeout", str(FINISH_S)]
    for option, value in engine.items():
        argv.append(f"--{option.replace('_', '-')}")
        if value is not True:
            argv.append(str(value))
    if settings.lora_adapters:
        argv.append("--lora-modules")
        argv += [f"{adapter}={place}" for adapter, place in adapters(settings, name, model).items()]
    return [*argv, *settings.args]


def adapters(settings: ModelSettings, name: str, model: Path) -> dict[str, Path]:
    """Their folders. Raises `LoadRejected` for one that is not there."""
    found = {}
    for adapter, path in settings.lora_adapters.items():
        place = model / path
        if not (place / "adapter_config.json").is_file():
            raise LoadRejected(
                f"the adapter {adapter} of {name} was expected at {place}, and there is no adapter_config.json: "
                "`lora_adapters` takes absolute paths and those in the model's folder",
                code="adapter_missing",
            )
        found[adapter] = place
    return found


def environment(vllm: Vllm, settings: ModelSettings, kind: str, cache: Path) -> dict[str, str]:
    """What the server's processes read before anything else."""
    values = {**SAFE, "VLLM_CACHE_ROOT": str(cache)}
    if kind == "cpu":
        values |= _on_cpu(vllm, settings)
    if settings.sleep and kind == "cuda":
        values["VLLM_SERVER_DEV_MODE"] = "1"  # without it there are no routes to sleep and wake
    return values


def _on_cpu(vllm: Vllm, settings: ModelSettings) -> dict[str, str]:
    values = {
        # One process for the engine and the model, and that forked from the server: half of the memory, and a third
        # of the time to start.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "MODELIUM_VLLM_FORK": "1",
        # Threads are not bound to cores, for which every model would choose the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads or max(1, cores() - 1)),
        # Without it glibc keeps what was read to be laid out anew, as much again as the weights.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "CUDA_VISIBLE_DEVICES": "",
    }
    library = vllm.prefix / "lib" / "libiomp5.so"
    if library.is_file():  # as vLLM asks for; other than GCC's, it goes on after a fork
        values["LD_PRELOAD"] = ":".join(filter(None, (os.environ.get("LD_PRELOAD"), str(library))))
    return values
