"""What a runtime backend's author writes: a `RuntimeBackend` that describes, and a `RuntimeDriver` that acts."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel

from modelium.api.types import (
    Analysis,
    Candidate,
    Device,
    Layout,
    LoadOutcome,
    LoadRequest,
    Observation,
    Offer,
    ParkOutcome,
    Plan,
    Report,
    RuntimeInfo,
    Situation,
    UnloadOutcome,
)


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that outlives Modelium: which one it is, beyond doubt."""

    name: str
    pid: int
    created_at: float
    """The kernel's start time of `pid`, so that a recycled number is never mistaken for it."""
    argv: tuple[str, ...]
    log: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the driver wants to know again after a restart (ports, versions); JSON values only."""


class Processes(Protocol):
    """Starts, finds again and ends the long-lived processes of runtimes. Given to drivers by the engine.

    Each process leads its own session and process group, writes to a rotated log file, and carries a mark in its
    environment by which it is found even when the record of it was lost.
    """

    async def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> ProcessRecord:
        """Start `argv` under `name`, after ending what still runs under it. `env` is added to Modelium's own, None
        taking a variable away."""

    def find(self, name: str) -> ProcessRecord | None:
        """The living process last started under `name`, if there is one."""

    async def stop(self, name: str, *, grace_s: float = 30) -> None:
        """SIGTERM to the group, then SIGKILL; returns when every member is gone. No process is no error."""

    def tail(self, name: str, lines: int = 200, *, this_run: bool = False) -> list[str]:
        """The last lines of its log; with `this_run` none from before it was last started."""

    def ended(self, record: ProcessRecord) -> str:
        """How a process that died ended, as `was killed by signal 9`; empty where that is not known."""

    def names(self) -> list[str]:
        """The names under which something runs, what a dead process left behind included. Looks at all processes."""


@dataclass(frozen=True, slots=True)
class RuntimeContext:
    """What a driver is created with."""

    name: str
    repository: Path
    state_dir: Path
    """This runtime's own folder for state; survives a restart of Modelium."""
    cache_dir: Path
    """Shared between all roots of this user: downloads and environments."""
    settings: BaseModel
    """The backend's section of the configuration."""
    processes: Processes
    report: Report
    """Progress of long preparations (installing an environment) that belong to no single load."""
    starting: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """By device, the same for all runtimes: held by a start that measures what is free there."""


@runtime_checkable
class RuntimeDriver(Protocol):
    """Talks to one runtime. Everything that waits is here, and nothing is judged here.

    Methods may be called again after failing. `load` and `unload` of different models may run at the same time, of
    one model never. Errors are `DriverError`s: `LoadRejected` when the model is at fault, `RuntimeUnavailable` when
    the runtime is, `RuntimeStuck` where only a new start of the runtime helps.
    """

    async def start(self) -> RuntimeInfo:
        """Adopt the running runtime, else start it; return when it answers."""

    async def observe(self) -> Observation:
        """What it holds now. Raises `RuntimeUnavailable` when it is gone."""

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """Load, or reload when files changed. Cancelling the task gives up the load and leaves nothing half-loaded.

        With `request.replace` the old revision serves on; where both hold memory beside each other, return once the
        old one's is back, and report the new one's `endpoints` before.
        """

    async def unload(self, name: str) -> UnloadOutcome:
        """Return when the model is gone and its memory is back. Unloading what is not loaded is no error."""

    async def stop(self) -> None:
        """End the runtime's processes; an external runtime is left alone."""

    async def close(self) -> None:
        """Let go of connections; the runtime stays up."""

    def logs(self, model: str | None, lines: int) -> list[str]:
        """The last lines that it wrote, about one model where that can be told."""


@runtime_checkable
class Parks(Protocol):
    """A `RuntimeDriver` whose models can be put to sleep: they give their device's memory back and come again soon.

    A parked model is shown by `observe` with its level as not ready, through restarts of Modelium too. `unload` ends
    it as it ends one that serves; `load` has it serve, by waking it or anew. Only models of which nothing is in flight
    are parked, and what keeps a model asleep must be out of reach of its clients.
    """

    async def park(self, name: str, level: int) -> ParkOutcome:
        """Return when the model sleeps and its device's memory is back. Cancelled or failed, it is unloaded next.

        Raises `DriverError`, also for what is not loaded.
        """

    async def wake(self, name: str, report: Report) -> LoadOutcome:
        """Return when the model answers again as it did. Cancelled or failed, it is unloaded next, and loaded anew.

        Raises `DriverError`, also for what is not there.
        """


DEFAULT_SETTINGS = "default_settings"
"""The one of a runtime's facts that `RuntimeBackend.offers` starts each model's settings from."""


@runtime_checkable
class RuntimeBackend(Protocol):
    """One kind of runtime."""

    name: str
    settings_model: type[BaseModel]
    """Validates the section of the configuration that bears the backend's name."""

    def create(self, context: RuntimeContext) -> RuntimeDriver: ...

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        """The ways in which this runtime could serve the model, best first.

        `runtime` is None while the runtime has never been up: then offer what works on any. Its fact
        `default_settings`, where it is there, holds settings to start from: those of the configuration, if the driver
        says so, and where a brain sets some otherwise, offers are asked for again with these over them, so that what
        they take is estimated. Raises `ModelError` for wrong ones.
        """

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        """What the model's folder in the repository should hold for `plan`."""


@runtime_checkable
class Installable(Protocol):
    """A `RuntimeBackend` whose runtime can be installed by `modelium runtimes install`."""

    async def install(self, cache_dir: Path, settings: BaseModel, report: Report) -> str:
        """Make what it needs under `cache_dir`, unless it is there; returns one line that says what there is now.

        Raises `DriverError` or `ConfigError`.
        """


@runtime_checkable
class Brain(Protocol):
    """Chooses among the offers. Synchronous, deterministic, and quick."""

    name: str

    def plan(self, name: str, analysis: Analysis, offers: Sequence[Offer], situation: Situation) -> Plan:
        """Choose; raise `ModelError` with the reason when nothing on offer will do."""


@runtime_checkable
class EvictionPolicy(Protocol):
    """Ranks what may be evicted. Synchronous, deterministic, and quick."""

    name: str

    def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
        """The candidates' names, the one to evict first at the front. A name left out is not evicted."""


@runtime_checkable
class Converter(Protocol):
    """Makes a usable drop out of an unusable one. Runs in a separate, limited process."""

    name: str

    def accepts(self, path: Path, codes: Sequence[str]) -> bool:
        """Whether it can mend a drop with these findings' codes."""

    def convert(self, path: Path, target: Path) -> str:
        """Write the converted drop to `target`, leaving `path` as it is; return one line that says what was done.

        Raises `ModelError` when the drop can't be converted safely.
        """


@runtime_checkable
class UsageSource(Protocol):
    """Counts use that does not pass through the service itself."""

    name: str

    async def read(self) -> Mapping[str, tuple[int, int]]:
        """Requests so far and requests in flight, by model."""
