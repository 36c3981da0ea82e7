"""llama.cpp as Modelium's host sees it: what it can serve, and what that takes."""

from __future__ import annotations

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
from modelium.errors import ModelError
from modelium_plugin_llamacpp import memory
from modelium_plugin_llamacpp.analyzer import FORMAT
from modelium_plugin_llamacpp.layout import layout
from modelium_plugin_llamacpp.settings import (
    EMBEDDING,
    PROJECTOR,
    LlamaCppSettings,
    ModelSettings,
    capped,
    model_settings,
)

RUNTIME = "llamacpp"
SERVING = "gguf"

START_S = 1.0
"""Of a server whose model is small."""
EMBEDDING_CTX = 2048
"""Tokens of a text whose embedding is wanted: it is computed at once, which takes room for all of it."""


class LlamaCppBackend:
    """llama.cpp's HTTP server, a process for each model."""

    name = RUNTIME
    settings_model: type[BaseModel] = LlamaCppSettings

    def create(self, context: RuntimeContext) -> RuntimeDriver:
        from modelium.api.servers import ModelServers
        from modelium_plugin_llamacpp.kind import LlamaCppKind

        settings = context.settings
        assert isinstance(settings, LlamaCppSettings)
        kind = LlamaCppKind(context, settings)
        return ModelServers(context, kind, base_port=settings.base_port, load_timeout_s=settings.load_timeout_s)

    async def install(self, cache_dir: Path, settings: BaseModel, report: Report) -> str:
        """`modelium.api.Installable`."""
        from modelium_plugin_llamacpp.install import install

        assert isinstance(settings, LlamaCppSettings)
        program = await install(cache_dir, settings, report)
        return f"{program.version}: {program.argv[0]}{', with a GPU' if program.gpu else ''}"

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        """Raises `ModelError` for a GGUF file that is no language model."""
        if analysis.format != FORMAT or "memory" not in analysis.facts:
            return []
        if unsupported := analysis.facts.get("unsupported"):
            raise ModelError(str(unsupported))
        facts: Mapping[str, Any] = runtime.facts if runtime else {}
        settings = chosen(analysis, facts.get(DEFAULT_SETTINGS) or {})
        pooling = analysis.facts.get("pooling")
        own = {EMBEDDING: pooling} if pooling else {}
        if projector := analysis.facts.get("projector"):
            own[PROJECTOR] = projector
        needed = memory.estimate(analysis, settings, embedding=bool(pooling))
        gpus = [d for d in devices if d.kind == "cuda" and not d.runtime] if facts.get("gpu") else []
        offer = Offer(
            runtime=RUNTIME,
            serving=SERVING,
            native=True,
            device_kinds=("cuda", "cpu") if gpus else ("cpu",),
            memory_bytes=needed,
            load_s=START_S + analysis.weights_bytes / READ_BYTES_PER_S,
            requires=() if facts.get("installed", True) else ("llama.cpp",),
            settings={**settings.model_dump(mode="json"), **own},
            note="llama.cpp's own server",
        )
        return [offer, *_spread(offer, gpus)]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        """Raises `ModelError` when the plan's settings are not right."""
        model_settings(plan.settings)
        return layout(name, analysis)


def chosen(analysis: Analysis, defaults: Mapping[str, Any]) -> ModelSettings:
    """The settings for a model where nobody has said more."""
    settings = model_settings(defaults)
    if analysis.facts.get("pooling") and "ctx" not in defaults:
        settings = settings.model_copy(update={"ctx": EMBEDDING_CTX})
    return capped(settings, analysis)


def _spread(offer: Offer, gpus: Sequence[Device]) -> Iterator[Offer]:
    """Over several GPUs, after the one: taken where fewer have too little room."""
    for count in range(2, len(gpus) + 1):
        yield offer.model_copy(update={"devices": count, "device_kinds": ("cuda",)})
