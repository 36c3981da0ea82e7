"""What a data path's author writes: what carries requests for loaded models past the service, straight to runtimes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from modelium.api.driver import Processes
from modelium.api.types import Frozen

AWAY = "Modelium is not there at this moment"
"""How a data path's answer begins, under status 503, to what only the service can answer while there is none."""


class Front(Frozen):
    """The addresses that clients know, and where the service itself answers."""

    host: str
    port: int
    """HTTP; 0 takes a free one."""
    grpc_port: int
    """0 takes a free one."""
    hosts: tuple[str, ...] | None
    """Names in `Host` by which requests go straight to runtimes; the service judges all others. None: any."""
    service_http: Path
    """The service's Unix socket for HTTP."""
    service_grpc: Path
    certificate: Path | None = None
    """PEM; with it, `key` too, and clients speak TLS."""
    key: Path | None = None
    sockets: tuple[Path, Path] | None = None
    """Unix sockets for clients besides, for HTTP and for gRPC."""
    access_log: bool = False
    """Write a line for each request."""
    max_body_bytes: int | None = None
    """Of a request that goes straight to a runtime; the service refuses longer ones. None: any."""
    max_header_bytes: int = 8000
    """Of all headers of a request that goes straight to a runtime; the service judges the others."""
    client_stall_s: float = 60.0
    """The longest pause of a client in the middle of its request, or of taking the answer to it."""
    client_errors: tuple[str, ...] = ()
    """How answers of runtimes under status 500 begin that are the client's fault, and are to have status 400."""
    dead: str = ""
    """A regular expression for what answers of runtimes under status 400 or 500 hold when the model's own process has
    ended: they are to have status 502."""


class DataRoute(Frozen):
    """A loaded model, and where its runtime answers."""

    model: str
    endpoints: Mapping[str, str]
    """Address by protocol, as `Endpoint` names them."""
    decoupled: bool = False
    """It may answer one request with many responses, which Triton's HTTP `infer` can't pass on."""


class DataPathInfo(Frozen):
    """What a data path turned out to be once it was up."""

    name: str
    version: str
    pid: int
    adopted: bool
    """It was already running when Modelium came."""
    port: int
    grpc_port: int


class Carried(NamedTuple):
    """Requests for one model that a data path has carried since it was started."""

    requests: int
    in_flight: int
    """Now; each counts from before it is let through until its answer is out."""
    idle_s: float = 0.0
    """Since one was let in, or its answer was out."""
    failures: int = 0
    """Answered by the runtime with a 5xx."""
    organisations: Mapping[str, Carried] = {}
    """Those of them that named one."""


@dataclass(frozen=True, slots=True)
class DataPathContext:
    """What a data path is created with."""

    name: str
    state_dir: Path
    """Its own folder for state; survives a restart of Modelium."""
    socket_dir: Path
    """For Unix sockets: its path leaves room for names of up to 18 bytes."""
    settings: BaseModel
    processes: Processes


@runtime_checkable
class DataPathDriver(Protocol):
    """Runs one data path. What it does not carry goes to the service. Errors are `DriverError`s or `ConfigError`s.

    Calls may overlap; those that change routes are made one at a time.
    """

    async def start(self, front: Front) -> DataPathInfo:
        """Adopt the one that runs, else start it; return when it listens. Routes it has already go on meanwhile."""

    async def sync(self, routes: Collection[DataRoute]) -> None:
        """Carry requests for exactly these models."""

    async def admit(self, route: DataRoute) -> None:
        """Carry requests for one more model, or along another route."""

    async def divert(self, model: str) -> None:
        """Return when every new request for it goes to the service; those under way go on."""

    async def read(self) -> Mapping[str, Carried]:
        """By model; those long unused may be left out. Raises `RuntimeUnavailable` when the data path is gone."""

    async def stop(self) -> None:
        """End it."""

    def logs(self, lines: int) -> list[str]:
        """The last lines that it wrote."""


@runtime_checkable
class DataPath(Protocol):
    """One kind of data path."""

    name: str
    settings_model: type[BaseModel]
    """Validates the section of the configuration that bears the data path's name."""

    def usable(self, settings: BaseModel) -> str | None:
        """None when it can run here, else why not, in one sentence."""

    def create(self, context: DataPathContext) -> DataPathDriver: ...
