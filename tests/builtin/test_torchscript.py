from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from modelium.api import Analysis, Severity
from modelium.builtin import torchscript as plugin
from modelium.errors import ModelError
from tests.builtin.making import evil_pickle


def analyze(path: Path) -> Analysis:
    found = plugin.modelium_analyze(path)
    assert found is not None
    return found


def change(path: Path, entry: str, data: bytes) -> None:
    """Replace what an archive holds under names that end so."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in entries.items():
            archive.writestr(name, data if name.endswith(entry) else old)


@pytest.fixture
def script(tmp_path: Path, torch_files: Path) -> Path:
    return Path(shutil.copy(torch_files / "script.pt", tmp_path / "script.pt"))


def test_a_scripted_module(script: Path) -> None:
    found = analyze(script)
    assert (found.format, found.architecture, found.entry) == ("torchscript", "TwoInputs", "")
    assert found.weights_bytes == 4 * 2 * 4 + 2 * 4
    assert found.facts["inputs"] == [
        {"name": "x", "type": "Tensor", "optional": False},
        {"name": "scale", "type": "float", "optional": True},
    ]
    assert found.facts["returns"] == "Tuple[Tensor, Tensor]"


def test_a_traced_module(torch_files: Path) -> None:
    found = analyze(torch_files / "traced.pt")
    assert found.facts["inputs"] == [{"name": "input", "type": "Tensor", "optional": False}]
    assert found.facts["returns"] == "Tensor"
    assert found.weights_bytes == 16


def test_in_a_folder(tmp_path: Path, script: Path) -> None:
    drop = tmp_path / "drop"
    (drop / "1").mkdir(parents=True)
    script.rename(drop / "1" / "model.pt")
    found = analyze(drop)
    assert (found.entry, found.confidence) == ("1/model.pt", 0.5)
    shutil.copy(drop / "1" / "model.pt", drop / "net.pt")
    with pytest.raises(ModelError, match="holds 2 TorchScript models"):
        plugin.modelium_analyze(drop)
    (drop / "config.pbtxt").write_text("")
    assert plugin.modelium_analyze(drop) is None


def test_other_files_are_left_to_others(tmp_path: Path, torch_files: Path) -> None:
    for name in ("state_dict.pt", "legacy.pt", "expected.safetensors"):
        assert plugin.modelium_analyze(torch_files / name) is None
        assert plugin.modelium_completeness(torch_files / name) is None
        assert list(plugin.modelium_scan(torch_files / name)) == []


def test_cut_anywhere_it_is_not_complete(script: Path) -> None:
    told = plugin.modelium_completeness(script)
    assert told is not None
    assert told.complete
    whole = script.read_bytes()
    for kept in range(4, len(whole), 37):
        script.write_bytes(whole[:kept])
        told = plugin.modelium_completeness(script)
        assert told is not None
        assert (told.complete, told.have_bytes) == (False, kept)
        assert "begins as a zip archive and has no end" in told.reason
        with pytest.raises(ModelError, match="copy it again, whole"):
            plugin.modelium_analyze(script)


def test_an_entry_beyond_the_end(script: Path) -> None:
    """The list of entries is whole, and what it lists is not there."""
    data = script.read_bytes()
    start = data.index(b"PK\x01\x02")
    script.write_bytes(data[:200] + data[start:])
    with pytest.raises(ModelError):
        plugin.modelium_analyze(script)


# --------------------------------------------------------------------------- what scanning says


def test_a_program_is_told_of(script: Path) -> None:
    (finding,) = plugin.modelium_scan(script)
    assert (finding.severity, finding.code) == (Severity.WARN, "torchscript")
    assert "serve it only if you trust" in finding.message


@pytest.mark.parametrize(("name", "operator"), [("script_reads.pt", "from_file"), ("script_saves.pt", "save")])
def test_a_program_that_reaches_for_files_is_refused(torch_files: Path, name: str, operator: str) -> None:
    (finding,) = plugin.modelium_scan(torch_files / name)
    assert (finding.severity, finding.code) == (Severity.REFUSE, "torchscript_files")
    assert f"it calls {operator})" in finding.message


def test_parts_whose_names_are_no_identifiers_are_no_such_calls(script: Path) -> None:
    """This is how PyTorch writes every Sequential and ModuleList."""
    code = 'class M(Module):\n  def forward(self, x):\n    return (getattr(getattr(self.a, "0"), "b-1")).forward(x, )\n'
    change(script, "code/__torch__.py", code.encode())
    (finding,) = plugin.modelium_scan(script)
    assert finding.severity is Severity.WARN


@pytest.mark.parametrize(
    "call",
    [
        "getattr(torch, 'save')(x, 'y')",
        'getattr(torch, "save")(x, "y")',
        'getattr(getattr(self, "0"), "sa\\x76e")(x, "y")',
        "torch . save(x, 'y')",
        "ops.aten.from_file('y')",
    ],
)
def test_other_ways_to_say_it(script: Path, call: str) -> None:
    change(script, "code/__torch__.py", f"class M(Module):\n  def forward(self, x):\n    {call}\n".encode())
    (finding,) = plugin.modelium_scan(script)
    assert finding.code == "torchscript_files"


def test_a_pickle_for_python_in_an_archive_for_torchscript(tmp_path: Path, script: Path) -> None:
    marker = tmp_path / "marker"
    change(script, "/data.pkl", evil_pickle(marker))
    (finding,) = plugin.modelium_scan(script)
    assert (finding.severity, finding.code) == (Severity.REFUSE, "pickle_code")
    assert "posix.system" in finding.message
    plugin.modelium_analyze(script)
    assert not marker.exists()


def test_a_program_that_is_too_long(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "MAX_CODE_BYTES", 100)
    with pytest.raises(ModelError, match="more than 100 B"):
        plugin.modelium_analyze(script)


def test_data_that_names_no_module(script: Path) -> None:
    change(script, "/data.pkl", b"nonsense")
    with pytest.raises(ModelError, match="names no module"):
        plugin.modelium_analyze(script)
