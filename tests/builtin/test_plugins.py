"""The built-in plugins as the host sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modelium.api import Analysis
from modelium.builtin import BUILTIN_PLUGINS
from modelium.errors import ModelError
from modelium.host import PluginHost
from tests.builtin.making import hugging_face, onnx_model


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return PluginHost.load(entry_points=False)


def test_all_are_in_use(host: PluginHost) -> None:
    assert {p.name for p in host.plugins()} == {name.rpartition(".")[2] for name in BUILTIN_PLUGINS}
    assert [p.error for p in host.plugins() if p.error] == []


def test_they_offer_what_the_configuration_names_by_default(host: PluginHost) -> None:
    assert host.brain("rules", {}).name == "rules"
    assert host.eviction_policy("lru", {}).name == "lru"
    assert [c.name for c in host.converters()] == ["pickle"]
    assert host.devices()[0].id == "cpu:0"


def test_claims_never_tie(host: PluginHost, tmp_path: Path, torch_files: Path) -> None:
    drops = {
        onnx_model(tmp_path / "x.onnx"): "onnx",
        hugging_face(tmp_path / "hf"): "huggingface",
        torch_files / "script.pt": "torchscript",
        torch_files / "state_dict.pt": "torch-checkpoint",
        torch_files / "bert": "huggingface",
        torch_files / "expected.safetensors": "safetensors",
    }
    for drop, format in drops.items():
        found = host.analyze(drop)
        assert isinstance(found, Analysis)
        assert found.format == format
        told = host.completeness(drop)
        assert told is None or told.complete
    assert host.failures() == []


def test_what_nobody_knows(host: PluginHost, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="is not a model that any analyzer knows"):
        host.analyze(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not a model that any analyzer knows"):
        host.analyze(tmp_path / "empty")


def test_heavy_libraries_are_not_imported_before_they_are_needed() -> None:
    code = (
        "import sys; from modelium.host import PluginHost; PluginHost.load(entry_points=False);"
        "print([m for m in ('onnx', 'numpy', 'torch', 'pynvml', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
