"""From what a model is to how it will be served: offers, the brain's choice, and what is known of its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from modelium.api.driver import DEFAULT_SETTINGS, Brain, Parks
from modelium.api.types import Analysis, Device, Inspection, Layout, Offer, Plan, Situation
from modelium.core.world import Estimate, Standby
from modelium.engine.runtimes import Running
from modelium.engine.store import Measured, MeasuredStandby, Store, key_of
from modelium.errors import ModelError, PluginError

PROCESS_BYTES = 1_500_000_000
"""What a sleeping server keeps, of the host as of each device, but for weights: of the order of what NVIDIA's driver
and CUDA graphs take. Of a small model a tenth of its size is expected."""
WAKE_BYTES_PER_S = 5e9
"""Weights come back from the host's memory at least this fast: half of what PCIe 3.0 carries over sixteen lanes."""


@dataclass(frozen=True, slots=True)
class Planner:
    brain: Brain
    runtimes: Mapping[str, Running]
    situation: Callable[[], Situation]
    store: Store

    def offers(self, analysis: Analysis) -> list[Offer]:
        """What all runtimes offer. Raises `ModelError` with their reasons when they say why and nobody offers."""
        situation = self.situation()
        offers: list[Offer] = []
        reasons: list[str] = []
        for name in self.runtimes:
            try:
                offers += self._offers_of(name, analysis, situation)
            except ModelError as exc:
                reasons.append(exc.message)
        if reasons and not offers:
            raise ModelError("; ".join(reasons))
        return offers

    def _offers_of(
        self, name: str, analysis: Analysis, situation: Situation, settings: Mapping[str, Any] | None = None
    ) -> list[Offer]:
        """`settings` are put over those of the runtime's configuration."""
        running = self.runtimes[name]
        info = running.info
        if info is not None and settings:
            defaults = {**(info.facts.get(DEFAULT_SETTINGS) or {}), **settings}
            info = info.model_copy(update={"facts": {**info.facts, DEFAULT_SETTINGS: defaults}})
        found = running.backend.offers(analysis, info, situation.reachable(name))
        return [o if o.runtime == name else o.model_copy(update={"runtime": name}) for o in found]

    def plan(self, name: str, inspection: Inspection) -> Plan:
        """What was measured of this content before counts, else the offers' own estimates; where the brain sets
        something otherwise than was offered, those with its settings.

        Raises `ModelError` when nothing on offer will do.
        """
        analysis = inspection.analysis
        if analysis is None:
            raise ModelError(f"no analyzer knows what {name} is")
        if not self.runtimes:
            raise ModelError("no runtime is there to serve it: `pip install modelium-plugin-triton`")
        situation = self.situation()
        offers = self.offers(analysis)
        plan = self._chosen(name, inspection, offers, situation)
        settings = _set_by_the_brain(plan, offers)
        if not settings:
            return plan
        # What is set otherwise may take more or less.
        try:
            anew = self._offers_of(plan.runtime, analysis, situation, settings)
        except ModelError as exc:
            told = f"{exc.message}; the brain set them: correct its rules in the configuration, and add the model again"
            raise ModelError(told, code=exc.code) from exc
        before = {runtime: [offer for offer in offers if offer.runtime == runtime] for runtime in self.runtimes}
        offers = [offer for found in (before | {plan.runtime: anew}).values() for offer in found]
        again = self._chosen(name, inspection, offers, situation)
        # Another rule may have applied, with other settings: for these the runtime was not asked.
        holds = again.runtime != plan.runtime or settings.items() <= again.settings.items()
        return again if holds else plan

    def _chosen(self, name: str, inspection: Inspection, offers: Sequence[Offer], situation: Situation) -> Plan:
        assert inspection.analysis is not None
        known = [one for offer in offers for one in self._measured(inspection.content_key, offer)]
        plan = self.brain.plan(name, inspection.analysis, known, situation)
        if plan.runtime not in self.runtimes:
            raise PluginError(f"the brain {self.brain.name} chose the runtime {plan.runtime}, which is not there")
        return plan

    def _measured(self, content_key: str, offer: Offer) -> list[Offer]:
        """The offer as it is, or one for each kind of device where something was measured on one of them."""
        found = {
            kind: self.store.measurement(key_of(content_key, offer.runtime, offer.serving, kind, offer.settings))
            for kind in offer.device_kinds
        }
        if not any(found.values()):
            return [offer]
        return [
            offer.model_copy(
                update={"device_kinds": (kind,)}
                | ({"memory_bytes": known.memory_bytes, "load_s": known.load_s or offer.load_s} if known else {})
            )
            for kind, known in found.items()
        ]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        return self.runtimes[plan.runtime].backend.layout(name, analysis, plan)

    def estimate(self, measured_as: str, plan: Plan, weights_bytes: int) -> Estimate:
        """What was measured before, else what the plan expects."""
        known = self.store.measured.get(measured_as, Measured())
        found = self.store.measurement(measured_as)
        estimate = Estimate(plan.memory_bytes, plan.load_s)
        if found is not None:
            load_s = found.load_s or plan.load_s
            last = known.memory[-1] if known.memory else found.memory_bytes
            estimate = Estimate(
                last,
                load_s,
                measured=True,
                slowest_s=found.slowest_s,
                spread_bytes=found.memory_bytes - last,
            )
        running = self.runtimes.get(plan.runtime)
        if not plan.standby or running is None or not isinstance(running.driver, Parks):
            return estimate
        slept = known.standby
        levels = [_standby(n, slept.get(n, MeasuredStandby()), estimate, plan, weights_bytes) for n in plan.standby]
        return replace(estimate, standby=tuple(sorted(levels, key=lambda s: s.level)))


def _set_by_the_brain(plan: Plan, offers: Sequence[Offer]) -> dict[str, Any]:
    """What the plan sets otherwise than the offer that it takes."""
    way = (plan.runtime, plan.serving, plan.devices)
    offered = next((o.settings for o in offers if (o.runtime, o.serving, o.devices) == way), plan.settings)
    return {k: v for k, v in plan.settings.items() if k not in offered or offered[k] != v}


def _standby(level: int, known: MeasuredStandby, estimate: Estimate, plan: Plan, weights_bytes: int) -> Standby:
    """What sleeping at a level takes: as it was measured, else a guess that holds until it was tried once."""
    process = min(PROCESS_BYTES, estimate.memory_bytes // 10)
    again_s = weights_bytes / WAKE_BYTES_PER_S + 0.1 * estimate.load_s if level == 1 else 0.4 * estimate.load_s
    return Standby(
        level=level,
        host_bytes=known.host_bytes or process + (weights_bytes if level == 1 else 0),
        device_bytes=known.device_bytes if known.host_bytes else process * plan.devices,
        wake_s=median(known.wake_s) if known.wake_s else again_s,
    )


def budgets(devices: Sequence[Device], configured: Mapping[str, int], share: float) -> dict[str, int]:
    """Bytes that models may occupy, by device."""
    return {d.id: min(configured.get(d.id, int(d.total_bytes * share)), d.total_bytes) for d in devices}
