"""Several runtimes under one budget: ten minutes of swaps, what a swap takes, and how a first token compares with the
same server started by hand."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from tests import fleet
from tests.service import Served, processes_of

RUNTIMES = ("triton", "vllm", "ray_serve", "llamacpp")
SWAPPING_S = float(os.environ.get("MODELIUM_BENCH_SWAPPING_S", "600"))
BY_HAND = ("vllm", "llamacpp")
"""Runtimes whose servers a person can start by the same command."""


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    fleet.install(RUNTIMES)
    service = Served(folder / "root", fleet.configuration(RUNTIMES))
    try:
        service.start()
        sizes = fleet.fill(service, RUNTIMES, folder)
        for runtime in BY_HAND:
            yield _first_token(service, fleet.MEMBERS[runtime])
        service.stop()
        # Room for all but one and a bit of the largest: each request after the first few makes somebody go.
        room = sum(sizes.values()) - max(sizes.values()) // 2
        service.configure(fleet.configuration(RUNTIMES, room))
        service.start()
        yield from _swap(service)
        yield from _estimates(service, sizes)
    finally:
        service.down()
    yield "processes left after `modelium down`", str(len(processes_of(folder))), "0"


def _first_token(service: Served, member: fleet.Member) -> tuple[str, str, str]:
    """From a load that was asked for to the first answer, against the same command typed by hand."""
    ours, by_hand = [], []
    for _ in range(3):
        if service.state(member.name) == "READY":
            service.post(f"/models/{member.name}/unload")
        start = time.perf_counter()
        assert member.ask(service)
        ours.append(time.perf_counter() - start)
        record = _record(service, member)
        env = _environment(record["pid"])
        service.post(f"/models/{member.name}/unload")
        by_hand.append(_started_by_hand(record, env, member))
    return (
        f"{member.runtime}: a cold model's first answer, against the same server by hand",
        f"{median(ours):.1f} s against {median(by_hand):.1f} s, {median(ours) / median(by_hand):.2f} of it",
        "at most 1.10 of it",
    )


def _record(service: Served, member: fleet.Member) -> dict[str, Any]:
    file = service.root / ".modelium" / "processes" / f"{member.runtime}.{member.name}.json"
    return dict(json.loads(file.read_text()))


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def _started_by_hand(record: dict[str, Any], env: dict[str, str], member: fleet.Member) -> float:
    base = f"http://127.0.0.1:{record['facts']['port']}"
    body = json.dumps({"model": member.name, "prompt": "abc", "max_tokens": 3, "temperature": 0}).encode()
    start = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(record["argv"], env=env, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        while True:
            request = urllib.request.Request(
                f"{base}/v1/completions", data=body, headers={"Content-Type": "application/json"}
            )
            with suppress(OSError), urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
                return time.perf_counter() - start
            assert process.poll() is None, f"{record['argv'][0]} ended"
            time.sleep(0.05)
    finally:
        process.terminate()
        process.wait(60)


def _swap(service: Served) -> Iterator[tuple[str, str, str]]:
    members = [fleet.MEMBERS[runtime] for runtime in RUNTIMES]
    took: dict[bool, list[float]] = {True: [], False: []}
    failed = asked = 0
    before = fleet.host(service)["unexplained_bytes"]
    end = time.monotonic() + SWAPPING_S
    while time.monotonic() < end:
        for member in members:
            loaded = service.state(member.name) == "READY"
            start = time.perf_counter()
            try:
                failed += not member.ask(service)
            except Exception:
                failed += 1
            took[loaded].append(time.perf_counter() - start)
            asked += 1
    grown = fleet.host(service)["unexplained_bytes"] - before
    yield (
        f"{len(members)} runtimes on a budget too small for all, {SWAPPING_S:.0f} s",
        f"{asked} requests, {failed} failed, {len(took[False])} swaps; unexplained memory {grown / 2**20:+.0f} MiB",
        "none failed, no leak",
    )
    if took[False]:
        yield "a request that swaps, weights in the page cache", f"median {median(took[False]):.1f} s", ""
    if took[True]:
        yield "a request for a loaded model among them", f"median {median(took[True]) * 1000:.0f} ms", ""


def _estimates(service: Served, sizes: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    for name in sizes:
        found = service.get(f"/models/{name}/explain")
        estimate, measured = found["estimate_bytes"], found["measured"]["memory_bytes"]
        yield (
            f"{name}: estimated against measured",
            f"{estimate / 2**20:.0f} MiB against {measured / 2**20:.0f} MiB, {estimate / measured - 1:+.0%}",
            "median error at most 15%",
        )
