"""The devices of this machine: its GPUs by NVML, and the host's memory as `cpu:0`.

Host memory is what a process here could still get: in a container the cgroup's limit counts, not the machine's size,
and page cache that the kernel would give back counts as free.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from modelium.api import Device, hookimpl
from modelium.api.measuring import visible

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

UNLIMITED = 1 << 60
"""cgroup v1 writes the largest multiple of a page below 2**63 where there is no limit."""


@hookimpl
def modelium_devices() -> Sequence[Device]:
    """`cpu:0`, and `cuda:N` for each GPU that CUDA programs started from here would see."""
    return [host_device(), *gpu_devices()]


# --------------------------------------------------------------------------- the host's memory


def host_device(cgroups: Path = CGROUPS, own_cgroup: Path = OWN_CGROUP) -> Device:
    """The host's memory as this process may use it."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _cgroup_memory(cgroups, own_cgroup):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    cores = len(psutil.Process().cpu_affinity() or ()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    return Device(
        id="cpu:0",
        kind="cpu",
        name=f"host memory, {cores} {platform.machine()} cores",
        total_bytes=total,
        used_bytes=total - min(available, total),
    )


def _cgroup_memory(cgroups: Path, own_cgroup: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, without page cache, of each cgroup with a limit that this process is in."""
    for line in _text(own_cgroup).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _levels(cgroups, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _levels(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _levels(mount: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[tuple[int, int]]:
    """The group and those above it. In a container the path is often the host's: then the mount is the group."""
    parts = PurePosixPath(path).relative_to("/").parts if path.startswith("/") else ()
    if ".." in parts or not (mount / Path(*parts)).is_dir():
        parts = ()
    for depth in range(len(parts), -1, -1):
        folder = mount / Path(*parts[:depth])
        most = _number(folder / limit)
        if most is None or most >= UNLIMITED:
            continue
        stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
        cache = sum(int(stat.get(f"{prefix}{which}_file", 0)) for which in ("active", "inactive"))
        yield most, max(0, (_number(folder / usage) or 0) - cache)


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


# --------------------------------------------------------------------------- GPUs


class _Nvml:
    """NVML, opened when first needed; a machine without it is asked again each time, which costs microseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False

    def devices(self, environment: Mapping[str, str]) -> list[Device]:
        import pynvml  # type: ignore[import-untyped]

        with self._lock:
            try:
                if not self._open:
                    pynvml.nvmlInit()
                    self._open = True
                handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
                chosen = visible([str(pynvml.nvmlDeviceGetUUID(h)) for h in handles], environment)
                found = (_gpu(pynvml, number, handles[index]) for number, index in enumerate(chosen))
                return [device for device in found if device is not None]
            except pynvml.NVMLError:  # no driver, or it was replaced while we ran
                if self._open:
                    self._open = False
                    with contextlib.suppress(pynvml.NVMLError):
                        pynvml.nvmlShutdown()
                return []


_nvml = _Nvml()


def gpu_devices(environment: Mapping[str, str] = os.environ) -> list[Device]:
    """The GPUs, numbered as CUDA numbers them with CUDA_DEVICE_ORDER=PCI_BUS_ID; none without NVML."""
    return _nvml.devices(environment)


def _gpu(nvml: Any, number: int, handle: Any) -> Device | None:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError:  # it shares the host's memory, or fell off the bus
        return None
    try:
        utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except nvml.NVMLError:  # not told for parts of a GPU (MIG)
        utilization = None
    return Device(
        id=f"cuda:{number}",
        kind="cuda",
        name=name.decode() if isinstance(name, bytes) else str(name),
        total_bytes=int(memory.total),
        used_bytes=int(memory.total) - int(memory.free),  # the driver's own reserve can't be had either
        utilization=utilization,
    )
