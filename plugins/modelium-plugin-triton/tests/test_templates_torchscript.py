"""TorchScript in the Python backend of a real tritonserver, against PyTorch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from real_triton import Triton
from tritonclient import http

from tests import models

pytestmark = pytest.mark.timeout(600)  # the first test of a new machine installs libraries

NUMPY: dict[str, Any] = {
    "FP32": np.float32, "FP64": np.float64, "INT64": np.int64, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
}  # fmt: skip
TORCH = {"FP32": "float32", "FP64": "float64", "INT64": "int64", "BF16": "bfloat16", "BOOL": "bool"}


@pytest.fixture(scope="module", params=models.TORCHSCRIPT)
def script(
    request: pytest.FixtureRequest, triton: Triton, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    kind = str(request.param)
    path = models.make(triton.python, kind, tmp_path_factory.mktemp(kind) / f"{kind}.pt")
    return kind, path


INPUTS: dict[str, list[tuple[str, list[int], Any]]] = {
    "torchscript": [("FP32", [-1, 4], np.linspace(-1, 1, 8).reshape(2, 4))],
    "torchscript-bfloat16": [("BF16", [-1, 4], np.linspace(-1, 1, 8).reshape(2, 4))],
    "torchscript-image": [("FP32", [-1, 3, -1, -1], np.linspace(0, 1, 3 * 12 * 10).reshape(1, 3, 12, 10))],
    "torchscript-tokens": [
        ("INT64", [-1, -1], np.array([[1, 2, 3], [4, 5, 6]])),
        ("FP32", [-1, -1], np.array([[1, 1, 0], [1, 1, 1]])),
    ],
    "torchscript-options": [
        ("FP32", [-1, -1], np.array([[1, -2, 3]])),
        ("FP64", [1], np.array([3.0])),
        ("BOOL", [1], np.array([True])),
    ],
}
"""What the program should be found to take, and values for it."""


def test_its_tensors_are_found_and_its_answers_are_pytorchs(triton: Triton, script: tuple[str, Path]) -> None:
    kind, path = script
    with triton.serving(kind, path) as name:
        metadata = triton.client.get_model_metadata(name)
        assert [(i["datatype"], i["shape"]) for i in metadata["inputs"]] == [(d, s) for d, s, _ in INPUTS[kind]]
        given = []
        for index, (datatype, _, values) in enumerate(INPUTS[kind]):
            tensor = http.InferInput(f"INPUT__{index}", list(values.shape), datatype)
            tensor.set_data_from_numpy(values.astype(NUMPY[datatype]))
            given.append(tensor)
        answer = triton.client.infer(name, given)
        expected = models.original(
            triton.python,
            kind,
            path,
            inputs=[values.item() if shape == [1] else values.tolist() for _, shape, values in INPUTS[kind]],
            dtypes=[TORCH[datatype] for datatype, _, _ in INPUTS[kind]],
        )
        assert len(metadata["outputs"]) == len(expected)
        for index, values in enumerate(expected):
            got = answer.as_numpy(f"OUTPUT__{index}")
            assert metadata["outputs"][index]["shape"] == [-1] * got.ndim
            np.testing.assert_allclose(got.astype(np.float32), np.array(values, np.float32), rtol=1e-5, atol=1e-6)


def test_what_may_be_left_out_has_its_default(triton: Triton, tmp_path: Path) -> None:
    path = models.make(triton.python, "torchscript-options", tmp_path / "options.pt")
    with triton.serving("options", path) as name:
        x = {"name": "INPUT__0", "datatype": "FP32", "shape": [1, 2], "data": [1, -2]}
        negate = {"name": "INPUT__2", "datatype": "BOOL", "shape": [1], "data": [True]}
        for inputs, expected in (([x], [2, -4]), ([x, negate], [-2, 4])):
            status, body = triton.post(f"{name}/infer", {"inputs": inputs})
            assert status == 200
            assert [output["data"] for output in body["outputs"]] == [expected, [True, False]]


def test_what_the_program_refuses_is_told(triton: Triton, tmp_path: Path) -> None:
    path = models.make(triton.python, "torchscript-tokens", tmp_path / "tokens.pt")
    with triton.serving("refusing-script", path) as name:
        ids = {"name": "INPUT__0", "datatype": "INT64", "shape": [1, 3], "data": [1, 2, 3]}
        mask = {"name": "INPUT__1", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}
        status, body = triton.post(f"{name}/infer", {"inputs": [ids, mask]})
        assert status == 400 and "size of tensor" in body["error"]
        status, body = triton.post(f"{name}/infer", {"inputs": [ids | {"shape": [3]}, mask]})
        assert status == 400 and "Expected [-1,-1], got [3]" in body["error"]
