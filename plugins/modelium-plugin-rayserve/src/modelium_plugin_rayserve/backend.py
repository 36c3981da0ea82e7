"""Ray Serve as Modelium's host sees it: what it can serve, and how a model's folder is made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from modelium_plugin_rayserve import packs, servings
from modelium_plugin_rayserve.servings import RUNTIME
from modelium_plugin_rayserve.settings import RayServeSettings, replica_settings


class RayServeBackend:
    """A Ray cluster, its own or somebody else's, with an application for each model."""

    name = RUNTIME
    settings_model: type[BaseModel] = RayServeSettings

    def create(self, context: RuntimeContext) -> RuntimeDriver:
        from modelium_plugin_rayserve.driver import RayServeDriver

        return RayServeDriver(context)

    async def install(self, cache_dir: Path, settings: BaseModel, report: Report) -> str:
        """`modelium.api.Installable`: Ray, and what each kind of model needs."""
        assert isinstance(settings, RayServeSettings)
        python = await packs.install(cache_dir, settings, list(packs.PACKS), report)
        if settings.python is not None:
            return f"ray_serve.python is {python}: what it needs is installed there by whoever made it"
        return f"{packs.RAY} with {', '.join(name for name in packs.PACKS if name != packs.BASE)}: {python}"

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        """One replica on one node; where there are more nodes, then also one on each.

        Raises `ModelError` with the reason when it is a kind of model that could be served, and this one can't be.
        """
        serving = servings.as_is(analysis) if analysis.format == "triton" else servings.servings_for(analysis)
        if serving is None:
            return []
        facts: Mapping[str, Any] = runtime.facts if runtime is not None else {}
        reached = [device for device in devices if device.runtime in ("", runtime.name if runtime else "")]
        wanted = servings.device_kinds(serving, analysis, own=facts.get("own", True))
        kinds = [kind for kind in wanted if any(device.kind == kind for device in reached)]
        if not kinds:
            return []
        installed = facts.get("packs") if runtime is not None else ()
        needed = (packs.BASE, *servings.packs_needed(serving, analysis))
        missing = [] if installed is None else [pack for pack in needed if pack not in installed]
        defaults = replica_settings(facts.get(DEFAULT_SETTINGS) or {})
        plain = servings.offer(serving, analysis, kinds, defaults, missing)
        nodes = {device.id.rpartition("/")[0] for device in reached if device.kind == kinds[0]}
        if len(nodes) < 2:
            return [plain]
        return [plain, servings.spread(plain.model_copy(update={"device_kinds": (kinds[0],)}), len(nodes))]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        return servings.layout(name, analysis, plan)
