"""What can be found out on this machine without a service: for `check`, `init` and `plugins`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modelium.api.driver import RuntimeBackend
from modelium.api.units import human
from modelium.app import supervisor
from modelium.config import Config, load_config, validate_sections
from modelium.errors import ModeliumError
from modelium.host import PluginHost

LOW_DISK_BYTES = 2 * 10**9

Row = dict[str, Any]
"""The fields of a `CheckView`."""


def plugins() -> list[dict[str, Any]]:
    """What is installed here, as a service here would use it."""
    return [view.model_dump(mode="json") for view in _host().plugins()]


def sections() -> dict[str, type[BaseModel]]:
    """The sections of the configuration that the installed plugins own."""
    return _host().sections()


def backends(config: Config | None = None) -> list[RuntimeBackend]:
    """The runtime backends that the installed plugins offer."""
    return list(_host(config).runtime_backends())


def section(config: Config, name: str) -> BaseModel:
    """A plugin's section of the configuration. Raises `ConfigError`."""
    return validate_sections(config, _host(config).sections())[name]


def _host(config: Config | None = None) -> PluginHost:
    return PluginHost.load((config or load_config()).plugins.disable)


def checks(config: Config) -> list[Row]:
    """Everything that `modelium serve` with this configuration stands on."""
    return [row(*found) for found in _checks(config)]


def row(name: str, ok: bool, found: str, advice: str = "") -> Row:
    return {"name": name, "ok": ok, "found": found, "advice": "" if ok else advice}


def _checks(config: Config) -> Iterator[tuple[str, bool, str, str]]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield "python", sys.version_info >= (3, 11), version, "Modelium needs Python 3.11 or newer"
    yield "configuration", True, str(config.file or "defaults (no modelium.yaml here)"), ""
    yield from _folders(config)
    problem = _bind(config.server.host, config.server.port)
    found = problem or f"{config.server.host}:{config.server.port} is free"
    left = _left_running(config) if problem else []
    if left:
        problem, found = "", f"{problem}; {', '.join(left)} of an earlier service goes on, and is taken over"
    yield "port", not problem, found, "end what uses it, or choose another server.port"
    yield from _plugins(config)


def _folders(config: Config) -> Iterator[tuple[str, bool, str, str]]:
    try:
        paths = config.paths()
    except ModeliumError as exc:
        yield "folders", False, exc.message, ""
        return
    named = {"repository": paths.repository, "incoming": paths.incoming, "state": paths.state, "cache": paths.cache}
    for name, folder in named.items():
        if folder is None:
            continue
        there = _existing(folder)
        ok = os.access(there, os.R_OK | os.W_OK | os.X_OK)
        found = str(folder) if there == folder else f"{folder}, to be made"
        yield f"folder {name}", ok, found, f"{there} can't be written: let the user that runs Modelium write there"
        if name in ("repository", "cache"):
            free = shutil.disk_usage(there).free
            yield f"disk {name}", free >= LOW_DISK_BYTES, f"{human(free)} free at {there}", "make room there"


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _left_running(config: Config) -> list[str]:
    """The processes of this root that go on without a service."""
    try:
        paths = config.paths()
    except ModeliumError:
        return []
    return supervisor(paths).names() if paths.state.is_dir() else []


def _bind(host: str, port: int) -> str:
    """Why the port can't be bound, empty when it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        return f"{host}:{port}: {exc.strerror}"
    return ""


def _plugins(config: Config) -> Iterator[tuple[str, bool, str, str]]:
    host = _host(config)
    advice = "mend or uninstall it, or name it in plugins: {disable: [...]}"
    disabled = config.plugins.disable
    for view in host.plugins():
        title = f"{view.distribution} {view.version}"
        ok = view.error is None or view.name in disabled or view.distribution in disabled
        yield f"plugin {view.name}", ok, f"{title}: {view.error}" if view.error else title, advice
    backends = [backend.name for backend in host.runtime_backends()]
    yield "runtimes", bool(backends), ", ".join(backends) or "none is installed", "pip install modelium-plugin-triton"
    for what, choose in (
        ("sections", lambda: validate_sections(config, host.sections())),
        ("brain", lambda: host.brain(config.brain.name, config.brain.settings)),
        ("eviction", lambda: host.eviction_policy(config.eviction.name, config.eviction.settings)),
    ):
        try:
            choose()
        except ModeliumError as exc:
            yield what, False, exc.message, ""
        else:
            yield what, True, {"brain": config.brain.name, "eviction": config.eviction.name}.get(what, "valid"), ""
    devices = host.devices()
    found = ", ".join(f"{d.id} {d.name} {human(d.total_bytes)}" for d in devices)
    yield "devices", bool(devices), found or "none is reported", "see `modelium plugins` for errors"
    for failure in host.failures():
        yield f"plugin {failure.plugin}", False, str(failure), "report it to the plugin's author"
