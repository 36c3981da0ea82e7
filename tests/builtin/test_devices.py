from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelium.builtin import devices
from modelium.builtin.devices import gpu_devices, host_device

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB, of which 48 can be had."""
    memory = types.SimpleNamespace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def tree(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        place = root / "cgroup" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    (root / "own").write_text(own)
    return root / "cgroup", root / "own"


def stat(active: int, inactive: int, prefix: str = "") -> str:
    return f"anon 5\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}\nodd\n"


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    found = host_device(tmp_path / "none", tmp_path / "none")
    assert (found.id, found.kind, found.total_bytes, found.used_bytes) == ("cpu:0", "cpu", 64 * GIB, 16 * GIB)


def test_version_2(tmp_path: Path) -> None:
    where = tree(
        tmp_path,
        "0::/app/web\n",
        {
            "app/web/memory.max": "max\n",
            "app/memory.max": f"{4 * GIB}\n",
            "app/memory.current": f"{3 * GIB}\n",
            "app/memory.stat": stat(GIB // 2, GIB // 2),
        },
    )
    found = host_device(*where)
    assert (found.total_bytes, found.used_bytes) == (4 * GIB, 2 * GIB)


def test_version_2_in_a_container_that_sees_only_itself(tmp_path: Path) -> None:
    where = tree(
        tmp_path, "0::/docker/abc\n", {"memory.max": f"{GIB}\n", "memory.current": f"{100 * MIB}\n", "memory.stat": ""}
    )
    found = host_device(*where)
    assert (found.total_bytes, found.used_bytes) == (GIB, 100 * MIB)


def test_version_1(tmp_path: Path) -> None:
    where = tree(
        tmp_path,
        "5:cpu:/x\n4:memory:/x\n0::/x\n",
        {
            "memory/x/memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory/x/memory.usage_in_bytes": f"{GIB}\n",
            "memory/x/memory.stat": stat(0, 256 * MIB, "total_"),
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    found = host_device(*where)
    assert (found.total_bytes, found.used_bytes) == (2 * GIB, 768 * MIB)


def test_a_limit_beyond_the_machine_is_none(tmp_path: Path) -> None:
    where = tree(tmp_path, "0::/\n", {"memory.max": f"{999 * GIB}\n", "memory.current": "0\n", "memory.stat": ""})
    assert host_device(*where).total_bytes == 64 * GIB


def test_a_machine_that_is_fuller_than_its_group(tmp_path: Path) -> None:
    where = tree(tmp_path, "0::/\n", {"memory.max": f"{60 * GIB}\n", "memory.current": "0\n", "memory.stat": ""})
    found = host_device(*where)
    assert found.total_bytes - found.used_bytes == 48 * GIB


def test_a_path_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    where = tree(tmp_path, "0::/../../etc\n", {"memory.max": f"{GIB}\n", "memory.current": "0\n", "memory.stat": ""})
    assert host_device(*where).total_bytes == GIB


# --------------------------------------------------------------------------- GPUs


class Nvml(types.ModuleType):
    """What is used of pynvml, for a machine with two GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.inits = 0
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError
        self.inits += 1

    def nvmlShutdown(self) -> None:
        raise self.NVMLError

    def nvmlDeviceGetCount(self) -> int:
        if self.broken:
            raise self.NVMLError
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{'abc'[handle]}0"

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return f"NVIDIA {handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle == 2:
            raise self.NVMLError  # one that shares the host's memory
        return types.SimpleNamespace(total=80 * GIB, free=(60 + handle) * GIB, used=1)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError
        return types.SimpleNamespace(gpu=50)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    monkeypatch.setattr(devices, "_nvml", devices._Nvml())
    return fake


def test_gpus(nvml: Nvml) -> None:
    first, second = gpu_devices({})
    assert (first.id, first.kind, first.name) == ("cuda:0", "cuda", "NVIDIA 0")
    assert (first.total_bytes, first.used_bytes, first.utilization) == (80 * GIB, 20 * GIB, 0.5)
    assert (second.id, second.utilization) == ("cuda:1", None)
    gpu_devices({})
    assert nvml.inits == 1


def test_gpus_as_cuda_is_told_to_see_them(nvml: Nvml) -> None:
    assert [d.name for d in gpu_devices({"CUDA_VISIBLE_DEVICES": "1,0"})] == ["NVIDIA 1", "NVIDIA 0"]
    assert [d.id for d in gpu_devices({"CUDA_VISIBLE_DEVICES": "1"})] == ["cuda:0"]
    assert gpu_devices({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_driver_that_goes_and_comes_back(nvml: Nvml) -> None:
    assert len(gpu_devices({})) == 2
    nvml.broken = True
    assert gpu_devices({}) == []
    assert gpu_devices({}) == []
    nvml.broken = False
    assert len(gpu_devices({})) == 2
    assert nvml.inits == 2


def test_the_host_is_reported_whatever_else_there_is() -> None:
    assert devices.modelium_devices()[0].id == "cpu:0"
