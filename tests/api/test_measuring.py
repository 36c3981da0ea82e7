"""What processes hold: real processes, and GPUs as NVML shows them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from modelium.api.measuring import (
    HOST_MEMORY,
    Gpus,
    Process,
    Sizes,
    Trees,
    added,
    arguments_of,
    key_of,
    less,
    process_of,
    processes,
    visible,
)

MIB = 1 << 20
NOBODY = 2**22 + 1
"""Above the largest pid that Linux gives."""


def test_sums() -> None:
    assert added([{"cpu:0": 1, "cuda:0": 2}, {"cpu:0": 3}, {}]) == {"cpu:0": 4, "cuda:0": 2}
    assert less({"cpu:0": 5, "cuda:0": 2, "cuda:1": 1}, {"cpu:0": 1, "cuda:0": 2}) == {"cpu:0": 4, "cuda:1": 1}


# --------------------------------------------------------------------------- GPUs


class Nvml:
    """What `Gpus` asks of NVML, for two GPUs."""

    class NVMLError(Exception):
        pass

    uuids = ("GPU-aaa", "GPU-bbb")

    def __init__(self, processes: Mapping[str, list[tuple[int, int | None]]]):
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

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80, free=60 + self.uuids.index(handle))

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (9, self.uuids.index(handle))


def test_gpu_memory_by_process() -> None:
    nvml = Nvml({"GPU-aaa": [(1, 10), (2, None)], "GPU-bbb": [(1, 5), (3, 7)]})
    assert Gpus(nvml, {}).by_process() == {1: {"cuda:0": 10, "cuda:1": 5}, 3: {"cuda:1": 7}}


def test_a_lost_gpu_hides_only_itself() -> None:
    assert Gpus(Nvml({"GPU-bbb": [(3, 7)]}), {}).by_process() == {3: {"cuda:1": 7}}


@pytest.mark.parametrize(
    ("chosen", "order"),
    [("1,0", ["GPU-bbb", "GPU-aaa"]), ("GPU-b", ["GPU-bbb"]), ("", []), ("0,7,1", ["GPU-aaa"]), ("-1", [])],
)
def test_gpus_are_numbered_as_cuda_does(chosen: str, order: list[str]) -> None:
    gpus = Gpus(Nvml({}), {"CUDA_VISIBLE_DEVICES": chosen})
    assert gpus.handles == {f"cuda:{number}": uuid for number, uuid in enumerate(order)}


def test_what_is_told_of_a_gpu() -> None:
    gpus = Gpus(Nvml({}), {"CUDA_VISIBLE_DEVICES": "1"})
    assert gpus.memory("cuda:0") == (80, 61)
    assert (gpus.uuid("cuda:0"), gpus.compute_capability("cuda:0")) == ("GPU-bbb", "9.1")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-b", [1]),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("0,0", [0]),
        ("GPU-", []),
        ("nonsense", []),
    ],
)
def test_visible(value: str | None, wanted: list[int]) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible(["GPU-a0", "GPU-b0", "GPU-c0"], environment) == wanted


# --------------------------------------------------------------------------- single processes


def test_a_process_as_the_kernel_shows_it() -> None:
    own = process_of(os.getpid())
    assert own is not None and own.key in [process.key for process in processes()]
    assert (own.parent, own.session, own.zombie) == (os.getppid(), os.getsid(0), False)
    assert own.resident > MIB and key_of(os.getpid()) == own.key
    assert process_of(NOBODY) is None and key_of(NOBODY) is None and arguments_of(NOBODY) is None


def test_one_that_has_ended_is_none() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    zombie = process_of(ended.pid)
    assert zombie is not None and zombie.zombie and key_of(ended.pid) is None
    ended.wait()


def test_a_size_is_measured_anew_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def info(of: psutil.Process) -> Any:
        measured.append(of.pid)
        return SimpleNamespace(uss=1000 * len(measured))

    monkeypatch.setattr(psutil.Process, "memory_full_info", info)
    sizes = Sizes("uss", Gpus(Nvml({"GPU-aaa": [(os.getpid(), 5)]}), {}))
    own = process_of(os.getpid())
    assert own is not None

    def size(resident: int) -> Mapping[str, int]:
        return sizes.of(Process(own.key, own.parent, own.session, resident, zombie=False))

    assert size(10 * MIB) == {HOST_MEMORY: 1000}  # the GPUs were not asked yet
    sizes.begin()
    assert size(11 * MIB - 1) == {HOST_MEMORY: 1000, "cuda:0": 5}
    assert size(11 * MIB) == {HOST_MEMORY: 2000, "cuda:0": 5}
    sizes.keep([own.key])
    assert size(11 * MIB)[HOST_MEMORY] == 2000
    sizes.keep([])
    assert size(11 * MIB)[HOST_MEMORY] == 3000


def test_when_one_of_a_family_has_changed_all_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def info(of: psutil.Process) -> Any:
        measured.append(of.pid)
        return SimpleNamespace(uss=1)

    monkeypatch.setattr(psutil.Process, "memory_full_info", info)
    sizes = Sizes("uss")
    own, other = process_of(os.getpid()), process_of(os.getppid())
    assert own is not None and other is not None
    grown = replace(own, resident=own.resident + MIB)
    assert sizes.together([own, other]) == {HOST_MEMORY: 2}
    assert sizes.together([own, other]) == {HOST_MEMORY: 2} and len(measured) == 2
    assert sizes.together([grown, other]) == {HOST_MEMORY: 2} and measured[2:] == [own.key[0], other.key[0]]


def test_the_size_of_what_has_gone_or_is_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes("pss")
    gone = Process((NOBODY, 1), parent=1, session=1, resident=10 * MIB, zombie=False)
    assert sizes.of(gone) == {}

    def denied(of: psutil.Process) -> Any:
        raise psutil.AccessDenied(of.pid)

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    own = process_of(os.getpid())
    assert own is not None and sizes.of(own) == {HOST_MEMORY: own.resident}


# --------------------------------------------------------------------------- trees

WAITS = "import time; time.sleep(600)"
HOLDS = f"held = b'x' * (64 << 20); print('up', flush=True); {WAITS}"
PARENT = f"""
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", {HOLDS!r}], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid)
"""
ROOT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAITS!r}])
ended = subprocess.run([sys.executable, "-c", {PARENT!r}], stdout=subprocess.PIPE, check=True)
print(child.pid, int(ended.stdout), flush=True)
{WAITS}
"""


@contextlib.contextmanager
def tree() -> Iterator[tuple[int, int, int]]:
    """The pids of a root, its child, and a grandchild that holds 64 MiB and whose parent has ended."""
    root = subprocess.Popen([sys.executable, "-c", ROOT], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert root.stdout is not None
        child, grandchild = map(int, root.stdout.readline().split())
        yield root.pid, child, grandchild
    finally:
        os.killpg(root.pid, 9)
        root.communicate()


def test_trees() -> None:
    with tree() as one, tree() as other:
        shown = process_of(one[2])
        assert shown is not None and shown.parent not in one and shown.session == one[0]
        sizes = {pid: 10**place for place, pid in enumerate([*one, *other, os.getpid()])}
        trees = Trees(Gpus(Nvml({"GPU-aaa": list(sizes.items())}), {}))
        held = trees.look({"one": one[0], "other": other[0], "gone": NOBODY})
        assert {name: size["cuda:0"] for name, size in held.items()} == {"one": 111, "other": 111_000}
        for size in held.values():
            assert 64 * MIB < size[HOST_MEMORY] < 128 * MIB

        os.kill(other[1], 9)
        held = trees.look({"one": one[0], "other": other[0]})
        assert {name: size["cuda:0"] for name, size in held.items()} == {"one": 111, "other": 101_000}
        assert set(trees.look({"one": one[0]})) == {"one"}


@pytest.mark.parametrize(("outer", "inner"), [("all", "child"), ("", "child"), ("all", "")])
def test_a_root_within_a_tree_is_a_tree_of_its_own(outer: str, inner: str) -> None:
    with tree() as (root, child, grandchild):
        nvml = Nvml({"GPU-aaa": [(root, 1), (child, 10), (grandchild, 100)]})
        held = Trees(Gpus(nvml, {})).look({outer: root, inner: child})
        assert {name: size["cuda:0"] for name, size in held.items()} == {outer: 101, inner: 10}


def test_a_root_that_has_ended_has_nothing() -> None:
    with tree() as (root, _, _):
        os.kill(root, 9)
        os.waitid(os.P_PID, root, os.WEXITED | os.WNOWAIT)
        assert Trees().look({"root": root}) == {}
