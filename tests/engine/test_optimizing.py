"""Faster forms of models: made while nothing is in use, taken up beside what serves, put back where they fail."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import BaseModel

from modelium.api import Device, Endpoint, Job, Optimization, Optimized, OptimizerContext, Served
from modelium.api.fakes import FakeRuntime, silent
from modelium.api.testing import eventually
from modelium.engine import job as jobs
from modelium.engine import optimizing, swapping
from modelium.errors import DriverError, LoadRejected, ModelError
from tests.engine.harness import MB, Rig, rig

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


class Settings(BaseModel):
    pass


class Packer:
    """Makes a packed toy: a program of its own writes it. What it does is the test's to say."""

    name = "packer"
    settings_model: type[BaseModel] = Settings

    def __init__(self) -> None:
        self.version = "1"
        self.proposing: Exception | bool = True
        self.making: Exception | None = None
        self.held: asyncio.Event | None = None
        """Set by a test: it goes on when the event is set."""
        self.arrived = asyncio.Event()
        self.made: list[str] = []
        self.cancelled = 0
        self.memory_bytes = MB

    async def start(self, context: OptimizerContext) -> None:
        assert isinstance(context.settings, Settings)

    def proposes(self, served: Served) -> Optimization | None:
        if isinstance(self.proposing, Exception):
            raise self.proposing
        if not self.proposing:
            return None
        content = "".join(c for c in served.inspection.content_key if c.isalnum())
        return Optimization(
            key=f"{content}-{self.version}",
            what=f"a packed toy {self.version}",
            devices=tuple(d.id for d in served.devices),
            depends_on={"packer": self.version},
        )

    async def optimize(self, served: Served, optimization: Optimization, target: Path, job: Job) -> Mapping[str, Any]:
        assert (served.path / "config.pbtxt").is_file() and not list(target.iterdir())
        self.arrived.set()
        try:
            if self.held is not None:
                await self.held.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.making is not None:
            raise self.making
        await job.run([sys.executable, "-c", WRITE, str(target / "packed"), f"packed by {self.version}"])
        self.made.append(served.name)
        return {"version": self.version}

    def layout(self, served: Served, optimization: Optimization, facts: Mapping[str, Any]) -> Optimized:
        return Optimized(
            serving="packed",
            settings={"packed": True},
            memory_bytes=self.memory_bytes,
            load_s=0.5,
            note=f"equal on all inputs, packer {facts['version']}",
            texts={"config.pbtxt": f'name: "{served.name}"\nbackend: "packed"\n'},
            made={"1/packed": "packed"},
            kept={"1/toy": "1/model"},
        )


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "LOOK_EVERY_S", 0.005)
    monkeypatch.setattr(optimizing, "WATCH_EVERY_S", 0.005)


@asynccontextmanager
async def optimized(root: Path, packer: Packer, **options: Any) -> AsyncIterator[Rig]:
    async with rig(root, optimizers=[packer], **options) as r:
        yield r


def folder(r: Rig, name: str = "a") -> Path:
    return r.engine.paths.repository / name


def manifest(r: Rig, name: str = "a") -> dict[str, Any]:
    return dict(json.loads((folder(r, name) / "modelium.json").read_text()))


def is_packed(r: Rig, name: str = "a") -> bool:
    """It serves in its new form, and is what lies on disk."""
    known = r.engine.catalog.known.get(name)
    return known is not None and known.optimized and r.state(name) == "READY" and r.loaded(name)


def as_dropped(r: Rig, name: str = "a") -> bool:
    known = r.engine.catalog.known.get(name)
    return known is not None and not known.optimized and r.state(name) == "READY" and r.loaded(name)


def said(r: Rig, name: str = "a") -> str:
    return r.engine.optimizing.said(name)


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    return {p.relative_to(path).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


async def quiet(r: Rig) -> None:
    """Let nothing be in use for long enough."""
    r.advance(optimizing.QUIET_S + 1)


async def test_a_loaded_model_is_served_faster_once_nothing_is_in_use(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        before = contents(folder(r))
        held = r.runtime.hold("load", "a")
        await quiet(r)
        await held.arrived.wait()
        assert r.state("a") == "READY"
        lease = r.service.try_acquire("a")
        assert lease is not None, "the old form serves while the new one loads"
        lease.release()
        held.release()
        await r.until(lambda: is_packed(r))
        assert r.runtime.count("load", "a") == 2 and r.runtime.count("unload") == 0
        assert (folder(r) / "1/packed").read_text() == "packed by 1"
        assert (folder(r) / "1/toy").read_bytes() == (folder(r) / "unconverted/1/model").read_bytes()
        assert contents(folder(r) / "unconverted") == before
        record = manifest(r)["optimization"]
        assert record["what"] == "a packed toy 1" and record["unconverted"] == "unconverted"
        view = await r.service.model("a")
        assert view.serving == "packed" and view.plan is not None and view.plan.settings == {"packed": True}
        assert "equal on all inputs" in view.plan.reason and "fake/as-is on cpu" in view.plan.alternatives[0]
        told = [t.reason for t in r.service.decisions("a")]
        assert any(t.startswith("a packed toy 1 is being made of it") for t in told)
        assert any(t.startswith("converted: it is served as a packed toy 1") for t in told)
        ids = [t.decision for t in r.service.decisions("a")]
        assert all(ids) and ids == sorted(ids)
        assert not list((tmp_path / ".modelium/staging").iterdir()), "nothing is left beside the repository"


async def test_nothing_is_made_while_the_device_is_in_use(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await r.add("b", size=2 * MB)
        using = await r.service.acquire("b")
        for _ in range(3):
            await quiet(r)
            await asyncio.sleep(0.02)  # it had every chance
        assert not packer.arrived.is_set()
        using.release()
        await asyncio.sleep(0.02)
        assert not packer.arrived.is_set(), "it was used a moment ago"
        await quiet(r)
        await packer.arrived.wait()


async def test_it_rests_while_the_device_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[bool] = []
    monkeypatch.setattr(jobs.Job, "pause", lambda self, on: rests.append(on))
    packer = Packer()
    packer.held = asyncio.Event()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await packer.arrived.wait()
        await r.until(lambda: rests[-1:] == [False])
        using = await r.service.acquire("a")
        await r.until(lambda: rests[-1:] == [True])
        using.release()
        assert packer.cancelled == 0
        r.advance(optimizing.REST_S + 1)
        await r.until(lambda: rests[-1:] == [False])
        packer.held.set()
        await r.until(lambda: is_packed(r))


async def test_it_is_given_up_for_who_waits_and_made_later(tmp_path: Path) -> None:
    packer = Packer()
    packer.held = asyncio.Event()
    async with optimized(tmp_path, packer, budget=2 * MB, min_resident_seconds=0) as r:
        await r.add("a")
        await quiet(r)
        await packer.arrived.wait()
        using = await r.service.acquire("a")
        await r.add("b", size=2 * MB)
        waiter = asyncio.ensure_future(r.service.acquire("b"))
        await r.until(lambda: "was given up: b waits for room" in said(r))
        assert packer.cancelled == 1 and as_dropped(r) and not r.engine.progress
        using.release()
        (await waiter).release()
        await r.service.unload("b")
        (await r.service.acquire("a")).release()
        packer.held.set()
        await quiet(r)
        await r.until(lambda: is_packed(r))


async def test_one_that_does_not_load_is_put_back_and_not_tried_again(tmp_path: Path) -> None:
    packer, runtime = Packer(), FakeRuntime()
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.add("a")
        before = contents(folder(r))
        r.runtime.fail("load", LoadRejected("no such operator: Packed"), "a")
        await quiet(r)
        await r.until(lambda: "put back" in said(r) or "stays" in said(r))
        await r.until(lambda: as_dropped(r) and "stays" in said(r))
        assert contents(folder(r)) == before
        assert any(
            "put back as it was dropped: a packed toy 1 failed" in t.reason and "Packed" in t.reason
            for t in r.service.decisions("a")
        )
        lease = r.service.try_acquire("a")
        assert lease is not None
        lease.release()
        await quiet(r)
        await asyncio.sleep(0.02)
        assert packer.made == ["a"] and runtime.count("load", "a") == 2
    async with optimized(tmp_path, packer, runtime=runtime) as again:
        await again.until(lambda: as_dropped(again) and "no such operator" in said(again))
    packer.version = "2"  # something in the key has changed
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.until(lambda: r.state("a") == "READY")
        await quiet(r)
        await r.until(lambda: is_packed(r))
        assert packer.made == ["a", "a"]


async def test_one_that_fails_when_it_is_loaded_later_is_put_back_and_loads(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r))
        await r.service.unload("a")
        r.runtime.fail("load", LoadRejected("made for another GPU"), "a")
        with pytest.raises(DriverError, match="another GPU"):
            await r.service.acquire("a")
        await r.until(lambda: manifest(r)["optimization"] is None and r.state("a") in ("COLD", "READY"))
        (await r.service.acquire("a")).release()
        assert as_dropped(r)


async def test_what_does_not_load_is_put_back_while_another_is_made(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r, "a"))
        await r.service.unload("a")
        packer.arrived.clear()
        packer.held = asyncio.Event()  # never set
        await r.add("b", size=2 * MB)
        await quiet(r)
        await packer.arrived.wait()
        r.runtime.fail("load", LoadRejected("made for another GPU"), "a")
        with pytest.raises(DriverError, match="another GPU"):
            await r.service.acquire("a")
        await r.until(lambda: not r.engine.catalog.known["a"].optimized)
        (await r.service.acquire("a")).release()
        assert packer.cancelled == 0
    assert packer.cancelled == 1, "what is being made ends with the engine"


async def test_a_key_that_no_longer_fits_puts_it_back_and_it_is_made_anew(tmp_path: Path) -> None:
    packer, runtime = Packer(), FakeRuntime()
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.add("a")
        await r.add("b", size=2 * MB)
        await quiet(r)
        await r.until(lambda: is_packed(r, "a"))
        await quiet(r)
        await r.until(lambda: is_packed(r, "b"))
        await r.service.unload("b")
    packer.version = "2"
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.until(lambda: as_dropped(r, "a"))
        await r.until(lambda: r.state("b") == "COLD" and manifest(r, "b")["optimization"] is None)
        told = [t.reason for t in r.service.decisions("a")]
        assert any("does not fit any more: packer was 1 and is 2" in t for t in told)
        await quiet(r)
        await r.until(lambda: is_packed(r, "a"))
        assert (folder(r) / "1/packed").read_text() == "packed by 2"
    packer.proposing = False
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.until(lambda: as_dropped(r, "a"))
        assert "packer is not to convert it" in said(r)


async def test_while_nobody_can_tell_it_stays_as_it_is(tmp_path: Path) -> None:
    packer, runtime = Packer(), FakeRuntime()
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r))
    packer.proposing = DriverError("the packer is not installed: pip install packer")
    async with optimized(tmp_path, packer, runtime=runtime) as r:
        await r.until(lambda: r.state("a") == "READY")
        await r.add("b", size=2 * MB)
        await r.until(
            lambda: said(r, "b") == "it stays as it was dropped: the packer is not installed: pip install packer"
        )
        assert is_packed(r, "a") and r.runtime.count("load", "a") == 2


async def test_what_was_made_once_is_made_for_all_of_that_content(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r, "a"))
        await r.add("b")  # in use a moment ago, and taken up at once
        await r.until(lambda: is_packed(r, "b"))
        assert packer.made == ["a"]
        assert 'name: "b"' in (folder(r, "b") / "config.pbtxt").read_text()


async def test_one_that_does_not_load_says_nothing_of_one_that_does(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r, "a"))
        first = r.runtime.hold("load", "b")
        r.runtime.fail("load", LoadRejected("a bad copy"), "b")
        r.drop("b", size=MB)
        first.release()
        await r.until(lambda: "it stays as it was dropped" in said(r, "b"))
        assert as_dropped(r, "b") and is_packed(r, "a")
        await quiet(r)
        await asyncio.sleep(0.02)
        assert is_packed(r, "a")


async def test_one_that_answers_otherwise_is_not_taken_up(tmp_path: Path) -> None:
    packer = Packer()
    packer.making = ModelError("it differs by 0.3, and 0.001 is allowed")
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: "differs by 0.3" in said(r))
        assert as_dropped(r) and not r.engine.progress
        packer.making = None
        await quiet(r)
        await asyncio.sleep(0.02)
        assert packer.made == [] and r.runtime.count("load", "a") == 1


@pytest.mark.parametrize("error", [DriverError("the disk is full"), ZeroDivisionError("a bug")], ids=repr)
async def test_what_may_pass_is_tried_again_later_and_a_bug_is_not(tmp_path: Path, error: Exception) -> None:
    packer = Packer()
    packer.making = error
    async with optimized(tmp_path, packer, always_loaded=("a",)) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: str(error) in said(r))
        packer.making = None
        await quiet(r)
        await asyncio.sleep(0.02)
        assert packer.made == []
        r.advance(optimizing.AGAIN_AFTER_S)
        if isinstance(error, DriverError):
            await r.until(lambda: is_packed(r))
        else:
            await asyncio.sleep(0.02)
            assert as_dropped(r)


async def test_one_that_can_not_be_laid_out_says_nothing_of_others(tmp_path: Path) -> None:
    class Clumsy(Packer):
        def layout(self, served: Served, optimization: Optimization, facts: Mapping[str, Any]) -> Optimized:
            if served.name == "a":
                raise KeyError("nothing")
            return super().layout(served, optimization, facts)

    packer = Clumsy()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await r.add("b", size=2 * MB)
        (await r.service.acquire("a")).release()  # it comes first
        await quiet(r)
        await r.until(lambda: packer.made)
        await quiet(r)
        await r.until(lambda: is_packed(r, "b"))
        await r.until(lambda: "an error in the optimizer itself: KeyError: 'nothing'" in said(r, "a"))
        assert packer.made == ["a", "b"] and as_dropped(r, "a")


async def test_what_fails_in_our_own_work_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer, converted = Packer(), swapping.converted

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(swapping, "converted", full)
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: "can't be taken up: OSError" in said(r))
        assert as_dropped(r)
        monkeypatch.setattr(swapping, "converted", converted)
        await r.until(lambda: is_packed(r))
        assert packer.made == ["a"]


async def test_it_waits_until_its_device_is_seen_again(tmp_path: Path) -> None:
    packer, runtime = Packer(), FakeRuntime()
    runtime.devices = (
        Device(id="far/cpu:0", kind="cpu", name="far", total_bytes=4 * MB, used_bytes=0, runtime="fake"),
    )
    async with optimized(tmp_path, packer, budget=MB // 2, runtime=runtime) as r:
        await r.until(lambda: "far/cpu:0" in r.engine.loop.world.devices)
        packer.held = asyncio.Event()
        await r.add("a")
        await quiet(r)
        await packer.arrived.wait()
        there, runtime.devices = runtime.devices, ()
        await r.look()
        await r.until(lambda: r.engine.loop.world.devices["far/cpu:0"].missed)
        packer.held.set()
        await r.until(lambda: "waits for room" in said(r))
        assert as_dropped(r)
        runtime.devices = there
        await r.look()
        await r.until(lambda: is_packed(r))


async def test_what_waits_for_anything_but_room_holds_up_nothing(tmp_path: Path) -> None:
    packer, box = Packer(), FakeRuntime("other")
    box.external = box.up = True
    box.put("guest", endpoints=(Endpoint(protocol="openai", address="http://box.invalid"),))
    async with optimized(tmp_path, packer, others=[box]) as r:
        await r.is_("guest", "READY")
        box.lose_contact()
        r.engine.runtimes.poke("other")
        for _ in range(9):
            r.runtime.fail("load", LoadRejected("it is broken"), "bad")
        await r.add("bad")
        await r.service.pin("bad", True)
        await r.is_("guest", "FAILED")
        await r.is_("bad", "FAILED")
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r, "a"))
        assert set(r.engine.loop.world.queue) == {"bad", "guest"}


async def test_it_waits_for_room_beside_what_serves(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer, budget=3 * MB) as r:
        await r.add("a")
        await r.add("b", size=2 * MB)
        await quiet(r)
        await r.until(lambda: "waits for room" in said(r, "a"))
        assert as_dropped(r, "a") and r.runtime.count("unload") == 0
        await r.service.unload("b")
        await r.until(lambda: is_packed(r, "a"))
        assert r.runtime.count("unload", "a") == 0


async def test_what_a_person_has_changed_is_left_alone(tmp_path: Path) -> None:
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r))
        (folder(r) / "config.pbtxt").write_text("# mine\n")
        await r.until(lambda: r.runtime.count("load", "a") == 3 and r.loaded("a"))
        packer.version = "2"
        await r.service.unload("a")
        (await r.service.acquire("a")).release()
        await quiet(r)
        await asyncio.sleep(0.05)
        assert (folder(r) / "config.pbtxt").read_text() == "# mine\n"


async def test_what_a_person_changes_in_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = swapping.exchange

    def edited_first(one: Path, other: Path) -> None:
        if other.name == "a":
            (other / "notes.txt").write_text("mine")
        really(one, other)

    monkeypatch.setattr(swapping, "exchange", edited_first)
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r))
        assert (tmp_path / "trash/a/notes.txt").read_text() == "mine"
        assert not list((tmp_path / ".modelium/staging").iterdir())


async def test_one_that_is_removed_meanwhile_blames_nobody(tmp_path: Path) -> None:
    packer = Packer()
    packer.held = asyncio.Event()
    packer.making = ModelError("its files have gone")
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await quiet(r)
        await packer.arrived.wait()
        await r.service.remove("a")
        packer.held.set()
        packer.arrived.clear()
        packer.making = None
        await r.add("a")
        await quiet(r)
        await r.until(lambda: is_packed(r))


async def test_where_files_can_not_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, place: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        before = contents(folder(r))
        await quiet(r)
        await r.until(lambda: is_packed(r))
        packer.proposing = False
        assert contents(folder(r) / "unconverted") == before


async def test_where_folders_can_not_be_exchanged_all_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(one: Path, other: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(swapping, "exchange", refuse)
    packer = Packer()
    async with optimized(tmp_path, packer) as r:
        await r.add("a")
        await r.until(lambda: "can't exchange two folders in one step" in caplog.text)
        await quiet(r)
        await asyncio.sleep(0.02)
        assert not packer.arrived.is_set()


async def test_a_person_s_own_repository_is_not_touched(tmp_path: Path) -> None:
    packer = Packer()
    theirs = tmp_path / "theirs"
    (theirs / "a/1").mkdir(parents=True)
    (theirs / "a/config.pbtxt").write_text("mine")
    (theirs / "a/1/x.toy").write_text('{"size": 1}')
    before = contents(theirs)
    async with optimized(tmp_path, packer, repository=theirs) as r:
        await r.is_("a", "COLD")
        (await r.service.acquire("a")).release()
        await quiet(r)
        await asyncio.sleep(0.05)
        assert contents(theirs) == before and not packer.arrived.is_set()


# --------------------------------------------------------------------------- its programs

SPAWNING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(child.pid, flush=True)
time.sleep(1000)
"""


def status_of(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"


async def test_a_program_rests_goes_on_and_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    job = jobs.Job(str(tmp_path), silent)
    pids: list[int] = []
    task = asyncio.create_task(job.run([sys.executable, "-c", SPAWNING], tell=lambda line: pids.append(int(line))))

    async def started() -> bool:
        return bool(pids)

    await eventually(started, "the program runs")
    both = [pids[0], psutil.Process(pids[0]).ppid()]
    assert psutil.Process(both[1]).nice() == min(os.nice(0) + 10, 19)

    def all_are(*wanted: str) -> Any:
        async def are() -> bool:
            return all(status_of(pid) in wanted for pid in both)

        return are

    job.pause(True)
    await eventually(all_are(psutil.STATUS_STOPPED), "both rest")
    job.pause(False)
    await eventually(all_are(psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING), "both go on")
    job.pause(True)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(all_are("gone", psutil.STATUS_ZOMBIE), "both have ended")


async def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    job = jobs.Job(str(tmp_path), silent)
    with pytest.raises(DriverError, match="status 3:\nso it is"):
        await job.run([sys.executable, "-c", "print('so it is'); raise SystemExit(3)"])
    with pytest.raises(DriverError, match="SIGKILL"):
        await job.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    await job.run([sys.executable, "-c", "import os; assert os.environ['X'] == '1'"], env={"X": "1"})


async def test_of_a_program_that_ends_no_line_little_is_kept() -> None:
    told: list[str] = []
    code = "import sys; sys.stdout.write('10%\\r20%\\r\\n' + 'x' * 1_000_000 + 'end'); sys.exit(3)"
    with pytest.raises(DriverError, match=r"(?s)20%.*xend$") as failed:
        await jobs.Job("root", silent).run([sys.executable, "-c", code], tell=told.append)
    assert told == ["10%", "20%"]
    assert len(failed.value.message) < 2 * jobs.LONGEST_KEPT


def test_lines_are_whole_however_they_come() -> None:
    lines = jobs._Lines()
    assert lines.ended(b"10%\r") == ["10%"], "a bar is told at once"
    assert lines.ended(b"\n20%\r\n") == ["20%"]
    assert lines.ended("\u00e4".encode()[:1]) == []
    assert lines.ended("\u00e4".encode()[1:] + b"\r") == ["\u00e4"]
    assert lines.ended(b"\r") == [""]
    refusal = "@" + "x" * 100_000
    assert lines.ended(refusal[:70_000].encode()) == []
    assert lines.ended(f"{refusal[70_000:]}\nend".encode()) == [refusal]
    lines.ended(b"x" * 2 * jobs.LONGEST_LINE)
    assert len(lines.rest) == jobs.LONGEST_LINE


async def test_a_long_line_is_told_whole_and_little_of_it_is_kept() -> None:
    told: list[str] = []
    code = "print('@' + 'x' * 500_000); raise SystemExit(3)"
    with pytest.raises(DriverError) as failed:
        await jobs.Job("root", silent).run([sys.executable, "-c", code], tell=told.append)
    assert told == ["@" + "x" * 500_000]
    assert len(failed.value.message) < 2 * jobs.LONGEST_KEPT


async def test_what_a_killed_service_left_is_ended_at_the_next_start(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        left = jobs.Job(r.engine.processes.root_id, silent)
    pids: list[int] = []
    task = asyncio.create_task(left.run([sys.executable, "-c", SPAWNING], tell=lambda line: pids.append(int(line))))

    async def told() -> bool:
        return bool(pids)

    async def ended() -> bool:
        return status_of(pids[0]) in ("gone", psutil.STATUS_ZOMBIE)

    await eventually(told, "it runs")
    async with optimized(tmp_path, Packer()):
        await eventually(ended, "it is ended")
    with pytest.raises(DriverError):
        await task
