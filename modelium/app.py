"""The composition root: the one place where the parts are made and put together."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from aiohttp import web

from modelium import __version__
from modelium.api.datapath import Front
from modelium.config import Config, validate_sections
from modelium.engine.inspector import Inspector
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.processes import ProcessSupervisor
from modelium.engine.service import Service
from modelium.errors import ConfigError
from modelium.host import PluginHost
from modelium.http.answers import DEAD
from modelium.http.app import CHANNELS, UPSTREAM, build_app, encryption, serving
from modelium.http.guard import guarded_names
from modelium.http.kserve import UNPARSABLE
from modelium.http.rpc.server import serving_rpc
from modelium.http.settings import MAX_HEADER_BYTES, HttpSettings
from modelium.log import setup
from modelium.paths import LONGEST_SOCKET_PATH, Paths, socket_folder

log = logging.getLogger(__name__)


@asynccontextmanager
async def running(config: Config, *, stop_runtimes: bool = False) -> AsyncIterator[tuple[Service, str]]:
    """The whole service while the context lasts; gives it, and the URL where it answers.

    Runtimes stay up afterwards unless `stop_runtimes`. Raises `ConfigError` for what keeps it from starting.
    """
    paths = config.paths()
    if paths.incoming is None and not paths.repository.is_dir():
        raise ConfigError(f"{paths.repository} is not there: --repository names a folder that exists")
    with _only_one(paths):
        host = await asyncio.to_thread(PluginHost.load, config.plugins.disable)
        sections = validate_sections(config, host.sections())
        inspector = Inspector(disabled=config.plugins.disable, note=host.note)
        engine = Orchestrator(config, paths, host, sections, inspector)
        service = Service(engine)
        started = False
        settings = HttpSettings(
            host=config.server.host,
            allowed_hosts=config.server.allowed_hosts,
            allowed_origins=config.server.allowed_origins,
            max_body_bytes=config.server.max_body_bytes,
            max_json_bytes=config.server.max_json_bytes,
            client_stall_s=config.server.client_stall_s,
            metrics=config.metrics.enabled,
            access_log=config.logging.access,
        )
        try:
            app = build_app(service, settings)
            async with _listening(config, engine, service, settings, app) as (port, grpc_port):
                url = config.server.model_copy(update={"port": port}).url
                engine.listening = {"http": url, "grpc": f"{urlsplit(url).hostname}:{grpc_port}"}
                try:
                    await engine.start()
                    started = True
                    yield service, url
                finally:
                    engine.shut()  # requests that wait are answered; those that are served may end
        finally:
            await engine.stop(stop_runtimes=stop_runtimes and started)


@asynccontextmanager
async def _listening(
    config: Config, engine: Orchestrator, service: Service, settings: HttpSettings, app: web.Application
) -> AsyncIterator[tuple[int, int]]:
    """Bind the addresses that clients know, by the data path where there is one; gives the ports of HTTP and gRPC."""
    server = config.server
    certificate, key = server.tls.certificate, server.tls.key
    tls = (certificate, key) if certificate is not None and key is not None else None
    if tls is not None:
        await asyncio.to_thread(encryption, tls)  # what is wrong with it is told here, in whichever way it is used
    sockets = _sockets(server.socket_directory)
    await engine.end_other_paths()
    http_socket, grpc_socket = sockets or (None, None)
    if engine.fast is None:
        async with (
            serving(app, server.host, server.port, socket=http_socket, tls=tls) as (_, port),
            serving_rpc(
                service,
                settings,
                app[UPSTREAM],
                app[CHANNELS],
                server.host,
                server.grpc_port,
                socket=grpc_socket,
                tls=tls,
            ) as grpc_port,
        ):
            yield port, grpc_port
        return
    folder = socket_folder(engine.paths.state)
    front = Front(
        host=server.host,
        port=server.port,
        grpc_port=server.grpc_port,
        hosts=guarded_names(settings),
        service_http=folder / "http.sock",
        service_grpc=folder / "grpc.sock",
        certificate=certificate,
        key=key,
        sockets=sockets,
        access_log=settings.access_log,
        max_body_bytes=settings.max_body_bytes,
        max_header_bytes=MAX_HEADER_BYTES,
        client_stall_s=settings.client_stall_s,
        client_errors=UNPARSABLE,
        dead=DEAD,
    )
    async with (
        serving(app, front.service_http),
        serving_rpc(service, settings, app[UPSTREAM], app[CHANNELS], front.service_grpc),
    ):
        info = await engine.fast.start(front)
        log.info("requests for loaded models go by %s %s", info.name, info.version)
        yield info.port, info.grpc_port


def _sockets(folder: Path | None) -> tuple[Path, Path] | None:
    """For HTTP and gRPC, where a folder for them is configured."""
    if folder is None:
        return None
    if len(os.fsencode(folder / "grpc.sock")) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"server.socket_directory is too long: a socket's path may have {LONGEST_SOCKET_PATH} bytes for HAProxy to "
            f"take it, and {folder / 'grpc.sock'} has {len(os.fsencode(folder / 'grpc.sock'))}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"{folder} can't be made: {exc.strerror}; choose another server.socket_directory") from exc
    return folder / "http.sock", folder / "grpc.sock"


def serve(config: Config, *, stop_runtimes: bool = False, ready: Callable[[str, Paths], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the URL and the folders once it answers."""

    async def main() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        async with running(config, stop_runtimes=stop_runtimes) as (_, url):
            log.info("Modelium %s answers on %s", __version__, url)
            if ready is not None:
                ready(url, config.paths())
            await ended.wait()
            log.info("stopping")
        if not stop_runtimes and (left := supervisor(config.paths()).names()):
            log.info("still running: %s; `%s` ends what is left", ", ".join(left), down_command(config))

    with setup(format=config.logging.format, level=config.logging.level):
        uvloop.run(main())


def down(config: Config, tell: Callable[[list[str]], None]) -> list[str]:
    """End the runtimes that an earlier `serve` of this root left running; returns their names, after `tell` was told.

    Raises `ConfigError` when the service itself is still running, or there never was one.
    """
    paths = config.paths()
    if not paths.state.is_dir():
        raise ConfigError(f"no service has ever had {paths.root} as its root: name another by --root or --repository")
    with _only_one(paths, "end that first, and then its runtimes"):
        processes = supervisor(paths)
        names = processes.names()
        if names:
            tell(names)

        async def stop() -> None:
            for name in names:
                await processes.stop(name)

        asyncio.run(stop())
    return names


def down_command(config: Config) -> str:
    """What a person types, anywhere, to end the runtimes that this configuration leaves running."""
    paths, section = config.paths(), config.orchestration
    words = ["modelium", "down"]
    if section.model_repository is None or "root" in section.model_fields_set:
        words += ["--root", str(paths.root)]
    if section.model_repository is not None:
        words += ["--repository", str(paths.repository)]
    return shlex.join(words)


def supervisor(paths: Paths) -> ProcessSupervisor:
    """Of the processes that services of this root have started."""
    return ProcessSupervisor(paths.root, state_dir=paths.state / "processes", log_dir=paths.state / "logs")


@contextmanager
def _only_one(paths: Paths, advice: str = "end that first, or choose another --root") -> Iterator[None]:
    """Two services on one root would fight over it."""
    file = paths.state / "lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise ConfigError(
            f"{file} can't be written: {exc.strerror}; choose another --root, or let this user write there",
            code="storage",
        ) from exc
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = _holder(file)
            raise ConfigError(
                f"{paths.root} is served already{holder}: {advice}",
                code="served_already",
            ) from exc
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _holder(file: Path) -> str:
    try:
        return f" by process {int(file.read_text())}"
    except (OSError, ValueError):
        return ""
