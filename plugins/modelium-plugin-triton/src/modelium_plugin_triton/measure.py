"""What each model holds, told by processes: a Python-backend model runs in stubs of its own, one for each instance.

Bytes are USS, what would come free if the process ended; for GPUs what NVML counts for the process.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelium.api.measuring import Gpus, Key, Process, Sizes, arguments_of, key_of, processes
from modelium_plugin_triton.install import STUB

_INSTANCE = re.compile(r"_\d+_\d+$")
"""What Triton puts behind a model's name to name an instance: group and number."""


@dataclass(frozen=True, slots=True)
class Stub:
    """A process of a Python-backend model."""

    key: Key
    model: str
    completing: bool
    """It only completes the configuration, before the instances are made. Triton waits for it without end."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """By device, with what processes of the model's own that it started hold."""
    others: tuple[Key, ...] = ()
    """Those processes."""


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
    """Looks at one server's processes, in one thread at a time."""

    def __init__(self, pid: int, repository: Path, gpus: Gpus | None = None):
        self.pid = pid
        self._repository = repository
        self._sizes = Sizes("uss", gpus)
        self._stubs: dict[Key, Stub] = {}

    def look(self) -> Family:
        """One pass over the processes of this machine."""
        children: dict[int, list[Process]] = {}
        server = None
        for process in processes():
            children.setdefault(process.parent, []).append(process)
            if process.key[0] == self.pid:
                server = process
        if server is None or server.zombie:
            return Family()
        self._sizes.begin()
        seen = {server.key}
        families: dict[Key, list[Process]] = {}
        stubs: list[Stub] = []
        left: list[tuple[Process, Key | None]] = [(child, None) for child in children.get(self.pid, ())]
        while left:
            process, owner = left.pop()
            if process.zombie:
                continue
            seen.add(process.key)
            if stub := self._stub(process.key):
                stubs.append(stub)
                owner = process.key
            if owner is not None:  # a model may have started processes of its own
                families.setdefault(owner, []).append(process)
            left += [(child, owner) for child in children.get(process.key[0], ())]
        own = self._sizes.of(server)
        self._stubs = {key: self._stubs[key] for key in self._stubs.keys() & seen}
        self._sizes.keep(seen)
        memory = {key: self._sizes.together(family) for key, family in families.items()}
        return Family(
            server=own,
            stubs=tuple(
                replace(
                    stub,
                    memory=memory[stub.key],
                    others=tuple(process.key for process in families[stub.key][1:]),
                )
                for stub in stubs
            ),
            zombies=tuple(child.key[0] for child in children.get(self.pid, ()) if child.zombie),
        )

    def _stub(self, key: Key) -> Stub | None:
        if key not in self._stubs:  # asked again as long as it is none: a shell becomes one
            argv = arguments_of(key[0])
            stub = stub_of(key, argv, self._repository) if argv is not None else None
            if stub is None:
                return None
            self._stubs[key] = stub
        return self._stubs[key]


def kill(stub: Stub) -> None:
    """End a stub with all that it started, save processes whose number is another's by now."""
    for key in (stub.key, *stub.others):
        if key_of(key[0]) == key:
            with contextlib.suppress(ProcessLookupError):
                os.kill(key[0], signal.SIGKILL)
