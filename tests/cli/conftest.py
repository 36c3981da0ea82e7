"""The command line as people run it: a process of its own, against a real service on a scripted runtime."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from modelium.http.app import build_app, serving
from tests.engine.harness import Rig, rig

CHECKOUT = Path(__file__).parents[2]

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell that runs the tests in the background has them ignore it, and so would the commands that they interrupt."""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Modelium = Callable[..., Awaitable[Ran]]


def environment(cwd: Path, changes: dict[str, str]) -> dict[str, str]:
    """Nothing of the user's own settings, and a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODELIUM_", "XDG_"))}
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    return kept | {"PYTHONPATH": str(CHECKOUT), "HOME": str(home)} | changes


async def start(*args: str, cwd: Path, **environ: str) -> asyncio.subprocess.Process:
    """`modelium ARGS` in `cwd`."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "modelium.cli",
        *args,
        cwd=cwd,
        env=environment(cwd, environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def on_a_terminal(
    *args: str, cwd: Path, **environ: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Callable[[bytes], None]]]:
    """`modelium ARGS` with a terminal; and a function that reads from it until a text is there."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "modelium.cli",
        *args,
        cwd=cwd,
        env=environment(cwd, {"TERM": "xterm", **environ}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = bytearray()
    loop = asyncio.get_running_loop()

    def take() -> None:
        try:
            seen.extend(os.read(ours, 4096))
        except OSError:  # EIO: the other side is closed
            loop.remove_reader(ours)

    loop.add_reader(ours, take)  # all the time: a terminal that nobody reads holds up whoever writes to it

    def read(text: bytes) -> None:
        ends = time.monotonic() + 30
        while text not in seen:
            assert time.monotonic() < ends, f"never shown: {text!r} in {bytes(seen)!r}"
            time.sleep(0.01)

    try:
        yield process, read
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(ours)
        os.close(ours)


async def finish(process: asyncio.subprocess.Process) -> Ran:
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return Ran(process.returncode, out.decode(), err.decode())


@pytest.fixture
def alone(tmp_path: Path) -> Modelium:
    """Run `modelium` where no service is."""

    async def run(*args: str, **environ: str) -> Ran:
        return await finish(await start(*args, cwd=tmp_path, **environ))

    return run


@dataclass
class Served:
    """A service that runs, and the command line that talks to it."""

    rig: Rig
    url: str
    folder: Path

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        return await start(*args, cwd=self.folder, MODELIUM_URL=self.url)

    async def modelium(self, *args: str) -> Ran:
        return await finish(await self.start(*args))

    def toy(self, name: str, **toy: Any) -> Path:
        """A toy outside of the service's folders."""
        path = self.folder / "mine" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"size": 10**6} | toy))
        return path


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with (
        rig(tmp_path / "root") as engine,
        serving(build_app(engine.service), "127.0.0.1", 0, grace_s=0.1) as (host, port),
    ):
        yield Served(engine, f"http://{host}:{port}", tmp_path)
