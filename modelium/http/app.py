"""The HTTP surface put together, and how it is served."""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from modelium.errors import ConfigError
from modelium.http.admin import Admin
from modelium.http.answers import SPOKEN, errors, name_request
from modelium.http.composed import Composed
from modelium.http.guard import make_guard
from modelium.http.inference import Inference
from modelium.http.kserve import KServe
from modelium.http.metrics import Metrics
from modelium.http.openai import OpenAI
from modelium.http.over_openai import OverOpenAI
from modelium.http.predict import Predict
from modelium.http.rpc.channels import Channels
from modelium.http.settings import MAX_HEADER_BYTES, SETTINGS, SOCKET_MODE, HttpSettings
from modelium.http.streams import Streams
from modelium.http.upstream import Upstream

UPSTREAM: web.AppKey[Upstream] = web.AppKey("upstream", Upstream)
CHANNELS: web.AppKey[Channels] = web.AppKey("channels", Channels)

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

if TYPE_CHECKING:
    from modelium.engine.service import Service

log = logging.getLogger(__name__)


def build_app(service: Service, settings: HttpSettings | None = None) -> web.Application:
    """The whole surface over `service`. To be served by `serving`, which sets what an application can't."""
    settings = settings or HttpSettings()
    upstream, channels = Upstream(settings), Channels()
    streams = Streams(channels)
    admin = Admin(service, settings)
    app = web.Application(middlewares=[errors, make_guard(settings)])
    app[SETTINGS] = settings
    app[UPSTREAM] = upstream
    app[CHANNELS] = channels
    app[SPOKEN] = set()
    over_openai = OverOpenAI(service, upstream)
    inference = Inference(upstream, streams, over_openai)
    composed = Composed(settings, inference, over_openai)
    app.add_routes(KServe(service, settings, upstream, streams, composed).routes())
    app.add_routes(OpenAI(service, settings, upstream, inference).routes())
    app.add_routes(Predict(service, settings, inference).routes())
    app.add_routes(admin.routes())
    if settings.metrics:
        app.add_routes(Metrics(service).routes())

    async def clients(app: web.Application) -> AsyncIterator[None]:
        await upstream.open()
        yield
        await upstream.close()
        await channels.close()

    app.cleanup_ctx.append(clients)
    app.on_response_prepare.append(name_request)
    app.on_shutdown.append(admin.close_feeds)
    return app


@asynccontextmanager
async def serving(
    app: web.Application,
    host: str | Path,
    port: int = 0,
    *,
    socket: Path | None = None,
    tls: tuple[Path, Path] | None = None,
    keepalive_s: float = 3600.0,
    grace_s: float = 10.0,
) -> AsyncIterator[tuple[str, int]]:
    """Serve `app` while the context lasts; gives the address bound, of use where `port` is 0.

    A path as `host` is a Unix socket; `socket` is one besides. `tls` is a certificate with its key, both PEM.

    At the end new connections are refused, requests under way get `grace_s` seconds, and what is left is broken off.
    An idle client's connection is kept for `keepalive_s`: long, so that clients' pools hardly ever meet a closed one.
    Raises `ConfigError` when the address can't be bound.
    """
    runner = web.AppRunner(
        app,
        access_log=logging.getLogger("modelium.access") if app[SETTINGS].access_log else None,
        access_log_format='%a "%r" %s %b bytes %Tf s "%{User-Agent}i" %{X-Request-ID}o',
        logger=_ServerLog(log),
        auto_decompress=False,  # bodies are passed on as they come
        handler_cancellation=True,  # who leaves stops waiting, and the runtime stops working for nobody
        keepalive_timeout=keepalive_s,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        shutdown_timeout=grace_s,
    )
    await runner.setup()
    sweeping = asyncio.create_task(_sweep_silent(app, runner), name="silent connections")
    sockets = [path for path in (host, socket) if isinstance(path, Path)]
    try:
        for path in sockets:
            path.unlink(missing_ok=True)
            await web.UnixSite(runner, path, backlog=1024).start()
            path.chmod(SOCKET_MODE)
        if isinstance(host, Path):
            yield str(host), 0
            return
        context = encryption(tls) if tls is not None else None
        site = web.TCPSite(runner, host, port, backlog=1024, ssl_context=context)
        try:
            await site.start()
        except OSError as exc:
            raise ConfigError(_cannot_bind(exc, host, port), code="address", host=host, port=port) from exc
        address = runner.addresses[-1]
        yield address[0], address[1]
    finally:
        sweeping.cancel()
        await runner.cleanup()
        for path in sockets:
            path.unlink(missing_ok=True)


async def _sweep_silent(app: web.Application, runner: web.AppRunner) -> None:
    """Close connections on which no whole head of a request came in time, which aiohttp would keep for ever."""
    spoken, patience_s = app[SPOKEN], app[SETTINGS].client_stall_s
    loop = asyncio.get_running_loop()
    silent: dict[Any, float] = {}
    while True:
        await asyncio.sleep(patience_s / 2)
        there = set(runner.server.connections) if runner.server is not None else set()
        spoken &= there
        now = loop.time()
        silent = {connection: silent.get(connection, now) for connection in there - spoken}
        for connection, since in silent.items():
            transport = connection.transport
            if now - since >= patience_s and transport is not None:
                transport.write(TOO_SLOW)
                transport.close()


def encryption(tls: tuple[Path, Path]) -> ssl.SSLContext:
    """For a certificate and its key. Raises `ConfigError` when they can't be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(*tls)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"the certificate {tls[0]} and its key {tls[1]} can't be used: {exc}") from exc
    return context


class _ServerLog(logging.LoggerAdapter[logging.Logger]):
    """Takes a malformed request for what it is: one quiet line, where aiohttp would log an error with a traceback."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **kwargs: Any) -> None:
        if isinstance(exc_info, HttpProcessingError):
            self.info("a malformed request was refused: %s", exc_info.message.partition("\n")[0])
        else:
            super().exception(msg, *args, exc_info=exc_info, **kwargs)


def _cannot_bind(exc: OSError, host: str, port: int) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: end what uses it, or choose another with --port"
    if exc.errno == errno.EACCES:
        return f"port {port} may not be bound by this user: choose one from 1024 up with --port"
    return f"{host}:{port} can't be bound ({exc.strerror or exc}): is the address one of this machine?"
