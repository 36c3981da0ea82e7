"""Somebody's own repository on a real tritonserver: what is read of it is what Triton makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from modelium_plugin_triton.analyzer import modelium_analyze
from real_triton import Triton
from tritonclient import http
from tritonclient.utils import InferenceServerException

from modelium.api import Analysis
from modelium.errors import ModelError

pytestmark = pytest.mark.timeout(600)  # the first test of a new machine installs libraries

SCALE = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", request.inputs()[0].as_numpy() * {factor})])
            for request in requests
        ]
"""
TENSORS = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
STEP = (
    'step { model_name: "%s" model_version: -1 input_map { key: "x" value: "%s" } output_map { key: "y" value: "%s" } }'
)


def write(root: Path, name: str, config: str, versions: dict[int, float]) -> Path:
    folder = root / name
    for version, factor in versions.items():
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / "model.py").write_text(SCALE.format(factor=factor))
    (folder / "config.pbtxt").write_text(config)
    return folder


def infer(triton: Triton, name: str, version: str = "") -> list[float]:
    tensor = http.InferInput("x", [2], "FP32")
    tensor.set_data_from_numpy(np.array([1, 2], np.float32))
    answer = triton.client.infer(name, [tensor], model_version=version)
    values: list[float] = answer.as_numpy("y").tolist()
    return values


def analyse(path: Path) -> Analysis:
    found = modelium_analyze(path)
    assert found is not None
    return found


def test_versions(triton: Triton) -> None:
    config = f'backend: "python" {TENSORS} version_policy {{ specific {{ versions: [1, 3] }} }}'
    folder = write(triton.repository, "versions", config, {1: 10, 2: 20, 3: 30})
    found = analyse(folder)
    triton.load("versions")
    try:
        ready = [v for v in found.facts["versions"] if triton.client.is_model_ready("versions", str(v))]
        assert ready == found.facts["served"] == [1, 3]
        assert infer(triton, "versions", "1") == [10, 20]
        assert infer(triton, "versions") == [30, 60]
        metadata = triton.client.get_model_metadata("versions")
        assert [(t["name"], t["datatype"], tuple(t["shape"])) for t in metadata["inputs"]] == [
            (t.name, t.datatype, t.shape) for t in found.inputs
        ]
    finally:
        triton.unload("versions")


def test_an_ensemble_and_its_parts(triton: Triton) -> None:
    write(triton.repository, "part-a", f'backend: "python" {TENSORS}', {1: 2})
    write(triton.repository, "part-b", f'backend: "python" {TENSORS}', {1: 5})
    steps = STEP % ("part-a", "x", "t") + STEP % ("part-b", "t", "y")
    folder = triton.repository / "whole"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(f'platform: "ensemble" {TENSORS} ensemble_scheduling {{ {steps} }}')
    found = analyse(folder)
    assert found.depends_on == ("part-a", "part-b")
    for part in found.depends_on:
        triton.load(part)
    triton.load("whole")
    try:
        assert infer(triton, "whole") == [10, 20]
    finally:
        for name in ("whole", *found.depends_on):
            triton.unload(name)


@pytest.mark.parametrize(
    ("name", "config"),
    [("misnamed", f'name: "other" backend: "python" {TENSORS}'), ("misspelt", f'backnd: "python" {TENSORS}')],
)
def test_what_is_called_broken_triton_refuses_too(triton: Triton, name: str, config: str) -> None:
    folder = write(triton.repository, name, config, {1: 1})
    with pytest.raises(ModelError):
        modelium_analyze(folder)
    with pytest.raises(InferenceServerException):
        triton.client.load_model(name)
