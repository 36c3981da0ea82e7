"""What an optimizer's author writes: what makes a faster form of a model that is served already.

A model is served at once as it was dropped. What an optimizer makes of it takes its place later, once it is known to
answer alike; what was dropped is kept beside it, and put back where the faster form does not load or no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, Field

from modelium.api.types import Device, Frozen, Inspection, Plan, Report, RuntimeInfo


class Served(Frozen):
    """A model as it is served without any optimizer."""

    name: str
    path: Path
    """A folder with the files that it is served from, as its runtime's `layout` arranged them; not to be changed."""
    inspection: Inspection
    plan: Plan
    devices: tuple[Device, ...]
    """Those that it is loaded on."""
    runtime: RuntimeInfo | None
    """The runtime that serves it."""


class Optimization(Frozen):
    """A faster form that can be made of a model."""

    key: str
    """Stands for all that the result depends on: the content, the settings, the versions of what makes it, the kind of
    device. It is made once for each key, and put aside as soon as the key is another. Letters, digits, `.`, `_`, `-`.
    """
    what: str
    """What it is, for a person: `a TensorRT 10.13 engine in fp16 for compute capability 9.0`."""
    devices: tuple[str, ...]
    """Those that have to be idle while it is made."""
    depends_on: Mapping[str, str] = Field(default_factory=dict)
    """What is in the key, for a person to compare."""


class Optimized(Frozen):
    """The model's folder with its faster form in it, and how that is served, by the same runtime.

    Keys of `texts`, `made` and `kept` are paths inside the model's folder, with `/` between their parts. One of `made`
    leads to what `optimize` wrote, one of `kept` to the model's own files: a file, or a folder as a whole.
    """

    serving: str
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """Of the plan, in place of what it had."""
    memory_bytes: int
    """Estimated, as in an `Offer`."""
    load_s: float
    note: str = ""
    """What was compared, and with what result, for a person."""
    texts: Mapping[str, str] = Field(default_factory=dict)
    made: Mapping[str, str] = Field(default_factory=dict)
    kept: Mapping[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimizerContext:
    """What an optimizer is started with."""

    cache_dir: Path
    """Shared between all roots of this user: downloads and environments."""
    settings: BaseModel
    """The optimizer's section of the configuration."""


class Job(Protocol):
    """One optimization under way, as the engine holds it."""

    report: Report
    """How far it is."""

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Run a program to its end; `env` is added to Modelium's own, and `tell` gets each line that it writes.

        It is paused while its devices are in use, and ended when the optimization is given up. Raises `DriverError`
        with its last lines when it fails.
        """


@runtime_checkable
class Optimizer(Protocol):
    """Makes faster forms of models, one at a time, while their devices are idle and nobody waits."""

    name: str
    settings_model: type[BaseModel]
    """Validates the section of the configuration that bears the optimizer's name."""

    async def start(self, context: OptimizerContext) -> None:
        """Find out what there is to work with; called once, before all else. Raises `ConfigError`, `DriverError`."""

    def proposes(self, served: Served) -> Optimization | None:
        """The faster form that it would make of a model; None where it would make none. Pure and quick.

        Raises `ModelError`, `ConfigError` or `DriverError` with the reason where it would make one, and can't.
        """

    async def optimize(self, served: Served, optimization: Optimization, target: Path, job: Job) -> Mapping[str, Any]:
        """Make it: write its files into `target`, an empty folder, and return what `layout` has to know, JSON values.

        Raises `ModelError` when it can't be made of this model, or does not answer like it: that is not tried again
        with this key. Raises `DriverError` where trying again later may help.
        """

    def layout(self, served: Served, optimization: Optimization, facts: Mapping[str, Any]) -> Optimized:
        """What the model's folder should hold, by what `optimize` returned, for this or another model of equal key."""
