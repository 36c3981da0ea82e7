"""Our own tritonserver: its command line, its ports, and what is left of one that died."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelium.api import ProcessRecord
from modelium.api.ports import HOST, hold
from modelium.errors import ConfigError
from modelium_plugin_triton.install import Wheel
from modelium_plugin_triton.locate import INSTALLED, backends_folder
from modelium_plugin_triton.settings import TritonSettings

EXIT_TIMEOUT_S = 15
"""How long it waits for requests in flight when it is told to end."""
STUCK_EXIT_S = 3
"""How long one gets that would wait for its own wedged load."""
LOAD_THREADS = 16
"""How many models it loads at a time; 4 unless told. A load that never ends keeps its thread."""

PORTS = ("http", "grpc", "metrics")
SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Command:
    """What to spawn, and what to know again after a restart of Modelium."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    facts: Mapping[str, object]


def command(
    settings: TritonSettings,
    repository: Path,
    ports: Mapping[str, int],
    *,
    executable: Path,
    wheel: Wheel | None,
) -> Command:
    """How tritonserver is started on `repository`: in explicit mode, for this machine alone."""
    backends = wheel.backends if wheel else backends_folder(executable)
    argv = [
        str(executable),
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        # Readiness is each model's own affair: without this, any load makes the whole server unready.
        "--strict-readiness=false",
        f"--model-load-thread-count={LOAD_THREADS}",
        f"--log-verbose={settings.log_verbose}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(repository)}",
    ]
    for name in PORTS:
        argv += [f"--{name}-address={HOST}", f"--{name}-port={ports[name]}"]
    if backends is not None:
        argv.append(f"--backend-directory={backends}")
    argv += settings.args
    env = {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # GPUs are numbered as NVML numbers them
    if wheel is not None:
        env["LD_LIBRARY_PATH"] = _joined(wheel.libraries, os.environ.get("LD_LIBRARY_PATH"))
        # The stub asks PATH for its interpreter.
        env["PATH"] = _joined(wheel.environment.folder / "bin", os.environ.get("PATH", os.defpath))
    facts = {
        "repository": str(repository),
        "ports": dict(ports),
        "environment": str(wheel.environment.folder) if wheel else None,
        "backends": str(_backend_directory(argv) or INSTALLED / "backends"),
    }
    return Command(argv=tuple(argv), env=env, facts=facts)


def _joined(first: Path, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else str(first)


def _backend_directory(argv: Iterable[str]) -> str | None:
    return argument(tuple(argv), "--backend-directory")


def argument(argv: tuple[str, ...], name: str) -> str | None:
    """The value of an argument, given as `--name=value` or as two; the last one counts."""
    found = None
    for index, word in enumerate(argv):
        if word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word == name and index + 1 < len(argv):
            found = argv[index + 1]
    return found


def facts_of(record: ProcessRecord) -> dict[str, object]:
    """The facts of a living server; from its command line when its record was lost."""
    if record.facts:
        return dict(record.facts)
    argv = record.argv
    return {
        "repository": argument(argv, "--model-repository"),
        "ports": {name: int(argument(argv, f"--{name}-port") or 0) for name in PORTS},
        "environment": None,
        "backends": argument(argv, "--backend-directory") or str(INSTALLED / "backends"),
    }


# --------------------------------------------------------------------------- ports


def choose_ports(settings: TritonSettings, state_dir: Path) -> dict[str, int]:
    """The configured ports; for each that is 0 the one used last time, if it is free, else any free one.

    Raises `ConfigError` when a configured one is in use.
    """
    memory = state_dir / "ports.json"
    last: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        last = {str(k): int(v) for k, v in json.loads(memory.read_text()).items()}
    ports: dict[str, int] = {}
    held: list[socket.socket] = []
    try:
        for name in PORTS:
            wanted = getattr(settings, f"{name}_port")
            holder = hold(wanted or last.get(name, 0)) or (None if wanted else hold(0))
            if holder is None:
                raise ConfigError(
                    f"triton.{name}_port is {wanted}, and another program uses that port: choose another, or leave it "
                    "out for a free one",
                    code="address",
                )
            held.append(holder)
            ports[name] = holder.getsockname()[1]
    finally:
        for holder in held:
            holder.close()
    with contextlib.suppress(OSError):
        state_dir.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(ports))
    return ports


# --------------------------------------------------------------------------- shared memory


def shm_prefix(repository: Path) -> str:
    """How the shared memory of this repository's stubs is called, so that what a killed server left can be told."""
    return f"modelium-{hashlib.sha256(str(repository).encode()).hexdigest()[:12]}-"


def sweep_shm(repository: Path) -> None:
    """Remove shared memory that a killed server left. Only while none runs on this repository."""
    for path in SHM.glob(f"{shm_prefix(repository)}*"):
        with contextlib.suppress(OSError):
            path.unlink()
