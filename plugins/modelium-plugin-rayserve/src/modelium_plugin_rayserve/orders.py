"""What a load request comes to in Ray Serve's words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelium.api import LoadRequest
from modelium.errors import LoadRejected, ModelError
from modelium_plugin_rayserve.modelconfig import newest_version, read_config
from modelium_plugin_rayserve.servings import one_replica_bytes
from modelium_plugin_rayserve.settings import ReplicaSettings, replica_settings

GRACE_S = 30.0
"""How long a replica that is told to end may finish what it is doing."""
HEALTHY_WITHIN_S = 60.0
"""A replica that does not answer for so long is ended; one that computes in Python may be slow to."""


def order(
    request: LoadRequest, *, own: bool, nodes: Sequence[str], log: Path, uuid_of: Callable[[str], str]
) -> dict[str, Any]:
    """What the controller is sent, see `onray.controller`. Raises `LoadRejected`. Reads files.

    `own`: the cluster is ours alone, so that the ledger chooses GPUs rather than Ray. `uuid_of` names one of this
    machine's GPUs in CUDA_VISIBLE_DEVICES.
    """
    try:
        wanted = replica_settings(request.plan.settings)
    except ModelError as error:
        raise LoadRejected(f"{request.name}: {error.message}", code=error.code) from error
    gpu = request.plan.device_kind == "cuda"
    reserved = wanted.num_gpus
    if gpu and reserved is None and not own:
        reserved = _share(request, wanted)
    sees: str | None = None
    if not gpu:
        sees = ""
    elif reserved is None:
        sees = uuid_of(request.devices[0])
    return {
        "name": request.name,
        "folder": str(request.path),
        "version": newest_version(request.path, request.name),
        "config": read_config(request.path, request.name, request.parameters.get("config")),
        "gpu": gpu,
        "sees_gpus": sees,
        "threads": math.ceil(wanted.num_cpus),
        "log": str(log),
        "nodes": list(nodes),
        "options": _options(wanted, reserved if gpu else None, len(nodes)),
    }


def _share(request: LoadRequest, wanted: ReplicaSettings) -> float:
    """Of a GPU, what the memory of one replica is of it, in hundredths.

    What is booked is of all that there may be, or of as many as there were when it was measured: where Ray adds some,
    the estimate of one tells between these. It counts no further, so that Ray refuses nothing that was booked.
    """
    nodes = len(request.devices)
    least = request.memory_bytes / max(wanted.most, nodes)
    most = request.memory_bytes / max(wanted.replicas, nodes)
    each = min(max(least, one_replica_bytes(request.plan, request.analysis)), most)
    smallest = min((request.device_bytes.get(device, 0) for device in request.devices), default=0)
    return min(1.0, max(0.01, math.ceil(100 * each / smallest) / 100)) if smallest else 1.0


def _options(wanted: ReplicaSettings, num_gpus: float | None, nodes: int) -> dict[str, Any]:
    """Of `serve.deployment`."""
    options: dict[str, Any] = {
        "max_ongoing_requests": wanted.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": wanted.num_cpus} | ({"num_gpus": num_gpus} if num_gpus else {}),
        # What failed once fails again, and the engine decides when to try.
        "max_constructor_retry_count": 1,
        # The old revision serves until the new one does; with several nodes the others do meanwhile.
        "max_surge_percent": 0 if nodes > 1 else 100,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": GRACE_S,
        "health_check_period_s": 2,
        "health_check_timeout_s": HEALTHY_WITHIN_S,
    }
    if wanted.most > wanted.replicas:
        options["autoscaling_config"] = {
            "min_replicas": wanted.replicas,
            "initial_replicas": wanted.replicas,
            "max_replicas": wanted.most,
            "target_ongoing_requests": wanted.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = max(wanted.replicas, nodes)
    if nodes > 1:
        options["max_replicas_per_node"] = math.ceil(max(wanted.most, nodes) / nodes)
    return options
