"""Triton model directories are read as Triton reads them, and never written."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelium_plugin_triton.analyzer import (
    modelium_analyze,
    modelium_completeness,
    modelium_scan,
)

from modelium.api import Analysis, Severity
from modelium.errors import ModelError

PYTHON = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_STRING dims: -1 }
"""


def folder(root: Path, config: str | None = None, files: dict[str, bytes] | None = None, name: str = "m") -> Path:
    path = root / name
    path.mkdir()
    if config is not None:
        (path / "config.pbtxt").write_text(config)
    for file, data in (files or {"1/model.py": b"import os\n"}).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(data)
    return path


def analyse(path: Path) -> Analysis:
    analysis = modelium_analyze(path)
    assert analysis is not None
    return analysis


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}


class TestWhatItClaims:
    def test_a_configured_directory(self, tmp_path: Path) -> None:
        found = analyse(folder(tmp_path, 'name: "m"\nmax_batch_size: 8\n' + PYTHON))
        assert (found.format, found.confidence, found.facts["backend"]) == ("triton", 1.0, "python")
        assert [(t.name, t.datatype, t.shape) for t in found.inputs] == [("x", "FP32", (-1, 4))]
        assert [(t.name, t.datatype, t.shape) for t in found.outputs] == [("y", "BYTES", (-1, -1))]

    def test_without_batching_shapes_are_as_configured(self, tmp_path: Path) -> None:
        assert analyse(folder(tmp_path, PYTHON)).inputs[0].shape == (4,)

    @pytest.mark.parametrize(
        ("file", "backend"),
        [
            ("model.onnx", "onnxruntime"),
            ("model.plan", "tensorrt"),
            ("model.pt", "pytorch"),
            ("model.py", "python"),
            ("model.xml", "openvino"),
        ],
    )
    def test_numbered_folders_without_a_configuration(self, tmp_path: Path, file: str, backend: str) -> None:
        found = analyse(folder(tmp_path, None, {f"1/{file}": b"12345"}))
        assert found.facts["backend"] == backend
        assert 0.9 < found.confidence < 1
        assert found.weights_bytes == 5

    @pytest.mark.parametrize(
        "files",
        [{"model.onnx": b""}, {"1/weights.bin": b""}, {"01/model.onnx": b""}, {"v1/model.onnx": b""}],
        ids=["flat", "unknown file", "leading zero", "not a number"],
    )
    def test_what_is_not_its_own(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        path = folder(tmp_path, None, files)
        assert modelium_analyze(path) is None
        assert modelium_completeness(path) is None
        assert not list(modelium_scan(path) or ())

    def test_a_file_is_not_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"")
        assert modelium_analyze(tmp_path / "model.onnx") is None

    def test_a_backend_by_its_platform(self, tmp_path: Path) -> None:
        found = analyse(folder(tmp_path, 'platform: "onnxruntime_onnx"', {"1/model.onnx": b"1"}))
        assert found.facts["backend"] == "onnxruntime"

    def test_a_backend_of_somebodys_own(self, tmp_path: Path) -> None:
        found = analyse(folder(tmp_path, 'backend: "vllm"', {"1/model.json": b"{}"}))
        assert found.facts["backend"] == "vllm"


class TestVersions:
    FILES = {f"{v}/model.onnx": b"1" * v for v in (1, 2, 10)} | {"03/model.onnx": b"1" * 99, "old/model.onnx": b"1"}

    @pytest.mark.parametrize(
        ("policy", "served"),
        [
            ("", [10]),
            ("version_policy { latest { num_versions: 2 } }", [2, 10]),
            ("version_policy { all { } }", [1, 2, 10]),
            ("version_policy { specific { versions: [1, 2] } }", [1, 2]),
        ],
    )
    def test_the_policy_says_which_are_counted(self, tmp_path: Path, policy: str, served: list[int]) -> None:
        found = analyse(folder(tmp_path, f'backend: "onnxruntime" {policy}', self.FILES))
        assert found.facts["served"] == served
        assert found.facts["versions"] == [1, 2, 10]
        assert found.weights_bytes == sum(served)

    def test_a_version_that_is_asked_for_and_absent(self, tmp_path: Path) -> None:
        path = folder(tmp_path, 'backend: "onnxruntime" version_policy { specific { versions: [1, 7] } }', self.FILES)
        with pytest.raises(ModelError, match="version 7"):
            modelium_analyze(path)


class TestEnsembles:
    CONFIG = """
    platform: "ensemble"
    input { name: "x" data_type: TYPE_FP32 dims: 4 }
    output { name: "z" data_type: TYPE_FP32 dims: 3 }
    ensemble_scheduling {
      step { model_name: "first" input_map { key: "x" value: "x" } output_map { key: "y" value: "t" } }
      step { model_name: "second" input_map { key: "x" value: "t" } output_map { key: "y" value: "u" } }
      step { model_name: "first" input_map { key: "x" value: "u" } output_map { key: "y" value: "z" } }
    }
    """

    def test_it_depends_on_its_parts(self, tmp_path: Path) -> None:
        found = analyse(folder(tmp_path, self.CONFIG, {"1/.keep": b""}))
        assert found.depends_on == ("first", "second")
        assert found.facts["ensemble"] is True
        assert found.facts["backend"] == ""

    def test_it_needs_no_version_folder_to_be_whole(self, tmp_path: Path) -> None:
        assert modelium_completeness(folder(tmp_path, self.CONFIG, {"README": b""})) is None

    def test_it_may_not_have_itself_as_a_part(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="itself"):
            modelium_analyze(folder(tmp_path, self.CONFIG, name="second"))

    def test_it_needs_steps(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="steps"):
            modelium_analyze(folder(tmp_path, 'platform: "ensemble"'))


class TestFacts:
    def test_what_the_engine_asks_for(self, tmp_path: Path) -> None:
        config = PYTHON + (
            "max_batch_size: 4 dynamic_batching { } model_transaction_policy { decoupled: true }"
            "instance_group { kind: KIND_CPU count: 3 } instance_group { kind: KIND_GPU gpus: [0, 1] }"
        )
        facts = analyse(folder(tmp_path, config)).facts
        assert facts["decoupled"] is True
        assert facts["dynamic_batching"] is True
        assert facts["sequence"] is False
        assert facts["max_batch_size"] == 4
        assert facts["instances"] == [
            {"kind": "KIND_CPU", "count": 3, "gpus": []},
            {"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]},
        ]

    def test_imports_are_read_and_nothing_is_run(self, tmp_path: Path) -> None:
        code = f"import torch.nn as nn\nfrom transformers import AutoModel\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
        found = analyse(folder(tmp_path, PYTHON, {"1/model.py": code.encode()}))
        assert found.facts["imports"] == ["torch", "transformers"]
        assert not (tmp_path / "ran").exists()

    def test_everything_can_be_written_as_json(self, tmp_path: Path) -> None:
        found = analyse(folder(tmp_path, PYTHON))
        assert Analysis.model_validate_json(found.model_dump_json()) == found


class TestBroken:
    @pytest.mark.parametrize(
        ("config", "line", "words"),
        [
            ('backend: "python"\nmax_batchsize: 8\ninput { }\n', 2, "did you mean `max_batch_size`"),
            ('backend: "python"\ninput { nam: "x" }\noutput { }\n', 2, "no field `nam` in ModelInput"),
            ('backend: "python"\nmax_batch_size: "many"\ninput { }\n', 2, "max_batch_size"),
            ('backend: "python"\ninput { data_type: FP32 }\noutput { }\n', 2, "FP32"),
        ],
    )
    def test_the_line_and_what_was_expected(self, tmp_path: Path, config: str, line: int, words: str) -> None:
        path = folder(tmp_path, config)
        with pytest.raises(ModelError) as caught:
            modelium_analyze(path)
        assert caught.value.fields["line"] == line
        assert f"line {line}" in caught.value.message and words in caught.value.message
        assert modelium_completeness(path) is None, "waiting does not mend it"

    def test_a_name_that_is_not_the_folders(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="rename the folder to 'other'"):
            modelium_analyze(folder(tmp_path, 'name: "other"\n' + PYTHON))

    def test_no_backend_and_nothing_that_tells(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="expected `backend`"):
            modelium_analyze(folder(tmp_path, "max_batch_size: 1", {"1/weights.bin": b"1"}))

    def test_two_inputs_of_one_name(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="a name of its own"):
            modelium_analyze(folder(tmp_path, PYTHON + 'input { name: "x" data_type: TYPE_FP32 dims: 1 }'))

    def test_a_configuration_that_is_no_text(self, tmp_path: Path) -> None:
        path = folder(tmp_path, "")
        (path / "config.pbtxt").write_bytes(b"\xff\xfe\x00b")
        with pytest.raises(ModelError, match="UTF-8"):
            modelium_analyze(path)


class TestCompleteness:
    def incomplete(self, path: Path) -> str:
        found = modelium_completeness(path)
        assert found is not None and not found.complete
        return found.reason

    def test_no_version_yet(self, tmp_path: Path) -> None:
        path = folder(tmp_path, PYTHON, {"README": b""})
        assert "no version" in self.incomplete(path)
        with pytest.raises(ModelError, match="no version"):
            modelium_analyze(path)

    def test_the_models_file_is_not_there_yet(self, tmp_path: Path) -> None:
        path = folder(tmp_path, 'backend: "onnxruntime" default_model_filename: "net.onnx"', {"3/x": b""})
        assert "3/net.onnx" in self.incomplete(path)

    @pytest.mark.parametrize("config", ['backend: "pyth', 'backend: "python"\ninput {\n  name: "x"\n', "input"])
    def test_the_configuration_ends_in_the_middle(self, tmp_path: Path, config: str) -> None:
        path = folder(tmp_path, config)
        assert "ends in the middle" in self.incomplete(path)
        with pytest.raises(ModelError, match="ends in the middle"):
            modelium_analyze(path)

    def test_whole_is_left_to_others_to_judge(self, tmp_path: Path) -> None:
        assert modelium_completeness(folder(tmp_path, PYTHON)) is None


class TestScan:
    def test_code_is_a_warning_and_no_refusal(self, tmp_path: Path) -> None:
        path = folder(tmp_path, PYTHON, {"1/model.py": b"", "1/lib.so": b"", "1/data.json": b""})
        findings = list(modelium_scan(path) or ())
        assert {(f.path, f.code) for f in findings} == {("1/model.py", "python_code"), ("1/lib.so", "native_code")}
        assert {f.severity for f in findings} == {Severity.WARN}

    def test_no_code_no_finding(self, tmp_path: Path) -> None:
        assert not list(modelium_scan(folder(tmp_path, None, {"1/model.onnx": b""})) or ())
