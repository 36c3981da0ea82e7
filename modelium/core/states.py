"""The life of a model and of a runtime, as tables: what is not in them can't happen."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    DISCOVERED = "DISCOVERED"
    INVALID = "INVALID"
    COLD = "COLD"
    QUEUED = "QUEUED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    PARKING = "PARKING"
    STANDBY = "STANDBY"
    UNLOADING = "UNLOADING"
    FAILED = "FAILED"
    RECOVERING = "RECOVERING"


S = State

TRANSITIONS: Mapping[State, frozenset[State]] = {
    S.DISCOVERED: frozenset({S.INVALID, S.COLD}),
    S.INVALID: frozenset({S.DISCOVERED, S.COLD}),
    S.COLD: frozenset({S.QUEUED, S.RECOVERING, S.INVALID}),
    S.QUEUED: frozenset({S.LOADING, S.COLD, S.FAILED, S.RECOVERING, S.INVALID}),
    S.LOADING: frozenset({S.READY, S.FAILED, S.UNLOADING}),
    S.READY: frozenset({S.DRAINING, S.FAILED}),
    S.DRAINING: frozenset({S.UNLOADING, S.PARKING, S.READY, S.FAILED}),
    S.PARKING: frozenset({S.STANDBY, S.UNLOADING, S.FAILED}),
    S.STANDBY: frozenset({S.LOADING, S.UNLOADING, S.COLD, S.RECOVERING}),
    S.UNLOADING: frozenset({S.COLD, S.FAILED}),
    S.FAILED: frozenset({S.QUEUED, S.COLD, S.RECOVERING, S.INVALID}),
    S.RECOVERING: frozenset({S.READY, S.STANDBY, S.COLD, S.FAILED}),
}
"""An accepted drop takes its model's name: where that is another one, the drop's record goes, and a COLD one comes."""

BIRTH = frozenset({S.DISCOVERED, S.INVALID, S.COLD, S.RECOVERING})
"""States in which a record may first appear."""

LIVE = frozenset({S.LOADING, S.READY, S.DRAINING, S.PARKING, S.STANDBY, S.UNLOADING, S.RECOVERING})
"""States in which a model may hold memory or an operation."""


class RuntimeState(StrEnum):
    DOWN = "DOWN"
    STARTING = "STARTING"
    UP = "UP"
    STOPPING = "STOPPING"
    CRASHED = "CRASHED"


R = RuntimeState

RUNTIME_TRANSITIONS: Mapping[RuntimeState, frozenset[RuntimeState]] = {
    R.DOWN: frozenset({R.STARTING}),
    R.STARTING: frozenset({R.UP, R.CRASHED, R.STOPPING}),
    R.UP: frozenset({R.UP, R.CRASHED, R.STOPPING}),
    R.STOPPING: frozenset({R.DOWN, R.CRASHED}),
    R.CRASHED: frozenset({R.STARTING, R.STOPPING}),
}


class Want(StrEnum):
    """Why a model should be loaded, the strongest reason that holds."""

    NONE = "none"
    DROPPED = "dropped"
    """It was just dropped in: load it if there is room that nobody needs."""
    RESTORE = "restore"
    """It was in use when its runtime was lost, or when its files changed."""
    REQUEST = "request"
    PART = "part"
    """A model that depends on it is wanted."""
    PERSON = "person"
    RESIDENT = "resident"
    """Pinned, or always loaded by configuration."""


BASE_PRIORITY: Mapping[Want, int] = {
    Want.NONE: -20,
    Want.DROPPED: -10,
    Want.RESTORE: -5,
    Want.REQUEST: 0,
    Want.PART: 1,
    Want.PERSON: 2,
    Want.RESIDENT: 3,
}
"""In the units of a request's own priority, which is bounded to -10 to 10."""

URGENT = frozenset({Want.REQUEST, Want.PART, Want.PERSON, Want.RESIDENT})
"""What evicts models that are not idle. A part's urgency is that of what is made of it."""
