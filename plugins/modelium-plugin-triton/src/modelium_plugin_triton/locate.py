"""Finds what is there already: a tritonserver and its backends, an interpreter that the wheel's server can use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from modelium.api import environments
from modelium.api.environments import Interpreter
from modelium.errors import ConfigError
from modelium_plugin_triton.settings import TritonSettings

INSTALLED = Path("/opt/tritonserver")
"""Where NVIDIA's containers have it."""

PYTHONS = ("3.12", "3.11")
"""Versions that the wheel has a stub for and that numpy 1.26 and the packs' libraries have wheels for."""


def find_executable(settings: TritonSettings) -> Path | None:
    """The tritonserver of the configuration, of PATH or of NVIDIA's containers; None when there is none of them.

    Raises `ConfigError` when the configured one can't be run.
    """
    if settings.executable is not None:
        found = shutil.which(settings.executable)
        if found is None:
            raise ConfigError(
                f"triton.executable is {settings.executable}, and that is no program that can be run: "
                "give the path of a tritonserver, or leave it out to use the one that pip brings"
            )
        return Path(found).resolve()
    found = shutil.which("tritonserver", path=os.pathsep.join([os.environ.get("PATH", ""), str(INSTALLED / "bin")]))
    return Path(found).resolve() if found else None


def backends_folder(executable: Path) -> Path | None:
    """The backend directory that belongs to an executable; None when it is where tritonserver itself looks."""
    beside = executable.parent.parent / "backends"
    return beside if beside.is_dir() and beside.parent != INSTALLED else None


def list_backends(folder: Path) -> tuple[str, ...]:
    """The backends of a backend directory: a folder with a shared library (`libtriton_NAME.so`) or, for a Python-based
    backend, a `model.py`."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return ()
    return tuple(e.name for e in entries if _library(e).exists() or (e / "model.py").exists())


def python_based(folder: Path) -> frozenset[str]:
    """Those of its backends whose models run in the Python backend's processes."""
    return frozenset(name for name in list_backends(folder) if name == "python" or not _library(folder / name).exists())


def _library(backend: Path) -> Path:
    return backend / f"libtriton_{backend.name}.so"


async def find_interpreter(settings: TritonSettings) -> Interpreter:
    """The interpreter for Triton's own environment. Raises `ConfigError` when none will do."""
    return await environments.find_interpreter(
        settings.python, PYTHONS, what="Triton's own environment", key="triton.python"
    )
