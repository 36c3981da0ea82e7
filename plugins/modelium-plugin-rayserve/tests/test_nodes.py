"""A cluster of two nodes, which somebody else runs: both on this machine, the first being Modelium's own."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelium_plugin_rayserve import packs
from modelium_plugin_rayserve.settings import RayServeSettings
from ray_lab import Lab, answer_of

from modelium.api import ObservedModel
from modelium.api.fakes import silent
from modelium.api.testing import eventually
from modelium.errors import DriverError
from modelium.paths import cache_dir

pytestmark = pytest.mark.timeout(900)  # it may be the first that needs Ray's environment

CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 6}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False, "_system_config": quick})
second = cluster.add_node(**small, node_name="second")
print(json.dumps({"address": cluster.address}), flush=True)
sys.stdin.readline()
cluster.remove_node(second, allow_graceful=False)
print("removed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
"""Waits for a line before the second node dies, and for another before it all ends."""


class TwoNodes:
    def __init__(self, python: Path):
        self.process = subprocess.Popen(
            [python, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.address = self._said('"address"').split('"')[3]

    def _said(self, words: str) -> str:
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if words in line)

    def _go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def kill_second(self) -> None:
        self._go_on()
        self._said("removed")

    def end(self) -> None:
        self._go_on()
        self.process.wait(60)


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TwoNodes]:
    # Both nodes, and who connects to them, stay on loopback.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = TwoNodes(await packs.install(cache_dir(), RayServeSettings(), (), silent))
    try:
        yield cluster
    finally:
        cluster.process.kill()


async def test_models_are_placed_on_nodes_and_come_back_elsewhere_when_one_dies(
    cluster: TwoNodes, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, address=cluster.address)
    driver = lab.driver()
    info = await driver.start()
    assert info.external and info.instance

    async def held(name: str) -> ObservedModel:
        return next(m for m in (await driver.observe()).models if m.name == name)

    async def devices() -> list[str]:
        return [device.id for device in (await driver.observe()).devices]

    async def seen() -> bool:
        return await devices() == ["second/cpu:0"]

    await eventually(seen, "the other node is among the devices, and this machine is not")
    (second,) = (await driver.observe()).devices
    assert second.runtime == "ray_serve" and second.total_bytes > second.used_bytes > 0

    far = lab.python_model("far", initialize="print('a word from afar')", devices=("second/cpu:0",))
    outcome = await driver.load(far, silent)
    assert await answer_of(outcome, "far", 2) == 2
    both = lab.python_model("both", devices=("cpu:0", "second/cpu:0"), replicas=2)
    await driver.load(both, silent)

    async def measured() -> bool:
        found = (await held("far")).memory, (await held("both")).memory
        return [set(memory) for memory in found] == [{"second/cpu:0"}, {"cpu:0", "second/cpu:0"}]

    await eventually(measured, "what each model holds is told by the node that it is on")
    assert any("a word from afar" in line for line in driver.logs("far", 50))

    await driver.close()  # Modelium is started again
    driver = lab.driver()
    again = await driver.start()
    assert again.adopted and again.instance == info.instance and (await held("far")).ready

    cluster.kill_second()

    async def lost() -> bool:
        shown = await held("far")
        return shown.broken and not shown.ready

    await eventually(lost, "a model on a node that has died is told to be broken")
    assert "has left the Ray cluster" in (await held("far")).reason
    assert (await held("both")).ready, "its other replica still serves"
    assert await devices() == []
    with pytest.raises(DriverError, match="second has left"):
        await driver.load(far, silent)
    outcome = await driver.load(far.model_copy(update={"devices": ("cpu:0",)}), silent)
    assert set(outcome.memory) == {"cpu:0"} and await answer_of(outcome, "far", 3) == 3

    await driver.stop()
    await driver.close()
    assert not lab.processes.names()
    assert cluster.process.poll() is None, "somebody else's cluster is left alone"
    cluster.end()
