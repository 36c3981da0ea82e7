"""What optimizers would make of each model, asked once for as long as nothing about it changes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from modelium.api.optimizing import Optimization, Optimizer, Served
from modelium.api.types import Device, Manifest, OptimizationRecord, Plan
from modelium.core.states import State
from modelium.core.world import Model
from modelium.engine.repository import MANIFEST
from modelium.errors import ModelError, ModeliumError, PluginError

if TYPE_CHECKING:
    from modelium.engine.catalog import Known
    from modelium.engine.orchestrator import Orchestrator

log = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9._-]{1,200}")


@dataclass(frozen=True, slots=True)
class Judged:
    """What could be made of a model as it is."""

    seen: tuple[object, ...]
    """What it was judged by."""
    revision: str
    manifest: Manifest
    served: Served
    optimizer: Optimizer | None = None
    optimization: Optimization | None = None
    reason: str = ""
    """Why it can't be made, where it would be."""

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def ours(self) -> bool:
        """The folder is as Modelium made it, not as a person has changed it since."""
        return self.manifest.revision == self.revision


class Judge:
    def __init__(self, engine: Orchestrator, optimizers: Mapping[str, Optimizer]):
        self._engine = engine
        self._optimizers = optimizers
        self._judged: dict[str, Judged] = {}

    def subjects(self) -> list[Known]:
        """Models whose folders Modelium made, and with which nothing is done now: loaded ones, and all optimized ones
        that are not loaded."""
        models = self._engine.loop.world.models
        found = [
            known
            for name, known in self._engine.catalog.known.items()
            if known.managed
            and (model := models.get(name)) is not None
            and not model.op
            and (model.state is State.READY or (known.optimized and model.held is None))
        ]
        names = {known.name for known in found}
        self._judged = {name: judged for name, judged in self._judged.items() if name in names}
        return found

    async def judge(self, known: Known) -> Judged | None:
        """None for one that can't be read."""
        model = self._engine.loop.world.models.get(known.name)
        if model is None:
            return None
        running = self._engine.running.get(known.plan.runtime)
        info = running.info if running is not None else None
        devices = self._devices(known.plan, model)
        seen = (known.revision, info, tuple(device.id for device in devices))
        before = self._judged.get(known.name)
        if before is not None and before.seen == seen:
            return before
        try:
            manifest = await asyncio.to_thread(self._engine.catalog.manifest, known.name)
            path, original = known.path, manifest
            if manifest.optimization is not None:
                path = known.path / manifest.optimization.unconverted
                original = await asyncio.to_thread(_manifest_in, path)
        except ModeliumError as exc:
            log.warning("%s can't be judged: %s", known.name, exc.message)
            return None
        served = Served(
            name=known.name,
            path=path,
            inspection=original.inspection,
            plan=original.plan,
            devices=devices,
            runtime=info,
        )
        judged = self._judged[known.name] = self._ask(Judged(seen, known.revision, manifest, served))
        return judged

    def _devices(self, plan: Plan, model: Model) -> tuple[Device, ...]:
        """Those that it is loaded on; while it is not, all that it might be."""
        held = {device for device, _ in model.booking}
        return tuple(d for d in self._engine.devices if (d.id in held if held else d.kind == plan.device_kind))

    def _ask(self, judged: Judged) -> Judged:
        """The first optimizer that would make something; of one that has made something, only that one is asked."""
        record = judged.manifest.optimization
        for name, optimizer in self._optimizers.items():
            if record is not None and record.optimizer != name:
                continue
            judged = replace(judged, optimizer=optimizer)
            try:
                optimization = optimizer.proposes(judged.served)
                if optimization is not None and not _KEY.fullmatch(optimization.key):
                    raise PluginError(f"the optimizer {name} gave the key {optimization.key!r:.200}")
            except ModeliumError as exc:
                judged = replace(judged, reason=exc.message)
                continue
            except Exception as exc:
                log.exception("the optimizer %s failed to judge %s", name, judged.name)
                judged = replace(judged, reason=f"the optimizer {name} failed: {type(exc).__name__}: {exc}")
                continue
            if optimization is not None:
                return replace(judged, optimization=optimization, reason="")
        return judged


def difference(record: OptimizationRecord, now: Optimization) -> str:
    """In what the keys differ, for a person."""
    names = sorted({*record.depends_on, *now.depends_on})
    parts = [
        f"{name} was {record.depends_on.get(name, 'none')} and is {now.depends_on.get(name, 'none')}"
        for name in names
        if record.depends_on.get(name) != now.depends_on.get(name)
    ]
    return "; ".join(parts) or f"it would be {now.what} now"


def _manifest_in(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as exc:
        raise ModelError(f"{folder} holds no manifest that can be read: {exc}") from exc
