"""What Modelium knows, as one immutable value. A step makes a new one that shares all that did not change.

Times are seconds since the epoch and sizes bytes, always given from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from immutables import Map

from modelium.api.types import Candidate
from modelium.core.states import LIVE, RuntimeState, State, Want

Booking = tuple[tuple[str, int], ...]
"""Bytes by device id."""

SPARE_SHARE = 0.1
"""Of what a load is expected to take: no more is booked besides."""


@dataclass(frozen=True, slots=True)
class Standby:
    """What a model is expected to take while it is parked at a level."""

    level: int
    host_bytes: int
    device_bytes: int
    """What it keeps of the device that it is parked to make room on."""
    wake_s: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a load is expected to take."""

    memory_bytes: int
    load_s: float
    measured: bool = False
    slowest_s: float = 0.0
    """The slowest of its last loads; 0 where none was measured."""
    spread_bytes: int = 0
    """By how much the most that it was ever measured to take, grown in use or not, is more than that."""
    standby: tuple[Standby, ...] = ()
    """The levels at which the model can be parked, the quickest to wake first."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What was decided about a model when it was accepted."""

    runtime: str
    device_kind: str
    revision: str
    """Changes whenever a file of it changes."""
    depends_on: tuple[str, ...] = ()
    devices: int = 1
    """Over how many devices it spreads, each with an equal part of its memory."""
    elastic: bool = False
    """It may take all of its estimate at any time, however little it was measured to take."""
    guest: bool = False
    """Its runtime has it of its own accord: it is used, and never loaded or unloaded from here."""


@dataclass(frozen=True, slots=True)
class Use:
    """Use of a loaded model, exact at the moment of the step that reads it."""

    in_flight: int = 0
    requests: int = 0
    last_used: float = 0.0
    qps: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Held:
    """What a runtime was given to load."""

    spec: Spec
    parameters: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What was done otherwise than planned: nothing is learnt from it."""


@dataclass(frozen=True, slots=True)
class Parked:
    """How a model is put to sleep."""

    level: int
    before: Booking = ()
    """What it held when it was awake; empty where nobody knows any more."""


@dataclass(frozen=True)
class Model:
    """One model's record. Without slots: a step copies records, and a `__dict__` copies several times faster."""

    name: str
    state: State
    since: float
    reason: str
    spec: Spec | None = None
    """None for a drop that is not accepted."""
    estimate: Estimate = Estimate(0, 0.0)
    pinned: bool = False
    always_loaded: bool = False

    want: Want = Want.NONE
    wanted_since: float = 0.0
    tickets: tuple[int, ...] = ()
    promise: Booking = ()
    """Room that is kept for it while it waits for that."""

    booking: Booking = ()
    """Memory that it holds, or will hold when its load is done."""
    extra: Booking = ()
    """Memory for the new revision while the old one serves; while it is PARKING, what it will hold then."""
    placed: tuple[str, ...] = ()
    """The devices that it was placed on; its booking may name others too, on which it holds a little besides."""
    measured: Booking = ()
    op: int = 0
    """The operation under way; results of any other are dropped."""
    op_since: float = 0.0
    held: Held | None = None
    """What it is loaded as, or loads as; its files may be others by now."""
    coming: Held | None = None
    """What loads beside it, to replace it."""
    parked: Parked | None = None
    """It is parked, or about to be, or wakes."""
    rejected: Spec | None = None
    """What failed to replace it."""
    loaded_at: float = 0.0
    loaded_for: Want = Want.NONE
    """Why it was loaded; NONE when it was found loaded."""
    use: Use = Use()
    again: Want = Want.NONE
    """While it drains or unloads: load it again afterwards, for this reason."""
    forget: bool = False
    """Its files are gone: forget it once it is unloaded."""
    invalid: Failure | None = None
    """Its files are no longer usable: it becomes INVALID once it is unloaded."""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    failure: Failure | None = None
    failures: int = 0
    retry_at: float = 0.0
    given_up: bool = False
    """While it unloads: its load, or its wake, was given up."""
    late: int = 0
    """How often in a row a load was begun anew, since it took far longer than any before."""

    @property
    def runtime(self) -> str:
        """Where it should be loaded."""
        return self.spec.runtime if self.spec else ""

    @property
    def need(self) -> int:
        """What it is expected to take on each of its devices."""
        several = self.spec.devices if self.spec else 1
        return self.estimate.memory_bytes if several == 1 else -(-self.estimate.memory_bytes // several)

    @property
    def spare(self) -> int:
        """What is booked besides on each of its devices where it is free: it took so much more once, and at most a
        share, which bounds what one odd load costs."""
        estimate = self.estimate
        several = self.spec.devices if self.spec else 1
        return min(estimate.spread_bytes, int(estimate.memory_bytes * SPARE_SHARE)) // several

    @property
    def home(self) -> str:
        """The runtime that has it, else the one that should."""
        return self.held.spec.runtime if self.held else self.runtime

    @property
    def loaded_revision(self) -> str | None:
        return self.held.spec.revision if self.held else None

    @property
    def stale(self) -> bool:
        """It is loaded as something else than what it should be by now."""
        held = self.held
        return held is not None and (
            (held.spec is not self.spec and held.spec != self.spec)
            or (held.parameters is not self.parameters and held.parameters != self.parameters)
        )

    @property
    def visits(self) -> bool:
        """What is loaded is its runtime's own, and never unloaded from here."""
        return self.held is not None and self.held.spec.guest

    @property
    def elastic(self) -> bool:
        """What is loaded may grow at any time to all that is booked for it."""
        return self.held is not None and self.held.spec.elastic

    @property
    def kept(self) -> bool:
        """It should be loaded at all times."""
        return self.pinned or self.always_loaded or (self.spec is not None and self.spec.guest)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what it is made of, as it is, is loaded, and is about to be loaded."""
        spec, held, coming = self.spec, self.held, self.coming
        names = spec.depends_on if spec is not None else ()
        if held is not None and held.spec is not spec:
            names += tuple(n for n in held.spec.depends_on if n not in names)
        if coming is not None and coming.spec is not spec:
            names += tuple(n for n in coming.spec.depends_on if n not in names)
        return names

    @property
    def blameless(self) -> bool:
        """It failed with its runtime."""
        return self.failure is not None and self.failure.code in ("runtime_unavailable", "runtime_stuck")

    @property
    def busy_since(self) -> float:
        """When it was last of use to anybody."""
        return max(self.use.last_used, self.loaded_at)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Somebody waits for a model to be READY, or (`gone`) to be unloaded."""

    id: int
    model: str
    since: float
    deadline_at: float
    priority: int = 0
    gone: bool = False
    person: bool = False
    """It asks for the load itself and brings no request."""
    particular: bool = False
    """It wants the model with its present parameters, not as it may be loaded now."""


@dataclass(frozen=True, slots=True)
class Account:
    """A device's memory. `reclaiming` is the part of `booked` that is on its way back."""

    id: str
    kind: str
    name: str
    total_bytes: int
    used_bytes: int
    budget_bytes: int
    unbooked_bytes: int = 0
    """Used beyond what models were measured to hold: by other processes, by runtimes for themselves."""
    booked_bytes: int = 0
    promised_bytes: int = 0
    reclaiming_bytes: int = 0
    utilization: float | None = None
    runtime: str = ""
    """The only runtime that reaches it; empty: any."""
    missed: int = 0
    """So many looks in a row were without it; nothing is placed on it meanwhile."""
    missed_since: float = 0.0
    """When the first of them was."""

    @property
    def limit_bytes(self) -> int:
        """What models may occupy now: the budget, less when too much of the device is used for anything else."""
        return max(0, min(self.budget_bytes, self.total_bytes - self.unbooked_bytes))


@dataclass(frozen=True, slots=True)
class Runtime:
    name: str
    state: RuntimeState = RuntimeState.DOWN
    since: float = 0.0
    reason: str = ""
    epoch: int = 0
    """Counts starts; a result from an older one is dropped."""
    instance: str = ""
    external: bool = False
    elsewhere: bool = False
    crashes: tuple[float, ...] = ()
    retry_at: float = 0.0
    """When CRASHED: the next start; infinite when a person has to see to it."""
    given_up: bool = False
    """It is CRASHED, and nobody is to wait for it: the next start is far off, or a person has to see to it."""
    recycle: str = ""
    """It is UP, and why it is to be started anew as soon as nothing that it holds is in use."""
    foreign: tuple[str, ...] = ()
    residue: Booking = ()
    """What unloads did not give back since it was started."""
    slowest_unload_s: float = 0.0
    """Of those seen since it was started, save for loads and wakes that were given up."""


def least_recently_used(candidates: Sequence[Candidate], now: float) -> Sequence[str]:
    """The order used when no policy is given."""
    return [c.name for c in sorted(candidates, key=lambda c: (c.last_used, c.name))]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration asks for. Durations in seconds."""

    always_loaded: tuple[str, ...] = ()
    """Names, or patterns as in a shell."""
    idle_s: float = 300.0
    keep_above_qps: float = 0.5
    min_qps: float = 0.01
    min_resident_s: float = 30.0
    max_utilization: float = 0.9
    budgets: Mapping[str, int] = field(default_factory=dict)
    drain_timeout_s: float = 30.0
    load_timeout_s: float = 900.0
    unload_timeout_s: float = 180.0
    fairness_after_s: float = 15.0
    max_queue: int = 10_000
    max_queue_per_model: int = 1_000
    max_concurrent_loads: int = 2
    max_residue_bytes: int = 2**30
    """What unloads may leave behind in a runtime before it is started anew."""
    sweep_s: float = 10.0
    retry_s: float = 5.0
    retry_max_s: float = 300.0
    crash_budget: int = 5
    """Crashes of a runtime within `crash_window_s` before it is left down for as long."""
    crash_window_s: float = 600.0
    standby_device: str = "cpu:0"
    """Whose memory parked models hold: the host's."""
    standby_budget_bytes: int | None = None
    """What they may hold of it together; None: half of what would be free without them."""
    rank: Callable[[Sequence[Candidate], float], Sequence[str]] = least_recently_used


@dataclass(frozen=True, slots=True)
class World:
    models: Map[str, Model] = Map()
    devices: Map[str, Account] = Map()
    runtimes: Map[str, Runtime] = Map()
    tickets: Map[int, Ticket] = Map()
    live: Map[str, None] = Map()
    """Names of the models in a LIVE state, so that a tick need not look at the others."""
    queue: Map[str, None] = Map()
    """Names of the models that wait: for room, or FAILED and wanted."""
    moving: Map[str, None] = Map()
    """Names of the models with an operation under way."""
    stale: Map[str, None] = Map()
    """Names of the READY models that are loaded as something else than what they should be."""
    dependents: Map[str, tuple[str, ...]] = Map()
    """Who depends on a name, whether or not that name exists."""
    next_id: int = 1
    next_sweep: float = 0.0

    def model(self, name: str) -> Model | None:
        return self.models.get(name)


def is_live(model: Model) -> bool:
    return model.state in LIVE or model.held is not None


def is_moving(model: Model) -> bool:
    return model.state in _MOVING or bool(model.op)


_MOVING = frozenset({State.LOADING, State.DRAINING, State.PARKING, State.UNLOADING})


def is_stale(model: Model) -> bool:
    return model.state is State.READY and model.stale


def queued(model: Model) -> bool:
    """It waits for room, or for its turn: to be loaded, or to be woken."""
    return model.state is State.QUEUED or (model.state is State.STANDBY and _wanted(model))


def waits(model: Model) -> bool:
    state = model.state
    return state is State.QUEUED or (state in _WAKEABLE and _wanted(model))


_WAKEABLE = frozenset({State.STANDBY, State.FAILED})


def _wanted(model: Model) -> bool:
    return model.want is not Want.NONE or bool(model.tickets)
