"""What each model holds, told by processes: a Python-backend model runs in stubs of its own, one for each instance.

Bytes are USS, what would come free if the process ended; for GPUs what NVML counts for the process.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from modelium_plugin_triton.install import STUB

log = logging.getLogger(__name__)

V = TypeVar("V")

HOST_MEMORY = "cpu:0"

_INSTANCE = re.compile(r"_\d+_\d+$")
"""What Triton puts behind a model's name to name an instance: group and number."""

_Key = tuple[int, float]
"""A process beyond doubt: its pid and when it was started."""


@dataclass(frozen=True, slots=True)
class Stub:
    """A process of a Python-backend model."""

    key: _Key
    model: str
    completing: bool
    """It only completes the configuration, before the instances are made. Triton waits for it without end."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """By device, with what processes of the model's own that it started hold."""


@dataclass(frozen=True, slots=True)
class Family:
    """tritonserver's processes at one moment."""

    server: Mapping[str, int] = field(default_factory=dict)
    """Its own bytes by device; empty when it can't be looked at."""
    stubs: tuple[Stub, ...] = ()
    zombies: tuple[int, ...] = ()
    """Children that have ended and that the server has not noticed."""

    def of(self, model: str) -> list[Stub]:
        return [stub for stub in self.stubs if stub.model == model]

    def by_model(self) -> dict[str, list[Stub]]:
        models: dict[str, list[Stub]] = {}
        for stub in self.stubs:
            models.setdefault(stub.model, []).append(stub)
        return models


def stub_of(key: _Key, argv: Sequence[str], repository: Path) -> Stub | None:
    """The stub that this command line belongs to; None for any other process.

    A stub's arguments (python_backend/src/stub_launcher.cc): the model's file, shared memory and its two sizes, the
    server's pid, the backend's folder, a handle, the name of model or instance, and the runtime's folder.
    """
    if len(argv) < 9 or not argv[0].endswith(f"/{STUB}"):
        return None
    file, name = Path(argv[1]), argv[8]
    # The name may be the configuration's own; the path is sure, save for models that came in the load request itself.
    model = file.relative_to(repository).parts[0] if repository in file.parents else _INSTANCE.sub("", name)
    return Stub(key=key, model=model, completing=name == model)


def has_shaken_hands(stub: Stub) -> bool:
    """Whether Triton would notice this stub's end: it does not before the stub's first message.

    Only after that does the stub import triton_python_backend_utils, and with it numpy, whose library is then mapped.
    """
    try:
        return "_multiarray_umath" in Path(f"/proc/{stub.key[0]}/maps").read_text()
    except OSError:
        return False


class Measurer:
    """Looks at one server's processes, in one thread at a time.

    Cheap to ask again: a process whose resident size has hardly changed is not measured anew.
    """

    TOLERANCE_BYTES = 1 << 20

    def __init__(self, pid: int, repository: Path, gpus: Gpus | None = None):
        self.pid = pid
        self._repository = repository
        self._gpus = gpus
        self._stubs: dict[_Key, Stub] = {}
        self._sizes: dict[_Key, tuple[int, int]] = {}

    def look(self) -> Family:
        """One pass over the server's descendants."""
        gpu = self._gpus.by_process() if self._gpus else {}
        try:
            server = psutil.Process(self.pid)
            own = self._memory(server, gpu)
            descendants = server.children(recursive=True)
        except psutil.Error:
            return Family()
        found: dict[_Key, tuple[Stub, list[Mapping[str, int]]]] = {}
        zombies: list[int] = []
        owners: dict[int, _Key] = {}
        for process in descendants:  # parents come before their children
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    zombies += [process.pid] if process.ppid() == self.pid else []
                    continue
                key = (process.pid, process.create_time())
                stub = self._stub(process, key)
                if stub is not None:
                    found[key] = (stub, [])
                owner = key if stub is not None else owners.get(process.ppid())
                if owner is not None:
                    owners[process.pid] = owner
                    found[owner][1].append(self._memory(process, gpu))
            except psutil.Error:
                continue  # it has just ended
        self._stubs = _only(self._stubs, found)
        self._sizes = _only(self._sizes, {(p.pid, p.create_time()) for p in (server, *descendants)})
        stubs = tuple(replace(stub, memory=added(parts)) for stub, parts in found.values())
        return Family(server=own, stubs=stubs, zombies=tuple(zombies))

    def _stub(self, process: psutil.Process, key: _Key) -> Stub | None:
        stub = self._stubs.get(key)
        if stub is None:  # asked again as long as it is none: a shell becomes one
            stub = stub_of(key, process.cmdline(), self._repository)
            if stub is not None:
                self._stubs[key] = stub
        return stub

    def _memory(self, process: psutil.Process, gpu: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
        key = (process.pid, process.create_time())
        resident = process.memory_info().rss
        resident_then, size = self._sizes.get(key, (-self.TOLERANCE_BYTES, 0))
        if abs(resident - resident_then) >= self.TOLERANCE_BYTES:
            size = process.memory_full_info().uss
            self._sizes[key] = (resident, size)
        return {HOST_MEMORY: size, **gpu.get(process.pid, {})}


class Gpus:
    """NVML's view of who holds what on the GPUs that our processes see, numbered as CUDA numbers them by PCI bus."""

    def __init__(self, nvml: Any, environment: Mapping[str, str] = os.environ):
        self._nvml = nvml
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        order = _visible([nvml.nvmlDeviceGetUUID(handle) for handle in handles], environment)
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
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except self._nvml.NVMLError as error:
                log.debug("%s: %s", name, error)
                continue
            for process in processes:
                if process.usedGpuMemory is not None:
                    held = found.setdefault(process.pid, {})
                    held[name] = held.get(name, 0) + int(process.usedGpuMemory)
        return found


def _visible(uuids: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    """Which GPUs CUDA_VISIBLE_DEVICES leaves, in its order; as for CUDA, it ends at the first entry that is wrong."""
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


def _only(known: Mapping[_Key, V], keys: Iterable[_Key]) -> dict[_Key, V]:
    return {key: known[key] for key in keys if key in known}


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
