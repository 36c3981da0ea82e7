"""The environment that Ray and its replicas run in: made in the cache, by named packs.

Versions are pinned so that a model loads tomorrow as it did today.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelium.api import Report
from modelium.api.environments import (
    Environment,
    find_interpreter,
    hash_of,
    install_pack,
    make_environment,
    on_disk,
    probe,
)
from modelium.api.pip import InstallError
from modelium.errors import ConfigError
from modelium_plugin_rayserve.settings import RayServeSettings

RAY = "ray[serve]==2.60.0"

BASE = "ray"
PACKS: dict[str, tuple[str, ...]] = {
    BASE: (RAY, "numpy==2.4.6"),
    "onnx": ("onnxruntime==1.31.1",),
    "torch": ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "pillow==13.0.0"),
}
CONSTRAINTS = (RAY.replace("[serve]", ""), "numpy==2.4.6")
"""For every installation: what runs already must not change under it."""

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
"""Of Python, that all of these have wheels for."""

PACK_OF = {"onnxruntime": "onnx", "torch": "torch", "transformers": "torch", "safetensors": "torch", "PIL": "torch"}
"""The pack that brings a module which a person's own model imports."""


async def environment_for(cache: Path, settings: RayServeSettings) -> Environment | None:
    """Ours, made or not; None where the configuration names an interpreter that has all.

    Raises `ConfigError` for an interpreter that does not run, and when there is none for our environment.
    """
    if settings.python is not None:
        if await probe(settings.python) is None:
            raise ConfigError(f"ray_serve.python is {settings.python}, and that does not run as a Python interpreter")
        return None
    interpreter = await find_interpreter(None, VERSIONS, what="Ray's environment", key="ray_serve.python")
    key = hash_of(interpreter.full_version, str(interpreter.prefix), PACKS, list(settings.pip_args))
    return Environment(cache / "ray_serve" / f"env-{interpreter.version}-{key}")


def has_pack(environment: Environment, pack: str) -> bool:
    return environment.has(pack, PACKS[pack], CONSTRAINTS)


async def install(cache: Path, settings: RayServeSettings, packs: Sequence[str], report: Report) -> Path:
    """The interpreter of the environment, which has Ray and these packs then.

    Raises `InstallError` or `ConfigError`.
    """
    environment = await environment_for(cache, settings)
    if environment is None:
        assert settings.python is not None
        return settings.python
    if unknown := [pack for pack in packs if pack not in PACKS]:
        raise InstallError(
            f"a plan asks for the pack {unknown[0]!r} of Ray's environment; there are {', '.join(PACKS)}"
        )
    with on_disk(environment.folder):
        interpreter = await find_interpreter(None, VERSIONS, what="Ray's environment", key="ray_serve.python")
        await make_environment(environment, interpreter, report, what="Ray's environment")
        for pack in dict.fromkeys((BASE, *packs)):
            await install_pack(
                environment,
                pack,
                PACKS[pack],
                report,
                what=f"installing {pack}" + ("" if pack == BASE else " for Ray"),
                constraints=CONSTRAINTS,
                pip_args=settings.pip_args,
                torch=pack == "torch",
            )
    return environment.python
