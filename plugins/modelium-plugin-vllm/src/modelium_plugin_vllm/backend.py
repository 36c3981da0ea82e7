"""vLLM as Modelium's host sees it: what it can serve, with what settings, and what that takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modelium.api import (
    DEFAULT_SETTINGS,
    Analysis,
    Device,
    Layout,
    Offer,
    Plan,
    Report,
    RuntimeContext,
    RuntimeDriver,
    RuntimeInfo,
)
from modelium.api.estimates import READ_BYTES_PER_S
from modelium.api.templates import render
from modelium.errors import ModelError
from modelium_plugin_vllm import memory
from modelium_plugin_vllm.arguments import model_folder, server_args, share
from modelium_plugin_vllm.environment import INSTALL
from modelium_plugin_vllm.limits import counts, refusal
from modelium_plugin_vllm.registry import known
from modelium_plugin_vllm.settings import DEVICE_BYTES, LEVELS, REPOSITORY, ModelSettings, VllmSettings, model_settings

RUNTIME = "vllm"
GENERATE, EMBED = "generate", "embed"
"""Ways of serving, by vLLM's own words for what a model does."""
HALF = "-half"
"""The way of serving in two bytes on a CPU that computes in four by itself."""

START_S: Mapping[str, float] = {"cpu": 20.0, "cuda": 60.0}
"""Of a server whose model is small, on two cores; on a GPU with what is compiled and captured."""


class VllmBackend:
    """vLLM's OpenAI server, a process tree for each model; or somebody else's server."""

    name = RUNTIME
    settings_model: type[BaseModel] = VllmSettings

    def create(self, context: RuntimeContext) -> RuntimeDriver:
        from modelium.api.external import ExternalServer
        from modelium_plugin_vllm.kind import VllmKind
        from modelium_plugin_vllm.servers import VllmServers
        from modelium_plugin_vllm.sleeping import SleepingServers

        settings = context.settings
        assert isinstance(settings, VllmSettings)
        if settings.endpoint is not None:
            return ExternalServer(context, settings.endpoint, name="vLLM")
        servers = SleepingServers if settings.default_settings.sleep else VllmServers
        kind = VllmKind(context, settings)
        return servers(context, kind, base_port=settings.base_port, load_timeout_s=settings.load_timeout_s)

    async def install(self, cache_dir: Path, settings: BaseModel, report: Report) -> str:
        """`modelium.api.Installable`."""
        from modelium_plugin_vllm.environment import install

        assert isinstance(settings, VllmSettings)
        return (await install(cache_dir, settings, report)).words

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        """Raises `ModelError` with the reason when it is a kind of model that vLLM serves, and this one can't be, or
        there is no vLLM."""
        if runtime is None or runtime.external or analysis.format != "huggingface" or not _task(analysis):
            return []
        if not runtime.facts.get("installed"):
            raise ModelError(f"vLLM may serve it, and is not installed: `{INSTALL}`, then start Modelium again")
        embed = analysis.task == "feature-extraction"
        kind = str(runtime.facts["kind"])
        here = [device for device in devices if device.kind == kind and not device.runtime]
        if not here:
            return []
        vllm = known(Path(str(runtime.facts["package"])))
        if refused := refusal(analysis, vllm, kind, embed=embed, int4=bool(runtime.facts.get("int4", True))):
            raise ModelError(f"vLLM {runtime.version} can't serve it: {refused}")
        defaults = model_settings(runtime.facts.get(DEFAULT_SETTINGS) or {})
        found = _offers(analysis, defaults, here, embed=embed, packs=bool(runtime.facts.get("bf16", True)))
        place = {REPOSITORY: str(runtime.facts["repository"])}
        return [offer.model_copy(update={"settings": {**offer.settings, **place}}) for offer in found]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        """The drop beside what Triton's own vLLM backend would read. Raises `ModelError` for wrong settings."""
        settings = model_settings(plan.settings)
        engine = server_args(analysis, settings, plan.device_kind, plan.devices)
        place = Path(plan.settings.get(REPOSITORY, "/"), name)  # Triton takes an absolute path alone
        if plan.device_kind == "cuda":
            total = plan.settings.get(DEVICE_BYTES) or plan.memory_bytes
            engine["gpu_memory_utilization"] = share(plan.memory_bytes / plan.devices, total)
        engine = {"model": str(model_folder(place, analysis)), **engine}
        values = {"name": name, "device_kind": plan.device_kind, "devices": plan.devices, "engine_args": engine}
        texts = render("vllm", values)
        if settings.lora_adapters:
            found = {
                adapter: str(model_folder(place, analysis) / path) for adapter, path in settings.lora_adapters.items()
            }
            texts["1/multi_lora.json"] = json.dumps(found, indent=2)
        return Layout(files={"1/model": "."}, texts=texts)


def _task(analysis: Analysis) -> bool:
    return analysis.task in ("text-generation", "feature-extraction") and not analysis.facts.get("unsupported")


def _offers(
    analysis: Analysis, defaults: ModelSettings, devices: Sequence[Device], *, embed: bool, packs: bool
) -> Iterator[Offer]:
    kind = devices[0].kind
    serving = EMBED if embed else GENERATE
    if kind == "cpu":
        if packs or defaults.dtype != "auto" or analysis.facts.get("quantization"):
            yield _offer(serving, analysis, defaults, devices, 1, embed=embed, packs=packs)
            return
        wide = defaults.model_copy(update={"dtype": "float32"})
        half = defaults.model_copy(update={"dtype": "bfloat16"})
        yield _offer(serving, analysis, wide, devices, 1, embed=embed, packs=True)
        yield _offer(serving + HALF, analysis, half, devices, 1, embed=embed, packs=False)
        return
    groups, asked = defaults.pipeline_parallel_size, defaults.tensor_parallel_size
    for count in counts(analysis, len(devices), groups) if asked is None else (asked * groups,):
        offer = _offer(serving, analysis, defaults, devices, count, embed=embed, packs=True)
        yield offer
        if offer.memory_bytes <= count * memory.USABLE * min(device.total_bytes for device in devices):
            return  # over more devices it would only take more


def _offer(
    serving: str,
    analysis: Analysis,
    settings: ModelSettings,
    devices: Sequence[Device],
    count: int,
    *,
    embed: bool,
    packs: bool,
) -> Offer:
    kind = devices[0].kind
    least = min(device.total_bytes for device in devices)
    size = memory.size(analysis, settings, kind, count, least, embed=embed, packs=packs)
    own: dict[str, Any] = {DEVICE_BYTES: least} if kind == "cuda" else {}
    own["kv_cache_memory_bytes"] = size.cache
    if not embed:
        own["max_model_len"] = memory.length(analysis, settings, kind)
    if count > 1:
        own["tensor_parallel_size"] = count // settings.pipeline_parallel_size
    return Offer(
        runtime=RUNTIME,
        serving=serving,
        native=True,
        device_kinds=(kind,),
        devices=count,
        memory_bytes=size.total,
        load_s=START_S[kind] + analysis.weights_bytes / READ_BYTES_PER_S,
        standby=LEVELS if kind == "cuda" and settings.sleep else (),
        settings={**settings.model_dump(mode="json", exclude_unset=True), "dtype": settings.dtype, **own},
        note=_note(analysis, settings, kind, count, size, embed=embed),
    )


def _note(analysis: Analysis, settings: ModelSettings, kind: str, count: int, size: memory.Size, *, embed: bool) -> str:
    words = ["vLLM's own server"]
    if count > 1:
        words.append(f"over {count} devices")
    if not embed:
        tokens = memory.length(analysis, settings, kind)
        each = memory.requests(analysis, settings, kind, count, 1)
        words.append(f"with room for {size.cache // each if each else 0} requests of {tokens} tokens")
    return ", ".join(words)
