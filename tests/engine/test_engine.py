"""The engine whole, on a scripted runtime: drops, loads, evictions, crashes, restarts."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from modelium.api import Device, Endpoint, Inspection, LoadOutcome, LoadRequest, Progress, Report
from modelium.api.fakes import FakeDriver, FakeRuntime
from modelium.core.ticking import GONE_AFTER, GONE_AFTER_S
from modelium.engine.ledger import Ledger
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.repository import Repository
from modelium.engine.service import Service
from modelium.errors import (
    DeadlinePassed,
    DriverError,
    LoadRejected,
    ModelConflict,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    NeverFits,
    PluginError,
    QueueFull,
    RuntimeUnavailable,
)
from tests.engine.harness import MB, First, ToyInspector, rig


async def test_a_drop_becomes_ready_and_answers(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.drop("a.toy.onnx", size=MB)
        await r.is_("a.toy", "READY")
        lease = r.service.try_acquire("a.toy")
        assert lease is not None and lease.endpoints["kserve-http"] == "http://fake.invalid"
        lease.release()
        assert not list((tmp_path / "incoming").iterdir())
        assert (tmp_path / "repository/a.toy/config.pbtxt").exists()
        view = await r.service.model("a.toy")
        assert view.memory_source == "measured" and view.requests == 1 and view.plan is not None


async def test_two_hundred_waiters_cause_one_load(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.unload("a")
        held = r.runtime.hold("load", "a")
        waiters = [asyncio.ensure_future(r.service.acquire("a")) for _ in range(200)]
        await held.arrived.wait()
        assert r.service.view("a").waiting == 200
        held.release()
        leases = await asyncio.gather(*waiters)
        assert {lease.model for lease in leases} == {"a"}
        assert r.runtime.count("load", "a") == 2  # the drop's and this one
        assert r.service.view("a").in_flight == 200
        for lease in leases:
            lease.release()
        assert r.service.view("a").in_flight == 0


async def test_room_is_made_for_a_request_and_what_is_in_use_stays(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=2 * MB, min_resident_seconds=0) as r:
        await r.add("a")
        await r.add("b")
        using = await r.service.acquire("a")
        await r.add("c")
        assert r.state("c") == "COLD"  # a drop evicts nothing that is not idle
        lease = await r.service.acquire("c")
        assert (r.state("a"), r.state("b"), r.state("c")) == ("READY", "COLD", "READY")
        lease.release()
        using.release()


async def test_a_waiter_gets_its_room_when_the_use_ends(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=MB, min_resident_seconds=0) as r:
        await r.add("a")
        await r.add("b")
        using = await r.service.acquire("a")
        waiter = asyncio.ensure_future(r.service.acquire("b"))
        await r.until(lambda: "in use" in r.reason("b"))
        using.release()
        (await waiter).release()
        assert r.state("a") == "COLD"


async def test_a_request_in_flight_is_waited_for_before_the_unload(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        using = await r.service.acquire("a")
        unload = asyncio.ensure_future(r.service.unload("a"))
        await r.is_("a", "DRAINING")
        assert r.service.try_acquire("a") is None
        assert r.runtime.count("unload") == 0
        using.release()
        await unload
        assert r.state("a") == "COLD"


async def test_who_leaves_is_not_loaded_for(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=MB) as r:
        await r.add("a")
        using = await r.service.acquire("a")
        await r.add("b")
        waiter = asyncio.ensure_future(r.service.acquire("b"))
        await r.is_("b", "QUEUED")
        waiter.cancel()
        await r.is_("b", "COLD")
        using.release()
        assert r.runtime.count("load", "b") == 0
        assert not r.engine.loop.world.tickets


async def test_a_lease_granted_to_one_who_just_left_is_given_back(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.unload("a")
        held = r.runtime.hold("load", "a")
        waiter = asyncio.ensure_future(r.service.acquire("a"))
        await held.arrived.wait()
        held.release()
        while r.state("a") != "READY":
            await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert r.service.view("a").in_flight == 0


async def test_deadline_queue_and_size_are_told_apart(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=MB, max_queue_per_model=1, min_resident_seconds=0) as r:
        await r.add("a")
        await r.add("b")
        await r.add("big", size=5 * MB)
        using = await r.service.acquire("a")
        with pytest.raises(NeverFits, match=r"5\.0 MB.*budget of 1\.0 MB"):
            await r.service.acquire("big")
        waiter = asyncio.ensure_future(r.service.acquire("b", deadline_s=10))
        await r.is_("b", "QUEUED")
        with pytest.raises(QueueFull):
            await r.service.acquire("b")
        r.advance(11)
        with pytest.raises(DeadlinePassed) as passed:
            await waiter
        assert passed.value.retry_after_s and "in use" in passed.value.message
        with pytest.raises(ModelNotFound):
            await r.service.acquire("nobody")
        using.release()


async def test_a_rejected_model_fails_with_its_reason_and_is_retried_later(tmp_path: Path) -> None:
    async with rig(tmp_path, retry_s=5) as r:
        r.runtime.fail("load", LoadRejected("no such operator: Foo"), "a")
        await r.add("a")
        assert r.state("a") == "FAILED"
        with pytest.raises(DriverError, match="Foo") as refused:
            await r.service.acquire("a")
        assert refused.value.retry_after_s == pytest.approx(5)
        r.advance(6)
        (await r.service.acquire("a")).release()
        assert r.state("a") == "READY"


async def test_a_driver_with_a_bug_fails_the_load_and_nothing_else(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.runtime.fail("load", RuntimeError("boom"), "a")
        await r.add("a")
        assert r.state("a") == "FAILED" and "boom" in r.reason("a")
        await r.add("b")
        assert r.state("b") == "READY"


async def test_a_load_that_never_ends_is_given_up(tmp_path: Path) -> None:
    async with rig(tmp_path, load_timeout_s=60) as r:
        held = r.runtime.hold("load", "a")
        r.drop("a", size=MB)
        await held.arrived.wait()
        waiter = asyncio.ensure_future(r.service.acquire("a", deadline_s=500))
        await r.until(lambda: r.service.view("a").waiting)
        r.advance(61)
        with pytest.raises(ModelFailed, match="60 s"):
            await waiter
        await r.is_("a", "FAILED")
        assert held.cancelled and r.runtime.count("unload", "a") == 1


async def test_a_crash_of_the_runtime_brings_back_what_was_wanted(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("used")
        await r.add("idle")
        await r.add("pinned")
        await r.service.pin("pinned", True)
        lease = r.service.try_acquire("used")  # an instant before the crash
        assert lease is not None
        lease.release()
        r.crash()
        await r.until(lambda: r.state("runtime") == "-" and r.runtime.starts == 1 and r.state("idle") == "FAILED")
        assert r.service.try_acquire("used") is None
        r.advance(2)
        await r.until(lambda: r.runtime.starts == 2)
        r.advance(2)
        await r.is_("used", "READY")
        await r.is_("pinned", "READY")
        assert r.state("idle") in ("FAILED", "COLD")
        (await r.service.acquire("idle")).release()


async def test_requests_that_wait_survive_a_crash_in_mid_load(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.unload("a")
        held = r.runtime.hold("load", "a")
        waiter = asyncio.ensure_future(r.service.acquire("a"))
        await held.arrived.wait()
        r.crash()
        for _ in range(3):
            await r.until(lambda: not r.engine.loop._running)
            await asyncio.sleep(0.01)
            r.advance(3)
        (await asyncio.wait_for(waiter, 5)).release()


async def test_a_restart_adopts_what_is_loaded_and_reloads_nothing(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    async with rig(tmp_path, runtime=runtime) as r:
        for name in ("a", "b"):
            await r.add(name)
        await r.service.pin("b", True)
        await r.add("cold", size=MB)
        await r.service.unload("cold")
    assert runtime.models.keys() == {"a", "b"}
    async with rig(tmp_path, runtime=runtime) as again:
        await again.until(lambda: again.state("a") in ("RECOVERING", "READY"))
        await again.look()
        await again.is_("a", "READY")
        await again.is_("b", "READY")
        await again.is_("cold", "COLD")
        assert runtime.count("load") == 3 and runtime.starts == 1
        assert again.service.view("b").pinned
        assert "adopted" in again.reason("a")
        assert again.service.status().devices[0].booked_bytes == 2 * MB


async def test_losing_everything_but_the_repository_costs_only_estimates(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
    for file in (tmp_path / ".modelium").glob("*.json"):
        file.unlink()
    async with rig(tmp_path, runtime=runtime) as again:
        await again.is_("a", "COLD")
        await again.look()
        await again.is_("a", "READY")
        assert runtime.count("load") == 1


async def test_changed_files_are_loaded_while_the_old_serve(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        held = r.runtime.hold("load", "a")
        (tmp_path / "repository/a/1/model").write_text(json.dumps({"size": MB, "new": 1}))
        await r.engine.catalog.look("a", settled=True)
        await held.arrived.wait()
        lease = r.service.try_acquire("a")
        assert lease is not None
        lease.release()
        assert r.service.status().devices[0].booked_bytes == 2 * MB
        held.release()
        await r.until(lambda: r.loaded("a"))
        assert r.runtime.count("unload") == 0 and r.service.status().devices[0].booked_bytes == MB


async def test_changed_files_that_do_not_load_leave_the_old_serving(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        r.runtime.fail("load", LoadRejected("broken"), "a")
        (tmp_path / "repository/a/1/model").write_text(json.dumps({"size": MB, "new": 1}))
        await r.engine.catalog.look("a", settled=True)
        await r.until(lambda: "broken" in r.reason("a"))
        assert r.state("a") == "READY" and r.service.try_acquire("a") is not None
        loads = r.runtime.count("load")
        r.advance(100)
        assert r.runtime.count("load") == loads


async def test_a_removed_folder_is_unloaded_and_forgotten(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        place = await r.service.remove("a")
        assert place == tmp_path / "trash/a" and (place / "1/model").exists()
        await r.until(lambda: r.state("a") == "-")
        assert "a" not in r.runtime.models and r.engine.usage.get("a") is None
        await r.add("b")
        (tmp_path / "repository/b").rename(tmp_path / "elsewhere")
        await r.until(lambda: r.state("b") == "-")
        assert "b" not in r.runtime.models


async def test_a_rescan_never_undoes_an_eviction(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.unload("a")
        loads = r.runtime.count("load")
        await r.engine.catalog.read()
        await r.engine.ingest.read()  # type: ignore[union-attr]
        r.engine.loop.tick()
        assert r.state("a") == "COLD" and r.runtime.count("load") == loads


async def test_bad_drops_are_kept_out_and_kept(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        for name, toy, why in (
            ("my model", {}, "letters"),
            ("..hidden", {}, "letters"),
            ("evil", {"bad": "it asks for os.system"}, "os.system"),
            ("a", {}, "there already"),
        ):
            if name.startswith("."):
                continue
            r.drop(name, **toy)
            await r.is_(f"quarantine/{name}", "INVALID")
            assert why in r.reason(f"quarantine/{name}")
            assert (tmp_path / "quarantine" / name).exists()
        (tmp_path / "incoming/notes.txt").write_text("hello")
        await r.is_("quarantine/notes.txt", "INVALID")
        assert r.runtime.count("load") == 1
    async with rig(tmp_path) as again:
        await again.is_("quarantine/evil", "INVALID")
        await again.service.remove("quarantine/evil")
        assert again.state("quarantine/evil") == "-" and (tmp_path / "trash/evil").exists()


async def test_a_half_drop_waits_for_the_rest(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        place = r.drop("a", whole=False)
        await r.until(lambda: "half of it" in r.reason("incoming/a"))
        assert r.state("incoming/a") == "DISCOVERED"
        place.write_text(json.dumps({"whole": True}))
        await r.is_("a", "READY")


async def test_a_pickled_drop_is_converted_and_the_original_kept(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.drop("a.bin", pickled=True)
        await r.is_("a", "READY")
        assert json.loads((tmp_path / "repository/a/1/model").read_text())["pickled"] is False
        assert json.loads((tmp_path / "trash/a.bin").read_text())["pickled"] is True


async def test_an_unwritable_repository_leaves_the_drop_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as r:

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device", "x")

        monkeypatch.setattr("modelium.engine.repository.Repository._arrange", full)
        place = r.drop("a", size=MB)
        await r.is_("incoming/a", "INVALID")
        assert "disk is full" in r.reason("incoming/a") and place.exists()
        monkeypatch.undo()
        r.engine.ingest.noticed("a")  # type: ignore[union-attr]
        await r.is_("a", "READY")


async def test_what_a_cut_off_installation_took_is_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as r:

        def killed(*args: object) -> None:
            raise OSError(5, "Input/output error", "x")  # the undoing never comes either

        monkeypatch.setattr("modelium.engine.repository._undo", killed)
        monkeypatch.setattr("os.rename", _rename_but_into(tmp_path / "repository"))
        r.drop("a", size=MB)
        await r.until(lambda: not (tmp_path / "incoming/a").exists())
    monkeypatch.undo()
    async with rig(tmp_path) as again:
        await again.is_("a", "READY")


def _rename_but_into(folder: Path):  # type: ignore[no-untyped-def]
    import os

    real = os.rename

    def rename(source: object, target: object) -> None:
        if str(target).startswith(str(folder)):
            raise OSError(5, "Input/output error", str(target))
        real(source, target)  # type: ignore[arg-type]

    return rename


async def test_models_that_somebody_else_loads_or_unloads(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.add("b")
        await r.service.unload("b")
        r.runtime.put("foreign", {"cpu:0": MB})
        r.runtime.put("b", {"cpu:0": MB})
        del r.runtime.models["a"]
        await r.look()
        assert r.state("b") == "READY" and r.state("a") == "COLD"
        assert r.service.status().runtimes[0].foreign_models == ("foreign",)
        r.advance(2)
        (await r.service.acquire("a")).release()


async def test_contact_lost_and_regained(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        r.runtime.lose_contact()
        await r.engine.runtimes.observe("fake")
        await r.engine.runtimes.observe("fake")
        assert r.service.status().runtimes[0].state == "CRASHED"
        r.runtime.regain_contact()
        r.advance(10)
        await r.is_("a", "READY")
        assert r.runtime.count("load") == 1  # it was adopted


async def test_growth_over_the_limit_makes_idle_models_go(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=4 * MB, min_resident_seconds=0) as r:
        await r.add("a")
        await r.add("b")
        r.clock.now += 1
        (await r.service.acquire("b")).release()
        r.runtime.put("b", {"cpu:0": 4 * MB})
        await r.look()
        r.advance(11)
        await r.is_("a", "COLD")
        assert r.state("b") == "READY"


async def test_idle_models_go_after_twice_the_threshold(tmp_path: Path) -> None:
    async with rig(tmp_path, evict_after_idle_seconds=100, always_loaded=["keep-*"]) as r:
        await r.add("a")
        await r.add("keep-b")
        (await r.service.acquire("a")).release()
        r.advance(150)
        assert r.state("a") == "READY"
        r.advance(100)
        await r.is_("a", "COLD")
        assert r.state("keep-b") == "READY"


async def test_what_would_happen_is_told_and_not_done(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=2 * MB, min_resident_seconds=0) as r:
        await r.add("a")
        await r.add("b")
        outside = tmp_path / "new"
        outside.write_text(json.dumps({"size": 2 * MB}))
        before = r.engine.loop.world
        told = await r.service.plan(outside)
        assert told.would_load is False and told.would_evict == ("a", "b") and told.refused is None
        assert r.engine.loop.world is before and outside.exists()
        outside.write_text(json.dumps({"size": 3 * MB}))
        told = await r.service.plan(outside)
        assert told.refused is not None and "never fit" in told.refused


async def test_what_would_happen_goes_by_use_up_to_this_moment(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=2 * MB, min_resident_seconds=0) as r:
        await r.add("a")
        await r.add("b")
        outside = tmp_path / "new"
        outside.write_text(json.dumps({"size": MB}))
        for used, other in (("a", "b"), ("b", "a")):
            r.clock.now += 1
            lease = r.service.try_acquire(used)
            assert lease is not None
            lease.release()
            assert (await r.service.plan(outside)).would_evict == (other,)


async def test_why_is_told(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        told = await r.service.explain("a")
        assert [t.after for t in told.transitions] == ["COLD", "QUEUED", "LOADING", "READY"]
        assert told.measured is not None and told.measured.memory_bytes == MB and told.model.plan is not None
        assert "holds 1.0 MB on cpu:0" in told.room
        checks = await r.service.check()
        assert all(c.ok for c in checks if not c.name.startswith("disk")), checks


async def test_a_runtime_that_is_not_there_yet_does_not_answer(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        running = r.engine.running["fake"]
        await running.known.wait()

        async def shown(**facts: Any) -> tuple[str, str]:
            assert running.info is not None
            running.info = running.info.model_copy(update={"facts": facts})
            (check,) = [c for c in await r.service.check() if c.name == "runtime fake"]
            assert check.ok
            return r.service.runtimes[0].reason, check.found

        absent = "not installed: `modelium runtimes install fake`, then start Modelium again"
        assert await shown(installed=False, install="modelium runtimes install fake") == (absent, absent)
        assert (await shown(installed=False))[0] == "not installed: it is installed with its first model"
        assert (await shown(installed=True, running=False))[0] == "starts with its first model"
        await r.add("a")
        await r.is_("a", "READY")
        assert (await shown(installed=True, running=False))[0] == "answers"


async def test_a_plan_is_for_the_name_that_is_asked_for(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        drop = tmp_path / "a.toy"
        drop.write_text(json.dumps({"size": MB}))
        assert (await r.service.plan(drop, "b")).name == "b"
        refused = await r.service.plan(drop, "no/name")
        assert refused.name == "no/name" and refused.refused


async def test_a_repository_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    for name in ("m1", "m2"):
        (theirs / name / "1").mkdir(parents=True)
        (theirs / name / "1/x.toy").write_text(json.dumps({"size": MB}))

    def listing() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in theirs.rglob("*"))

    before = listing()
    async with rig(tmp_path / "root", repository=theirs) as r:
        await r.is_("m1", "COLD")
        (await r.service.acquire("m1")).release()
        assert r.state("m2") == "COLD"
    assert listing() == before


async def test_stopping_answers_who_waits(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=MB) as r:
        await r.add("a")
        await r.add("b")
        using = await r.service.acquire("a")
        waiter = asyncio.ensure_future(r.service.acquire("b"))
        await r.is_("b", "QUEUED")
    with pytest.raises(DriverError, match="stopping"):
        await waiter
    using.release()


async def test_the_feed_shows_transitions(tmp_path: Path) -> None:
    async with rig(tmp_path) as r, r.service.subscribe() as feed:
        await r.add("a")
        seen = []
        async for event in feed:
            if event.kind == "transition" and event.subject == "a":
                seen.append(event.data["after"])
            if seen and seen[-1] == "READY":
                break
        assert seen == ["COLD", "QUEUED", "LOADING", "READY"]


async def test_a_request_for_a_folder_that_was_not_looked_into_yet_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, count = tmp_path / "theirs", 500
    for number in range(count):
        (theirs / f"m{number:03d}/1").mkdir(parents=True)
        (theirs / f"m{number:03d}/1/x.toy").write_text(json.dumps({"size": 1}))
    real = ToyInspector.inspect

    async def inspect(self: ToyInspector, path: Path) -> Inspection:
        await asyncio.sleep(0)
        return await real(self, path)

    monkeypatch.setattr(ToyInspector, "inspect", inspect)
    async with rig(tmp_path / "root", repository=theirs) as r:
        await r.engine.catalog.read_once.wait()
        for lease in await asyncio.gather(*(r.service.acquire("m499") for _ in range(5))):
            lease.release()
        assert len(r.service.names()) < count / 2
        await r.until(lambda: len(r.service.names()) == count)
        assert sorted(r.engine.inspector.inspected) == sorted(r.service.names())  # type: ignore[attr-defined]


async def test_a_request_before_the_repository_was_read_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime()
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
    go = threading.Event()
    real = Repository.names

    def slow(self: Repository) -> list[str]:
        go.wait(10)
        return real(self)

    monkeypatch.setattr(Repository, "names", slow)
    async with rig(tmp_path, runtime=runtime) as again:
        try:
            with pytest.raises(DeadlinePassed):
                await again.service.acquire("a", deadline_s=0.01)
            waiting = asyncio.ensure_future(again.service.acquire("a"))
            leaving = asyncio.ensure_future(again.service.acquire("a"))
            await asyncio.sleep(0)
            leaving.cancel()
        finally:
            go.set()
        (await waiting).release()
        with pytest.raises(ModelNotFound):
            await again.service.acquire("nobody")


async def test_a_request_before_runtimes_are_known_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime()
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
    real, asked = Orchestrator.start, []

    async def start(self: Orchestrator) -> None:
        asked.append(asyncio.ensure_future(Service(self).acquire("a")))
        await asyncio.wait(asked, timeout=0.2)
        await real(self)

    monkeypatch.setattr(Orchestrator, "start", start)
    async with rig(tmp_path, runtime=runtime):
        (await asked[0]).release()


async def test_a_lease_from_before_a_reload_ends_the_drain_too(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        using = await r.service.acquire("a")
        (tmp_path / "repository/a/1/model").write_text(json.dumps({"size": MB, "new": 1}))
        await r.engine.catalog.look("a", settled=True)
        await r.until(lambda: r.loaded("a"))
        unload = asyncio.ensure_future(r.service.unload("a"))
        await r.is_("a", "DRAINING")
        using.release()
        await unload


async def test_a_folder_that_cannot_be_read_for_a_moment_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.pin("a", True)

        def stale(self: Repository, name: str) -> None:
            raise OSError(116, "Stale file handle")

        def gone(self: Repository) -> list[str]:
            raise FileNotFoundError(2, "No such file or directory")

        with monkeypatch.context() as broken:
            broken.setattr(Repository, "entry", stale)
            await r.engine.catalog.look("a")
        with monkeypatch.context() as broken:
            broken.setattr(Repository, "names", gone)
            with pytest.raises(FileNotFoundError):
                await r.engine.catalog.read()
        assert r.state("a") == "READY" and r.service.view("a").pinned


async def test_a_fault_that_is_not_the_models_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "m/1").mkdir(parents=True)
    (theirs / "m/1/x.toy").write_text(json.dumps({"size": 1}))

    mended = False
    real = ToyInspector.inspect

    async def inspect(self: ToyInspector, path: Path) -> Inspection:
        if mended:
            return await real(self, path)
        raise PluginError("the process that looks at drops did not start")

    monkeypatch.setattr(ToyInspector, "inspect", inspect)
    async with rig(tmp_path / "root", repository=theirs) as r:
        await r.until(r.engine.catalog.read_once.is_set)
        assert r.state("m") == "-"
        mended = True
        await r.engine.catalog.read()
        await r.is_("m", "COLD")


async def test_a_folder_that_is_taken_away_while_it_is_looked_into_is_gone_and_no_bad_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, aside = tmp_path / "theirs", tmp_path / "aside"
    (theirs / "m/1").mkdir(parents=True)
    (theirs / "m/1/x.toy").write_text(json.dumps({"size": 1}))
    real = ToyInspector.inspect
    looking, asked = asyncio.Event(), asyncio.Event()

    async def inspect(self: ToyInspector, path: Path) -> Inspection:
        if not asked.is_set():
            looking.set()
            await asked.wait()
            path.rename(aside)
        return await real(self, path)

    monkeypatch.setattr(ToyInspector, "inspect", inspect)
    async with rig(tmp_path / "root", repository=theirs) as r:
        await looking.wait()
        waiting = asyncio.ensure_future(r.service.acquire("m"))
        await asyncio.sleep(0)  # it waits for what is found
        asked.set()
        with pytest.raises(ModelNotFound):
            await waiting
        assert r.state("m") == "-"
        aside.rename(theirs / "m")
        await r.is_("m", "COLD")


async def test_removing_lets_nobody_load_it_meanwhile(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        using = await r.service.acquire("a")
        removing = asyncio.ensure_future(r.service.remove("a"))
        await r.is_("a", "DRAINING")
        asking = [asyncio.ensure_future(r.service.acquire("a")) for _ in range(3)]
        loads = r.runtime.count("load")
        using.release()
        await removing
        for asked in asking:
            with pytest.raises(ModelNotFound):
                await asked
        assert r.runtime.count("load") == loads and (tmp_path / "trash/a/1/model").exists()
        await r.add("a")
        assert r.state("a") == "READY"


async def test_a_manifest_in_a_drop_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        hidden = tmp_path / "coming"
        (hidden / "1").mkdir(parents=True)
        (hidden / "1/x.toy").write_text(json.dumps({"size": 1}))
        (hidden / "modelium.json").write_text("{}")
        hidden.rename(tmp_path / "incoming/m")
        await r.is_("quarantine/m", "INVALID")
        assert "modelium.json" in r.reason("quarantine/m")
        assert (tmp_path / "quarantine/m/modelium.json").exists()


async def test_a_runtime_that_takes_long_to_come_is_waited_for(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    for _ in range(8):
        runtime.fail("start", RuntimeUnavailable("connection refused"))
    async with rig(tmp_path, runtime=runtime) as r:
        for _ in range(8):
            await r.until(lambda: r.service.status().runtimes[0].state == "CRASHED" or runtime.starts)
            r.advance(61)
        await r.until(lambda: runtime.starts == 1)


async def test_who_asks_while_the_service_ends_is_answered(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.unload("a")
        r.engine.shut()
        with pytest.raises(DriverError, match="stopping"):
            await r.service.acquire("a")


async def test_a_drop_that_stays_half_stays_marked_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelium.engine.ingest.STALLED_S", 0.05)
    async with rig(tmp_path) as r:
        place = r.drop("a", whole=False)
        await r.is_("incoming/a", "INVALID")
        before = len(r.service.decisions("incoming/a"))
        for _ in range(5):
            await r.engine.ingest.read()  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        assert len(r.service.decisions("incoming/a")) == before
        place.write_text(json.dumps({"whole": True}))
        await r.is_("a", "READY")


async def test_a_name_that_is_no_text_is_refused_and_can_be_shown(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        (tmp_path / "incoming" / os.fsdecode(b"\xff\xfe.toy")).write_text("{}")
        await r.until(lambda: any(n.startswith("quarantine/") for n in r.service.names()))
        for view in r.service.models():
            assert view.model_dump_json()
        assert all(t.model_dump_json() for t in r.service.decisions())


async def test_who_does_not_wait_has_it_loaded_once_for_the_next(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.add("a")
        await r.service.unload("a")
        held = r.runtime.hold("load", "a")
        for _ in range(3):
            with pytest.raises(ModelLoading) as caught:
                await r.service.load_soon("a")
        assert caught.value.fields["state"] == "LOADING" and caught.value.fields["expected_s"] is not None
        held.release()
        await r.is_("a", "READY")
        await r.service.load_soon("a")
        assert r.runtime.calls.count(("load", "a")) == 2
        assert r.service.view("a").in_flight == 0
        with pytest.raises(ModelNotFound):
            await r.service.load_soon("nobody")


async def test_who_asks_and_for_what_has_a_standing(tmp_path: Path) -> None:
    policies: dict[str, Any] = {
        "max_concurrent_loads": 1, "high_priority_teams": ["vip"], "organisation_priorities": {"slow": -3},
        "model_priorities": {"b*": 4, "*": 1},
    }  # fmt: skip
    async with rig(tmp_path, **policies) as r:
        for name in ("a", "b", "busy"):
            await r.add(name)
            await r.service.unload(name)
        held = r.runtime.hold("load", "busy")
        asking = [asyncio.ensure_future(r.service.acquire("busy"))]
        await held.arrived.wait()
        for name, organisation in (("a", "slow"), ("a", "vip"), ("b", "")):
            asking.append(asyncio.ensure_future(r.service.acquire(name, priority=1, organisation=organisation)))
            await asyncio.sleep(0)
        tickets = r.engine.loop.world.tickets.values()
        assert sorted((t.model, t.priority) for t in tickets) == [("a", -1), ("a", 7), ("b", 5), ("busy", 4)]
        held.release()
        for lease in await asyncio.gather(*asking):
            lease.release()


# --------------------------------------------------------------------------- devices and addresses of a runtime's own


def _far(size: int, used: int = 0) -> Device:
    return Device(id="far/cpu:0", kind="cpu", name="far", total_bytes=size, used_bytes=used, runtime="fake")


async def test_a_device_that_only_the_runtime_reaches_is_used_and_when_it_goes_its_models_come_here(
    tmp_path: Path,
) -> None:
    runtime = FakeRuntime()
    runtime.devices = (_far(4 * MB),)
    async with rig(tmp_path, budget=2 * MB, runtime=runtime, min_resident_seconds=0) as r:
        await r.until(lambda: "far/cpu:0" in r.engine.loop.world.devices)
        await r.add("large", size=3 * MB)
        assert r.state("large") == "READY"
        assert r.service.view("large").devices == ("far/cpu:0",)
        await r.add("small", size=MB)
        await r.is_("small", "READY")
        lease = await r.service.acquire("small")
        lease.release()
        where = r.service.view("small").devices
        runtime.devices = ()
        runtime.models.pop("large")
        if where == ("far/cpu:0",):
            runtime.models.pop("small")
        await r.look()
        for _ in range(GONE_AFTER):
            await r.engine._look_at_devices()
            r.clock.now += GONE_AFTER_S
        await r.until(lambda: "far/cpu:0" not in r.engine.loop.world.devices)
        r.advance(2)
        await r.is_("small", "READY")
        assert r.service.view("small").devices == ("cpu:0",)
        with pytest.raises(NeverFits):
            await r.service.acquire("large")


async def test_what_was_used_a_moment_ago_comes_back_when_its_device_is_gone(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.devices = (_far(4 * MB),)
    async with rig(tmp_path, budget=2 * MB, runtime=runtime) as r:
        await r.until(lambda: "far/cpu:0" in r.engine.loop.world.devices)
        await r.add("a")
        assert r.service.view("a").devices == ("far/cpu:0",)
        lease = r.service.try_acquire("a")  # the core is not told
        assert lease is not None
        lease.release()
        runtime.devices = r.engine.running["fake"].devices = ()
        for _ in range(GONE_AFTER):
            await r.engine._look_at_devices()
            r.clock.now += GONE_AFTER_S
        assert r.state("a") != "COLD"
        r.advance(2)
        await r.is_("a", "READY")
        assert r.service.view("a").devices == ("cpu:0",)


async def test_the_devices_are_looked_at_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, go = [], threading.Event()

    def look(self: Ledger, runtimes: object) -> None:
        looks.append(1)
        go.wait(30)

    async with rig(tmp_path) as r:
        monkeypatch.setattr(Ledger, "look", look)
        looking = asyncio.gather(*(r.engine._look_at_devices() for _ in range(2)))
        await r.until(lambda: looks)
        await asyncio.sleep(0.02)  # the other had every chance
        assert len(looks) == 1
        go.set()
        await looking
        assert len(looks) == 2


async def test_a_background_task_that_is_done_is_let_go_of(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.engine.catalog.read_once.wait()
        before = len(r.engine._tasks)
        for _ in range(9):
            r.engine.runtimes.devices_changed()
        assert len(r.engine._tasks) == before + 9
        await r.until(lambda: len(r.engine._tasks) <= before)


async def test_a_model_answers_at_an_address_of_its_own_also_after_it_moved_or_was_adopted(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.endpoints["a"] = "http://first.invalid"
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
        await r.add("b")
        lease = await r.service.acquire("a")
        assert lease.endpoints == {"openai": "http://first.invalid"}
        lease.release()
        assert (await r.service.acquire("b")).endpoints == {"kserve-http": "http://fake.invalid"}
        moved = Endpoint(protocol="openai", address="http://second.invalid")
        runtime.models["a"] = runtime.models["a"].model_copy(update={"endpoints": (moved,)})
        await r.look()
        assert (await r.service.acquire("a")).endpoints == {"openai": "http://second.invalid"}
    async with rig(tmp_path, runtime=runtime) as r:
        assert (await r.service.acquire("a")).endpoints == {"openai": "http://second.invalid"}


async def test_memory_that_does_not_come_back_is_noted_and_the_runtime_started_anew_when_idle(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.residue["a"] = {"cpu:0": 2 * MB}
    async with rig(tmp_path, runtime=runtime, max_residue_bytes=3 * MB, min_resident_seconds=5) as r:
        await r.add("a")
        await r.add("b")
        for _ in range(2):
            (await r.service.acquire("a")).release()
            await r.service.unload("a")
        assert r.service.status().runtimes[0].residue_bytes == {"as-is": 4 * MB}
        (await r.service.acquire("b")).release()
        r.advance(11)
        await r.until(lambda: runtime.count("stop") == 1 and runtime.starts == 2, "a new start")
        r.advance(1)
        await r.is_("b", "READY")
        assert "did not come back after unloads" in " ".join(
            t.reason for t in r.engine.journal.last("runtime:fake", 20)
        )


async def test_what_was_measured_on_a_device_counts_there_and_what_is_held_besides_does_not(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.memory["a"] = {"cpu:0": 2 * MB, "other": 7 * MB}
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
        await r.is_("a", "READY")
        await r.service.unload("a")
        assert (await r.service.explain("a")).measured.memory_bytes == 2 * MB  # type: ignore[union-attr]
        assert r.service.view("a").memory_bytes == 2 * MB


async def test_what_measured_loads_differed_by_is_booked_besides_after_a_restart(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
        for size in (21 * MB // 10, 2 * MB):
            await r.service.unload("a")
            runtime.memory["a"] = {"cpu:0": size}
            (await r.service.acquire("a")).release()
        await r.service.unload("a")
    async with rig(tmp_path, runtime=runtime) as r:
        await r.is_("a", "COLD")
        held = runtime.hold("load", "a")
        asking = asyncio.ensure_future(r.service.acquire("a"))
        await held.arrived.wait()
        assert r.engine.loop.world.devices["cpu:0"].booked_bytes == 21 * MB // 10
        held.release()
        (await asking).release()
        assert r.engine.loop.world.devices["cpu:0"].booked_bytes == 2 * MB


async def test_what_is_kept_of_a_model_on_unequal_devices_is_what_its_next_load_is_placed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = First.plan
    monkeypatch.setattr(First, "plan", lambda *told: plan(*told).model_copy(update={"devices": 2}))
    runtime = FakeRuntime()
    runtime.memory["a"] = {"cpu:0": 3 * MB, "cpu:1": 2 * MB, "other": 7 * MB}
    async with rig(tmp_path, runtime=runtime) as r:
        r.devices.append(r.devices[0].model_copy(update={"id": "cpu:1"}))
        await r.engine._look_at_devices()
        await r.add("a")
        await r.is_("a", "READY")
        await r.look()
        assert r.engine.loop.world.models["a"].estimate.memory_bytes == 6 * MB
        assert (await r.service.explain("a")).measured.memory_bytes == 6 * MB  # type: ignore[union-attr]


async def test_what_an_external_runtime_serves_of_its_own_accord_is_usable_and_stays(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.external = True
    runtime.up = True
    there = Endpoint(protocol="openai", address="http://box.invalid")
    runtime.put("llm", endpoints=(there,))
    runtime.put("org/llm", endpoints=(there,))  # a name that no path could have
    runtime.put("elsewhere")  # its own affair: it answers nowhere that is known
    async with rig(tmp_path, runtime=runtime, evict_after_idle_seconds=10, min_resident_seconds=0) as r:
        await r.is_("llm", "READY")
        assert [m.name for m in r.service.models()] == ["llm"]
        lease = await r.service.acquire("llm")
        assert lease.endpoints == {"openai": "http://box.invalid"}
        lease.release()
        with pytest.raises(ModelConflict, match="not ours to unload"):
            await r.service.unload("llm")
        r.advance(1000)
        await r.look()
        assert r.state("llm") == "READY"
        runtime.put("second", endpoints=(there,))
        await r.look()
        await r.is_("second", "READY")
        runtime.models.pop("llm")
        await r.look()
        await r.until(lambda: r.state("llm") == "-", "llm is forgotten")
        r.crash()
        await r.until(lambda: r.state("second") in ("QUEUED", "FAILED"), "its runtime is gone")
        waiter = asyncio.ensure_future(r.service.acquire("second"))
        runtime.put("second", endpoints=(there,))
        r.advance(2)
        (await waiter).release()
        assert not runtime.count("load") and not runtime.count("unload", "second")


async def test_a_guest_is_there_when_the_repository_is_read_after_its_runtime_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, names = threading.Event(), Repository.names

    def slow(repository: Repository) -> list[str]:
        reads.wait(60)
        return names(repository)

    monkeypatch.setattr(Repository, "names", slow)
    for name in ("a", "b"):
        (tmp_path / "repository" / name).mkdir(parents=True)
        (tmp_path / "repository" / name / "x.toy").write_text(json.dumps({"size": MB}))
    box = _box("guest", "a")
    async with rig(tmp_path, others=[box]) as r:
        try:
            await r.until(lambda: r.engine.loop.world.runtimes["other"].state == "UP")
            assert r.state("guest") == "-" and not r.engine.ready()
            look = box.hold("observe")
        finally:
            reads.set()
        await r.engine.catalog.read_once.wait()
        assert r.engine.ready() and r.state("guest") != "-" and r.state("a") != "READY"
        waiter = asyncio.ensure_future(r.service.acquire("guest"))
        await look.arrived.wait()
        look.release()
        (await waiter).release()
        await r.is_("a", "COLD")
        assert not any("of its own accord" in t.reason for t in r.engine.journal.last("a", 50))


async def test_a_folder_has_its_name_before_any_guest(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.external = True
    runtime.up = True
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a")
        runtime.put("a", endpoints=(Endpoint(protocol="openai", address="http://box.invalid"),))
        await r.look()
        assert (await r.service.model("a")).plan is not None
        await r.service.unload("a")
        assert r.state("a") == "COLD"


def _box(*names: str, **fields: Any) -> FakeRuntime:
    """An external server that is up already, and serves these of its own accord."""
    box = FakeRuntime("other")
    box.external = box.up = True
    for name in names:
        box.put(name, endpoints=(Endpoint(protocol="openai", address="http://box.invalid"),), **fields)
    return box


async def test_what_another_runtime_shows_by_the_same_name_says_nothing_of_a_model(tmp_path: Path) -> None:
    box, runtime = _box(), FakeRuntime()
    runtime.endpoints["a"] = "http://here.invalid"
    async with rig(tmp_path, runtime=runtime, others=[box]) as r:
        await r.add("a")
        box.put(
            "a",
            {"cpu:0": 9 * MB},
            endpoints=(Endpoint(protocol="openai", address="http://box.invalid"),),
            requests=100,
        )
        for requests in (100, 200):
            box.models["a"] = box.models["a"].model_copy(update={"requests": requests})
            await r.engine.runtimes.observe("other")
            await r.look()
        lease = await r.service.acquire("a")
        assert lease.endpoints == {"openai": "http://here.invalid"}
        lease.release()
        usage = r.engine.usage.get("a")
        assert usage is not None and usage.requests == 1
        assert (await r.service.explain("a")).measured.memory_bytes == MB  # type: ignore[union-attr]
        r.devices[0] = r.devices[0].model_copy(update={"used_bytes": 10 * MB})
        await r.engine._look_at_devices()
        assert r.engine.loop.world.devices["cpu:0"].unbooked_bytes == 9 * MB
        box.models["a"] = box.models["a"].model_copy(update={"endpoints": ()})
        await r.engine.runtimes.observe("other")
        assert (await r.service.acquire("a")).endpoints == {"openai": "http://here.invalid"}


async def test_a_guest_gives_its_name_to_a_folder_that_comes_and_has_it_again_when_that_goes(tmp_path: Path) -> None:
    box = _box("a")
    async with rig(tmp_path, others=[box]) as r:
        await r.is_("a", "READY")
        lease = await r.service.acquire("a")
        assert lease.endpoints == {"openai": "http://box.invalid"}
        lease.release()
        r.drop("a", size=MB)
        await r.until(lambda: "a" in r.engine.catalog.known, "the folder is known")
        for _ in range(3):
            r.advance(40)
            await r.engine.runtimes.observe("other")
        await r.until(lambda: r.state("a") == "READY" and r.loaded("a"), "the folder's model is loaded")
        for _ in range(3):
            r.advance(40)
            await r.engine.runtimes.observe("other")
        lease = await r.service.acquire("a")
        assert lease.endpoints == {"kserve-http": "http://fake.invalid"}
        lease.release()
        assert r.runtime.count("load", "a") == 1 and not box.count("unload")
        assert "FAILED" not in [t.after for t in r.engine.journal.last("a", 50)]
        await r.service.remove("a")
        await r.engine.runtimes.observe("other")
        await r.is_("a", "READY")
        assert (await r.service.acquire("a")).endpoints == {"openai": "http://box.invalid"}


async def test_a_folder_that_was_not_looked_into_yet_has_its_name_before_any_guest(tmp_path: Path) -> None:
    folder = tmp_path / "repository/a"
    folder.mkdir(parents=True)
    (folder / "x.toy").write_text(json.dumps({"size": MB}))
    box = _box("a")
    held = box.hold("start")
    async with rig(tmp_path, others=[box]) as r:
        await held.arrived.wait()
        await r.engine.catalog.read_once.wait()
        held.release()
        await r.is_("a", "COLD")
        await r.engine.runtimes.observe("other")
        (await r.service.acquire("a")).release()
        assert r.runtime.count("load", "a") == 1 and not box.count("unload")
        assert not any("of its own accord" in t.reason for t in r.engine.journal.last("a", 50))


async def test_what_was_just_loaded_is_not_taken_for_somebody_elses(tmp_path: Path) -> None:
    async with rig(tmp_path, budget=10 * MB) as r:
        await r.add("a", 3 * MB)
        held = r.runtime.hold("observe")  # nobody looks at what it has for a while
        r.engine.runtimes.poke(r.runtime.name)
        await held.arrived.wait()
        await r.add("b", 5 * MB)
        r.devices[0] = r.devices[0].model_copy(update={"used_bytes": 8 * MB})
        await r.engine._look_at_devices()
        await r.until(lambda: r.engine.loop.world.devices["cpu:0"].used_bytes == 8 * MB)
        r.engine.loop.tick()
        account = r.engine.loop.world.devices["cpu:0"]
        assert (account.unbooked_bytes, account.limit_bytes) == (0, 10 * MB)
        assert (r.state("a"), r.state("b")) == ("READY", "READY")
        held.release()


async def test_a_look_from_before_an_operation_ended_says_nothing_of_it(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.runtime.endpoints["a"] = "http://old"
        await r.add("a")
        held = r.runtime.hold("observe")
        r.engine.runtimes.poke(r.runtime.name)
        await held.arrived.wait()
        shown = dict(r.runtime.models)
        r.clock.now += 1
        r.runtime.endpoints["a"] = "http://new"
        (tmp_path / "repository/a/1/model").write_text(json.dumps({"size": MB, "new": 1}))
        await r.engine.catalog.look("a", settled=True)
        await r.until(lambda: r.loaded("a"))
        now, r.runtime.models = r.runtime.models, shown
        held.release()
        await held.ended.wait()
        await asyncio.sleep(0)
        r.runtime.models = now
        route = r.engine.admission.routes["a"]
        assert route.endpoints == {"openai": "http://new"}


async def test_a_replacement_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    async with rig(tmp_path, load_timeout_s=60) as r:
        await r.add("a")
        held = r.runtime.hold("load", "a")
        (tmp_path / "repository/a/1/model").write_text(json.dumps({"size": MB, "new": 1}))
        await r.engine.catalog.look("a", settled=True)
        await held.arrived.wait()
        r.advance(61)
        await held.ended.wait()
        assert held.cancelled
        assert r.state("a") == "READY" and "did not load within 60 s" in r.reason("a")


async def test_the_new_one_of_a_replacement_is_asked_before_the_old_one_has_ended(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.runtime.endpoints["a"] = "http://new"
        await r.add("a")
        held = r.runtime.hold("load", "a")
        (tmp_path / "repository/a/1/model").write_text(json.dumps({"size": MB, "new": 1}))
        await r.engine.catalog.look("a", settled=True)
        await held.arrived.wait()
        held.report(Progress(stage="ending", endpoints=(Endpoint(protocol="openai", address="http://newer"),)))
        assert r.engine.admission.routes["a"].endpoints == {"openai": "http://newer"}
        assert r.service.status().devices[0].booked_bytes == 2 * MB
        held.release()
        await r.until(lambda: r.loaded("a"))


async def test_nothing_is_learnt_from_what_was_loaded_otherwise_than_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FakeDriver.load

    async def load(self: FakeDriver, request: LoadRequest, report: Report) -> LoadOutcome:
        outcome = await real(self, request, report)
        return outcome.model_copy(update={"note": "with half a cache, since memory was short"})

    monkeypatch.setattr(FakeDriver, "load", load)
    runtime = FakeRuntime()
    runtime.memory["a"] = {"cpu:0": MB // 2}
    async with rig(tmp_path, runtime=runtime) as r:
        await r.add("a", MB)
        assert r.reason("a") == "loaded in 1.00 s, with half a cache, since memory was short"
        await r.look()
        view = r.service.view("a")
        assert (view.memory_bytes, view.memory_source) == (MB // 2, "measured")
        estimate = r.engine.loop.world.models["a"].estimate
        assert (estimate.memory_bytes, estimate.measured) == (MB, False)
        assert not r.engine.store.measured
