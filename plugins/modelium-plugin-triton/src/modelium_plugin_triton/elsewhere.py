"""The devices of a machine that only its Triton reaches, by that server's metrics.

Names as in Triton's docs/user_guide/metrics.md: `nv_gpu_memory_total_bytes`, `nv_gpu_memory_used_bytes` and
`nv_gpu_utilization` by `gpu_uuid`, `nv_cpu_memory_total_bytes`, `nv_cpu_memory_used_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from modelium.api import Device
from modelium.errors import RuntimeUnavailable

TIMEOUT_S = 5.0


async def devices(runtime: str, url: str) -> tuple[Device, ...]:
    """Its host memory and its GPUs, in the order in which the server numbers them. Raises `RuntimeUnavailable`."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session,
            session.get(url) as response,
        ):
            text = await response.text()
            if response.status != 200:
                raise RuntimeUnavailable(f"triton.metrics_endpoint, {url}, answers {response.status}: expected 200")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise RuntimeUnavailable(
            f"no metrics answer at triton.metrics_endpoint, {url}: {error or 'it took too long'}. Give the URL of the "
            "server's --metrics-port, as http://10.0.0.5:8002/metrics"
        ) from error
    return told(runtime, text)


def told(runtime: str, text: str) -> tuple[Device, ...]:
    """What metrics in Prometheus' text format say of devices. Raises `RuntimeUnavailable` when they are none."""
    found: dict[str, dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[sample.labels.get("gpu_uuid", "")] = sample.value
    except ValueError as error:
        raise RuntimeUnavailable(f"what the metrics endpoint of {runtime} answers are no metrics: {error}") from error
    host = _device(runtime, "cpu:0", "cpu", f"host memory of {runtime}", found, "nv_cpu_memory", "")
    gpus = [
        _device(runtime, f"cuda:{number}", "cuda", f"GPU of {runtime} {uuid}", found, "nv_gpu_memory", uuid)
        for number, uuid in enumerate(found.get("nv_gpu_memory_total_bytes", {}))
    ]
    return tuple(device for device in (host, *gpus) if device is not None)


def _device(
    runtime: str, id: str, kind: str, name: str, found: Mapping[str, Mapping[str, float]], metric: str, uuid: str
) -> Device | None:
    total = found.get(f"{metric}_total_bytes", {}).get(uuid)
    if not total:
        return None
    return Device(
        id=f"{runtime}/{id}",
        kind=kind,
        name=name,
        total_bytes=int(total),
        used_bytes=int(found.get(f"{metric}_used_bytes", {}).get(uuid, 0)),
        utilization=found.get("nv_gpu_utilization", {}).get(uuid) if kind == "cuda" else None,
        runtime=runtime,
    )
