"""Running pip: real pip, with indexes that answer and that don't."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelium.api import Progress, pip
from modelium.api.fakes import silent
from modelium.api.pip import InstallError, explain, run_pip


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError()'", "can't be reached"),
        ("ERROR: No matching distribution found for x==0.7.0", "no build for this machine, or"),
        ("ERROR: Could not install: [Errno 13] Permission denied: '/x'", "can't be written"),
        ("ERROR: Cannot install a and b because these package versions have conflicting dependencies.", "conflicting"),
        ("", "said nothing"),
    ],
)
def test_why_it_failed(said: str, reason: str) -> None:
    error = explain("installing x", ["Collecting x", said] if said else [])
    assert error.message.startswith("installing x failed: ") and reason in error.message
    assert error.code == "install_failed"


async def test_what_the_packages_are_built_for_is_told(tmp_path: Path) -> None:
    args = ["download", "--no-index", "--dest", str(tmp_path), "modelium-has-no-such-package"]
    told: list[Progress] = []
    with pytest.raises(InstallError, match=r"downloading x failed: .*\(expected: an abacus\)"):
        await run_pip(args, what="downloading x", report=told.append, builds_for="an abacus")
    assert [p.stage for p in told] == ["downloading x"]


async def test_it_holds_the_lock_for_as_long_as_it_runs(tmp_path: Path) -> None:
    """Were we killed, the next one must not start beside a pip that still writes."""
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    args = ["download", "--no-index", "--dest", str(tmp_path), "-r", str(gate)]
    running = asyncio.create_task(run_pip(args, what="x", report=silent, lock=lock))
    writer = await asyncio.to_thread(os.open, gate, os.O_WRONLY)  # pip has opened it: it runs
    os.close(lock)
    other = os.open(tmp_path / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(writer, b"# nothing\n")
    os.close(writer)
    await asyncio.wait([running])
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


async def test_cancelled_it_ends_pip(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    args = ["download", "--no-index", "--dest", str(tmp_path), "-r", str(gate)]
    running = asyncio.create_task(run_pip(args, what="x", report=silent))
    writer = await asyncio.to_thread(os.open, gate, os.O_WRONLY)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"# nobody reads this\n")
    os.close(writer)


# --------------------------------------------------------------------------- indexes


async def test_the_cpu_index_is_used_when_it_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_index() -> bool:
        return False

    monkeypatch.setattr(pip, "_names_an_index", no_index)
    monkeypatch.setattr(pip, "CPU_INDEX_WITHIN_S", 0.5)
    async for url in answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
        monkeypatch.setattr(pip, "CPU_INDEX", url)
        assert await pip.cpu_index_args() == ["--extra-index-url", url]
    assert await pip.cpu_index_args() == []  # it has closed
    async for url in answering(b""):  # takes the connection and says nothing
        monkeypatch.setattr(pip, "CPU_INDEX", url)
        assert await pip.cpu_index_args() == []


async def answering(what: bytes) -> AsyncIterator[str]:
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(what)
        await writer.drain()
        if not what:
            await done.wait()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/whl/cpu"
    done.set()
    server.close()
    await server.wait_closed()


async def test_an_index_of_the_users_own_stays_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.invalid/simple")
    assert await pip._names_an_index()
    assert await pip.cpu_index_args() == []
