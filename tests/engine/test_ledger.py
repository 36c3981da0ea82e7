"""Who holds what of this machine, by real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from modelium.api.measuring import HOST_MEMORY, Process
from modelium.engine.ledger import Ledger, descendants, private_bytes

HOLDS = "held = bytearray(64 << 20); print('here', flush=True); import time; time.sleep(600)"
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {HOLDS!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print("here", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose child holds 64 MiB, in a session of its own."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    process.wait()


def test_what_descends_from_a_runtime_is_not_foreign(holder: subprocess.Popen[bytes]) -> None:
    ledger = Ledger()
    ledger.look({holder.pid})
    before = ledger.holdings[HOST_MEMORY]
    assert before.service_bytes > 2**20  # this test's own process stands for the service
    ledger.look(set())
    after = ledger.holdings[HOST_MEMORY]
    # Without a runtime of that name, it descends from the service.
    assert after.service_bytes - before.service_bytes > 60 * 2**20


def test_foreign_processes_are_told_by_size() -> None:
    ledger = Ledger()
    ledger.look(set())
    holding = ledger.holdings[HOST_MEMORY]
    sizes = [one.bytes for one in holding.foreign]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 10
    assert sum(sizes) <= holding.foreign_bytes


def test_private_bytes_of_the_gone_are_none(holder: subprocess.Popen[bytes]) -> None:
    assert private_bytes(holder.pid) > 2**20
    assert private_bytes(2**22 + 1) == 0


def process(pid: int, parent: int, session: int) -> Process:
    return Process((pid, pid), parent, session, 0, False)


def test_descendants() -> None:
    found = [process(1, 0, 1), process(10, 1, 10), process(11, 10, 10), process(12, 11, 12), process(13, 1, 10)]
    assert descendants(found, {10}) == {10, 11, 12, 13}  # 13 lost its parent, and is in the session still
    assert descendants(found, set()) == set()
    assert descendants(found, {99}) == {99}
