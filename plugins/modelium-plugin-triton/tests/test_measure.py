"""Telling a server's processes apart, without a server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from modelium_plugin_triton.measure import Measurer, stub_of

from modelium.api.measuring import HOST_MEMORY, Gpus, added, less

REPOSITORY = Path("/models")
STUB = "/opt/tritonserver/backends/python/triton_python_backend_stub"


def arguments(file: str, name: str) -> list[str]:
    return [
        STUB,
        file,
        "shm-1",
        "1048576",
        "1048576",
        "77",
        "/opt/tritonserver/backends/python",
        "336",
        name,
        "DEFAULT",
    ]


@pytest.mark.parametrize(
    "file, name, model, completing",
    [
        ("/models/bert/1/model.py", "bert_0_0", "bert", False),
        ("/models/bert/12/model.py", "bert_3_11", "bert", False),
        ("/models/bert/1/model.py", "bert", "bert", True),
        ("/models/bert/1/model.py", "a name of its own_0", "bert", False),
        ("/models/m_1_2/1/model.py", "m_1_2", "m_1_2", True),
        ("/models/m_1_2/1/model.py", "m_1_2_0_0", "m_1_2", False),
        ("/tmp/folderAbC/1/model.py", "sent_0_0", "sent", False),
    ],
)
def test_whose_stub_it_is(file: str, name: str, model: str, completing: bool) -> None:
    stub = stub_of((1, 2), arguments(file, name), REPOSITORY)
    assert stub is not None and (stub.model, stub.completing) == (model, completing)


@pytest.mark.parametrize(
    "argv", [[], ["bash", "-c", f"exec {STUB} /models/m/1/model.py"], ["python", "a", *"123456789"]]
)
def test_what_is_no_stub(argv: list[str]) -> None:
    assert stub_of((1, 2), argv, REPOSITORY) is None


def test_sizes() -> None:
    assert added([{"cpu:0": 1, "cuda:0": 2}, {"cpu:0": 3}, {}]) == {"cpu:0": 4, "cuda:0": 2}
    assert less({"cpu:0": 5, "cuda:0": 2, "cuda:1": 1}, {"cpu:0": 1, "cuda:0": 2}) == {"cpu:0": 4, "cuda:1": 1}


# --------------------------------------------------------------------------- real processes


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A stand-in for a server with one stub that holds 64 MiB and has a child, and one child that has ended."""
    stub = tmp_path / "triton_python_backend_stub"
    stub.symlink_to(sys.executable)
    child = "print('up', flush=True); import time; time.sleep(600)"
    held = "held = b'x' * (64 << 20); import subprocess, sys, time; "
    held += f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
    held += "child.stdout.readline(); print('here', flush=True); time.sleep(600)"
    file = tmp_path / "models/m/1/model.py"
    file.parent.mkdir(parents=True)
    file.write_text(held)
    server = f"""
import subprocess, sys, time
gone = subprocess.Popen([sys.executable, "-c", ""])
stub = subprocess.Popen({[str(stub), str(file), *arguments("", "m_0_0")[2:]]!r}, stdout=subprocess.PIPE)
stub.stdout.readline()
import os
os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
print("up", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    yield process, tmp_path / "models"
    os.killpg(process.pid, 9)
    process.wait()
    process.stdout.close()


def test_a_family(family: tuple[subprocess.Popen[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, repository = family
    measurer = Measurer(server.pid, repository)
    seen = measurer.look()
    [stub] = seen.stubs
    assert stub.model == "m" and (64 << 20) < stub.memory[HOST_MEMORY] < (128 << 20)
    assert 0 < seen.server[HOST_MEMORY] < (64 << 20)
    assert len(seen.zombies) == 1 and seen.zombies[0] != stub.key[0]
    assert [s.key for s in seen.by_model()["m"]] == [stub.key] and seen.of("n") == []
    monkeypatch.delattr(psutil.Process, "memory_full_info")
    assert measurer.look() == seen  # asked again, nothing is measured anew
    os.kill(stub.key[0], 9)


def test_what_has_ended_has_nothing(family: tuple[subprocess.Popen[bytes], Path]) -> None:
    _, repository = family
    measurer = Measurer(2**22 + 1, repository)
    assert measurer.look().stubs == () and measurer.look().server == {}


# --------------------------------------------------------------------------- GPUs, as NVML shows them


class Nvml:
    """What `Gpus` asks of NVML, for two GPUs."""

    class NVMLError(Exception):
        pass

    uuids = ("GPU-aaa", "GPU-bbb")

    def __init__(self, processes: dict[str, list[tuple[int, int | None]]]):
        self._processes = processes

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.uuids[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        if handle not in self._processes:
            raise self.NVMLError("lost")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self._processes[handle]]


def test_gpu_memory_by_process() -> None:
    nvml = Nvml({"GPU-aaa": [(1, 10), (2, None)], "GPU-bbb": [(1, 5), (3, 7)]})
    assert Gpus(nvml, {}).by_process() == {1: {"cuda:0": 10, "cuda:1": 5}, 3: {"cuda:1": 7}}


def test_a_lost_gpu_hides_only_itself() -> None:
    assert Gpus(Nvml({"GPU-bbb": [(3, 7)]}), {}).by_process() == {3: {"cuda:1": 7}}


@pytest.mark.parametrize(
    "visible, order",
    [("1,0", ["GPU-bbb", "GPU-aaa"]), ("GPU-b", ["GPU-bbb"]), ("", []), ("0,7,1", ["GPU-aaa"]), ("-1", [])],
)
def test_gpus_are_numbered_as_cuda_does(visible: str, order: list[str]) -> None:
    gpus = Gpus(Nvml({}), {"CUDA_VISIBLE_DEVICES": visible})
    assert gpus.handles == {f"cuda:{number}": uuid for number, uuid in enumerate(order)}


def test_gpu_memory_counts_for_its_model(family: tuple[subprocess.Popen[bytes], Path]) -> None:
    server, repository = family
    [stub] = Measurer(server.pid, repository).look().stubs
    nvml = Nvml({"GPU-aaa": [(stub.key[0], 1000), (server.pid, 7)], "GPU-bbb": []})
    seen = Measurer(server.pid, repository, Gpus(nvml, {})).look()
    assert seen.stubs[0].memory["cuda:0"] == 1000 and seen.server["cuda:0"] == 7
