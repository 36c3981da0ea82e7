"""Estimates from headers against what the real server holds once it has computed a long prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from llamacpp_lab import Lab
from modelium_plugin_llamacpp import memory
from modelium_plugin_llamacpp.settings import model_settings
from tiny_gguf import bert, llama

from modelium.api.testing import silent

pytestmark = pytest.mark.timeout(300)

Make = Callable[[Path], Path]

WIDE: dict[str, Any] = {"width": 512, "heads": 8, "kv_heads": 8, "feed_forward": 1024, "context": 2048}

MODELS: dict[str, tuple[Make, dict[str, Any]]] = {
    "plain": (lambda path: llama(path, **WIDE, kind="F16"), {}),
    "many-at-a-time": (lambda path: llama(path, **WIDE, kind="F16"), {"parallel": 6}),
    "rewritten-for-the-processor": (lambda path: llama(path, **WIDE, layers=6, kind="Q4_0"), {}),
    "small-caches": (lambda path: llama(path, **WIDE, kind="Q8_0"), {"cache_type_k": "q8_0", "cache_type_v": "q4_0"}),
    "many-words": (lambda path: llama(path, width=256, words=40_000, context=1024, kind="F16"), {}),
    "windows": (
        lambda path: llama(
            path, arch="gemma3", width=512, layers=6, context=8192, kind="F16", attention__sliding_window=512
        ),
        {},
    ),
    "embeddings": (lambda path: bert(path, width=512, heads=8, layers=6, context=512), {}),
}


async def test_estimates_are_within_a_tenth_or_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    driver = lab.driver()
    await driver.start()
    errors = {}
    try:
        for name, (make, settings) in MODELS.items():
            request = lab.model(name, make(tmp_path / f"{name}.gguf"), **settings)
            embedding = "embedding" in request.plan.settings
            wanted = memory.estimate(request.analysis, model_settings(request.plan.settings), embedding=embedding)
            outcome = await driver.load(request, silent)
            await prompt(outcome.endpoints[0].address, embedding)
            held = next(m.memory["cpu:0"] for m in (await driver.observe()).models if m.name == name)
            # Others that run meanwhile have their part of its libraries, which is not in what it is found to hold.
            alone = psutil.Process(driver._servers[name].record.pid).memory_info().rss
            errors[name] = min(wanted / held - 1, max(0.0, wanted / alone - 1))
            await driver.unload(name)
    finally:
        await driver.close()
        await lab.end()
    assert all(-0.1 < error < 0.15 for error in errors.values()), errors


async def prompt(address: str, embedding: bool) -> None:
    """Long enough to be computed in one go of the largest size."""
    path, body = "/v1/completions", {"prompt": "a" * 700, "max_tokens": 1}
    if embedding:
        path, body = "/v1/embeddings", {"input": "hello " * 500}
    async with aiohttp.ClientSession() as http, http.post(address + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
