"""Files of unloaded models in the page cache."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from modelium.api.testing import eventually
from modelium.engine import readahead
from modelium.engine.readahead import STEP_BYTES, Files, choose, warm
from tests.engine.harness import MB, rig

LIBC = ctypes.CDLL(None, use_errno=True)


def resident(path: Path) -> float:
    """The share of a file's pages that is in memory, by mincore(2)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        found = (ctypes.c_ubyte * pages)()
        if LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found):
            raise OSError(ctypes.get_errno(), "mincore")
        del first
        return sum(page & 1 for page in found) / pages


def drop(path: Path) -> None:
    """Out of memory with its pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip(f"the file system of {path} keeps files in memory")


SMALL, LARGE = Files("small", 10, 1.0), Files("large", 60, 3.0)
SELDOM, NEVER = Files("seldom", 20, 0.1), Files("never", 5, 0.0)


@pytest.mark.parametrize(
    ("budget", "names"),
    [
        (0, []),
        (9, []),
        (10, ["small"]),
        (69, ["small", "seldom"]),
        (70, ["small", "large"]),
        (1000, ["small", "large", "seldom"]),
    ],
)
def test_what_gains_most_for_each_byte_comes_first_as_far_as_the_budget_goes(budget: int, names: list[str]) -> None:
    assert [f.name for f in choose([NEVER, SELDOM, LARGE, SMALL], budget)] == names


def test_equals_are_taken_in_the_order_of_their_names() -> None:
    assert [f.name for f in choose([Files("b", 10, 1.0), Files("a", 10, 1.0)], 10)] == ["a"]


async def test_files_are_read_whole_and_what_is_gone_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 * MB + 1))
    drop(path)

    async def read() -> bool:
        warm([tmp_path / "gone", path], threading.Event())  # anew, since others may displace it
        return resident(path) == 1

    await eventually(read, "it is in memory")


def test_stopped_it_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(64 * STEP_BYTES))
    drop(path)
    stopped = threading.Event()
    stopped.set()
    warm([path], stopped)
    assert resident(path) == 0


@pytest.mark.parametrize("budget", [0, 50 * MB])
async def test_an_evicted_model_is_read_ahead_unless_there_is_no_budget(tmp_path: Path, budget: int) -> None:
    async with rig(
        tmp_path,
        budget=MB,
        standby=(1,),
        standby_budget_bytes=0,
        readahead_budget_bytes=budget,
        min_resident_seconds=0,
    ) as r:
        await r.add("a", padding="x" * 4 * STEP_BYTES)
        (await r.service.acquire("a")).release()
        await r.add("b")
        path = next(p for p in (tmp_path / "repository/a").rglob("*") if p.is_file() and p.stat().st_size > STEP_BYTES)
        drop(path)
        (await r.service.acquire("b")).release()
        assert r.state("a") == "COLD"
        await r.engine.readahead.look()
        if budget:
            await r.until(lambda: resident(path) > 0.5, "it is warm")
        else:
            assert resident(path) == 0


async def test_what_a_person_unloaded_is_left_alone_and_what_is_warm_is_not_read_anew(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=MB, standby=(1,), standby_budget_bytes=0, min_resident_seconds=0) as r:
        for name in ("a", "b"):
            await r.add(name)
        for name in ("a", "b", "a"):
            (await r.service.acquire(name)).release()
        ahead = r.engine.readahead
        await r.service.unload("a")
        assert [m.name for m in ahead._unloaded()] == ["b"]
        await ahead.look()
        before = dict(ahead._warmed)
        await ahead.look()
        assert ahead._warmed == before and list(before) == ["b"]
        (await r.service.acquire("a")).release()
        await ahead.look()
        assert ahead._warmed["b"] != before["b"]


async def test_a_model_that_is_removed_during_a_look_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, listed, reading, read = (threading.Event() for _ in range(4))
    done: list[str] = []

    def files(folder: Path) -> tuple[tuple[Path, ...], int]:
        listing.set()
        listed.wait(30)
        return (folder,), MB

    def reads(paths: Sequence[Path], stopped: threading.Event) -> None:
        done.extend(path.name for path in paths)
        reading.set()
        read.wait(30)

    async def nothing(self: object) -> None: ...

    monkeypatch.setattr(readahead, "_files", files)
    monkeypatch.setattr(readahead, "warm", reads)
    monkeypatch.setattr(readahead.ReadAhead, "run", nothing)
    async with rig(tmp_path, budget=9 * MB, standby=(1,), standby_budget_bytes=0, min_resident_seconds=0) as r:
        names = ["a", "b", "c", "d"]
        for name in names:
            await r.add(name)
            (await r.service.acquire(name)).release()
        r.advance(700)
        for name in names:
            await r.is_(name, "COLD")
        looking = asyncio.ensure_future(r.engine.readahead.look())
        await r.until(listing.is_set)
        for name in ("a", "b"):
            await r.service.remove(name)
        listed.set()
        await r.until(lambda: reading.is_set() or looking.done())
        await r.service.remove("d" if done == ["c"] else "c")
        read.set()
        await looking
        assert len(done) == 1 and done[0] in ("c", "d")
