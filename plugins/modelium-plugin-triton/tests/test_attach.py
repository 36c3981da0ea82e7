"""Attaching to a tritonserver that somebody else started."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from driver_lab import Lab, code
from modelium_plugin_triton import attach, elsewhere, install, locate, server
from modelium_plugin_triton.attach import Epoch, grpc_address
from modelium_plugin_triton.client import TritonClient
from modelium_plugin_triton.settings import TritonSettings

from modelium.api.fakes import silent
from modelium.api.testing import eventually
from modelium.errors import DriverError, LoadRejected, RuntimeUnavailable
from modelium.paths import cache_dir

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]


class ByHand:
    """A tritonserver as a person would start it."""

    def __init__(self, repository: Path, log: Path):
        self.repository = repository
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    async def start(self, mode: str = "explicit") -> None:
        settings = TritonSettings()
        interpreter = await locate.find_interpreter(settings)
        wheel = await install.prepare(cache_dir(), interpreter, (), silent)
        self.ports = self.ports or server.choose_ports(settings, self.log.parent)
        command = server.command(settings, self.repository, self.ports, executable=wheel.executable, wheel=wheel)
        argv = [word.replace("=explicit", f"={mode}") for word in command.argv]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, env={**os.environ, **command.env}, stdout=log, stderr=log)
        client = TritonClient(self.grpc)
        async with asyncio.timeout(60):
            while not await client.live():
                await asyncio.sleep(0.1)
        await client.close()

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"endpoint": self.http, "grpc_endpoint": self.grpc}

    def kill(self) -> None:
        if self.process is not None:
            stubs = (
                psutil.Process(self.process.pid).children(recursive=True) if psutil.pid_exists(self.process.pid) else []
            )
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            for stub in stubs:
                stub.kill() if stub.is_running() else None
            self.process = None
        server.sweep_shm(self.repository)


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    assert lab.processes.names() == []  # nothing is started beside it


@pytest_asyncio.fixture
async def by_hand(lab: Lab) -> AsyncIterator[ByHand]:
    by_hand = ByHand(lab.repository, lab.root / "by-hand.log")
    yield by_hand
    by_hand.kill()


async def refusal(lab: Lab, **settings: Any) -> DriverError:
    driver = lab.driver(**settings)
    with pytest.raises(DriverError) as caught:
        await driver.start()
    await driver.close()
    return caught.value


async def test_it_is_used_and_left_alone(lab: Lab, by_hand: ByHand) -> None:
    await by_hand.start()
    await asyncio.to_thread(lab.model, "theirs")
    before = sorted(str(p) for p in lab.repository.rglob("*"))
    driver = lab.driver(**by_hand.settings)
    info = await driver.start()
    assert info.external and info.adopted and info.version == "2.51.0"
    assert info.endpoint("kserve-http") == by_hand.http and info.endpoint("kserve-grpc") == by_hand.grpc
    assert info.backends == ("python",)  # seen in its backend directory, since it runs on this machine
    assert sorted(str(p) for p in lab.repository.rglob("*")) == before
    outcome = await driver.load(lab.model("mine"), silent)
    assert outcome.memory["cpu:0"] > 0
    seen = await driver.observe()
    assert {m.name for m in seen.models} == {"mine"} and seen.instance == info.instance
    with pytest.raises(LoadRejected, match="ValueError: broken"):
        await driver.load(lab.model("bad", code("raise ValueError('broken')")), silent)
    await driver.unload("mine")
    assert not (await driver.observe()).models
    assert driver.logs(None, 10) == []
    await driver.load(lab.model("mine"), silent)
    await driver.stop()
    await driver.close()
    assert by_hand.process is not None and by_hand.process.poll() is None
    # Modelium comes back: the model is still there.
    second = lab.driver(**by_hand.settings)
    again = await second.start()
    assert again.instance == info.instance
    assert [m.name for m in (await second.observe()).models] == ["mine"]
    await second.close()


async def test_a_cancelled_load_is_unloaded_when_it_is_done(lab: Lab, by_hand: ByHand) -> None:
    """Its processes are not ours to end."""
    await by_hand.start()
    driver = lab.driver(**by_hand.settings)
    await driver.start()
    task = asyncio.create_task(driver.load(lab.model("slow", code("import time; time.sleep(4)")), silent))
    async with asyncio.timeout(30):
        while not (await driver.observe()).models:
            await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (await driver.observe()).models
    await driver.close()


async def test_a_restart_of_it_is_another_instance(lab: Lab, by_hand: ByHand) -> None:
    await by_hand.start()
    driver = lab.driver(**by_hand.settings)
    before = await driver.start()
    await driver.load(lab.model("mine"), silent)
    by_hand.kill()
    await by_hand.start()
    with pytest.raises(RuntimeUnavailable, match="started anew"):
        await driver.observe()
    by_hand.kill()
    with pytest.raises(RuntimeUnavailable):
        await driver.observe()
    assert (await refusal(lab, **by_hand.settings)).code == "attach_http"
    await by_hand.start()
    after = await driver.start()
    assert after.instance != before.instance
    assert not (await driver.observe()).models
    await driver.close()


async def test_a_restart_out_of_sight_is_told_by_what_it_forgot(
    lab: Lab, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_process_of", lambda *_: None)
    await by_hand.start()
    driver = lab.driver(**by_hand.settings, backends=("python", "onnxruntime"))
    before = await driver.start()
    assert before.pid is None and before.backends == ("onnxruntime", "python")
    outcome = await driver.load(lab.model("mine"), silent)
    assert not outcome.memory  # out of sight, it can't be measured
    assert (await driver.observe()).instance == before.instance
    await driver.unload("mine")
    assert (await driver.observe()).instance == before.instance  # our own doing is no restart
    await driver.load(lab.model("mine"), silent)
    await driver.observe()
    by_hand.kill()
    await by_hand.start()
    for _ in range(2):  # told until it is attached to again
        with pytest.raises(RuntimeUnavailable, match="started anew"):
            await driver.observe()
    after = await driver.start()
    assert after.instance != before.instance
    assert (await driver.observe()).instance == after.instance
    await driver.close()


async def test_backends_out_of_sight_are_learnt(lab: Lab, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_process_of", lambda *_: None)
    await by_hand.start()
    driver = lab.driver(**by_hand.settings, backends=("tensorrt",))
    assert (await driver.start()).backends == ("tensorrt",)
    await driver.load(lab.model("mine"), silent)
    with pytest.raises(LoadRejected) as caught:
        await driver.load(lab.model("plan", backend="tensorrt"), silent)
    assert caught.value.code == "backend_missing"
    assert (await driver.start()).backends == ("python",)
    await driver.close()


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_a_server_that_loads_by_itself(lab: Lab, by_hand: ByHand, mode: str) -> None:
    lab.model("theirs")
    await by_hand.start(mode)
    error = await refusal(lab, **by_hand.settings)
    assert error.code == "attach_mode" and "--model-control-mode=explicit" in error.message


async def test_a_server_on_another_folder(lab: Lab, tmp_path: Path) -> None:
    lab.model("ours")
    other = Lab(tmp_path / "other")
    other.model("theirs")
    by_hand = ByHand(other.repository, lab.root / "by-hand.log")
    try:
        await by_hand.start()
        error = await refusal(lab, **by_hand.settings)
        assert error.code == "attach_repository"
        assert error.fields == {"only_ours": ["ours"], "only_theirs": ["theirs"]}
        assert "holds ours; it lists theirs" in error.message
        # A copy with the same names is another folder, too.
        shutil.rmtree(other.repository / "theirs")
        other.model("ours")
        assert (await refusal(lab, **by_hand.settings)).code == "attach_repository"
        assert sorted(p.name for p in lab.repository.iterdir()) == ["ours"]
    finally:
        by_hand.kill()


async def test_addresses_that_are_wrong(lab: Lab, by_hand: ByHand, unused_tcp_port: int) -> None:
    error = await refusal(lab, endpoint=f"http://127.0.0.1:{unused_tcp_port}")
    assert error.code == "attach_http" and "--http-port" in error.message
    await by_hand.start()
    metrics = by_hand.ports["metrics"]
    error = await refusal(lab, endpoint=f"http://127.0.0.1:{metrics}", grpc_endpoint=by_hand.grpc)
    assert error.code == "attach_http" and "something else" in error.message
    error = await refusal(lab, endpoint=by_hand.http, grpc_endpoint=f"127.0.0.1:{unused_tcp_port}")
    assert error.code == "attach_grpc" and "--grpc-port" in error.message


async def test_a_named_runtime_is_told_by_its_own_section(tmp_path: Path, unused_tcp_port: int) -> None:
    settings = TritonSettings(endpoint=f"http://127.0.0.1:{unused_tcp_port}")
    client = TritonClient(grpc_address(settings))
    with pytest.raises(DriverError) as caught:
        await attach.attach(settings, tmp_path, client, "box")
    await client.close()
    assert "at runtimes.box.endpoint, " in caught.value.message
    assert ": Connection refused. Start it, or set `runtimes.box.endpoint` to" in caught.value.message


async def test_a_folder_that_cannot_be_written_is_compared_by_names(
    lab: Lab, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(attach, "_make_probe", read_only)
    lab.model("shared")
    await by_hand.start()
    driver = lab.driver(**by_hand.settings)
    assert (await driver.start()).external
    await driver.close()
    other = Lab(lab.root / "other")
    other.model("elsewhere")
    assert (await refusal(other, **by_hand.settings)).code == "attach_repository"


# --------------------------------------------------------------------------- without a server


@pytest.mark.parametrize(
    "endpoint, grpc, address",
    [
        ("http://127.0.0.1:8000", None, "127.0.0.1:8001"),
        ("http://triton", None, "triton:81"),
        ("http://[::1]:9000/", None, "[::1]:9001"),
        ("https://triton.example", "grpcs://triton.example:443", "grpcs://triton.example:443"),
    ],
)
async def test_the_grpc_address(endpoint: str, grpc: str | None, address: str) -> None:
    assert grpc_address(TritonSettings(endpoint=endpoint, grpc_endpoint=grpc)) == address


async def test_an_endpoint_must_be_a_url() -> None:
    with pytest.raises(ValueError, match="http://127"):
        TritonSettings(endpoint="127.0.0.1:8000")


async def test_epoch(tmp_path: Path) -> None:
    file = tmp_path / "state/external.json"
    epoch = Epoch(file, "http://a")
    assert not epoch.see({}) and not epoch.see({"m": 0}) and not epoch.see({"m": 5, "n": 1})
    epoch.expect("n")
    assert not epoch.see({"m": 5, "n": 0})  # loaded anew by us
    assert not epoch.see({"m": 6})  # unloaded by somebody else, and m goes on
    assert not Epoch(file, "http://a").see({"m": 7})  # after a restart of ours
    assert Epoch(file, "http://b").number == 1
    assert epoch.see({}) and epoch.instance == "http://a#2"
    assert not epoch.see({}) and Epoch(file, "http://a").instance == "http://a#2"
    assert not epoch.see({"m": 3})
    assert epoch.see({"m": 1})  # its count was set back


async def test_the_devices_of_another_machine_are_told_by_its_metrics(
    lab: Lab, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_process_of", lambda *_: None)
    await by_hand.start()
    metrics = f"http://127.0.0.1:{by_hand.ports['metrics']}/metrics"
    driver = lab.driver(**by_hand.settings, metrics_endpoint=metrics)
    info = await driver.start()
    assert info.external and info.elsewhere

    async def told() -> bool:
        return bool((await driver.observe()).devices)

    await eventually(told, "the server has looked at its memory")
    (host,) = (await driver.observe()).devices  # there is no GPU here
    assert (host.id, host.kind, host.runtime) == (f"{info.name}/cpu:0", "cpu", info.name)
    assert 0 < host.used_bytes < host.total_bytes
    await driver.load(lab.model("mine").model_copy(update={"devices": (host.id,)}), silent)
    assert [m.name for m in (await driver.observe()).models if m.ready] == ["mine"]
    await driver.close()
    wrong = lab.driver(**by_hand.settings, metrics_endpoint=f"{by_hand.http}/metrics")
    await wrong.start()
    with pytest.raises(RuntimeUnavailable, match="metrics_endpoint"):
        await wrong.observe()
    await wrong.close()


METRICS = """\
# TYPE nv_gpu_memory_total_bytes gauge
nv_gpu_memory_total_bytes{gpu_uuid="GPU-b"} 85899345920
nv_gpu_memory_total_bytes{gpu_uuid="GPU-a"} 42949672960
# TYPE nv_gpu_memory_used_bytes gauge
nv_gpu_memory_used_bytes{gpu_uuid="GPU-a"} 1000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-b"} 2000
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-b"} 0.5
"""


async def test_gpus_keep_the_servers_own_order() -> None:
    first, second = elsewhere.told("box", METRICS)
    assert (first.id, first.kind, first.total_bytes, first.used_bytes, first.utilization) == (
        "box/cuda:0",
        "cuda",
        85899345920,
        2000,
        0.5,
    )
    assert (second.id, second.used_bytes, second.utilization, second.runtime) == ("box/cuda:1", 1000, None, "box")
    with pytest.raises(RuntimeUnavailable, match="no metrics"):
        elsewhere.told("box", "<html>")
