"""What is planned where a brain sets something otherwise than it was offered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelium.api import DEFAULT_SETTINGS, Analysis, Device, Inspection, Offer, RuntimeInfo, Situation
from modelium.api.fakes import FakeBackend, FakeDriver, FakeRuntime
from modelium.builtin.brain import RulesBrain, RulesSettings
from modelium.core.loading import measured
from modelium.core.world import Estimate
from modelium.engine.planner import Planner
from modelium.engine.runtimes import Running
from modelium.engine.store import Store
from modelium.errors import ModelError

GPU = Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=1000, used_bytes=0)
CPU = Device(id="cpu:0", kind="cpu", name="CPU", total_bytes=10_000, used_bytes=0)
INSPECTION = Inspection(
    content_key="key",
    total_bytes=100,
    analysis=Analysis(analyzer="toy", format="toy", summary="a toy", confidence=1, task="toy", weights_bytes=100),
)


class Sized(FakeBackend):
    """Takes a byte for each token of `length`, and may be `slim`."""

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        settings: Mapping[str, Any] = {"length": 50, **((runtime and runtime.facts.get(DEFAULT_SETTINGS)) or {})}
        if settings["length"] < 0:
            raise ModelError("a length can't be negative")
        size = 100 + settings["length"]
        return [
            Offer(runtime=self.name, serving="toy", device_kinds=("cuda", "cpu"), memory_bytes=size, settings=settings)
        ]


def planner(folder: Path, *rules: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> Planner:
    runtime = FakeRuntime()
    facts = {DEFAULT_SETTINGS: defaults or {}}
    info = RuntimeInfo(name=runtime.name, version="1", instance="1", adopted=False, facts=facts)
    running = Running(Sized(runtime), FakeDriver(runtime), info)
    situation = Situation(devices=(GPU, CPU), budgets={"cuda:0": 1000, "cpu:0": 10_000})
    brain = RulesBrain(RulesSettings.model_validate({"rules": rules}).rules)
    return Planner(brain, {runtime.name: running}, lambda: situation, Store(folder))


def test_what_is_set_counts_in_the_estimate(tmp_path: Path) -> None:
    found = planner(tmp_path, {"name": "long", "settings": {"length": 700}}).plan("m", INSPECTION)
    assert (found.settings, found.memory_bytes, found.device_kind) == ({"length": 700}, 800, "cuda")
    assert "about 800 B" in found.reason


def test_it_goes_where_there_is_room_for_what_is_set(tmp_path: Path) -> None:
    rule = {"name": "long", "settings": {"length": 5000}, "prefer": {"device_kind": ["cuda"]}}
    found = planner(tmp_path, rule).plan("m", INSPECTION)
    assert (found.memory_bytes, found.device_kind) == (5100, "cpu")


def test_the_configurations_own_settings_stay_below(tmp_path: Path) -> None:
    rules = {"name": "slim", "settings": {"slim": True}}
    found = planner(tmp_path, rules, defaults={"length": 200}).plan("m", INSPECTION)
    assert (found.settings, found.memory_bytes) == ({"length": 200, "slim": True}, 300)


def test_who_comes_first_does_so_still_with_what_is_set(tmp_path: Path) -> None:
    made = planner(tmp_path, {"name": "long", "settings": {"length": 700}})
    (first,) = made.runtimes.values()
    runtime = FakeRuntime("other")
    other = Running(Sized(runtime), FakeDriver(runtime), first.info)
    found = replace(made, runtimes={**made.runtimes, "other": other}).plan("m", INSPECTION)
    assert (found.runtime, found.memory_bytes) == ("fake", 800)


def test_what_is_set_wrongly_names_who_set_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be negative; the brain set them: correct its rules"):
        planner(tmp_path, {"name": "long", "settings": {"length": -1}}).plan("m", INSPECTION)


def test_what_is_expected_after_a_restart_is_what_was_expected_before(tmp_path: Path) -> None:
    made = planner(tmp_path)
    plan = made.plan("m", INSPECTION)
    expected = Estimate(plan.memory_bytes, plan.load_s)
    for taken in (2000, 2200, 2100):
        made.store.measure("k", taken, 1.0)
        expected = measured(expected, taken)
        again = made.estimate("k", plan, 100)
        assert (again.memory_bytes, again.spread_bytes) == (expected.memory_bytes, expected.spread_bytes)
    assert (expected.memory_bytes, expected.spread_bytes) == (2100, 100)
    made.store.measure("k", 2180)
    expected = measured(expected, 2180)
    again = made.estimate("k", plan, 100)
    assert (again.memory_bytes, again.spread_bytes) == (expected.memory_bytes, expected.spread_bytes) == (2180, 20)


def test_where_another_rule_sets_it_otherwise_the_first_stands(tmp_path: Path) -> None:
    long = {"name": "on-a-gpu", "when": {"fits": ["cuda"]}, "settings": {"length": 5000}}
    short = {"name": "elsewhere", "settings": {"length": 10}}
    found = planner(tmp_path, long, short).plan("m", INSPECTION)
    assert found.settings == {"length": 5000} and "rule on-a-gpu" in found.reason


def test_what_can_t_be_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be negative"):
        planner(tmp_path, {"name": "wrong", "settings": {"length": -1}}).plan("m", INSPECTION)
