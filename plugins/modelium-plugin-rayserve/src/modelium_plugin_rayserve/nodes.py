"""The cluster's nodes as devices, and devices as nodes.

The node that the controller is on is this machine, whose devices are nobody's alone: `cpu:0`, `cuda:0`. Those of
another node bear its name, `NODE/cpu:0`, and only Ray reaches them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from modelium.api import Device
from modelium.api.measuring import HOST_MEMORY
from modelium.errors import DriverError


class Nodes:
    """Those that live, as the controller's status tells them."""

    def __init__(self, status: Mapping[str, Any]):
        self.me: str = status["node"]
        self._alive = {node["id"]: node for node in status["nodes"] if node["alive"]}
        others = [node for node in self._alive.values() if node["id"] != self.me]
        names = Counter(node["name"] for node in others)
        self.names: dict[str, str] = {
            node["id"]: node["name"] if names[node["name"]] == 1 else f"{node['name']}-{node['id'][:8]}"
            for node in others
        }
        """By id, of nodes other than this machine. A node that comes back under its address is the same again."""

    def alive(self, node: str) -> bool:
        return node in self._alive

    def device(self, node: str, device: str) -> str:
        """What a node calls `cpu:0`, as Modelium calls it."""
        return device if node == self.me else f"{self.names.get(node, node[:8])}/{device}"

    def devices(self, runtime: str) -> tuple[Device, ...]:
        """Those that only Ray reaches, as far as they have been looked at."""
        found = []
        for node, name in sorted(self.names.items(), key=lambda item: item[1]):
            look = self._alive[node]["look"]
            if look is None:
                continue
            found.append(_device(name, runtime, HOST_MEMORY, f"host memory of {name}", look))
            found += [_device(name, runtime, gpu["id"], f"{gpu['name']} of {name}", gpu) for gpu in look["gpus"]]
        return tuple(found)

    def placed(self, devices: Sequence[str]) -> list[str]:
        """The ids of the nodes that these devices are on. Raises `DriverError` when one is not there any more."""
        by_name = {name: node for node, name in self.names.items()} | {"": self.me}
        nodes = []
        for device in devices:
            name = device.rpartition("/")[0]
            if name not in by_name:
                raise DriverError(f"the node {name} has left the Ray cluster", code="node_gone")
            nodes.append(by_name[name])
        return list(dict.fromkeys(nodes))

    def held(self, node: str, pid: int) -> dict[str, int]:
        """Bytes by device of a process on another node; empty when that is not known yet."""
        look = self._alive.get(node, {}).get("look") or {}
        held: Mapping[str, int] = look.get("held", {}).get(str(pid), {})
        return {self.device(node, device): size for device, size in held.items()}


def _device(node: str, runtime: str, id: str, name: str, look: Mapping[str, Any]) -> Device:
    return Device(
        id=f"{node}/{id}",
        kind=id.partition(":")[0],
        name=name,
        total_bytes=look["total"],
        used_bytes=look["used"],
        runtime=runtime,
    )
