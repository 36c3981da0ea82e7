"""What can happen, in the past tense. Every event says when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelium.api.types import Device, Observation
from modelium.core.world import Booking, Estimate, Failure, Spec, Use


@dataclass(frozen=True, slots=True)
class Event:
    at: float


# ------------------------------------------------------------------ models on disk


@dataclass(frozen=True, slots=True)
class DropSeen(Event):
    """Something lies in the incoming folder; `name` is its place (`incoming/x.onnx`)."""

    name: str
    reason: str = "seen; not yet complete"


@dataclass(frozen=True, slots=True)
class DropRefused(Event):
    """`kept_as` is its place in quarantine, or its old one when it could not be moved."""

    name: str
    failure: Failure
    kept_as: str


@dataclass(frozen=True, slots=True)
class DropGone(Event):
    """It was taken away, or accepted under its model's name."""

    name: str
    reason: str = "no longer there"


@dataclass(frozen=True, slots=True)
class ModelAccepted(Event):
    """A model lies in the repository, new or changed."""

    name: str
    spec: Spec
    estimate: Estimate
    pinned: bool = False
    dropped: bool = False
    """It came through the incoming folder just now."""
    was_loaded: bool = False
    """A record of an earlier life says that it was loaded: ask the runtime before anything else."""
    loaded_revision: str | None = None
    reason: str = "in the repository"


@dataclass(frozen=True, slots=True)
class ModelInvalid(Event):
    """A folder in the repository is no usable model."""

    name: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class ModelRemoved(Event):
    name: str


# ------------------------------------------------------------------ people and requests


@dataclass(frozen=True, slots=True)
class ReadyAsked(Event):
    ticket: int
    name: str
    deadline_at: float
    priority: int = 0
    person: bool = False
    """A person asked for the load itself: a failed model is tried again at once."""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class UnloadAsked(Event):
    ticket: int
    name: str
    deadline_at: float


@dataclass(frozen=True, slots=True)
class TicketWithdrawn(Event):
    ticket: int


@dataclass(frozen=True, slots=True)
class PinAsked(Event):
    name: str
    pinned: bool


# ------------------------------------------------------------------ results of instructions


@dataclass(frozen=True, slots=True)
class Loaded(Event):
    name: str
    op: int
    memory: Booking
    """Measured; empty where the runtime can't tell."""
    load_s: float
    note: str = ""
    """What was done otherwise than planned."""


@dataclass(frozen=True, slots=True)
class LoadFailed(Event):
    name: str
    op: int
    failure: Failure
    runtime_lost: bool = False
    """The runtime is at fault, not the model."""
    recycle: bool = False
    """And it has to be started anew."""


@dataclass(frozen=True, slots=True)
class Parked(Event):
    name: str
    op: int
    memory: Booking
    """Measured; empty where the runtime can't tell."""
    park_s: float


@dataclass(frozen=True, slots=True)
class ParkFailed(Event):
    name: str
    op: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Drained(Event):
    name: str
    op: int


@dataclass(frozen=True, slots=True)
class Unloaded(Event):
    name: str
    op: int
    residue: Booking = ()
    """What did not come back."""


@dataclass(frozen=True, slots=True)
class UnloadFailed(Event):
    name: str
    op: int
    failure: Failure
    recycle: bool = False
    """The runtime has to be started anew."""


# ------------------------------------------------------------------ what is observed


@dataclass(frozen=True, slots=True)
class UseObserved(Event):
    """Use of models since the last such event, exact now."""

    use: tuple[tuple[str, Use], ...]


@dataclass(frozen=True, slots=True)
class DevicesObserved(Event):
    devices: tuple[Device, ...]
    accounted: Mapping[str, int] = field(default_factory=dict)
    """Measured bytes of the models on each device, at the same time."""


@dataclass(frozen=True, slots=True)
class RuntimeAdded(Event):
    """A runtime backend is configured; `start` it."""

    name: str


@dataclass(frozen=True, slots=True)
class RuntimeUp(Event):
    name: str
    epoch: int
    instance: str
    external: bool
    observation: Observation
    adopted: bool = False
    elsewhere: bool = False
    """Only devices of its own are within its reach."""


@dataclass(frozen=True, slots=True)
class RuntimeDown(Event):
    """It could not be started or stopped, or it is gone."""

    name: str
    epoch: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class RuntimeStopped(Event):
    """It was ended as told, with all that it held."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class RuntimeObserved(Event):
    name: str
    epoch: int
    taken_at: float
    """When the observation began: what changed since is newer than it."""
    observation: Observation


@dataclass(frozen=True, slots=True)
class Ticked(Event):
    """Time has passed."""
