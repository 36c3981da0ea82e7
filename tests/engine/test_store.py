"""What survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelium.api import Plan
from modelium.engine import store as module
from modelium.engine.store import MeasuredStandby, Store, measurement_key


def test_everything_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.pin("a", True)
    store.set_loaded("a", "r")
    for seconds in (1.0, 9.0, 2.0):
        store.measure("k", 100, seconds)
    store.measure("k", 150)
    store.flush()
    again = Store(tmp_path)
    found = again.measurement("k")
    assert again.pins == {"a"} and again.loaded == {"a": "r"}
    assert found is not None and (found.loads, found.memory_bytes, found.load_s) == (3, 150, 2.0)


def test_growth_counts_only_after_a_load_and_when_it_matters(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.measure("k", 100)
    assert store.measurement("k") is None
    store.measure("k", 1000, 1.0)
    store.measure("k", 1005)
    assert store.measured["k"].memory_bytes == 1000
    store.measure("k", 1100)
    assert store.measured["k"].memory_bytes == 1100
    store.measure("k", 1000, 1.0)
    store.measure("k", 1090)
    assert (store.measured["k"].memory_bytes, store.measured["k"].memory) == (1100, (1100, 1090))


def test_what_sleep_takes_is_kept_by_level(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.measure("k", 100, 5.0)
    for seconds in (0.2, 0.9, 0.3):
        store.measure_wake("k", 1, seconds)
    store.measure_parked("k", 1, 50, 8)
    store.measure_parked("k", 1, 40, 9)
    store.measure_wake("k", 2, 2.0)
    store.measure("k", 110, 6.0)
    store.flush()
    again = Store(tmp_path)
    found, kept = again.measurement("k"), again.measured["k"].standby
    assert found is not None and found.wake_s == {1: 0.3, 2: 2.0}
    assert kept[1] == MeasuredStandby(host_bytes=50, device_bytes=9, wake_s=(0.2, 0.9, 0.3))


def test_broken_files_start_anew(tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_text("{")
    (tmp_path / "measurements.json").write_text('{"k": {"loads": "many"}}')
    store = Store(tmp_path)
    assert store.pins == set() and store.measured == {}


def test_a_measurement_is_for_one_content_runtime_setting_and_kind() -> None:
    plan = Plan(
        brain="b", runtime="r", serving="s", device_kind="cpu", memory_bytes=1, load_s=1, reason="", confidence=1
    )  # fmt: skip
    keys = {
        measurement_key("c", plan),
        measurement_key("d", plan),
        measurement_key("c", plan.model_copy(update={"serving": "t"})),
        measurement_key("c", plan.model_copy(update={"device_kind": "cuda"})),
        measurement_key("c", plan.model_copy(update={"settings": {"x": 1}})),
    }
    assert len(keys) == 5
    assert measurement_key("c", plan.model_copy(update={"reason": "another"})) in keys


def test_only_what_was_measured_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_KEYS", 2)
    kept = Store(tmp_path)
    for key in ("a", "b", "a", "c"):
        kept.measure(key, 1, 1.0)
    assert list(kept.measured) == ["a", "c"] == list(Store(tmp_path).measured)
