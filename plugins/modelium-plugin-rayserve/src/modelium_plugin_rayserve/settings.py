"""The `ray_serve:` section of the configuration, and what a plan may set for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modelium.api.settings import plan_settings

MIB = 2**20


class ReplicaSettings(BaseModel):
    """How Ray runs one model. A brain's rule may set each of these, and `default_settings` all of them at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    replicas: int = Field(default=1, ge=1, le=1000)
    """Processes that serve it, each with the whole model."""
    max_replicas: int | None = Field(default=None, ge=1, le=1000)
    """With more than `replicas`, Ray adds some under load and takes them away again."""
    target_ongoing_requests: float = Field(default=2, gt=0)
    """Requests under way in each replica that Ray aims at when it adds some."""
    max_ongoing_requests: int = Field(default=100, ge=1)
    """Requests that a replica takes at a time; more wait in Ray's proxy."""
    num_cpus: float = Field(default=0, ge=0)
    """CPUs that Ray reserves for each replica, and threads that its libraries take; 0 reserves none."""
    num_gpus: float | None = Field(default=None, gt=0)
    """The share of a GPU that Ray reserves for each replica, 1 at most; by default what its memory is of the GPU's. Ray
    chooses the GPU where it reserves one."""

    @field_validator("num_gpus")
    @classmethod
    def _of_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1:
            raise ValueError("expected at most 1: a model that needs several GPUs is not for Ray Serve's replicas")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"expected max_replicas ({self.max_replicas}) to be at least replicas ({self.replicas})")
        return self

    @property
    def most(self) -> int:
        """How many replicas there may be."""
        return max(self.replicas, self.max_replicas or 0)


class RayServeSettings(BaseModel):
    """How Ray Serve is found and started: a cluster that Modelium starts on this machine, or one by address.

    Our own cluster outlives Modelium: what is said of it here counts when it is next started.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool | Literal["auto"] = "auto"
    """Whether models are served by Ray at all; with `auto` its own cluster is started by the first model that needs it,
    with `true` together with Modelium."""

    # Somebody else's cluster

    address: str | None = None
    """A running cluster, as `10.0.0.5:6379`, or `auto` for the one that this machine is a node of. Modelium must run on
    one of its nodes; it is never stopped."""

    # Where Ray and the models' libraries are

    python: Path | None = None
    """An interpreter that has Ray and all that models need; by default an environment is made, and filled with what the
    first model of a kind takes. For a cluster by address it must have the cluster's version of Ray and of Python."""
    pip_args: tuple[str, ...] = ()
    """Further arguments of `pip install` for that environment."""

    # Our own cluster

    http_port: int = Field(default=0, ge=0, le=65535)
    """Of Ray Serve's proxy on loopback. 0: a free one, kept for as long as it stays free."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs that replicas may reserve; by default all of them."""
    object_store_bytes: int = Field(default=256 * MIB, ge=80 * MIB)
    """Shared memory for Ray's objects, which are requests and answers of more than 100 kB here."""
    start_timeout_s: float = Field(default=120, gt=0)
    """A start that takes longer has failed."""

    # Models

    default_settings: ReplicaSettings = ReplicaSettings()
    """For every model whose plan says nothing else."""
    load_timeout_s: float = Field(default=900, gt=0)
    """A load that takes longer is given up."""
    unload_timeout_s: float = Field(default=120, gt=0)
    """An unload that takes longer is reported as stuck."""

    @field_validator("address")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        host, _, port = (value or "auto").rpartition(":")
        if value in (None, "auto") or (host and "/" not in host and port.isdecimal()):
            return value
        raise ValueError(f"expected `auto` or HOST:PORT of the cluster's head, as 10.0.0.5:6379, found {value!r}")


def replica_settings(settings: Mapping[str, Any]) -> ReplicaSettings:
    """Those of a plan, which holds others besides. Raises `ModelError` naming what is wrong."""
    ours = {k: v for k, v in settings.items() if k in ReplicaSettings.model_fields}
    return plan_settings(ReplicaSettings, ours, "Ray Serve")
