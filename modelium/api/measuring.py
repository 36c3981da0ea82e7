"""What processes hold, told apart: of the host's memory by the kernel, of GPUs by NVML. Linux only (proc(5)).

For drivers whose models live in processes, and for the inventory of devices, so that both number GPUs alike.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

log = logging.getLogger(__name__)

HOST_MEMORY = "cpu:0"

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Key = tuple[int, int]
"""A process beyond doubt: its pid, and when it was started, in the kernel's ticks since the boot."""

Measure = Literal["uss", "pss"]
"""`uss` is what would come free if the process ended; `pss` adds its part of what several processes share."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process as the kernel shows it."""

    key: Key
    parent: int
    session: int
    resident: int
    """Bytes."""
    zombie: bool


def processes() -> Iterator[Process]:
    """Those of this machine, zombies among them."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (process := process_of(int(entry.name))) is not None:
            yield process


def process_of(pid: int) -> Process | None:
    """From `/proc/PID/stat` (proc_pid_stat(5)), field 2 of which may hold anything, so it is counted from its end."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *rest = stat[stat.rindex(")") + 2 :].split()
    return Process(
        key=(pid, int(rest[18])),
        parent=int(rest[0]),
        session=int(rest[2]),
        resident=int(rest[20]) * _PAGE_BYTES,
        zombie=state in "ZX",
    )


def key_of(pid: int) -> Key | None:
    """The living process with this number; None when there is none."""
    process = process_of(pid)
    return process.key if process is not None and not process.zombie else None


def arguments_of(pid: int) -> list[str] | None:
    """Its command line; None when it has gone, or is not ours to see."""
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return None


class Sizes:
    """Bytes by device of single processes; one whose resident size has hardly changed is not measured anew.

    Measuring a process makes the kernel walk its page tables, which takes milliseconds for each GiB.
    """

    TOLERANCE_BYTES = 1 << 20

    def __init__(self, measure: Measure, gpus: Gpus | None = None):
        self._measure = measure
        self._gpus = gpus
        self._sizes: dict[Key, tuple[int, int]] = {}
        self._on_gpus: Mapping[int, Mapping[str, int]] = {}

    def begin(self) -> None:
        """A new look at all: ask the GPUs once for it."""
        self._on_gpus = self._gpus.by_process() if self._gpus else {}

    def of(self, process: Process) -> dict[str, int]:
        """Empty for one that has gone."""
        if self._has_changed(process):
            try:
                size = int(getattr(psutil.Process(process.key[0]).memory_full_info(), self._measure))
            except psutil.NoSuchProcess:
                return {}
            except psutil.AccessDenied:  # somebody else's
                size = process.resident
            self._sizes[process.key] = (process.resident, size)
        return {HOST_MEMORY: self._sizes[process.key][1], **self._on_gpus.get(process.key[0], {})}

    def together(self, family: Sequence[Process]) -> dict[str, int]:
        """Of processes that share libraries: when one has changed, so have the others, of whom it may have taken a part
        of what was theirs alone."""
        if any(self._has_changed(process) for process in family):
            for process in family:
                self._sizes.pop(process.key, None)
        return added(self.of(process) for process in family)

    def _has_changed(self, process: Process) -> bool:
        before, _ = self._sizes.get(process.key, (-self.TOLERANCE_BYTES, 0))
        return abs(process.resident - before) >= self.TOLERANCE_BYTES

    def keep(self, seen: Iterable[Key]) -> None:
        """Forget all others."""
        seen = set(seen)
        self._sizes = {key: size for key, size in self._sizes.items() if key in seen}


class Trees:
    """What whole trees of processes hold, each named by the process that began it."""

    def __init__(self, gpus: Gpus | None = None):
        self._lock = threading.Lock()
        self._sizes = Sizes("pss", gpus)

    def look(self, roots: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Bytes by device for each name; none for a root that is not there. One pass over all processes.

        A tree is what descends from the root, and what is in the session that the root leads, since a child whose
        parent has ended descends from nobody any more.
        """
        with self._lock:
            return self._look(roots)

    def _look(self, roots: Mapping[str, int]) -> dict[str, dict[str, int]]:
        leaders = {pid: name for name, pid in roots.items()}
        found = {process.key[0]: process for process in processes() if not process.zombie}
        owners: dict[int, str | None] = {}
        for pid in found:
            line = []
            at = pid
            while at not in owners and at not in leaders and at in found:
                line.append(at)
                at = found[at].parent
            owners |= dict.fromkeys(line, leaders.get(at, owners.get(at)))
        for pid, process in found.items():
            if pid in leaders:
                owners[pid] = leaders[pid]
            elif owners[pid] is None:
                owners[pid] = leaders.get(process.session)
        self._sizes.begin()
        families: dict[str, list[Process]] = {name: [] for name, pid in roots.items() if pid in found}
        for pid, owner in owners.items():
            if owner is not None and owner in families:
                families[owner].append(found[pid])
        self._sizes.keep(found[pid].key for pid, owner in owners.items() if owner is not None)
        return {name: self._sizes.together(family) for name, family in families.items()}


class Gpus:
    """NVML's view of who holds what on the GPUs that our processes see, numbered as CUDA numbers them by PCI bus."""

    def __init__(self, nvml: Any, environment: Mapping[str, str] = os.environ):
        self._nvml = nvml
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        order = visible([nvml.nvmlDeviceGetUUID(handle) for handle in handles], environment)
        self.handles = {f"cuda:{number}": handles[index] for number, index in enumerate(order)}

    @classmethod
    def open(cls) -> Gpus | None:
        """None where there is no GPU, no driver, or one that does not fit the library."""
        try:
            import pynvml  # type: ignore[import-untyped,unused-ignore]

            gpus = cls(pynvml)
        except Exception as error:
            log.debug("no GPU: %s", error)
            return None
        return gpus if gpus.handles else None

    def by_process(self) -> dict[int, dict[str, int]]:
        """Bytes by pid and device. In a container that hides the host's pids nothing is told apart."""
        found: dict[int, dict[str, int]] = {}
        for name, handle in self.handles.items():
            try:
                running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except self._nvml.NVMLError as error:
                log.debug("%s: %s", name, error)
                continue
            for process in running:
                if process.usedGpuMemory is not None:
                    held = found.setdefault(process.pid, {})
                    held[name] = held.get(name, 0) + int(process.usedGpuMemory)
        return found

    def memory(self, device: str) -> tuple[int, int]:
        """Total and free bytes of `cuda:N`."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self.handles[device])
        return int(memory.total), int(memory.free)

    def uuid(self, device: str) -> str:
        """What names `cuda:N` in CUDA_VISIBLE_DEVICES, in whatever order CUDA counts."""
        uuid = self._nvml.nvmlDeviceGetUUID(self.handles[device])
        return uuid.decode() if isinstance(uuid, bytes) else str(uuid)

    def compute_capability(self, device: str) -> str:
        """`9.0`."""
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self.handles[device])
        return f"{major}.{minor}"


def visible(uuids: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    """Places in `uuids` of the GPUs that CUDA_VISIBLE_DEVICES leaves; as CUDA does, stop at the first that is wrong."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for word in (w.strip() for w in wanted.split(",")):
        if word.isdecimal():
            matching = [int(word)] if int(word) < len(uuids) else []
        else:
            matching = [i for i, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if len(matching) != 1 or matching[0] in chosen:
            break
        chosen += matching
    return chosen


def added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sizes by device, added up."""
    total: dict[str, int] = {}
    for part in parts:
        for device, size in part.items():
            total[device] = total.get(device, 0) + size
    return total


def less(sizes: Mapping[str, int], taken: Mapping[str, int]) -> dict[str, int]:
    """What is left of each device's size, devices where nothing is left out."""
    return {device: size - taken.get(device, 0) for device, size in sizes.items() if size > taken.get(device, 0)}
