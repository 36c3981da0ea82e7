"""Two minutes of everything at once, then quiet: all that was asked is answered, and what is believed is what is there.

The order of things is drawn from a seed that is printed: `MODELIUM_CHAOS_SEED=... MODELIUM_CHAOS_SECONDS=...` says it
again, as far as processes can be made to.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.kit import (
    Got,
    Straight,
    Toy,
    ensemble,
    eventually,
    helpers_of,
    infer,
    kill,
    stubs_of,
    talker,
    toy,
    triton,
    triton_address,
    write_toy_config,
    x_body,
)
from tests.service import Answer, Served, processes_of

SECONDS = float(os.environ.get("MODELIUM_CHAOS_SECONDS", "120"))
SEED = int(os.environ.get("MODELIUM_CHAOS_SEED") or random.SystemRandom().randrange(10**6))

MIB = 2**20
TOYS = 5
CLIENTS = 8
BUDGET = 260 * MIB
"""Room for about three of them."""

ANSWERED = {200, 404, 409, 429, 502, 503, 507}
"""Also what is refused is answered; 500 would be a fault of ours, and 0 no answer at all."""

CONFIG = {
    "orchestration": {
        "settle_s": 0.3,
        "rescan_interval_s": 1,
        "policies": {
            "device_budget_bytes": {"cpu:0": BUDGET},
            "min_resident_seconds": 0.5,
            "fairness_after_s": 3,
            "drain_timeout_s": 5,
            "retry_s": 0.3,
            "retry_max_s": 2,
            "crash_budget": 10_000,
            "load_timeout_s": 60,
        },
    }
}


@dataclass
class Asked:
    """One request, and what became of it."""

    what: str
    began: float
    ended: float = 0.0
    got: Got | None = None
    left: bool = False
    """The client went away by itself."""
    expected: Any = None


@dataclass
class Chaos:
    service: Served
    folder: Path
    toys: dict[str, Toy] = field(default_factory=dict)
    aside: dict[str, Path] = field(default_factory=dict)
    """Folders that were taken out of the repository by hand, and where they are."""
    gone: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    down: list[tuple[float, float]] = field(default_factory=list)
    """When Modelium was not there, or Triton died: connections may break."""
    did: Counter[str] = field(default_factory=Counter)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    up: asyncio.Event = field(default_factory=asyncio.Event)

    # ------------------------------------------------------------------ those who ask

    async def client(self, number: int, web: aiohttp.ClientSession) -> None:
        rng = random.Random(f"{SEED} client {number}")
        while not self.over.is_set():
            await self.up.wait()
            name = rng.choice([*self.toys, "six", "talker", "nobody"])
            await self.ask(web, rng, name)
            await asyncio.sleep(rng.choice([0, 0, 0, 0.01, 0.3]))

    async def ask(self, web: aiohttp.ClientSession, rng: random.Random, name: str) -> None:
        headers = {"x-modelium-deadline-s": str(rng.choice([0.2, 2, 10, 20]))}
        x = [float(rng.randrange(100))]
        path, body = f"/v2/models/{name}/infer", x_body(x)
        if name == "talker":
            path, body = "/v2/models/talker/generate_stream", {"text_input": "one two"}
        elif rng.random() < 0.2:
            path, body = f"/predict/{name}", {"inputs": x}
        asked = Asked(f"{path} {headers}", time.monotonic(), expected=(name, x[0]))
        self.asked.append(asked)
        patience = rng.choice([None, None, None, 0.05, 1.0])
        try:
            async with asyncio.timeout(patience):
                asked.got = await _post(web, self.service.url + path, body, headers)
        except TimeoutError:
            asked.left = True
        asked.ended = time.monotonic()

    # ------------------------------------------------------------------ what happens

    async def happen(self) -> None:
        rng = random.Random(f"{SEED} events")
        events: list[tuple[int, Callable[[random.Random], Awaitable[None]]]] = [
            (4, self.load), (5, self.unload), (3, self.pin), (3, self.unpin), (3, self.change), (2, self.remove),
            (2, self.take_away), (2, self.bring_back), (2, self.kill_stub), (1, self.kill_triton),
            (1, self.kill_service),
        ]  # fmt: skip
        weights = [weight for weight, _ in events]
        while not self.over.is_set():
            (_, event) = rng.choices(events, weights)[0]
            self.did[event.__name__] += 1
            await event(rng)
            await asyncio.sleep(rng.uniform(0.05, 0.7))

    async def order(self, method: str, path: str) -> None:
        """An order that a person gives; it may be refused, and is answered."""
        asked = Asked(f"{method} {path}", time.monotonic())
        self.asked.append(asked)

        def give() -> Got:
            try:
                headers = {"x-modelium-deadline-s": "20"}
                return Got(200, self.service.request(method, path, headers=headers).decode(), {})
            except Answer as exc:
                return Got(exc.status, exc.body.decode(), {})

        asked.got = await asyncio.to_thread(give)
        asked.ended = time.monotonic()

    async def load(self, rng: random.Random) -> None:
        await self.order("POST", f"/models/{rng.choice([*self.toys, 'six'])}/load")

    async def unload(self, rng: random.Random) -> None:
        await self.order("POST", f"/models/{rng.choice([*self.toys, 'six', 'talker'])}/unload")

    async def pin(self, rng: random.Random) -> None:
        await self.order("POST", f"/models/{rng.choice(list(self.toys))}/pin")

    async def unpin(self, rng: random.Random) -> None:
        for name in self.toys:
            if rng.random() < 0.7:
                await self.order("POST", f"/models/{name}/unpin")

    async def change(self, rng: random.Random) -> None:
        """New files in place, which multiply as the old ones do: a right answer stays right."""
        made = self.toys[rng.choice(list(self.toys))]
        if (made.path / "1").is_dir():
            with suppress(FileNotFoundError):  # it is being removed
                ballast = rng.randrange(20, 70) * MIB
                write_toy_config(made.path, factor=2, control=made.control, ballast_bytes=ballast)

    async def remove(self, rng: random.Random) -> None:
        """By the service, to its trash; and another one under the same name comes in."""
        name = rng.choice(list(self.toys))
        if name in self.aside:
            return
        await self.order("DELETE", f"/models/{name}")
        if not self.toys[name].path.exists():
            await asyncio.to_thread(self.drop, name)

    def drop(self, name: str) -> None:
        source = self.folder / f"new-{self.did.total()}-{len(self.asked)}" / name
        made = toy(source, control=self.folder / f"{name}.control", ballast_bytes=40 * MIB)
        made.path.rename(self.service.root / "incoming" / name)
        self.toys[name] = Toy(self.service.root / "repository" / name, made.control)

    async def take_away(self, rng: random.Random) -> None:
        name = rng.choice(list(self.toys))
        place = self.folder / "aside" / name
        with suppress(FileNotFoundError):
            if name not in self.aside:
                self.toys[name].path.rename(place)
                self.aside[name] = place

    async def bring_back(self, rng: random.Random) -> None:
        for name, place in list(self.aside.items()):
            place.rename(self.toys[name].path)
            del self.aside[name]

    async def kill_stub(self, rng: random.Random) -> None:
        stubs = sorted(await asyncio.to_thread(stubs_of, self.service.root))
        if stubs:
            kill(rng.choice(stubs))

    async def kill_triton(self, rng: random.Random) -> None:
        """HAProxy closes the connections of those whose requests it holds, and leaves it to them to ask again."""
        began = time.monotonic()
        for pid, command in (await asyncio.to_thread(processes_of, self.service.root)).items():
            if command.split()[0].endswith("/tritonserver"):
                kill(pid)
        self.down.append((began, time.monotonic() + 1))

    async def kill_service(self, rng: random.Random) -> None:
        began = time.monotonic()
        self.up.clear()
        helpers = await asyncio.to_thread(helpers_of, self.service)
        self.service.kill()
        _, left = await asyncio.to_thread(psutil.wait_procs, helpers, 30)
        assert not left, f"these outlived Modelium: {left}"
        await asyncio.to_thread(self.service.start, ready=rng.random() < 0.5)
        self.down.append((began, time.monotonic()))
        self.up.set()

    # ------------------------------------------------------------------ afterwards

    def unanswered(self) -> list[Asked]:
        """What was not answered as it must be. Only where something was killed may a connection break."""
        bad = []
        for asked in self.asked:
            if asked.left:
                continue
            got = asked.got
            if got is None or not asked.ended:
                bad.append(asked)
            elif got.status == 0:
                if not any(began <= asked.ended and asked.began <= ended for began, ended in self.down):
                    bad.append(asked)
            elif got.status not in ANSWERED or (got.status == 200 and not _right(asked)):
                bad.append(asked)
        return bad


async def _post(web: aiohttp.ClientSession, url: str, body: Any, headers: dict[str, str]) -> Got:
    try:
        async with web.post(url, json=body, headers=headers) as answer:
            return Got(answer.status, await answer.text(), dict(answer.headers))
    except aiohttp.ClientError as exc:
        return Got(0, f"{type(exc).__name__}: {exc}", {})


def _right(asked: Asked) -> bool:
    if asked.expected is None:
        return True
    assert asked.got is not None
    (name, x), body = asked.expected, asked.got.body
    if name == "talker":
        said = [json.loads(line.removeprefix("data:")) for line in body.splitlines() if line.startswith("data:")]
        # a stream that has begun can only tell of a loss in band
        return "".join(s.get("text_output", "") for s in said) == "one two" or any("error" in s for s in said)
    answer = json.loads(body)["outputs"]
    y = answer["y"] if isinstance(answer, dict) else answer[0]["data"]
    return bool(y == [(4 if name == "six" else 2) * x])


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    print(f"MODELIUM_CHAOS_SEED={SEED} MODELIUM_CHAOS_SECONDS={SECONDS:g}")
    service = Served(tmp_path / "root", CONFIG)
    chaos = Chaos(service, tmp_path)
    (tmp_path / "aside").mkdir()
    try:
        service.start()
        for number in range(TOYS):
            chaos.drop(f"toy-{number}")
        service.drop(talker(tmp_path / "talker"))
        for name in chaos.toys:
            service.until(lambda n=name: n in service.ps(), what=f"{name} to be accepted")  # type: ignore[misc]
        service.drop(ensemble(tmp_path / "six", "toy-0", "toy-1"))
        service.until(lambda: "six" in service.ps() and "talker" in service.ps(), what="all to be accepted")
        yield chaos
    finally:
        service.down()
    assert not processes_of(tmp_path)


async def test_chaos(chaos: Chaos) -> None:
    service = chaos.service
    chaos.up.set()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as web:
        clients = [asyncio.create_task(chaos.client(number, web)) for number in range(CLIENTS)]
        events = asyncio.create_task(chaos.happen())
        await asyncio.wait([*clients, events], timeout=SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        chaos.over.set()
        chaos.up.set()
        await asyncio.gather(events, *clients)
    await chaos.bring_back(random.Random())
    print(dict(chaos.did), Counter(a.got.status if a.got else "left" for a in chaos.asked))

    # every request has got exactly one answer
    assert not chaos.unanswered(), "\n".join(map(str, chaos.unanswered()[:20]))
    worked_on = sum(made.count("requests") for made in chaos.toys.values())
    assert worked_on <= 2 * sum(a.expected is not None for a in chaos.asked)  # the ensemble asks two

    # it comes to rest
    for name in chaos.toys:
        await eventually(lambda n=name: _known(service, n), f"{name} to be known")  # type: ignore[misc]
        await asyncio.to_thread(service.post, f"/models/{name}/unpin")
    try:
        await eventually(lambda: _at_rest(service), "rest", 120)
    except AssertionError:
        states = {name: (m["state"], m["reason"], m["since"]) for name, m in service.ps().items()}
        print(json.dumps({"models": states, "status": service.get("/status")}, indent=1), service.tail(60_000))
        raise
    status = service.get("/status")
    assert (status["waiting"], status["queue"]) == (0, [])

    # what is believed is what is there
    with suppress(AssertionError):
        await eventually(lambda: not _differences(service), "the ledger to be true", 20)
    assert not _differences(service)
    everything = {*chaos.toys, "six", "talker"}
    assert set(service.ps()) == everything  # nothing was lost, refused or left half-way
    assert not list((service.root / "incoming").iterdir())

    # and all of it still works
    for name in sorted(everything - {"talker"}):
        await eventually(lambda n=name: _asked(service, n), f"{name} to answer")  # type: ignore[misc]
    for name in ("six", "talker", *chaos.toys):
        await asyncio.to_thread(service.post, f"/models/{name}/unload")
    (device,) = [d for d in service.get("/status")["devices"] if d["id"] == "cpu:0"]
    assert (device["booked_bytes"], device["promised_bytes"], device["models"]) == (0, 0, [])
    assert not stubs_of(service.root)
    assert _live_in_triton(service) == set()


def _known(service: Served, name: str) -> bool:
    return service.state(name) not in ("-", "DISCOVERED")


def _at_rest(service: Served) -> bool:
    status = service.get("/status")
    settled = {"READY", "COLD", "FAILED"}
    return (
        triton(service)["state"] == "UP"
        and not status["waiting"]
        and not status["queue"]
        and {m["state"] for m in service.ps().values()} <= settled
    )


def _asked(service: Served, name: str) -> bool:
    try:
        return infer(service, name, [3]) == [12 if name == "six" else 6]
    except Answer as exc:
        assert exc.status in ANSWERED, exc
        return False


def _live_in_triton(service: Served) -> set[str]:
    stats = Straight(triton_address(service)).get("/v2/models/stats")
    return {m["name"] for m in stats["model_stats"]}


def _differences(service: Served) -> list[str]:
    """Where the ledger, Triton and the kernel disagree."""
    found = []
    shown = service.ps()
    ready = {name for name, m in shown.items() if m["state"] == "READY"}
    live = _live_in_triton(service)
    if ready != live:
        found.append(f"ready {sorted(ready)}, live in Triton {sorted(live)}")
    stubs = stubs_of(service.root)
    if len(stubs) != len(ready - {"six"}):
        found.append(f"{len(stubs)} stubs for {sorted(ready)}")
    (device,) = [d for d in service.get("/status")["devices"] if d["id"] == "cpu:0"]
    if set(device["models"]) - {"six"} != ready - {"six"}:  # an ensemble itself holds nothing
        found.append(f"booked for {device['models']}, ready {sorted(ready)}")
    booked, told = device["booked_bytes"], sum(shown[name]["memory_bytes"] for name in ready)
    if booked != told:
        found.append(f"booked {booked}, models hold {told}")
    held = 0
    for pid in stubs:
        with suppress(psutil.Error):
            held += psutil.Process(pid).memory_full_info().uss
    if abs(booked - held) > 0.3 * max(booked, held):
        found.append(f"booked {booked}, the kernel counts {held}")
    if device["promised_bytes"]:
        found.append(f"promised {device['promised_bytes']}")
    return found
