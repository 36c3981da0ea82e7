"""What the controller shows of a model's application, and what that means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelium.api import Endpoint, ObservedModel
from modelium_plugin_rayserve import reasons
from modelium_plugin_rayserve.nodes import Nodes

Shown = Mapping[str, Any]
"""An application, as the controller shows it."""


def pids(shown: Shown) -> list[tuple[str, int]]:
    """Node and number of each replica's process."""
    return [(replica["node"], replica["pid"]) for replica in shown["replicas"] if replica["pid"]]


def running(shown: Shown) -> set[str]:
    """The names of the replicas that serve."""
    return {replica["id"] for replica in shown["replicas"] if replica["state"] == "RUNNING"}


def failed(shown: Shown) -> bool:
    """Whether it will not come up by itself. Ray starts one whose process has ended again, and calls it unhealthy until
    then; when that fails too, the message says why."""
    if shown["status"] == "DEPLOY_FAILED":
        return True
    starting = any(replica["state"] == "STARTING" for replica in shown["replicas"])
    return shown["status"] == "UNHEALTHY" and (not starting or reasons.tells_why(shown["message"]))


def serves(shown: Shown, nodes: Nodes) -> bool:
    return shown["status"] != "DELETING" and any(
        replica["state"] == "RUNNING" and nodes.alive(replica["node"]) for replica in shown["replicas"]
    )


def observed(
    name: str, shown: Shown, nodes: Nodes, memory: Mapping[str, int], endpoints: tuple[Endpoint, ...]
) -> ObservedModel:
    ready = serves(shown, nodes)
    broken, reason = False, ""
    if not ready:
        lost = [node for node in shown["nodes"] if not nodes.alive(node)]
        if shown["nodes"] and len(lost) == len(shown["nodes"]):
            broken, reason = True, "the node that it was on has left the Ray cluster"
        elif failed(shown):
            broken, reason = True, reasons.in_short(shown["message"]) or "Ray says that it is unhealthy"
        else:
            reason = stage(shown)
    return ObservedModel(
        name=name,
        ready=ready,
        broken=broken,
        versions=("1",),
        memory=memory,
        reason=reason,
        endpoints=endpoints if ready else (),
    )


def stage(shown: Shown) -> str:
    """How far it is, for a person."""
    if shown["status"] == "DELETING":
        return "being deleted"
    if shown["message"]:
        return reasons.in_short(shown["message"])
    running = sum(replica["state"] == "RUNNING" for replica in shown["replicas"])
    target = shown["target"] or 1
    if running and target > 1:
        return f"{running} of {target} replicas are ready"
    if any(replica["pid"] for replica in shown["replicas"]):
        return "loading"
    return "starting its process"
