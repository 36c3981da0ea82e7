"""What each model holds, told by processes: a Python-backend model runs in stubs of its own, one for each instance.

Bytes are USS, what would come free if the process ended; for GPUs what NVML counts for the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from modelium_plugin_triton.install import STUB

log = logging.getLogger(__name__)

HOST_MEMORY = "cpu:0"

_INSTANCE = re.compile(r"_\d+_\d+$")
"""What Triton puts behind a model's name to name an instance: group and number."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Key = tuple[int, int]
"""A process beyond doubt: its pid, and when it was started, in the kernel's ticks since the boot."""


@dataclass(frozen=True, slots=True)
class Stub:
    """A process of a Python-backend model."""

    key: Key
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


def stub_of(key: Key, argv: Sequence[str], repository: Path) -> Stub | None:
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
        self._stubs: dict[Key, Stub] = {}
        self._sizes: dict[Key, tuple[int, int]] = {}

    def look(self) -> Family:
        """One pass over the processes of this machine."""
        children: dict[int, list[_Process]] = {}
        server = None
        for process in _processes():
            children.setdefault(process.parent, []).append(process)
            if process.key[0] == self.pid:
                server = process
        if server is None or server.zombie:
            return Family()
        gpu = self._gpus.by_process() if self._gpus else {}
        seen = {server.key}
        parts: dict[Key, list[Mapping[str, int]]] = {}
        stubs: list[Stub] = []
        left: list[tuple[_Process, Key | None]] = [(child, None) for child in children.get(self.pid, ())]
        while left:
            process, owner = left.pop()
            if process.zombie:
                continue
            seen.add(process.key)
            if stub := self._stub(process.key):
                stubs.append(stub)
                owner = process.key
            if owner is not None:  # a model may have started processes of its own
                parts.setdefault(owner, []).append(self._memory(process, gpu))
            left += [(child, owner) for child in children.get(process.key[0], ())]
        own = self._memory(server, gpu)
        self._stubs = {key: self._stubs[key] for key in self._stubs.keys() & seen}
        self._sizes = {key: self._sizes[key] for key in self._sizes.keys() & seen}
        return Family(
            server=own,
            stubs=tuple(replace(stub, memory=added(parts[stub.key])) for stub in stubs),
            zombies=tuple(child.key[0] for child in children.get(self.pid, ()) if child.zombie),
        )

    def _stub(self, key: Key) -> Stub | None:
        if key not in self._stubs:  # asked again as long as it is none: a shell becomes one
            try:
                argv = Path(f"/proc/{key[0]}/cmdline").read_bytes().split(b"\0")[:-1]
            except OSError:
                return None
            stub = stub_of(key, [os.fsdecode(word) for word in argv], self._repository)
            if stub is None:
                return None
            self._stubs[key] = stub
        return self._stubs[key]

    def _memory(self, process: _Process, gpu: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
        before, size = self._sizes.get(process.key, (-self.TOLERANCE_BYTES, 0))
        if abs(process.resident - before) >= self.TOLERANCE_BYTES:
            try:
                size = psutil.Process(process.key[0]).memory_full_info().uss
            except psutil.NoSuchProcess:
                return {}
            except psutil.AccessDenied:  # somebody else's server
                size = process.resident
            self._sizes[process.key] = (process.resident, size)
        return {HOST_MEMORY: size, **gpu.get(process.key[0], {})}


@dataclass(frozen=True, slots=True)
class _Process:
    key: Key
    parent: int
    resident: int
    """Bytes."""
    zombie: bool


def _processes() -> Iterator[_Process]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (process := _process(int(entry.name))) is not None:
            yield process


def _process(pid: int) -> _Process | None:
    """From `/proc/PID/stat` (proc_pid_stat(5)), field 2 of which may hold anything, so it is counted from its end."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *rest = stat[stat.rindex(")") + 2 :].split()
    return _Process(
        key=(pid, int(rest[18])), parent=int(rest[0]), resident=int(rest[20]) * _PAGE_BYTES, zombie=state in "ZX"
    )


def key_of(pid: int) -> Key | None:
    """The living process with this number; None when there is none."""
    process = _process(pid)
    return process.key if process is not None and not process.zombie else None


def kill(stub: Stub) -> None:
    """End a stub, unless its number is another process's by now."""
    if key_of(stub.key[0]) == stub.key:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stub.key[0], signal.SIGKILL)


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
