"""What the surface can be told."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

MAX_HEADER_BYTES = 8000
"""Of one HTTP header, or the request line: Triton drops the connection on which there is one of 8 KiB (2.51)."""
SOCKET_MODE = 0o660
"""Of Unix sockets: for the service's user and group."""
MAX_METADATA_BYTES = 64 * 1024
"""Of a gRPC call's metadata, in all."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Bounds and guards of the HTTP surface; every default is a good one. Sizes are bytes, durations seconds."""

    host: str = "127.0.0.1"
    """The address that is bound: on a loopback one, only loopback names are accepted in `Host`."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that clients may call this service by, without a port."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://app.example`) of web pages that may send requests other than GET."""
    max_body_bytes: int | None = None
    """Of any request; one that is passed on as it comes is never held in memory whole."""
    client_stall_s: float = 60.0
    """The longest that a client may pause in its request, or in taking the answer: meanwhile it holds a model's
    lease."""
    max_json_bytes: int = 16 * 2**20
    """Of a request that is read here: `/v1`, `/predict`, inference on decoupled models, parameters."""
    max_deadline_s: float = 3600.0
    """The longest that a client may ask to wait for a model."""
    connect_timeout_s: float = 5.0
    """For reaching a runtime."""
    heartbeat_s: float = 15.0
    """Between signs of life on `/events`."""
    metrics: bool = True
    access_log: bool = False
    """Write a line for each request."""


SETTINGS: web.AppKey[HttpSettings] = web.AppKey("settings", HttpSettings)
