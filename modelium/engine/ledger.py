"""What memory is in whose hands: of models and runtimes as measured, of everybody else by their processes.

The core books; this tells what is really held, so that what nobody can explain is seen. Host memory of others is what
their processes hold for themselves (without files, which the kernel takes back); of GPUs it is what NVML counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelium.api.measuring import HOST_MEMORY, Gpus, Process, processes
from modelium.engine.views import HolderView

log = logging.getLogger(__name__)

SHOWN = 10
"""How many of a device's foreign processes are told one by one, the largest first."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Holding:
    """What of a device is held by processes that are not ours, and by the service itself."""

    foreign_bytes: int = 0
    foreign: tuple[HolderView, ...] = ()
    """The largest of those processes."""
    service_bytes: int = 0


@dataclass(slots=True)
class Ledger:
    """Looks at all processes of this machine; whoever calls it lets one look end before the next."""

    gpus: Gpus | None = None
    holdings: Mapping[str, Holding] = field(default_factory=dict)
    """By device, as of the last look; a device of another machine is not among them."""

    def look(self, runtimes: Collection[int]) -> None:
        """Tell ours from others': `runtimes` are pids of processes that runtimes began, all that descends from them is
        theirs. One pass over `/proc`."""
        found = [process for process in processes() if not process.zombie]
        theirs = descendants(found, runtimes)
        service = descendants(found, {os.getpid()}) - theirs
        on_gpus = self.gpus.by_process() if self.gpus else {}
        held: dict[str, list[tuple[int, Process]]] = {}
        own: dict[str, int] = {}
        for process in found:
            pid = process.key[0]
            if pid in theirs:
                continue
            for device, size in {HOST_MEMORY: private_bytes(pid), **on_gpus.get(pid, {})}.items():
                if pid in service:
                    own[device] = own.get(device, 0) + size
                elif size:
                    held.setdefault(device, []).append((size, process))
        self.holdings = {device: _holding(held.get(device, ()), own.get(device, 0)) for device in {*held, *own}}


def descendants(found: Iterable[Process], roots: Collection[int]) -> set[int]:
    """The pids of `roots`, of all that descends from them, and of all in the sessions that they lead."""
    children: dict[int, list[int]] = {}
    members = set(roots)
    for process in found:
        children.setdefault(process.parent, []).append(process.key[0])
        if process.session in roots:
            members.add(process.key[0])
    left = list(members)
    while left:
        for child in children.get(left.pop(), ()):
            if child not in members:
                members.add(child)
                left.append(child)
    return members


def private_bytes(pid: int) -> int:
    """What of the host's memory a process holds that no file backs: resident less shared pages, statm of proc(5)."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return max(0, int(resident) - int(shared)) * _PAGE_BYTES


def _holding(held: Iterable[tuple[int, Process]], service: int) -> Holding:
    largest = sorted(held, key=lambda one: (-one[0], one[1].key))
    return Holding(
        foreign_bytes=sum(size for size, _ in largest),
        foreign=tuple(HolderView(pid=p.key[0], name=_name(p.key[0]), bytes=size) for size, p in largest[:SHOWN]),
        service_bytes=service,
    )


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
