"""A service killed, and one with another configuration, in the middle of 30 s of requests for loaded models."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp

from tests.bench.front import BODY, identity
from tests.service import Served, served

MODELS, CLIENTS, SECONDS = 5, 8, 30


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    with served(folder / "root", {"server": {"data_path": "haproxy"}}) as service:
        names = [f"m{number}" for number in range(MODELS)]
        for name in names:
            service.drop(identity(folder / name))
        for name in names:
            service.until_state(name, "READY")
        yield _row(service, names, "kill -9 of Modelium", service.kill)
        yield _row(service, names, "another configuration", lambda: _reconfigure(service))


def _reconfigure(service: Served) -> None:
    service.stop()
    service.configure({"server": {"data_path": "haproxy", "allowed_hosts": ["models.example"]}})


def _row(service: Served, names: list[str], what: str, end: Callable[[], object]) -> tuple[str, str, str]:
    found, away_s, adopted_s = asyncio.run(_measure(service, names, end))
    total = found.total()
    failed = total - found["200"]
    told = (
        f"{total:,} requests, {failed} failed{f' {dict(found)}' if failed else ''}; away {away_s:.1f} s, all adopted "
        f"{adopted_s:.1f} s after its start"
    )
    return (f"{what} within {SECONDS} s of requests", told, "none failed")


async def _measure(service: Served, names: list[str], end: Callable[[], object]) -> tuple[Counter[str], float, float]:
    over = asyncio.Event()
    found: Counter[str] = Counter()

    async def client(number: int) -> None:
        async with aiohttp.ClientSession() as web:
            while not over.is_set():
                name = names[number % len(names)]
                number += 1
                try:
                    async with web.post(f"{service.url}/v2/models/{name}/infer", json=BODY) as answer:
                        await answer.read()
                        found[str(answer.status)] += 1
                except aiohttp.ClientError as exc:
                    found[type(exc).__name__] += 1

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    began = time.perf_counter()
    await asyncio.sleep(SECONDS / 3)
    gone = time.perf_counter()
    await asyncio.to_thread(end)
    await asyncio.sleep(1)
    started = time.perf_counter()
    await asyncio.to_thread(service.start)
    back = time.perf_counter()
    await asyncio.to_thread(
        service.until, lambda: {service.state(name) for name in names} == {"READY"}, 60, "all to be adopted"
    )
    adopted = time.perf_counter()
    await asyncio.sleep(max(0.0, began + SECONDS - time.perf_counter()))
    over.set()
    await asyncio.gather(*clients)
    return found, back - gone, adopted - started
