"""Finds a llama-server, or makes an environment with llama.cpp's server in a Python package.

The package is xllamacpp: llama.cpp with its own HTTP server, built for Linux on x86-64 and arm64, without dependencies.
Of llama-cpp-python, whose server is a program in Python, PyPI has the source alone.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelium.api import Report
from modelium.api.environments import (
    Environment,
    Interpreter,
    find_interpreter,
    hash_of,
    install_pack,
    make_environment,
)
from modelium.errors import ConfigError, DriverError
from modelium_plugin_llamacpp.settings import LlamaCppSettings

PACKAGE = "xllamacpp==2026.10.11549"
PACK = "llamacpp"
LAUNCHER = Path(__file__).with_name("launcher.py")

VERSIONS = ("3.14", "3.13", "3.12", "3.11", "3.10")
"""The wheel takes any CPython from 3.10 on."""

ANSWERS_WITHIN_S = 60.0
"""A program with CUDA looks for GPUs before it says its version."""

_PROBE = """
import json, xllamacpp
kinds = [str(device["type"]) for device in xllamacpp.get_device_info()]
print(json.dumps({"gpu": any("GPU" in kind for kind in kinds)}))
"""


@dataclass(frozen=True, slots=True)
class Program:
    """A server that can be run, with llama-server's arguments."""

    argv: Sequence[str]
    version: str
    gpu: bool
    """It can compute on a GPU that it sees."""
    env: Mapping[str, str] = field(default_factory=dict)


def executable(settings: LlamaCppSettings) -> Path | None:
    """The llama-server of the configuration or of PATH. Raises `ConfigError` when the configured one can't be run."""
    if settings.executable is not None:
        found = shutil.which(settings.executable)
        if found is None:
            raise ConfigError(
                f"llamacpp.executable is {settings.executable}, and that is no program that can be run: give the path "
                "of a llama-server, or leave it out to use the one that `modelium runtimes install llamacpp` brings"
            )
        return Path(found).resolve()
    on_path = shutil.which("llama-server")
    return Path(on_path).resolve() if on_path else None


async def installed(cache: Path, settings: LlamaCppSettings) -> Program | None:
    """What can be run already: llama-server, else the environment; None when there is neither.

    Raises `DriverError` when what is there does not run.
    """
    found = executable(settings)
    if found is not None:
        # It tells its version on one stream or the other.
        said = await _run([str(found), "--version"])
        match = re.search(r"version:\s*(.+)", said)
        devices = await _run([str(found), "--list-devices"])
        gpu = bool(re.search(r"^\s*(CUDA|ROCm|Vulkan|SYCL|MUSA)\d+:", devices, re.MULTILINE))
        return Program([str(found)], f"llama-server {match[1].strip() if match else 'of unknown version'}", gpu)
    environment = await _environment(cache, settings)
    return await _program(environment) if environment.has(PACK, [PACKAGE]) else None


async def install(cache: Path, settings: LlamaCppSettings, report: Report) -> Program:
    """As `installed`, and make the environment where there is nothing. Raises `DriverError` or `ConfigError`."""
    there = await installed(cache, settings)
    if there is not None:
        return there
    environment = await _environment(cache, settings)
    interpreter = await _interpreter(settings)
    await make_environment(environment, interpreter, report, what="llama.cpp's environment")
    await install_pack(
        environment, PACK, [PACKAGE], report, what="installing llama.cpp", pip_args=settings.pip_args
    )  # fmt: skip
    return await _program(environment)


async def _environment(cache: Path, settings: LlamaCppSettings) -> Environment:
    """Another interpreter, package or index makes another one: what runs in the old one is left alone."""
    interpreter = await _interpreter(settings)
    key = hash_of(interpreter.full_version, str(interpreter.prefix), PACKAGE, list(settings.pip_args))
    return Environment(cache / "llamacpp" / f"env-{interpreter.version}-{key}")


async def _interpreter(settings: LlamaCppSettings) -> Interpreter:
    return await find_interpreter(settings.python, VERSIONS, what="llama.cpp's environment", key="llamacpp.python")


async def _program(environment: Environment) -> Program:
    said = await _run([str(environment.python), "-I", "-c", _PROBE])
    try:
        gpu = bool(json.loads(said.splitlines()[-1])["gpu"])
    except (ValueError, LookupError, TypeError):
        raise DriverError(
            f"the environment {environment.folder} does not run: {said.strip().splitlines()[-1:]}; remove it and run "
            "`modelium runtimes install llamacpp`",
            code="broken_environment",
        ) from None
    return Program([str(environment.python), "-I", str(LAUNCHER)], PACKAGE.replace("==", " "), gpu)


async def _run(command: Sequence[str]) -> str:
    """All that it says. Raises `DriverError` when it can't be run or does not end."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise DriverError(f"{command[0]} can't be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise DriverError(f"`{' '.join(command[:2])}` did not end within {ANSWERS_WITHIN_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace")
