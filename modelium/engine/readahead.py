"""Keeps the files of models that were unloaded in the page cache, where host memory is free: their next load reads
memory instead of a disk.

The kernel keeps what was read by itself, until others need the room; this reads ahead what it let go of, for the models
that gain most by it, within a budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelium.api.types import Transition
from modelium.core.standby import reuse
from modelium.core.states import State
from modelium.core.world import Model, Use

if TYPE_CHECKING:
    from modelium.engine.orchestrator import Orchestrator

log = logging.getLogger(__name__)

SHARE = 0.25
"""Of the free host memory, without a configured budget: sleeping models may take a half, see `core.standby`."""

REST_S = 30.0
"""From one look to the next."""

STEP_BYTES = 128 * 1024
"""The kernel reads no more for one request than a device's read-ahead, which is this unless somebody changed it
(`/sys/block/*/queue/read_ahead_kb`)."""

PIECE_BYTES = 16 * STEP_BYTES
"""So much is asked for at a time, that others who read from the disk need not wait for long."""


@dataclass(frozen=True, slots=True)
class Files:
    """What a model that is not loaded would read for its load."""

    name: str
    size: int
    gain: float
    """Seconds of loading that are expected of it for each second: what warm files can shorten."""


def choose(candidates: Iterable[Files], budget: int) -> list[Files]:
    """Whose files are kept warm, the first to be read first: what gains most for each byte, as far as the budget goes.

    One that does not fit is left out, and those after it that do are not.
    """
    chosen: list[Files] = []
    for files in sorted(candidates, key=lambda f: (-f.gain / max(1, f.size), f.name)):
        if 0 < files.size <= budget and files.gain > 0:
            chosen.append(files)
            budget -= files.size
    return chosen


def warm(paths: Sequence[Path], stopped: threading.Event) -> None:
    """Have the kernel read files that are not in memory; what is there costs no reading. Runs in a thread."""
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, STEP_BYTES):
                if stopped.is_set():
                    return
                os.posix_fadvise(file.fileno(), start, STEP_BYTES, os.POSIX_FADV_WILLNEED)
                if start % PIECE_BYTES == 0:
                    os.pread(file.fileno(), 1, start)  # waits until it is there


def _files(folder: Path) -> tuple[tuple[Path, ...], int]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return tuple(found), sum(p.stat().st_size for p in found)


def _gently() -> None:
    """The kernel takes a thread's priority for reading from its niceness."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class ReadAhead:
    """Looks at what is unloaded after each load and unload, once within `REST_S`.

    A model's files are read anew only after another load, which may have taken their place in the page cache.
    """

    def __init__(self, engine: Orchestrator, rest_s: float = REST_S):
        self._engine = engine
        self._rest_s = rest_s
        self._due = asyncio.Event()
        self._loads = 0
        self._warmed: dict[str, tuple[str, int]] = {}
        """The revision of each model whose files were read, and how many loads there had been by then."""
        self._known: dict[str, tuple[str, tuple[Path, ...], int]] = {}
        """Revision, files and their size."""
        self._stopped = threading.Event()
        self._thread: ThreadPoolExecutor | None = None

    def observe(self, transition: Transition) -> None:
        if transition.before == State.LOADING and transition.after == State.READY:
            self._loads += 1
            self._due.set()
        elif transition.before == State.UNLOADING and transition.after == State.COLD:
            self._due.set()

    async def run(self) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self.look()
            except OSError as exc:
                log.warning("files could not be kept warm: %s", exc)
            except Exception:
                log.exception("keeping files warm failed; it goes on")
            await asyncio.sleep(self._rest_s)

    async def look(self) -> None:
        """Read what should be warm and was not read since the last load."""
        budget = self._budget()
        if not budget:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "readahead", initializer=_gently)
        loop = asyncio.get_running_loop()
        candidates = [c for model in self._unloaded() if (c := await self._candidate(model)) is not None]
        for files in choose(candidates, budget):
            found = self._known.get(files.name)
            if found is None:
                continue  # removed meanwhile
            revision, paths, _ = found
            if self._warmed.get(files.name) != (revision, self._loads):
                self._warmed[files.name] = (revision, self._loads)
                await loop.run_in_executor(self._thread, warm, paths, self._stopped)

    def _budget(self) -> int:
        world, configured = self._engine.loop.world, self._engine.config.policies.readahead_budget_bytes
        host = world.devices.get(self._engine.loop.policy.standby_device)
        if host is None:
            return 0
        free = max(0, host.limit_bytes - host.booked_bytes)
        return int(SHARE * free) if configured is None else min(configured, free)

    def _unloaded(self) -> list[Model]:
        """What was used and went for room or idleness: what a person unloaded is not expected back."""
        models = self._engine.loop.world.models
        used = [models[u.name] for u in self._engine.usage if u.requests and u.name in models]
        return [m for m in used if _reads_files(m) and m.name in self._engine.catalog.known]

    async def _candidate(self, model: Model) -> Files | None:
        """None for one that was removed meanwhile."""
        known, found = self._engine.catalog.known.get(model.name), self._known.get(model.name)
        if known is not None and (found is None or found[0] != known.revision):
            found = (known.revision, *await asyncio.to_thread(_files, known.path))
        usage = self._engine.usage.get(model.name)
        if found is None or usage is None or model.name not in self._engine.catalog.known:
            return None
        self._known[model.name] = found
        now, policy = self._engine.clock(), self._engine.loop.policy
        use = Use(usage.in_flight, usage.requests, usage.last_used, usage.qps(now))
        return Files(model.name, found[2], reuse(use, now, policy.idle_s) * model.estimate.load_s)

    def forget(self, name: str) -> None:
        self._warmed.pop(name, None)
        self._known.pop(name, None)

    def close(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.shutdown(wait=False)


def _reads_files(model: Model) -> bool:
    """Asleep at a level that drops the weights it reads them to wake."""
    if model.state is State.STANDBY:
        return model.parked is not None and model.parked.level > 1
    return model.state is State.COLD and not model.reason.startswith("unload asked for")
