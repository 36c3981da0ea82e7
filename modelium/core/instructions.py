"""What is to be done, in the imperative. Each becomes at most one later event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelium.api.types import Transition
from modelium.core.world import Booking


@dataclass(frozen=True, slots=True)
class Instruction:
    pass


@dataclass(frozen=True, slots=True)
class Load(Instruction):
    """Becomes Loaded or LoadFailed."""

    name: str
    op: int
    runtime: str
    booking: Booking
    revision: str
    replace: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Park(Instruction):
    """Becomes Parked or ParkFailed."""

    name: str
    op: int
    runtime: str
    level: int


@dataclass(frozen=True, slots=True)
class Wake(Instruction):
    """Becomes Loaded or LoadFailed, as a load does."""

    name: str
    op: int
    runtime: str
    level: int


@dataclass(frozen=True, slots=True)
class CloseRoute(Instruction):
    """Let no new request in; becomes Drained when none is in flight. With op 0 nothing is awaited."""

    name: str
    op: int


@dataclass(frozen=True, slots=True)
class OpenRoute(Instruction):
    """Let requests through to the runtime."""

    name: str
    runtime: str


@dataclass(frozen=True, slots=True)
class Unload(Instruction):
    """Becomes Unloaded or UnloadFailed. What is under way with it is given up first."""

    name: str
    op: int
    runtime: str


@dataclass(frozen=True, slots=True)
class GiveUp(Instruction):
    """End the operation that is under way with a model; no result of it is wanted."""

    name: str


@dataclass(frozen=True, slots=True)
class StartRuntime(Instruction):
    """Becomes RuntimeUp or RuntimeDown."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class StopRuntime(Instruction):
    """Becomes RuntimeStopped or RuntimeDown."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Grant(Instruction):
    ticket: int
    name: str


@dataclass(frozen=True, slots=True)
class Refuse(Instruction):
    ticket: int
    name: str
    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Forget(Instruction):
    """The model is gone: drop what is kept about it."""

    name: str


@dataclass(frozen=True, slots=True)
class WakeAt(Instruction):
    """Becomes Ticked, at that time or a little later."""

    at: float


@dataclass(frozen=True, slots=True)
class Tell(Instruction):
    """Log it, show it, and give it to observers."""

    transition: Transition
