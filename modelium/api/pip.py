"""Runs pip apart from us, with the user's own pip configuration, tells how far it is, and says why it failed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import urllib.request
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from modelium.api import Progress, Report
from modelium.errors import DriverError

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's builds without CUDA; PyPI has only the large ones for Linux."""
CPU_INDEX_WITHIN_S = 4.0

_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)$")
"""What pip writes with `--progress-bar raw`, once for each part that it has downloaded."""
_FILE = re.compile(r"^\s*(?:Downloading|Processing|Using cached) (\S+)")


class InstallError(DriverError):
    """What a runtime needs could not be downloaded or installed."""

    code = "install_failed"


async def run_pip(
    args: Sequence[str],
    *,
    what: str,
    report: Report,
    python: Path | None = None,
    lock: int | None = None,
    builds_for: str = "",
) -> None:
    """`pip ARGS`, for the interpreter `python` (else ours). Cancelled, it ends pip.

    `lock` is a locked file's descriptor: pip inherits it, so that the lock lasts until pip itself has ended, come what
    may to us. `builds_for` are the machines that the packages have builds for, to be told when this is none of them.
    Raises `InstallError` saying that `what` failed and why.
    """
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"{what} needs pip, and {sys.executable} has none: run `{sys.executable} -m ensurepip`, or install it there"
        )
    target = ["--python", str(python)] if python else []
    command = [sys.executable, "-m", "pip", *target, *args, "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "raw" if _version() >= (24, 1) else "off"]
    report(Progress(stage=what))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=() if lock is None else (lock,),
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
        limit=2**20,
    )
    try:
        output = await _follow(process, what, report)
        code = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if code != 0:
        raise explain(what, output, builds_for)


async def _follow(process: asyncio.subprocess.Process, what: str, report: Report) -> list[str]:
    assert process.stdout is not None
    kept: deque[str] = deque(maxlen=400)
    file = ""
    async for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        if match := _PROGRESS.match(line):
            report(Progress(stage=f"{what}: {file}", done=int(match[1]), total=int(match[2]), unit="bytes"))
            continue
        if match := _FILE.match(line):
            file = match[1].rpartition("/")[2]
        elif line.startswith("Installing collected packages"):
            report(Progress(stage=f"{what}: unpacking"))
        kept.append(line)
    return list(kept)


def explain(what: str, output: Sequence[str], builds_for: str = "") -> InstallError:
    """The error that pip's output amounts to, with what to do."""
    text = "\n".join(output)
    said = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    reason = "; ".join(said[:2]) or next((line for line in reversed(output) if line.strip()), "pip said nothing")
    if "No space left on device" in text:
        return InstallError(f"{what} failed: the disk is full. Make room, or point the cache elsewhere. pip: {reason}")
    network = (
        r"NewConnectionError|NameResolutionError|Max retries exceeded|ConnectTimeout|ReadTimeout|Connection refused"
    )
    if re.search(network, text):
        return InstallError(
            f"{what} failed: the package index can't be reached. Connect this machine to it, or set pip's index-url "
            f"to a mirror (`pip config set global.index-url URL`). pip: {reason}",
            retry_after_s=60,
        )
    if "Permission denied" in text:
        return InstallError(f"{what} failed: a folder can't be written. pip: {reason}")
    if "No matching distribution" in text:
        expected = f" (expected: {builds_for})" if builds_for else ""
        return InstallError(
            f"{what} failed: the package index lacks the package, has no build for this machine{expected}, or was not "
            f"reached. pip: {reason}"
        )
    return InstallError(f"{what} failed: {reason}")


async def cpu_index_args() -> list[str]:
    """pip's arguments for PyTorch's CPU builds when its index answers at once, and nothing else names an index."""
    if await _names_an_index():
        return []

    def answers() -> bool:
        request = urllib.request.Request(f"{CPU_INDEX}/torch/", method="HEAD")
        with urllib.request.urlopen(request, timeout=CPU_INDEX_WITHIN_S) as response:
            return bool(response.status == 200)

    try:
        # A name server may take longer than any timeout of the connection.
        async with asyncio.timeout(CPU_INDEX_WITHIN_S):
            return ["--extra-index-url", CPU_INDEX] if await asyncio.to_thread(answers) else []
    except (OSError, ValueError, TimeoutError):
        return []


async def _names_an_index() -> bool:
    """Whether the user's pip configuration names an index: then packages come from there alone."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pip", "config", "list",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await process.communicate()
    keys = {line.partition("=")[0].rpartition(".")[2] for line in output.decode(errors="replace").splitlines()}
    return bool(keys & {"index-url", "extra-index-url", "no-index"})


def _version() -> tuple[int, ...]:
    parts = importlib.metadata.version("pip").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())
