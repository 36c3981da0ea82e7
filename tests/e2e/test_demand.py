"""More models than memory: what waits, what goes, what is refused, and why."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.kit import Got, Toy, eventually, infer, refused, stubs_of, toy, transitions, web, x_body
from tests.service import Served

MIB = 2**20
BALLAST = 150 * MIB
"""Of each model: what they differ by in measuring is small beside it."""

NAMES = ("ada", "bob", "cleo", "dora")
KEPT = "kept"
"""Always loaded, by configuration."""

QUEUE = 250


def config(budget_bytes: int | None) -> dict[str, Any]:
    policies: dict[str, Any] = {
        "min_resident_seconds": 0,
        "keep_above_qps": 1000,
        "max_queue_per_model": QUEUE,
        "retry_s": 0.2,
        "retry_max_s": 0.5,
        "fairness_after_s": 3600,
    }
    if budget_bytes is not None:
        policies["device_budget_bytes"] = {"cpu:0": budget_bytes}
        policies["always_loaded"] = [KEPT]
    return {"orchestration": {"settle_s": 0.5, "rescan_interval_s": 2, "policies": policies}}


class Room:
    """A service in which two of the four models fit beside the one that is always loaded."""

    def __init__(self, service: Served, toys: dict[str, Toy], size: int):
        self.service = service
        self.toys = toys
        self.size = size
        """Of each, as measured."""

    def loaded(self) -> set[str]:
        return {name for name, m in self.service.ps().items() if m["state"] == "READY"} - {KEPT}

    def only(self, *names: str) -> None:
        """See to it that these are loaded, used in this order, and no others."""
        for name in NAMES:
            self.service.post(f"/models/{name}/unpin")
        for name in self.loaded() - set(names):
            self.service.post(f"/models/{name}/unload")
        for name in names:
            infer(self.service, name)
        assert self.loaded() == set(names)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """Each model is loaded once with all the room there is; then the service is started again with little."""
    folder = tmp_path_factory.mktemp("demand")
    service = Served(folder / "root", config(None))
    try:
        service.start()
        toys = {name: toy(folder / name, ballast_bytes=BALLAST) for name in NAMES}
        toys[KEPT] = toy(folder / KEPT)
        for made in toys.values():
            service.drop(made.path)
        before = service.until(lambda: _accepted(service), what="all to be accepted")
        estimates = [m["memory_bytes"] for m in before.values() if m["memory_source"] == "estimated"]
        sizes = {}
        for name in toys:
            service.until_state(name, "READY")
            shown = service.get(f"/models/{name}/explain")
            assert shown["measured"]["loads"] == 1
            assert shown["model"]["memory_source"] == "measured"
            sizes[name] = shown["measured"]["memory_bytes"]
            if name != KEPT:
                assert sizes[name] > BALLAST > shown["estimate_bytes"]
        assert all(0 < estimate < BALLAST for estimate in estimates)
        for name in toys:
            service.post(f"/models/{name}/unload")
        size = max(sizes[name] for name in NAMES)
        service.stop()
        service.configure(config(sizes[KEPT] + int(2.5 * size)))
        service.start()
        service.until_state(KEPT, "READY")
        # What was measured is known after the restart, without a load.
        for name in NAMES:
            shown = service.get(f"/models/{name}/explain")
            assert shown["measured"]["memory_bytes"] == sizes[name] and shown["model"]["state"] == "COLD"
            assert shown["model"]["memory_source"] == "measured"
        there = service.root / "repository"
        yield Room(service, {name: Toy(there / name, made.control) for name, made in toys.items()}, size)
    finally:
        service.down()


def _accepted(service: Served) -> dict[str, dict[str, Any]] | None:
    shown = service.ps()
    return shown if {*NAMES, KEPT} <= set(shown) else None


# --------------------------------------------------------------------------- waiting


def test_a_cold_request_waits_and_is_answered(room: Room) -> None:
    room.only("ada", "bob")
    before = room.toys["cleo"].count("loads")
    assert infer(room.service, "cleo", [3]) == [6]
    assert room.toys["cleo"].count("loads") == before + 1


def test_two_hundred_clients_on_one_cold_model_are_one_load(room: Room) -> None:
    room.only("ada", "bob")
    cold = room.toys["cleo"]
    before = cold.count("loads"), cold.count("requests")

    async def herd() -> list[Got]:
        async with web(room.service) as ask:
            return list(await asyncio.gather(*(ask("/v2/models/cleo/infer", x_body([n])) for n in range(200))))

    for n, got in enumerate(asyncio.run(herd())):
        assert got.status == 200, got
        assert json.loads(got.body)["outputs"][0]["data"] == [2 * n]
    assert (cold.count("loads"), cold.count("requests")) == (before[0] + 1, before[1] + 200)
    assert room.service.get("/status")["waiting"] == 0


def test_a_deadline_of_ones_own(room: Room) -> None:
    room.only()
    with room.toys["ada"].holding("hold-load"):
        late = refused(room.service, "POST", "/v2/models/ada/infer", x_body(), **{"x-modelium-deadline-s": "0.3"})
        assert late.status == 503 and "ada was not ready within" in late.json["error"]
        assert "LOADING" in late.json["error"]
        at_once = refused(room.service, "POST", "/v2/models/ada/infer", x_body(), **{"x-modelium-deadline-s": "0"})
        assert at_once.status == 503
        wrong = refused(room.service, "POST", "/v2/models/ada/infer", x_body(), **{"x-modelium-deadline-s": "soon"})
        assert wrong.status == 400 and "x-modelium-deadline-s" in wrong.json["error"]
        assert room.service.get("/status")["waiting"] == 0
    assert infer(room.service, "ada", [1]) == [2]


def test_a_full_queue(room: Room) -> None:
    room.only()
    model = room.toys["ada"]

    async def crowd() -> tuple[list[Got], list[Got]]:
        async with web(room.service) as ask:
            with model.holding("hold-load") as go_on:
                waiting = [asyncio.ensure_future(ask("/v2/models/ada/infer", x_body())) for _ in range(QUEUE)]
                await eventually(lambda: room.service.model("ada")["waiting"] == QUEUE, "all to wait")
                refused = list(await asyncio.gather(*(ask("/v2/models/ada/infer", x_body()) for _ in range(10))))
                go_on()
                return list(await asyncio.gather(*waiting)), refused

    answered, refused_ones = asyncio.run(crowd())
    assert {got.status for got in answered} == {200}
    for got in refused_ones:
        assert got.status == 429, got
        assert int(got.headers["Retry-After"]) >= 1
        assert "max_queue_per_model" in json.loads(got.body)["error"]


def test_nobody_loads_for_nobody(room: Room) -> None:
    """Who leaves while his model waits for room takes the wish along."""
    room.only("ada", "bob")
    for name in ("ada", "bob"):
        room.service.post(f"/models/{name}/pin")
    before = room.toys["cleo"].count("loads")

    async def leave() -> None:
        async with web(room.service) as ask:
            waiting = [asyncio.ensure_future(ask("/v2/models/cleo/infer", x_body())) for _ in range(3)]
            await eventually(lambda: room.service.model("cleo")["waiting"] == 3, "three to wait")
            shown = room.service.model("cleo")
            assert shown["state"] == "QUEUED" and "pinned" in shown["reason"]
            assert room.service.get("/status")["queue"] == ["cleo"]
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await eventually(lambda: room.service.state("cleo") == "COLD", "the wish to be forgotten")

    asyncio.run(leave())
    for name in ("ada", "bob"):
        room.service.post(f"/models/{name}/unpin")
    assert room.loaded() == {"ada", "bob"} and room.toys["cleo"].count("loads") == before


# --------------------------------------------------------------------------- who goes


@pytest.mark.parametrize(("used", "gone"), [(("ada", "bob"), "ada"), (("bob", "ada"), "bob")])
def test_the_least_recently_used_goes(room: Room, used: tuple[str, str], gone: str) -> None:
    room.only(*used)
    assert infer(room.service, "cleo", [1]) == [2]
    assert room.loaded() == {*NAMES[:3]} - {gone}
    why = room.service.get(f"/models/{gone}/explain")["transitions"]
    assert "evicted for cleo" in [t["reason"] for t in why if t["after"] == "DRAINING"][-1]
    assert not stubs_of(room.service.root, gone)


def test_what_is_pinned_stays(room: Room) -> None:
    room.only("ada", "bob")
    room.service.post("/models/ada/pin")
    infer(room.service, "cleo")
    infer(room.service, "dora")
    assert room.loaded() == {"ada", "dora"}
    assert "pinned" in room.service.get("/models/ada/explain")["next"]
    conflict = refused(room.service, "POST", "/models/ada/unload")
    assert conflict.status == 409 and conflict.json["error"]["code"] == "model_conflict"
    room.service.post("/models/ada/unpin")


def test_a_pin_loads_and_makes_room(room: Room) -> None:
    room.only("ada", "bob")
    room.service.post("/models/cleo/pin")
    room.service.until_state("cleo", "READY")
    assert room.loaded() == {"bob", "cleo"}
    room.service.post("/models/cleo/unpin")


def test_room_that_all_is_pinned_in_is_refused_with_the_arithmetic(room: Room) -> None:
    room.only("ada", "bob")
    for name in ("ada", "bob"):
        room.service.post(f"/models/{name}/pin")
    late = refused(room.service, "POST", "/v2/models/cleo/infer", x_body(), **{"x-modelium-deadline-s": "0.3"})
    assert late.status == 503
    told = late.json["error"]
    assert "limit" in told and "booked" in told and "ada is pinned" in told and f"{KEPT} is always loaded" in told
    for name in ("ada", "bob"):
        room.service.post(f"/models/{name}/unpin")


def test_what_is_in_use_is_not_evicted(room: Room) -> None:
    """The least recently used one works on a request: the other goes."""
    room.only("ada", "bob")
    busy = room.toys["ada"]

    async def work() -> Got:
        async with web(room.service) as ask:
            with busy.holding("hold-infer"):
                before = busy.count("requests")
                held = asyncio.ensure_future(ask("/v2/models/ada/infer", x_body()))
                await eventually(lambda: busy.count("requests") > before, "the request to arrive")
                await asyncio.to_thread(infer, room.service, "bob")
                assert (await ask("/v2/models/cleo/infer", x_body())).status == 200
                assert await asyncio.to_thread(room.loaded) == {"ada", "cleo"}
            got: Got = await held
            return got

    assert asyncio.run(work()).status == 200


def test_always_loaded(room: Room) -> None:
    assert room.service.model(KEPT)["always_loaded"]
    for name in NAMES:
        infer(room.service, name)
    assert room.service.state(KEPT) == "READY"
    conflict = refused(room.service, "POST", f"/models/{KEPT}/unload")
    assert conflict.status == 409 and "always loaded" in conflict.json["error"]["message"]
    # once when it was dropped, and once when it had become always loaded
    assert room.toys[KEPT].count("loads") == 2


def test_what_is_evicted_stays_so_until_wanted(room: Room) -> None:
    room.only("ada", "bob")
    infer(room.service, "cleo")
    before = room.toys["ada"].count("loads")
    (room.toys["ada"].path / "seen").write_text("")  # the next rescan sees it, and so there was one
    revision = room.service.model("ada")["revision"]
    room.service.until(lambda: room.service.model("ada")["revision"] != revision, what="a rescan")
    assert room.service.state("ada") == "COLD" and room.toys["ada"].count("loads") == before
    assert infer(room.service, "ada", [1]) == [2]


# --------------------------------------------------------------------------- never, and what would be


def test_what_can_never_fit_is_refused_at_once(room: Room, tmp_path: Path) -> None:
    """Its file is as large as it says, and holds no block of the disk."""
    huge = toy(tmp_path / "huge")
    with (huge.path / "1" / "weights.bin").open("wb") as file:
        os.truncate(file.fileno(), 10**12)
    preview = room.service.cli("plan", str(huge.path), "--json", check=False)
    assert preview.returncode == 1 and "can never fit" in json.loads(preview.stdout)["refused"]
    huge.path.rename(room.service.root / "incoming" / "huge")
    room.service.until(lambda: room.service.state("huge") not in ("-", "DISCOVERED"), what="it to be accepted")
    for _ in range(2):
        answer = refused(room.service, "POST", "/v2/models/huge/infer", x_body())
        assert answer.status == 507, answer
        assert "can never fit: needs 1.0 TB" in answer.json["error"] and "cpu:0 has a budget of" in answer.json["error"]
    own = refused(room.service, "POST", "/models/huge/load")
    assert own.status == 507 and own.json["error"]["code"] == "never_fits"
    room.service.request("DELETE", "/models/huge")


def test_a_plan_tells_what_would_be_evicted_and_does_nothing(room: Room, tmp_path: Path) -> None:
    room.only("ada", "bob")
    newcomer = toy(tmp_path / "newcomer")
    with (newcomer.path / "1" / "weights.bin").open("wb") as file:
        os.truncate(file.fileno(), room.size)
    told = room.service.post("/plan", {"path": str(newcomer.path)})
    assert told["refused"] is None and told["plan"]["runtime"] == "triton" and not told["would_load"]
    assert told["would_evict"] == ["ada"]
    assert room.loaded() == {"ada", "bob"} and room.service.state("newcomer") == "-"
    assert transitions(room.service, "ada")[-1][1] == "READY"


def test_the_ledger_is_the_sum_of_what_is_loaded(room: Room) -> None:
    room.only("ada", "bob")
    shown = room.service.ps()
    (device,) = [d for d in room.service.get("/status")["devices"] if d["id"] == "cpu:0"]
    assert device["booked_bytes"] == sum(shown[name]["memory_bytes"] for name in ("ada", "bob", KEPT))
    assert device["booked_bytes"] <= device["budget_bytes"]
    assert set(device["models"]) == {"ada", "bob", KEPT}
    assert device["promised_bytes"] == 0
