"""The process layer, on real processes of this machine."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from modelium.engine.processes import NAME_MARK, ROOT_MARK, ProcessSupervisor, look
from modelium.errors import ConfigError, DriverError

pytestmark = pytest.mark.asyncio

WAITS = "import time; print('here', flush=True); time.sleep(600)"
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('here', flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
children = [subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=alone) for alone in (False, True)]
print('children', *(c.pid for c in children), flush=True)
time.sleep(600)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def until(check: Callable[[], object], bound_s: float = 20) -> None:
    async with asyncio.timeout(bound_s):
        while not check():
            await asyncio.sleep(0.01)


def make(root: Path, **options: int) -> ProcessSupervisor:
    return ProcessSupervisor(root, state_dir=root / ".modelium/processes", log_dir=root / ".modelium/logs", **options)


@pytest_asyncio.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[ProcessSupervisor]:
    supervisor = make(tmp_path)
    yield supervisor
    for name in supervisor.names():
        await supervisor.stop(name, grace_s=0)


async def children_of_parent(supervisor: ProcessSupervisor, name: str) -> list[int]:
    await until(lambda: any(line.startswith("children") for line in supervisor.tail(name)))
    await until(lambda: supervisor.tail(name).count("here") == 2)
    line = next(line for line in supervisor.tail(name) if line.startswith("children"))
    return [int(word) for word in line.split()[1:]]


async def test_it_leads_its_own_session_and_writes_its_log(supervisor: ProcessSupervisor) -> None:
    record = await supervisor.spawn("a", python(WAITS), env={"EXTRA": "1"}, facts={"port": 12})
    assert record.pid != os.getpid() and os.getsid(record.pid) == record.pid == os.getpgid(record.pid)
    await until(lambda: supervisor.tail("a", this_run=True) == ["here"])
    environ = Path(f"/proc/{record.pid}/environ").read_bytes().split(b"\0")
    assert b"EXTRA=1" in environ
    assert f"{ROOT_MARK}={supervisor.root_id}".encode() in environ and f"{NAME_MARK}=a".encode() in environ
    assert supervisor.find("a") == record


async def test_another_supervisor_of_the_root_finds_it(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    record = await supervisor.spawn("a", python(WAITS), facts={"port": 12})
    assert make(tmp_path).find("a") == record


async def test_a_supervisor_of_another_root_does_not(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    await supervisor.spawn("a", python(WAITS))
    other = make(tmp_path / "other")
    await other.stop("a")
    assert other.find("a") is None and other.names() == []
    assert supervisor.find("a") is not None


async def test_it_outlives_the_one_who_started_it(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from modelium.engine.processes import ProcessSupervisor\n"
        f"root = pathlib.Path({str(tmp_path)!r})\n"
        "s = ProcessSupervisor(root, state_dir=root / '.modelium/processes', log_dir=root / '.modelium/logs')\n"
        f"print(asyncio.run(s.spawn('a', [sys.executable, '-c', {WAITS!r}])).pid)\n"
    )
    here = Path(__file__).parents[2]
    ran = await asyncio.to_thread(subprocess.run, python(code), capture_output=True, text=True, cwd=here, check=True)
    found = supervisor.find("a")
    assert found is not None and found.pid == int(ran.stdout)
    await supervisor.stop("a")
    assert look(found.pid) is None


async def test_found_by_its_mark_when_the_record_is_lost(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    record = await supervisor.spawn("a", python(WAITS))
    (tmp_path / ".modelium/processes/a.json").unlink()
    await until(lambda: supervisor.find("a") is not None)
    found = make(tmp_path).find("a")
    assert found is not None
    assert (found.pid, found.created_at, found.argv) == (record.pid, record.created_at, record.argv)


async def test_a_torn_record_is_as_good_as_none(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    record = await supervisor.spawn("a", python(WAITS))
    (tmp_path / ".modelium/processes/a.json").write_text('{"name": "a", "pi')
    found = supervisor.find("a")
    assert found is not None and found.pid == record.pid


@pytest.mark.parametrize("field, value", [("created_at", 1.0), ("boot_id", "another boot")])
async def test_a_recycled_pid_is_never_taken_for_it(
    supervisor: ProcessSupervisor, tmp_path: Path, field: str, value: object
) -> None:
    stranger = await asyncio.create_subprocess_exec(*python(WAITS), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        record = await supervisor.spawn("a", python(WAITS))
        os.kill(record.pid, signal.SIGKILL)
        await until(lambda: supervisor.find("a") is None)
        path = tmp_path / ".modelium/processes/a.json"
        living = look(stranger.pid)
        assert living is not None
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"pid": stranger.pid, "created_at": living.started, field: value})
        )
        assert supervisor.find("a") is None
        await supervisor.stop("a")
        assert look(stranger.pid) is not None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_dead_child_does_not_look_alive(supervisor: ProcessSupervisor) -> None:
    record = await supervisor.spawn("a", python("print('bye')"))
    await until(lambda: look(record.pid) is None)
    assert supervisor.find("a") is None
    assert not Path(f"/proc/{record.pid}").exists()  # reaped: no zombie is left


async def test_stop_ends_group_other_sessions_and_the_stubborn(supervisor: ProcessSupervisor) -> None:
    record = await supervisor.spawn("a", python(PARENT))
    children = await children_of_parent(supervisor, "a")
    await supervisor.stop("a", grace_s=0.2)
    assert [pid for pid in (record.pid, *children) if look(pid)] == []
    assert supervisor.find("a") is None and supervisor.names() == []


async def test_stop_asks_before_it_kills(supervisor: ProcessSupervisor) -> None:
    polite = "import signal, sys, time\n"
    polite += "signal.signal(signal.SIGTERM, lambda *a: (print('goodbye', flush=True), sys.exit()))\n" + WAITS
    await supervisor.spawn("a", python(polite))
    await until(lambda: supervisor.tail("a", this_run=True) == ["here"])
    await supervisor.stop("a", grace_s=60)
    assert supervisor.tail("a", this_run=True) == ["here", "goodbye"]


async def test_orphans_of_a_killed_process_are_seen_and_ended(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    record = await supervisor.spawn("a", python(PARENT))
    children = await children_of_parent(supervisor, "a")
    os.kill(record.pid, signal.SIGKILL)
    await until(lambda: look(record.pid) is None)
    later = make(tmp_path)
    assert later.find("a") is None and later.names() == ["a"]
    again = await later.spawn("a", python(WAITS))
    assert [pid for pid in children if look(pid)] == []
    found = later.find("a")
    assert found is not None and found.pid == again.pid


async def test_spawning_again_ends_the_one_before(supervisor: ProcessSupervisor) -> None:
    first = await supervisor.spawn("a", python(WAITS))
    second = await supervisor.spawn("a", python(WAITS))
    assert look(first.pid) is None and look(second.pid) is not None
    await supervisor.spawn("b", python(WAITS))
    assert supervisor.names() == ["a", "b"]
    await supervisor.stop("a")
    assert supervisor.names() == ["b"]


async def test_a_descendant_without_the_mark_is_ended_too(supervisor: ProcessSupervisor) -> None:
    shy = f"import os, sys; os.execve(sys.executable, [sys.executable, '-c', {WAITS!r}], {{}})"
    code = f"""
import subprocess, sys, time
print('pid', subprocess.Popen([sys.executable, '-c', {shy!r}]).pid, flush=True)
time.sleep(600)
"""
    await supervisor.spawn("a", python(code))
    await until(lambda: "here" in supervisor.tail("a"))
    pid = int(next(line for line in supervisor.tail("a") if line.startswith("pid")).split()[1])
    await supervisor.stop("a", grace_s=0.2)
    assert look(pid) is None


async def test_what_is_not_there_can_be_stopped(supervisor: ProcessSupervisor) -> None:
    await supervisor.stop("nothing")
    assert supervisor.find("nothing") is None and supervisor.tail("nothing") == []


async def test_what_cannot_start_says_so(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="could not start /no/such/program"):
        await supervisor.spawn("a", ["/no/such/program"])
    with pytest.raises(DriverError, match="can't be called"):
        await supervisor.spawn("../a", python(WAITS))
    assert supervisor.names() == []


async def test_no_record_no_process(supervisor: ProcessSupervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def full(source: str, target: str) -> None:
        if written:  # the first is written before the start
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)

    monkeypatch.setattr("modelium.engine.processes.os.replace", full)
    with pytest.raises(ConfigError, match=r"a\.json.*No space left"):
        await supervisor.spawn("a", python(WAITS))
    assert written and supervisor.names() == []


async def test_found_when_the_starter_died_before_completing_the_record(
    supervisor: ProcessSupervisor, tmp_path: Path
) -> None:
    record = await supervisor.spawn("a", python(WAITS), facts={"port": 12})
    path = tmp_path / ".modelium/processes/a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 0, "created_at": 0.0}))
    assert make(tmp_path).find("a") == record


async def test_logs_stay_within_bounds_while_being_written(tmp_path: Path) -> None:
    supervisor = make(tmp_path, max_log_bytes=1000, old_logs=2)
    gate = tmp_path / "go"
    code = f"""
import os, time
def burst(word):
    for i in range(100):
        print(word, i, 'x' * 20, flush=True)
burst('first')
while not os.path.exists({str(gate)!r}):
    time.sleep(0.01)
burst('second')
time.sleep(600)
"""
    await supervisor.spawn("a", python(code))
    log = supervisor.log_of("a")
    await until(lambda: any(line.startswith("first 99") for line in supervisor.tail("a")))
    await supervisor.rotate()
    assert log.stat().st_size == 0
    assert supervisor.tail("a", 1)[0].startswith("first 99")  # from the old one
    gate.touch()
    await until(lambda: any(line.startswith("second 99") for line in supervisor.tail("a")))
    assert log.read_bytes().startswith(b"second 0 ")  # no hole where the first part was
    assert len(supervisor.tail("a", 150)) == 150
    await supervisor.rotate()
    assert sorted(path.name for path in log.parent.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    await supervisor.stop("a")


async def test_the_loop_goes_on_while_it_stops_a_stubborn_one(supervisor: ProcessSupervisor) -> None:
    await supervisor.spawn("a", python(STUBBORN))
    await until(lambda: supervisor.tail("a", this_run=True) == ["here"])
    stopping = asyncio.create_task(supervisor.stop("a", grace_s=0.5))
    turns = 0
    while not stopping.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 100


async def test_two_at_once_under_one_name_leave_one(supervisor: ProcessSupervisor) -> None:
    records = await asyncio.gather(*(supervisor.spawn("a", python(WAITS)) for _ in range(3)))
    assert len([r for r in records if look(r.pid)]) == 1
    assert supervisor.names() == ["a"]


async def test_a_cancelled_spawn_leaves_nothing_unrecorded(supervisor: ProcessSupervisor) -> None:
    task = asyncio.create_task(supervisor.spawn("a", python(WAITS)))
    deadline = time.monotonic() + 20
    while not supervisor._children and not task.done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert supervisor.find("a") is not None
    await supervisor.stop("a")
    assert supervisor.names() == []


async def test_the_log_of_a_run_begins_with_its_start(supervisor: ProcessSupervisor) -> None:
    for _ in range(2):
        await supervisor.spawn("a", python("print('here', flush=True)"))
        await until(lambda: supervisor.tail("a", this_run=True) == ["here"])
    said = supervisor.tail("a")
    assert [line.partition(" a ")[0] for line in said] == ["--- started:", "here", "--- started:", "here"]
