"""Models of several runtimes under one budget: each makes room for the others, and no request is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fleet
from tests.service import Served, processes_of

RUNTIMES = ("triton", "vllm", "ray_serve", "llamacpp")


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    fleet.install(RUNTIMES)


@pytest.mark.timeout(1800)
def test_models_of_four_runtimes_alternate_on_a_budget_that_is_too_small_for_all(tmp_path: Path) -> None:
    service = Served(tmp_path / "root", fleet.configuration(RUNTIMES))
    try:
        service.start()
        sizes = fleet.fill(service, RUNTIMES, tmp_path)
        runtimes = {r["name"]: r["state"] for r in service.get("/status")["runtimes"]}
        assert {runtimes[name] for name in RUNTIMES} == {"UP"}
        # After a restart all are taken over as they are; the budget then has room for all but the smallest.
        service.stop()
        room = sum(sizes.values()) - min(sizes.values()) // 2
        service.configure(fleet.configuration(RUNTIMES, room))
        service.start()
        loads = dict.fromkeys(sizes, 0)
        for _ in range(2):
            for member in fleet.MEMBERS.values():
                before = service.state(member.name)
                assert member.ask(service), member.name
                loads[member.name] += before != "READY"
                assert fleet.host(service)["budget_bytes"] == room
                # What grew with use makes room again by itself.
                service.until(lambda: fleet.host(service)["booked_bytes"] <= room, 60, "within the budget")
        assert sum(loads.values()) >= 2, f"nothing was swapped: {loads}, {sizes}"
        table = service.cli("ps", "--devices").stdout
        assert "UNEXPLAINED" in table and all(name in table for name in RUNTIMES)
        for name in sizes:
            if service.state(name) == "READY":
                service.post(f"/models/{name}/unload")
        service.until(lambda: set(service.ps()[n]["state"] for n in sizes) == {"COLD"}, 120)
        left = [command for command in processes_of(service.root).values() if "vllm" in command.lower()]
        assert not left, left
    finally:
        service.down()
    assert not processes_of(tmp_path)
