"""What authors of plugins read is whole, true and fresh."""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path

import pytest

import modelium.api
from modelium import hookdocs
from modelium.api import HOOKSPEC_VERSION
from tests.host.toys import host_with

HOOKS = hookdocs.hooks()


def test_hookspecs_md_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert hookdocs.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_or_missing_file_is_noticed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hookspecs.md"
    check, write = ["--check", "--file", str(file)], ["--file", str(file)]
    assert hookdocs.main(check) == 1
    assert hookdocs.main(write) == 0
    assert hookdocs.main(check) == 0
    file.write_text(file.read_text() + "one more line\n")
    assert hookdocs.main(check) == 1
    assert "is stale" in capsys.readouterr().err


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_is_documented_with_its_signature(name: str) -> None:
    text = hookdocs.render()
    section = text.partition(f"### {name}\n")[2].partition("\n### ")[0]
    arguments = [a for a in inspect.signature(HOOKS[name]).parameters if a != "self"]
    (shown,) = re.findall(rf"def {name}\((.*)\) -> .*: \.\.\.", section)
    assert re.findall(r"(\w+):", shown) == arguments
    assert inspect.cleandoc(HOOKS[name].__doc__ or "").splitlines()[0] in section


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_has_an_example_that_the_host_accepts(name: str) -> None:
    module = types.ModuleType("example")
    vars(module).update({n: getattr(modelium.api, n) for n in modelium.api.__all__})
    vars(module)["MODELIUM_HOOKSPEC_VERSION"] = HOOKSPEC_VERSION
    exec(compile(hookdocs.example(HOOKS[name]), name, "exec"), vars(module))
    (view,) = host_with(example=module).plugins()
    assert view.error is None
    assert view.hooks == (name,)


def test_the_types_that_cross_the_line_are_documented() -> None:
    text = hookdocs.render()
    classes = [n for n in modelium.api.__all__ if inspect.isclass(getattr(modelium.api, n))]
    for name in set(classes) - {"Frozen", "ModeliumSpec"}:
        assert f"### {name}\n" in text, name
    assert "| `confidence` | `float` |  | The claim with the highest confidence wins" in text
    assert "| `convert` | Unusable as it is; a converter may make it usable. |" in text
