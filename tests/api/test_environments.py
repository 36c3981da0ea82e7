"""Environments of runtimes' own: real interpreters, and real pip with packages that are made here."""

from __future__ import annotations

import asyncio
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from modelium.api import Progress
from modelium.api.environments import (
    Environment,
    Interpreter,
    beside,
    find_interpreter,
    install_pack,
    locked,
    make_environment,
    probe,
)
from modelium.api.fakes import silent
from modelium.api.pip import InstallError
from modelium.errors import ConfigError

OURS = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
async def interpreter() -> Interpreter:
    return await find_interpreter(None, [OURS], what="a test", key="toy.python")


@pytest.fixture
async def environment(tmp_path: Path, interpreter: Interpreter) -> Environment:
    environment = Environment(tmp_path / "env")
    await make_environment(environment, interpreter, silent, what="an environment")
    return environment


@pytest.fixture
def local(tmp_path: Path) -> list[str]:
    """pip's arguments for `toy` 1 and 2, `needy`, which requires toy 2, and `greedy`, whose requirement is nowhere."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "toy", "1")
    wheel(folder, "toy", "2")
    wheel(folder, "needy", "1", "toy>=2")
    wheel(folder, "greedy", "1", "nothing-meets-this")
    return ["--no-index", "--find-links", str(folder)]


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    info = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    tagged = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", tagged)
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


async def said(environment: Environment, program: str) -> str:
    process = await asyncio.create_subprocess_exec(
        environment.python, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode().strip()


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --------------------------------------------------------------------------- interpreters


async def test_what_an_interpreter_says_of_itself(tmp_path: Path) -> None:
    ours = await probe(Path(sys.executable))
    assert ours is not None and ours.full_version == ".".join(map(str, sys.version_info[:3]))
    assert (ours.version, ours.prefix, ours.library_name) == (OURS, Path(sys.base_prefix), f"libpython{OURS}.so.1.0")
    assert await probe(tmp_path / "nothing") is None
    assert await probe(program(tmp_path / "python3", "echo hello")) is None


async def test_ours_will_do_when_it_fits(interpreter: Interpreter) -> None:
    assert interpreter.version == OURS and interpreter.executable != Path(sys.executable)  # not the virtual one


async def test_else_one_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = '{"version": "9.8", "full_version": "9.8.7", "prefix": "/opt", "folders": [], "multiarch": ""}'
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "python9.9", "exit 1")
    there = program(tmp_path / "python9.8", f"echo '{facts}'")
    found = await find_interpreter(None, ["9.9", "9.8"], what="a test", key="toy.python")
    assert (found.executable, found.full_version, found.library) == (there, "9.8.7", None)


async def test_when_none_will_do_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"^a test needs Python 9\.9 or 9\.8, .*`toy: \{python: /path/to/python9\.9\}`"
    ):
        await find_interpreter(None, ["9.9", "9.8"], what="a test", key="toy.python")


async def test_the_configured_one_or_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"toy\.python is .*does not run as a Python"):
        await find_interpreter(program(tmp_path / "p", "echo hello"), [OURS], what="a test", key="toy.python")
    with pytest.raises(ConfigError, match=rf"toy\.python is Python {OURS}; a test needs 9\.9"):
        await find_interpreter(Path(sys.executable), ["9.9"], what="a test", key="toy.python")


# --------------------------------------------------------------------------- environments


async def test_it_is_made_once(tmp_path: Path, interpreter: Interpreter) -> None:
    environment = Environment(tmp_path / "deep/env")
    files = {"toy_site.py": "here = True\n"}
    making = (make_environment(environment, interpreter, silent, what="it", site_files=files) for _ in range(3))
    await asyncio.gather(*making)
    assert await said(environment, "import sys, toy_site; print(toy_site.here, sys.prefix != sys.base_prefix)") == (
        "True True"
    )
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["env", "env.lock"]


async def test_one_that_cannot_be_made_leaves_nothing(tmp_path: Path, interpreter: Interpreter) -> None:
    environment = Environment(tmp_path / "env")
    broken = replace(interpreter, executable=program(tmp_path / "python3", "echo no venv here; exit 1"))
    with pytest.raises(InstallError, match="no venv here"):
        await make_environment(environment, broken, silent, what="it")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["env.lock", "python3"]


# --------------------------------------------------------------------------- packs


async def pack(
    environment: Environment, local: list[str], *requirements: str, constraints: Sequence[str] = (), alone: str = ""
) -> list[str]:
    """Install the pack `p` and return what was told."""
    told: list[Progress] = []
    await install_pack(
        environment, "p", requirements, told.append, what="installing p", constraints=constraints, pip_args=local,
        without_dependencies=[alone] if alone else [],
    )  # fmt: skip
    return [progress.stage for progress in told]


async def test_a_pack_is_installed_once(environment: Environment, local: list[str]) -> None:
    assert not environment.has("p", ["toy"])
    assert "installing p" in await pack(environment, local, "toy")
    assert environment.has("p", ["toy"]) and not environment.has("q", ["toy"])
    assert await said(environment, "import toy; print(toy.version)") == "2"
    assert await pack(environment, local, "toy") == []
    assert not environment.has("p", ["toy==1"]) and not environment.has("p", ["toy"], ["toy<2"])  # not the same
    await pack(environment, local, "toy==1")
    assert await said(environment, "import toy; print(toy.version)") == "1"


async def test_constraints_hold(environment: Environment, local: list[str]) -> None:
    await pack(environment, local, "toy", constraints=["toy<2"])
    assert await said(environment, "import toy; print(toy.version)") == "1"
    with pytest.raises(InstallError, match="installing p failed"):
        await pack(environment, local, "needy", constraints=["toy<2"])
    assert not environment.has("p", ["needy"], ["toy<2"])


async def test_what_comes_without_its_dependencies(environment: Environment, local: list[str]) -> None:
    await pack(environment, local, "toy==1", alone="greedy")
    assert await said(environment, "import greedy, toy; print(greedy.version, toy.version)") == "1 1"
    assert environment.has("p", ["toy==1", "greedy"])


async def test_an_interrupted_installation_is_done_again(environment: Environment, local: list[str]) -> None:
    told: list[Progress] = []
    installing = install_pack(environment, "p", ["toy"], told.append, what="installing p", pip_args=local)
    task = asyncio.create_task(installing)
    async with asyncio.timeout(60):
        while not told:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not environment.has("p", ["toy"])
    await pack(environment, local, "toy")
    assert environment.has("p", ["toy"])
    assert await said(environment, "import toy; print(toy.version)") == "2"


# --------------------------------------------------------------------------- making things


def test_what_an_interruption_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".thing.new").mkdir()
    (tmp_path / ".thing.new/half").write_text("half")
    with beside(tmp_path / "thing") as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "more").write_text("")
    assert list(tmp_path.iterdir()) == []


async def test_one_at_a_time(tmp_path: Path) -> None:
    told: list[Progress] = []
    order: list[str] = []

    async def second() -> None:
        async with locked(tmp_path / "thing", told.append, "making it"):
            order.append("second")

    async with locked(tmp_path / "thing", silent, "making it"):
        waiting = asyncio.create_task(second())
        async with asyncio.timeout(60):
            while not told:
                await asyncio.sleep(0.01)
        order.append("first")
    await waiting
    assert order == ["first", "second"]
    assert [p.stage for p in told] == ["making it: waiting for another Modelium that does it"]
