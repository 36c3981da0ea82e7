"""Keeps web pages out: without this, any page open in a browser on this machine could drive a service on loopback.

Two rules, for every route. A request other than GET that carries an `Origin` (only browsers send it) must come from
this service's own address or from an allowed origin. And while the service listens on loopback only, `Host` must be a
loopback name or an allowed one, else a page could make its own domain resolve to 127.0.0.1 and count as the same
origin. Programs are not touched by either.
"""

from __future__ import annotations

import ipaddress

from aiohttp import hdrs, web

from modelium.errors import ModeliumError
from modelium.http.answers import Handler
from modelium.http.settings import HttpSettings

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Forbidden(ModeliumError):
    code = "forbidden"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guarded_names(settings: HttpSettings) -> tuple[str, ...] | None:
    """The names, in lower case and without a port, that clients may call this service by; None: any."""
    if not is_loopback(settings.host):
        return None
    return tuple(sorted(LOOPBACK_NAMES | {name.lower() for name in (settings.host, *settings.allowed_hosts)}))


def make_guard(settings: HttpSettings):  # type: ignore[no-untyped-def]  # aiohttp names no type for a middleware
    """The middleware that holds the two rules."""
    names = guarded_names(settings)
    origins = frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        host = headers.get(hdrs.HOST, "")
        if names is not None and host and host not in names and _name(host) not in names:
            raise Forbidden(
                f"this service is not known as {_name(host)!r}: call it by one of {', '.join(sorted(names))}, or add "
                "the name to server.allowed_hosts"
            )
        if request.method != hdrs.METH_GET and hdrs.ORIGIN in headers:
            origin = headers[hdrs.ORIGIN].lower()
            if origin not in origins and origin.partition("://")[2] != host.lower():
                raise Forbidden(
                    f"a web page of {origin} may not send {request.method} here; add the origin to "
                    "server.allowed_origins if it should"
                )
        return await handler(request)

    return guard


def _name(host: str) -> str:
    """`Host` without its port."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.lower()
