"""The one tree of errors, free of any protocol: each surface maps `code` to its own status and shape."""

from __future__ import annotations

from typing import Any


class ModeliumError(Exception):
    """Something that a person or a program should be told.

    `code` is stable and made for programs, `message` says what was expected, what was found and what to do, and
    `fields` carry the facts behind the message. `retry_after_s` is set where asking again later can help.
    """

    code = "internal"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float | None = None, **fields: Any):
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.retry_after_s = retry_after_s
        self.fields = fields

    def as_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"code": self.code, "message": self.message, **self.fields}
        if self.retry_after_s is not None:
            out["retry_after_s"] = self.retry_after_s
        return out


class ConfigError(ModeliumError):
    """The configuration is wrong; or, with a code of its own (`storage`, `address`, `served_already`), a folder, a port
    or another part of the surroundings is not as it must be."""

    code = "config"


class PluginError(ModeliumError):
    """A plugin could not be used, or two plugins claim the same thing."""

    code = "plugin"


class ModelError(ModeliumError):
    """A model, or what was dropped as one, is not usable."""

    code = "model_invalid"


class ModelNotFound(ModelError):
    code = "model_not_found"


class ModelFailed(ModelError):
    """The model's last load failed, or its runtime was lost; `retry_after_s` says when it may be tried again."""

    code = "model_failed"


class ModelConflict(ModelError):
    """What was asked for goes against the model's present state or another model's name."""

    code = "model_conflict"


class CapacityError(ModeliumError):
    """There is no room, now or ever."""

    code = "capacity"


class NeverFits(CapacityError):
    code = "never_fits"


class QueueFull(CapacityError):
    code = "queue_full"


class DeadlinePassed(CapacityError):
    code = "deadline_passed"


class ModelLoading(CapacityError):
    """It is on its way, and who asked did not want to wait: fields tell its state, progress and expected seconds."""

    code = "model_loading"


class DriverError(ModeliumError):
    """A runtime refused, failed, or could not be reached."""

    code = "driver"


class LoadRejected(DriverError):
    """The runtime read the model and refused it: the same files will be refused again."""

    code = "load_rejected"


class RuntimeUnavailable(DriverError):
    """The runtime is not up; `retry_after_s` says when it may be."""

    code = "runtime_unavailable"


class RuntimeStuck(RuntimeUnavailable):
    """The runtime answers, and can't do this before it is started anew, which the engine sees to with as little harm as
    can be: what it holds is drained first, and loaded again where it was in use."""

    code = "runtime_stuck"
