"""Finds what is there already: a tritonserver, an interpreter that the wheel's server can use, its shared library."""

from __future__ import annotations

import asyncio
import glob
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from modelium.errors import ConfigError
from modelium_plugin_triton.settings import TritonSettings

INSTALLED = Path("/opt/tritonserver")
"""Where NVIDIA's containers have it."""

PYTHONS = ("3.12", "3.11")
"""Versions that the wheel has a stub for and that numpy 1.26 and the packs' libraries have wheels for."""

_PROBE = """
import json, sys, sysconfig
variable = sysconfig.get_config_var
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "full_version": "%d.%d.%d" % sys.version_info[:3],
    "prefix": sys.base_prefix,
    "library": variable("INSTSONAME") or "",
    "folders": [f for f in (variable("LIBDIR"), variable("LIBPL")) if f],
    "multiarch": variable("MULTIARCH") or "",
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that is no virtual environment's."""

    executable: Path
    version: str
    """`3.11`."""
    full_version: str
    prefix: Path
    library: Path | None
    """Its shared library, `libpython3.11.so.1.0`, which Triton's stub is linked to; None when it has none."""

    @property
    def library_name(self) -> str:
        return f"libpython{self.version}.so.1.0"


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
    """The interpreter for Triton's own environment: the configured one, ours, or a fitting one on PATH.

    Raises `ConfigError` when none will do.
    """
    if settings.python is not None:
        found = await probe(settings.python)
        if found is None:
            raise ConfigError(f"triton.python is {settings.python}, and that does not run as a Python interpreter")
        if found.version not in PYTHONS:
            raise ConfigError(
                f"triton.python is Python {found.version}; Triton's own environment needs one of {', '.join(PYTHONS)}"
            )
        return found
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = [shutil.which(f"python{version}") for version in PYTHONS]
    own = [getattr(sys, "_base_executable", sys.executable)] if ours in PYTHONS else []
    for name in [*own, *filter(None, names)]:
        found = await probe(Path(name))
        if found is not None and found.version in PYTHONS:
            return found
    raise ConfigError(
        f"Triton's own environment needs Python {' or '.join(PYTHONS)}, and neither is on PATH (Modelium runs on "
        f"{ours}): install one and name it in `triton: {{python: /path/to/python3.12}}`"
    )


async def probe(executable: Path) -> Interpreter | None:
    """What an interpreter says of itself; None when it does not run."""
    try:
        process = await asyncio.create_subprocess_exec(
            executable, "-I", "-c", _PROBE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        output, _ = await process.communicate()
        facts = json.loads(output)
    except (OSError, ValueError):
        return None
    folders = [*facts["folders"], f"{facts['prefix']}/lib", f"/usr/lib/{facts['multiarch']}"]
    interpreter = Interpreter(
        executable=executable,
        version=facts["version"],
        full_version=facts["full_version"],
        prefix=Path(facts["prefix"]),
        library=None,
    )
    library = next((p for f in folders if (p := Path(f) / interpreter.library_name).is_file()), None)
    return Interpreter(executable, interpreter.version, interpreter.full_version, interpreter.prefix, library)


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU here; asks the kernel, so it needs no library."""
    return bool(glob.glob("/proc/driver/nvidia/gpus/*")) or bool(glob.glob("/dev/nvidia[0-9]*"))
