"""The controller's process: its command line, its environment, its files, and its port."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelium.api.environments import hash_of
from modelium.api.ports import hold
from modelium.errors import ConfigError
from modelium_plugin_rayserve.settings import RayServeSettings

SOCKET = "controller.sock"
CODE = "import sys; sys.path.append(sys.argv.pop(1)); from onray.controller import main; main()"
"""The package goes last on the path: it must not hide anything of Ray's."""

SESSION = "ray"
"""Ray's own folder in it, which Ray opens to all."""

LONGEST_FOLDER = 38
"""Ray makes sockets in `FOLDER/ray/session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store`, and a socket's
path may have 107 bytes (unix(7))."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to spawn, and what to know again after a restart of Modelium."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    facts: Mapping[str, Any]


def command(settings: RayServeSettings, python: Path, state_dir: Path, instance: str) -> Command:
    """How the controller is started. Raises `ConfigError` for what is in the way. Writes files."""
    folder = private_folder(state_dir)
    (folder / SOCKET).unlink(missing_ok=True)
    own = settings.address is None
    port = choose_port(settings.http_port, state_dir)
    arguments = {
        "socket": str(folder / SOCKET),
        "address": settings.address,
        "http_port": port,
        "num_cpus": settings.num_cpus or os.cpu_count(),
        "object_store_bytes": settings.object_store_bytes,
        "temp_dir": str(folder / SESSION),
    }
    env = {"RAY_USAGE_STATS_ENABLED": "0"}
    if own:
        env |= {
            # Ray's name for a cluster of this machine alone, whose servers all stay on loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Who can talk to Ray can run code as this user: no other user of this machine may.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(_token(state_dir)),
            "RAY_worker_niceness": "0",  # as other runtimes' processes: by default replicas would come last
            "RAY_ROTATION_MAX_BYTES": str(16 * 2**20),
            "RAY_ROTATION_BACKUP_COUNT": "2",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # GPUs are numbered as NVML numbers them
            # Ray would have each replica's libraries use one thread.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
        }
    return Command(
        argv=(str(python), "-c", CODE, str(Path(__file__).parent), json.dumps(arguments)),
        env=env,
        facts={"instance": instance, "socket": arguments["socket"], "address": settings.address},
    )


def private_folder(state_dir: Path) -> Path:
    """A short path of our own for sockets and Ray's session; the same each time. Raises `ConfigError`."""
    parent = Path(tempfile.gettempdir())
    name = f"modelium-ray-{hash_of(str(state_dir.resolve()))}"
    if len(os.fsencode(parent / name)) > LONGEST_FOLDER:
        parent = Path("/tmp")
    folder = parent / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is somebody else's, or open to others: remove it, since Ray's sockets go there", code="storage"
        )
    return folder


def sweep(state_dir: Path) -> None:
    """Remove what a cluster of ours left behind. Only while none runs."""
    shutil.rmtree(private_folder(state_dir), ignore_errors=True)


def _token(state_dir: Path) -> Path:
    """The file that holds the cluster's secret; a new one for each cluster."""
    path = state_dir / "token"
    state_dir.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(path, "x", encoding="ascii", opener=lambda p, f: os.open(p, f, 0o600)) as file:
        file.write(secrets.token_hex(32))
    return path


def choose_port(wanted: int, state_dir: Path) -> int:
    """The configured port; where that is 0 the one used last time, if it is free, else any free one.

    Raises `ConfigError` when the configured one is in use.
    """
    memory = state_dir / "port.json"
    last = 0
    with contextlib.suppress(OSError, ValueError):
        last = int(json.loads(memory.read_text()))
    holder = hold(wanted or last) or (None if wanted else hold(0))
    if holder is None:
        raise ConfigError(
            f"ray_serve.http_port is {wanted}, and another program uses that port: choose another, or leave it out for "
            "a free one",
            code="address",
        )
    with contextlib.closing(holder):
        port = int(holder.getsockname()[1])
    state_dir.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(port))
    return port
