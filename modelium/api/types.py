"""The frozen values that cross the line between Modelium and its plugins.

Sizes are bytes, durations seconds, times seconds since the epoch. Everything here can be written as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# --------------------------------------------------------------------------- looking at what was dropped


class Severity(StrEnum):
    REFUSE = "refuse"
    """Never load it as it is."""
    CONVERT = "convert"
    """Unusable as it is; a converter may make it usable."""
    WARN = "warn"
    """Usable, but a person should know."""


class Finding(Frozen):
    """What a scanner saw in a drop."""

    severity: Severity
    code: str
    message: str
    """What was found and what to do about it, for a person."""
    path: str = ""
    """The file, relative to the drop."""


class Completeness(Frozen):
    """How much of a drop has arrived, by what its own format says."""

    complete: bool
    reason: str = ""
    """What is missing, for a person."""
    have_bytes: int = 0
    want_bytes: int | None = None


class Tensor(Frozen):
    """One input or output: KServe datatype (`FP32`, `INT64`, `BYTES`, ...) and shape, -1 where it varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


class Analysis(Frozen):
    """What an analyzer found a drop to be, read from headers and configuration, never by running it."""

    analyzer: str
    format: str
    """`onnx`, `huggingface`, `torchscript`, `triton`, or a plugin's own."""
    summary: str
    """One line for a person: `Qwen2ForCausalLM, 494M parameters, bfloat16`."""
    confidence: float = Field(ge=0, le=1)
    """The claim with the highest confidence wins; two that tie are an error naming both."""
    task: str | None = None
    """Hugging Face's pipeline names: `text-generation`, `text-classification`, `feature-extraction`,
    `image-classification`."""
    architecture: str | None = None
    entry: str = ""
    """The main file, relative to the drop (empty when the drop is that file)."""
    weights_bytes: int = 0
    parameters: int | None = None
    dtype: str | None = None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    depends_on: tuple[str, ...] = ()
    """Names of models that must be loaded first (the parts of an ensemble)."""
    facts: Mapping[str, Any] = Field(default_factory=dict)
    """Whatever else the analyzer wants its runtime to know; JSON values only."""


class Inspection(Frozen):
    """All that was found out about a drop without running it."""

    content_key: str
    """A hash over names, sizes and the first and last 64 KiB of each file: the key for what is measured."""
    total_bytes: int
    findings: tuple[Finding, ...] = ()
    analysis: Analysis | None = None


# --------------------------------------------------------------------------- deciding how to serve it


class Offer(Frozen):
    """One way in which a runtime could serve a model, with what it would take."""

    runtime: str
    """The runtime backend's name: `triton`."""
    serving: str
    """The way of serving, unique within the runtime: `onnx`, `onnx-python`, `as-is`."""
    native: bool = False
    """Served by the runtime's own backend rather than by a template."""
    device_kinds: tuple[str, ...] = ("cpu",)
    """Kinds of device that it can use, best first."""
    memory_bytes: int = 0
    """Estimated memory when loaded, weights and overhead."""
    load_s: float = 10.0
    """Estimated seconds to load."""
    devices: int = 1
    """Over how many devices of one kind it spreads, each with an equal part of the memory."""
    requires: tuple[str, ...] = ()
    """What the runtime has to install before the first load of this kind, for a person to know."""
    standby: tuple[int, ...] = ()
    """Levels at which a model served like this can be parked (`Parks`): 1 keeps its weights in host memory, 2 drops
    them. Empty: it can't."""
    elastic: bool = False
    """It may grow to `memory_bytes` at any time without being asked, as by autoscaling: all of it stays booked."""
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """What the plan is to carry on; `decoupled: true` says that one request may have many responses."""
    note: str = ""


class Plan(Frozen):
    """How a model will be served, and why."""

    brain: str
    runtime: str
    serving: str
    device_kind: str
    settings: Mapping[str, Any] = Field(default_factory=dict)
    devices: int = 1
    """Over how many devices it spreads."""
    standby: tuple[int, ...] = ()
    """Levels at which it can be parked, as the offer said."""
    elastic: bool = False
    """All of `memory_bytes` stays booked, as the offer said."""
    memory_bytes: int
    load_s: float
    reason: str
    confidence: float = Field(ge=0, le=1)
    alternatives: tuple[str, ...] = ()
    """What else was on offer and why it was not taken, one line each."""


class Device(Frozen):
    """A place with memory that models occupy, as an inventory plugin reports it."""

    id: str
    """`cpu:0`, `cuda:0`."""
    kind: str
    """`cpu`, `cuda`."""
    name: str
    total_bytes: int
    used_bytes: int
    """In use by anyone, as the device itself reports."""
    utilization: float | None = None
    """0 to 1, where the device reports it."""
    runtime: str = ""
    """The only runtime that reaches it, as one on another machine; empty: any."""


class Situation(Frozen):
    """What a brain may take into account besides the model."""

    devices: tuple[Device, ...]
    budgets: Mapping[str, int]
    """Bytes that models may occupy, by device id."""
    elsewhere: frozenset[str] = frozenset()
    """Runtimes that reach none but devices of their own."""

    def reachable(self, runtime: str) -> tuple[Device, ...]:
        """The devices that a runtime may place models on."""
        shared = runtime not in self.elsewhere
        return tuple(d for d in self.devices if d.runtime == runtime or (shared and not d.runtime))


# --------------------------------------------------------------------------- writing it into the repository


class Layout(Frozen):
    """What a model's folder in the repository will hold; the engine does the moving and the writing.

    Keys are paths inside the model's folder, with `/` between their parts.
    """

    files: Mapping[str, str] = Field(default_factory=dict)
    """Destination to source, relative to the drop; a folder goes as a whole; `.` is the drop itself."""
    texts: Mapping[str, str] = Field(default_factory=dict)
    """Destination to the text to be written."""


class OptimizationRecord(Frozen):
    """What an optimizer made of a model, as its manifest tells it."""

    optimizer: str
    key: str
    """Stands for all that it depends on."""
    what: str
    note: str
    """What was compared, and with what result."""
    made_at: float
    unconverted: str
    """The folder inside the model's that holds it as it was, with its manifest."""
    depends_on: Mapping[str, str] = Field(default_factory=dict)
    """What is in the key, for a person to compare."""


class Manifest(Frozen):
    """`modelium.json`, beside a rendered model's `config.pbtxt`: written once, before the model appears."""

    schema_version: int = 1
    name: str
    created_at: float
    source: str
    """What was dropped, as it was called."""
    revision: str = ""
    """Of the model's files when this was written, by their names, sizes and times."""
    inspection: Inspection
    plan: Plan
    optimization: OptimizationRecord | None = None
    """Set when the model is served in a faster form than it was dropped in."""


# --------------------------------------------------------------------------- running it


class Endpoint(Frozen):
    """Where a loaded model answers."""

    protocol: str
    """`kserve-http` (a base URL), `kserve-grpc` (an address), `openai` (a base URL, to which `/v1/...` is
    added)."""
    address: str


class RuntimeInfo(Frozen):
    """What a runtime turned out to be once it was up."""

    name: str
    version: str
    instance: str
    """Changes exactly when the runtime was started anew, so that what was loaded before is known to be gone."""
    adopted: bool
    """It was already running when Modelium came."""
    external: bool = False
    """Somebody else's process: never stopped or restarted."""
    elsewhere: bool = False
    """It runs on another machine: only devices of its own are within its reach."""
    pid: int | None = None
    backends: tuple[str, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    facts: Mapping[str, Any] = Field(default_factory=dict)
    """What people and its own backend may want to know. Two are read by all: `installed: False` says that what it
    needs is not there, with the command that a person is to run as `install` where no load brings it by itself, and
    `running: False` that its first load starts it."""

    def endpoint(self, protocol: str) -> str | None:
        return next((e.address for e in self.endpoints if e.protocol == protocol), None)


class LoadRequest(Frozen):
    """What the engine asks of a driver. The model's files are in the repository already."""

    name: str
    path: Path
    plan: Plan
    analysis: Analysis
    devices: tuple[str, ...]
    memory_bytes: int
    """What the ledger has booked, on all devices together."""
    device_bytes: Mapping[str, int] = Field(default_factory=dict)
    """What each of the devices has in all."""
    replace: bool = False
    """An older revision is serving and should go on until this one is ready."""
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    """The client's own load parameters (Triton's `config` override), passed on as they are."""


class LoadOutcome(Frozen):
    memory: Mapping[str, int]
    """Measured bytes by device id; empty where the runtime can't tell."""
    load_s: float
    note: str = ""
    """What was done otherwise than planned, as it follows "loaded in 2 s, ". Of such a load nothing is learnt."""
    endpoints: tuple[Endpoint, ...] = ()
    """Where this model answers, if it is not where the runtime does."""


class UnloadOutcome(Frozen):
    residue: Mapping[str, int] = Field(default_factory=dict)
    """Bytes that did not come back, by device id."""


class ParkOutcome(Frozen):
    memory: Mapping[str, int]
    """Measured bytes that the model holds while it is parked, by device id; empty where the runtime can't tell."""
    park_s: float


class ObservedModel(Frozen):
    name: str
    ready: bool
    versions: tuple[str, ...] = ()
    memory: Mapping[str, int] = Field(default_factory=dict)
    """Measured bytes by device id; empty where the runtime can't tell."""
    requests: int | None = None
    """Finished so far by the runtime's own count, those that never passed through Modelium included."""
    in_flight: int | None = None
    broken: bool = False
    """It is neither ready nor on its way: it has to be loaded again, say since a process of its own has ended."""
    parked: int = 0
    """The level at which it sleeps: it is there and not ready, and `wake` makes it ready. 0: it does not."""
    reason: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    """Where this model answers, if it is not where the runtime does."""


class Observation(Frozen):
    """What a runtime holds at one moment."""

    instance: str
    models: tuple[ObservedModel, ...] = ()
    overhead: Mapping[str, int] = Field(default_factory=dict)
    """Bytes that the runtime itself holds and no model accounts for, by device id."""
    devices: tuple[Device, ...] = ()
    """Those that only this runtime reaches, as they are now."""


class Progress(Frozen):
    """How far a long operation is; `total` None where nobody knows."""

    stage: str
    done: float = 0
    total: float | None = None
    unit: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    """Where a model that is replaced answers from now on, while what it replaces is still to end."""


Report = Callable[[Progress], None]
"""Called from the event loop's thread; cheap and never fails."""


# --------------------------------------------------------------------------- evicting


class Candidate(Frozen):
    """A loaded model that may be evicted, as an eviction policy sees it."""

    name: str
    memory_bytes: int
    """What evicting it frees on the device in question, its exclusive parts included."""
    loaded_at: float
    last_used: float
    """The last request's start or end, or the load when there was none."""
    requests: int
    qps: float
    """Requests per second over the last minute."""
    load_s: float
    """What loading it again is expected to cost."""
    priority: int = 0


class Transition(Frozen):
    """One step in a model's or runtime's life, with its reason; what observers, logs and `explain` are given."""

    decision: int
    """The id of the decision that it belongs to."""
    at: float
    subject: str
    """The model's name, or `runtime:NAME`."""
    before: str
    after: str
    reason: str
