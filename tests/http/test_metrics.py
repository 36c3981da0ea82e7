"""What Prometheus reads: right, bounded, and nothing of what is gone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelium.http.metrics import FAMILIES
from modelium.http.settings import HttpSettings
from tests.http.conftest import Surface
from tests.http.test_kserve import ask
from tests.http.upstreams import Recorder

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(surface: Surface) -> Samples:
    async with surface.client.get(f"{surface.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        if family.name.startswith("modelium"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            assert FAMILIES[name][0] == family.type
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def of(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


async def test_what_is_counted_is_shown(surface: Surface, upstream: Recorder) -> None:
    service = surface.service
    for organisation in ("a", "a", "b", "c", "d"):
        await ask(surface, "POST", "/v2/models/m/infer", headers={"x-modelium-organisation": organisation})
    service.add('odd "name\\', "COLD")
    service.add("waits", "QUEUED")
    service.pinned.add("m")
    for before, after, reason in [
        ("COLD", "QUEUED", "asked for"), ("QUEUED", "LOADING", "request, 1 waiting"), ("LOADING", "READY", "loaded"),
        ("READY", "DRAINING", "evicted for x"), ("DRAINING", "UNLOADING", ""), ("UNLOADING", "COLD", ""),
        ("QUEUED", "LOADING", "person"), ("LOADING", "FAILED", "broken"),
        ("READY", "DRAINING", "idle for 9 s"), ("DRAINING", "PARKING", ""), ("PARKING", "STANDBY", ""),
        ("STANDBY", "LOADING", "request"), ("LOADING", "READY", "woken"),
    ]:  # fmt: skip
        service.tell("m", before, after, reason)
    samples = await scrape(surface)
    assert of(samples, "modelium_build_info", version="1.2.3") == 1
    assert of(samples, "modelium_models", state="READY") == 1
    assert of(samples, "modelium_queue_length") == 1
    assert of(samples, "modelium_waiting") == 0
    assert of(samples, "modelium_runtime_up", runtime="triton") == 1
    for kind, size in dict(total=100, used=50, budget=90, booked=30, promised=5, foreign=20).items():
        assert of(samples, "modelium_device_memory_bytes", device="cpu:0", kind=kind) == size
    assert of(samples, "modelium_device_utilization_ratio", device="cpu:0") == 0.5
    for organisation, count in {"a": 2, "b": 1, "c": 1, "other": 1}.items():
        labels = {"model": "m", "organisation": organisation, "result": "ok"}
        assert of(samples, "modelium_requests_total", **labels) == count
    assert of(samples, "modelium_request_seconds_count", model="m") == 5
    assert of(samples, "modelium_request_seconds_bucket", model="m", le="+Inf") == 5
    assert of(samples, "modelium_model_qps", model="m") == 0.5
    assert of(samples, "modelium_model_in_flight", model="m") == 0
    assert of(samples, "modelium_model_idle_seconds", model="m") == 7
    assert of(samples, "modelium_model_idle_seconds", model="waits") is None
    assert of(samples, "modelium_model_pinned", model="m") == 1
    assert of(samples, "modelium_model_state", model="m", state="READY") == 1
    assert of(samples, "modelium_model_state", model='odd "name\\', state="COLD") == 1
    assert of(samples, "modelium_model_memory_bytes", model="m", source="estimated") == 10
    assert of(samples, "modelium_model_loads_total", model="m", reason="request") == 1
    assert of(samples, "modelium_model_unloads_total", model="m", reason="evicted") == 1
    assert of(samples, "modelium_model_failed_loads_total", model="m") == 1
    assert of(samples, "modelium_model_parks_total", model="m", reason="idle") == 1
    assert of(samples, "modelium_model_wakes_total", model="m") == 1
    assert of(samples, "modelium_model_last_wake_seconds", model="m") is not None
    assert of(samples, "modelium_model_last_load_seconds", model="m") is not None
    assert of(samples, "modelium_load_seconds_count") == 1
    assert of(samples, "process_resident_memory_bytes")


async def test_a_model_that_is_gone_leaves_no_series(surface: Surface, upstream: Recorder) -> None:
    await ask(surface, "POST", "/v2/models/m/infer")
    await ask(surface, "POST", "/v2/models/unknown/infer")
    surface.service.tell("m", "QUEUED", "LOADING", "request")
    surface.service.tell("m", "LOADING", "READY", "")
    assert any(("model", "m") in labels for _, labels in await scrape(surface))
    await surface.service.remove("m")
    surface.service.usage.forget("m")
    assert not [labels for _, labels in await scrape(surface) if "model" in dict(labels)]


class TestTurnedOff:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(metrics=False)

    async def test_there_are_no_metrics(self, surface: Surface) -> None:
        async with surface.client.get(f"{surface.url}/metrics") as response:
            assert response.status == 404
