"""The `triton:` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from modelium.api.urls import BaseUrl

Port = Annotated[int, Field(ge=0, le=65535)]


class TritonSettings(BaseModel):
    """How Triton is found, started and talked to. Without `endpoint` Modelium runs its own.

    Our own server outlives Modelium: what is said of it here counts when it is next started.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether models are served by Triton at all."""

    # Somebody else's server

    endpoint: BaseUrl | None = None
    """HTTP base URL of a running Triton to attach to, as `http://127.0.0.1:8000`. It is never stopped or restarted; it
    must be in explicit mode and see the same repository folder."""
    grpc_endpoint: str | None = None
    """Its gRPC address, as `127.0.0.1:8001`, or `grpcs://host:port` with TLS; by default the endpoint's host at its
    port plus one, as Triton itself numbers them."""
    metrics_endpoint: BaseUrl | None = None
    """URL of the metrics of a server on another machine, as `http://10.0.0.5:8002/metrics`: with it, that machine's
    memory and GPUs are devices of their own, on which only this server's models are placed."""
    backends: tuple[str, ...] = ()
    """Backends that it has, where they can't be found out from here (a server in another container)."""

    # Our own server

    executable: Path | None = None
    """The tritonserver to start; by default the one on PATH or in /opt/tritonserver/bin, else that of the wheel."""
    http_port: Port = 0
    """0: a free one, kept for as long as it stays free."""
    grpc_port: Port = 0
    """As `http_port`."""
    metrics_port: Port = 0
    """As `http_port`."""
    args: tuple[str, ...] = ()
    """Further arguments of tritonserver."""
    log_verbose: int = Field(default=0, ge=0)
    """0 is quiet; the levels are tritonserver's own."""
    start_timeout_s: float = Field(default=120, gt=0)
    """A start that takes longer has failed."""

    # The private server and its Python environment

    python: Path | None = None
    """The interpreter that Python-backend models of the wheel's server run in; by default Modelium's own kind."""
    pip_args: tuple[str, ...] = ()
    """Further arguments of `pip install`, such as `--extra-index-url URL`; with any, none is added by itself."""

    vllm_environment: Path | None = None
    """An environment with vLLM, of the same version of Python as Triton's own, for language models that the wheel's
    server runs in vLLM; by default the one that `modelium runtimes install vllm` makes."""

    # Models

    load_timeout_s: float = Field(default=900, gt=0)
    """A load that takes longer is given up."""
    unload_timeout_s: float = Field(default=120, gt=0)
    """An unload that takes longer (requests are still running) is reported as stuck."""
