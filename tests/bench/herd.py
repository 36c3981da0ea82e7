"""Many clients at once on one COLD model: one load, all answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from tests.models import onnx_linear
from tests.service import Served, served

CLIENTS = 200


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    with served(folder / "root") as service:
        service.drop(onnx_linear(folder / "herd.onnx"))
        service.until_state("herd", "READY")
        service.post("/models/herd/unload")
        before = _loads(service)
        start = time.perf_counter()
        answered = asyncio.run(_ask(service))
        took = time.perf_counter() - start
        loads = _loads(service) - before
    yield (
        f"{CLIENTS} clients at once on one COLD model",
        f"{answered} answered, {loads} load(s), {took:.2f} s",
        f"{CLIENTS} answered, 1 load",
    )


def _loads(service: Served) -> int:
    return sum(1 for t in _transitions(service) if t["after"] == "LOADING")


def _transitions(service: Served) -> list[dict[str, str]]:
    found = service.get("/models/herd/explain")["transitions"]
    return list(found)


async def _ask(service: Served) -> int:
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one() -> bool:
            async with session.post(f"{service.url}/v2/models/herd/infer", json=body) as answer:
                return answer.status == 200 and "outputs" in await answer.json()

        return sum(await asyncio.gather(*(one() for _ in range(CLIENTS))))
