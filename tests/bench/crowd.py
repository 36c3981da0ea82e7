"""500 clients at once on 50 COLD models of which ten fit: how long it takes, how many loads, and that nobody fails."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from tests.bench.front import BODY, identity
from tests.service import Served, served

MODELS, CLIENTS, FIT = 50, 500, 10


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    policies = {"min_resident_seconds": 0, "request_deadline_s": 900}
    with served(folder / "root", {"orchestration": {"policies": policies}}) as service:
        for number in range(MODELS):
            service.drop(identity(folder / f"m{number:02d}"))
        service.until(lambda: len(service.ps()) == MODELS, 300, "all to be accepted")
        service.until(lambda: {m["state"] for m in service.ps().values()} <= {"READY", "COLD"}, 300, "rest")
        for name in service.ps():
            service.post(f"/models/{name}/unload")
        size = max(m["memory_bytes"] for m in service.ps().values())
        service.stop()
        service.configure({"orchestration": {"policies": {**policies, "device_budget_bytes": {"cpu:0": FIT * size}}}})
        service.start()
        before = _loads(service)
        start = time.perf_counter()
        found = asyncio.run(_ask(service))
        took = time.perf_counter() - start
        loads = _loads(service) - before
    failed = CLIENTS - found["200"]
    yield (
        f"{CLIENTS} clients on {MODELS} COLD models, {FIT} fit",
        f"{took:.0f} s, {loads} loads, {failed} failed{f' {dict(found)}' if failed else ''}",
        "none failed",
    )


def _loads(service: Served) -> int:
    return sum(t["after"] == "LOADING" for t in service.get("/decisions?limit=10000"))


async def _ask(service: Served) -> Counter[str]:
    timeout = aiohttp.ClientTimeout(total=1000)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as web:

        async def one(number: int) -> str:
            try:
                async with web.post(f"{service.url}/v2/models/m{number % MODELS:02d}/infer", json=BODY) as answer:
                    await answer.read()
                    return str(answer.status)
            except aiohttp.ClientError as exc:
                return type(exc).__name__

        return Counter(await asyncio.gather(*(one(number) for number in range(CLIENTS))))
