"""Telling a server's processes apart, without a server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from modelium_plugin_triton.measure import Measurer, Stub, kill, stub_of
from modelium_plugin_triton.session import Session

from modelium.api.measuring import HOST_MEMORY, Gpus

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
    started = [psutil.Process(key[0]) for key in (stub.key, *stub.others)]
    assert len(started) == 2, "the stub's child is its own"
    kill(stub)
    psutil.wait_procs(started, timeout=30)
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_what_has_ended_has_nothing(family: tuple[subprocess.Popen[bytes], Path]) -> None:
    _, repository = family
    measurer = Measurer(2**22 + 1, repository)
    assert measurer.look().stubs == () and measurer.look().server == {}


def test_gpu_memory_counts_for_its_model(family: tuple[subprocess.Popen[bytes], Path]) -> None:
    server, repository = family
    [stub] = Measurer(server.pid, repository).look().stubs

    class Known(Gpus):
        def __init__(self) -> None: ...

        def by_process(self) -> dict[int, dict[str, int]]:
            return {stub.key[0]: {"cuda:0": 1000}, server.pid: {"cuda:0": 7}}

    seen = Measurer(server.pid, repository, Known()).look()
    assert seen.stubs[0].memory["cuda:0"] == 1000 and seen.server["cuda:0"] == 7


def test_a_replaced_revision_s_lingering_process_is_not_the_new_one_s(tmp_path: Path) -> None:
    unused: Any = None
    session = Session(
        client=unused,
        settings=unused,
        instance="1",
        repository=tmp_path,
        memory_file=tmp_path / "n",
        measurer=Measurer(os.getpid(), tmp_path, None),
    )
    old, new = (Stub((pid, pid), "m", False, {"cpu:0": size}) for pid, size in ((10, 400), (20, 80)))
    session.stubs["m"] = 1
    assert session._observed("m", [], [new, old]).memory == {"cpu:0": 80}
    session.busy["m"] = "loading"
    assert session._observed("m", [], [new, old]).memory == {"cpu:0": 480}, "both are needed while one loads"
