from __future__ import annotations

import asyncio

import pytest
from modelium_plugin_vllm.backend import VllmBackend
from modelium_plugin_vllm.settings import VllmSettings

from modelium.api.fakes import silent
from modelium.paths import cache_dir


@pytest.fixture(scope="session")
def installed() -> str:
    """vLLM, installed as `modelium runtimes install vllm` does, unless it is; what is said of it."""
    return asyncio.run(VllmBackend().install(cache_dir(), VllmSettings(), silent))
