"""The Pythons that models are served and exported by, made by the plugins' own code in the cache."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelium_plugin_tensorrt import environment
from modelium_plugin_triton.install import install_pack, prepare
from modelium_plugin_triton.locate import find_interpreter
from modelium_plugin_triton.settings import TritonSettings
from real_triton import Triton  # type: ignore[import-not-found,unused-ignore]

from modelium.api import Progress
from modelium.engine.job import Job
from modelium.paths import cache_dir


def _say(progress: Progress) -> None:
    print(progress.stage, file=sys.stderr)


@pytest.fixture(scope="session")
def base() -> Path:
    """Triton's environment, with all that its models here need."""

    async def make() -> Path:
        wheel = await prepare(cache_dir(), await find_interpreter(TritonSettings()), (), _say)
        for pack in ("torch", "onnx"):
            await install_pack(wheel.environment, pack, (), _say)
        return Path(wheel.environment.folder)

    return asyncio.run(make())


@pytest.fixture(scope="session")
def exporter(base: Path) -> Path:
    """The Python that exports."""
    return asyncio.run(environment.prepare(cache_dir() / "tensorrt", base, True, (), _say))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(str(tmp_path), _say)


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    server = Triton(tmp_path_factory.mktemp("triton"))
    yield server
    server.close()
