"""Looks at one node of the cluster: its memory, its GPUs, what processes hold there, and models' logs.

For nodes other than Modelium's own, of which Modelium sees nothing by itself. Linux only (proc(5)).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .replica import log_of

KIB = 1024


class Probe:
    """An actor on its node."""

    def look(self, pids: Iterable[int]) -> dict[str, Any]:
        """Bytes of the node's memory (`total`, `used`), of its GPUs, and of the trees of processes under `pids`."""
        memory = {
            name: int(value.split()[0]) * KIB
            for name, _, value in (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
            if name in ("MemTotal", "MemAvailable")
        }
        gpus, by_process = _gpus()
        return {
            "total": memory["MemTotal"],
            "used": memory["MemTotal"] - memory["MemAvailable"],
            "gpus": gpus,
            "held": {str(pid): _held(tree, by_process) for pid, tree in _trees(pids).items()},
        }

    def tail(self, name: str, size: int) -> str:
        """The end of a model's log, `size` bytes at most; empty where there is none."""
        try:
            with open(log_of(name), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""


def _trees(pids: Iterable[int]) -> dict[int, set[int]]:
    """All that descends from each of these, themselves included."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(f"/proc/{entry.name}/stat").read_text(errors="replace")
            except OSError:
                continue
            parent = int(stat[stat.rindex(")") + 2 :].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    trees = {}
    for pid in pids:
        left, tree = [pid], set()
        while left:
            one = left.pop()
            tree.add(one)
            left += children.get(one, ())
        trees[pid] = tree
    return trees


def _held(tree: set[int], by_process: dict[int, dict[str, int]]) -> dict[str, int]:
    """Bytes of the host's memory, with its part of what is shared (Pss), and of each GPU."""
    held = {"cpu:0": 0}
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has gone
        held["cpu:0"] += sum(int(line.split()[1]) * KIB for line in lines if line.startswith("Pss:"))
        for gpu, size in by_process.get(pid, {}).items():
            held[gpu] = held.get(gpu, 0) + size
    return held


def _gpus() -> tuple[list[dict[str, Any]], dict[int, dict[str, int]]]:
    """The GPUs, by NVML, and what each process holds there; nothing where there is no driver."""
    try:
        import ray._private.thirdparty.pynvml as nvml

        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # no library, no driver, or one that does not fit: no GPU either way
        return [], {}
    gpus: list[dict[str, Any]] = []
    by_process: dict[int, dict[str, int]] = {}
    for index, handle in enumerate(handles):
        memory, name = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetName(handle)
        gpus.append(
            {
                "id": f"cuda:{index}",
                "name": name.decode() if isinstance(name, bytes) else str(name),
                "total": int(memory.total),
                "used": int(memory.used),
            }
        )
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.usedGpuMemory is not None:
                by_process.setdefault(process.pid, {})[f"cuda:{index}"] = int(process.usedGpuMemory)
    return gpus, by_process
