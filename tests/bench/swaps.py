"""From a drop to the first token, against the same server by hand; several runtimes under one budget: ten minutes of
swaps, and what a swap takes with weights in the page cache and without."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
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


def _large(folder: Path) -> Path:
    """0.4 GB of weights."""
    from tiny_gguf import llama

    sizes = {"width": 1024, "layers": 12, "feed_forward": 4096, "heads": 16, "kv_heads": 8, "kind": "F16"}
    return Path(llama(folder / "gguf-letters-large.gguf", **sizes))


LARGE = fleet.Member("gguf-letters-large", "llamacpp", _large, lambda _: True)


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    fleet.install(RUNTIMES)
    service = Served(folder / "root", fleet.configuration(RUNTIMES))
    try:
        service.start()
        sizes = fleet.fill(service, RUNTIMES, folder)
        for member in (*(fleet.MEMBERS[runtime] for runtime in BY_HAND), LARGE):
            yield from _first_token(service, member, folder)
        # Room for the largest and little else: it and the others make room for one another, again and again.
        sizes = {name: service.model(name)["memory_bytes"] for name in sizes}
        room = int(max(sizes.values()) * 1.05) + min(sizes.values()) // 2
        for name in sizes:
            service.post(f"/models/{name}/unload")  # what is in use without a pause would stay
        service.stop()
        service.configure(fleet.configuration(RUNTIMES, room))
        service.start()
        yield from _swaps(service)
        service.stop()
        service.configure(fleet.configuration(RUNTIMES))
        service.start()
        yield from _warm_and_cold(service, folder)
    finally:
        service.down()
    yield "processes left after `modelium down`", str(len(processes_of(folder))), "0"


def _first_token(service: Served, member: fleet.Member, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Of a model that was dropped, and of one that was COLD, against the same command typed by hand, in turns."""
    dropped, cold, by_hand = [], [], []
    for number in range(3):
        place = folder / f"again-{number}" / member.name
        place.mkdir(parents=True)
        source = member.make(place)
        name = f"{member.name}-{number}"
        drop = service.coming(source, name + source.suffix)
        start = time.perf_counter()
        drop()
        _first_answer(service.url, name)
        dropped.append(time.perf_counter() - start)
        record = _record(service, member.runtime, name)
        env = _environment(record["pid"])
        service.post(f"/models/{name}/unload")
        by_hand.append(_started_by_hand(record, env, name))
        start = time.perf_counter()
        _first_answer(service.url, name)
        cold.append(time.perf_counter() - start)
        service.post(f"/models/{name}/unload")
    for what, ours in (("from a drop to the first token", dropped), ("a COLD model's first token", cold)):
        yield (
            f"{member.name} by {member.runtime}: {what}, against the same server by hand",
            f"{median(ours):.2f} s against {median(by_hand):.2f} s, {median(ours) / median(by_hand):.2f} of it",
            "at most 1.10 of it",
        )


def _first_answer(base: str, name: str, alive: Callable[[], bool] = lambda: True) -> None:
    """Ask for a token until there is one."""
    body = json.dumps({"model": name, "prompt": "abc", "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{base}/v1/completions", data=body, headers={"Content-Type": "application/json"})
    while alive():
        with suppress(OSError), urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
            return
        time.sleep(0.02)
    raise AssertionError(f"the server of {name} ended")


def _record(service: Served, runtime: str, name: str) -> dict[str, Any]:
    file = service.root / ".modelium" / "processes" / f"{runtime}.{name}.json"
    return dict(json.loads(file.read_text()))


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def _started_by_hand(record: dict[str, Any], env: dict[str, str], name: str) -> float:
    start = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(record["argv"], env=env, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        _first_answer(f"http://127.0.0.1:{record['facts']['port']}", name, lambda: process.poll() is None)
        return time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(60)


def _swaps(service: Served) -> Iterator[tuple[str, str, str]]:
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
        yield "a request that swaps, of small models", f"median {median(took[False]):.1f} s", ""
    if took[True]:
        yield "a request for a loaded model among them", f"median {median(took[True]) * 1000:.0f} ms", ""


def _warm_and_cold(service: Served, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Two language models of 0.4 GB and room for one: with the one's weights in the page cache, and without."""
    names = ("gguf-letters-a", "gguf-letters-b")
    weights = _large(folder)
    for name in names:
        service.drop(weights, f"{name}.gguf")
        service.until_state(name, "READY", "COLD", within_s=600)
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(6):
        for name in names:
            warm, other = number % 2 == 0, names[names.index(name) - 1]
            service.post(f"/models/{name}/unload")
            _first_answer(service.url, other)
            (held,) = (service.root / "repository" / name).rglob("*.gguf")
            with held.open("rb") as file:
                if warm:
                    while file.read(2**24):
                        pass
                else:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            service.post(f"/models/{other}/unload")
            _first_answer(service.url, name)
            took[warm].append(time.perf_counter() - start)
    for warm, what in ((True, "weights in the page cache"), (False, "weights on the disk alone")):
        yield f"llamacpp: a swap of 0.4 GB of weights, {what}", f"median {median(took[warm]):.2f} s", ""
