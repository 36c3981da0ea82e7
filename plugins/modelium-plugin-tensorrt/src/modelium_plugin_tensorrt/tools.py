"""What TensorRT there is: NVIDIA's program `trtexec`, or the Python package."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from modelium.errors import ConfigError
from modelium_plugin_tensorrt.settings import TensorRTSettings

CONTAINER = Path("/usr/src/tensorrt/bin")
"""Where NVIDIA's containers have trtexec, Triton's among them."""

NONE = "TensorRT is not installed: `pip install tensorrt` beside PyTorch, or run where trtexec is (NVIDIA's containers)"

_VERSION = re.compile(r"\[TensorRT v(\d+)\]")
"""The first line of trtexec's output: 101303 is 10.13.3, and before version 10 8601 was 8.6.1 (NvInferVersion.h)."""
_PROBE_S = 60.0


@dataclass(frozen=True, slots=True)
class Tool:
    """One way to make engines."""

    path: Path
    """Of trtexec, or of a Python."""
    version: str
    """`10.13.3`."""
    python: bool


async def find(settings: TensorRTSettings) -> Tool | None:
    """What is configured, else what lies in the usual places; None where there is nothing.

    Raises `ConfigError` when what is configured is of no use.
    """
    if settings.trtexec is not None:
        path = shutil.which(settings.trtexec)
        version = await trtexec_version(Path(path)) if path else None
        if path is None or version is None:
            raise ConfigError(f"tensorrt.trtexec is {settings.trtexec}, which does not run as TensorRT's trtexec")
        return Tool(Path(path), version, python=False)
    if settings.python is not None:
        version = package_version(settings.python)
        if version is None:
            raise ConfigError(
                f"tensorrt.python is {settings.python}, which has no package `tensorrt`: "
                f"`{settings.python} -m pip install tensorrt`"
            )
        return Tool(settings.python, version, python=True)
    path = shutil.which("trtexec", path=os.pathsep.join([os.environ.get("PATH", ""), str(CONTAINER)]))
    version = await trtexec_version(Path(path)) if path else None
    if path is not None and version is not None:
        return Tool(Path(path), version, python=False)
    version = package_version(Path(sys.executable))
    return Tool(Path(sys.executable), version, python=True) if version else None


async def trtexec_version(path: Path) -> str | None:
    """None when it does not run, or says something else."""
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            "--help",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(_PROBE_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    found = _VERSION.search(output.decode(errors="replace"))
    return _spelt(int(found[1])) if found else None


def _spelt(number: int) -> str:
    unit = 10_000 if number >= 100_000 else 1_000
    return f"{number // unit}.{number % unit // 100}.{number % 100}"


def package_version(python: Path) -> str | None:
    """The version of `tensorrt` in a Python's own site-packages, by what is installed there: nothing is started."""
    places = [
        *python.parent.parent.glob("lib*/python3*/site-packages"),
        *python.parent.parent.glob("lib*/python3/dist-packages"),
    ]
    for place in places:
        for found in place.glob("tensorrt-*.dist-info"):
            return found.name.removeprefix("tensorrt-").removesuffix(".dist-info")
    return None
