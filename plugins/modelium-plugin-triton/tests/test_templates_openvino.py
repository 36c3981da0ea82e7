"""OpenVINO models in the Python backend of a real tritonserver, against the same arithmetic by hand."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelium_plugin_triton import servings
from real_triton import Triton, analyse
from tritonclient import http

from modelium.errors import LoadRejected
from tests.openvino_models import Network, linear, odd

pytestmark = pytest.mark.timeout(600)  # the first test of a new machine installs libraries

W = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
B = np.array([0.5, 1.0, 1.5], np.float32)


def tensor(name: str, array: np.ndarray, datatype: str) -> http.InferInput:
    made = http.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def ask(triton: Triton, name: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(triton.client.infer(name, [tensor("x", x, "FP32")]).as_numpy("y"))


def body(x: np.ndarray) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.reshape(-1).tolist()}]}


def test_a_batch_and_a_fixed_one(triton: Triton, tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with triton.serving("ov-free", linear(tmp_path / "free" / "net.xml")) as name:
        np.testing.assert_allclose(ask(triton, name, x), x @ W + B)
        assert triton.client.get_model_config(name)["max_batch_size"] == 32
    with triton.serving("ov-fixed", linear(tmp_path / "fixed" / "net.xml", batch=2), threads=1) as name:
        np.testing.assert_allclose(ask(triton, name, x), x @ W + B)
        status, said = triton.post(f"{name}/infer", body(x[:1]))
        assert status == 400 and "shape" in said["error"]


def test_requests_that_wait_are_one_batch(triton: Triton, tmp_path: Path) -> None:
    triton.install("ov-batched", linear(tmp_path / "drop" / "net.xml"))
    triton.load("ov-batched")
    config = triton.client.get_model_config("ov-batched")
    triton.unload("ov-batched")
    # A batch is run when it has three rows, and not before: no matter of luck.
    config["dynamic_batching"] = {"preferred_batch_size": [3], "max_queue_delay_microseconds": 10_000_000}
    config["max_batch_size"] = 3
    triton.load("ov-batched", config)
    rows = [np.full((1, 4), number, np.float32) for number in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda x: triton.post("ov-batched/infer", body(x)), rows))
    (stats,) = triton.client.get_inference_statistics("ov-batched")["model_stats"]
    triton.unload("ov-batched")
    assert (stats["inference_count"], stats["execution_count"]) == (3, 1)
    for x, (status, answer) in zip(rows, answers, strict=True):
        assert status == 200
        np.testing.assert_allclose(answer["outputs"][0]["data"], (x @ W + B).reshape(-1))


def test_scalars_and_tensors_without_names(triton: Triton, tmp_path: Path) -> None:
    with triton.serving("ov-odd", odd(tmp_path / "drop" / "net.xml")) as name:
        inputs = [
            tensor("times", np.array([6], np.int64), "INT64"),
            tensor("nameless", np.array([-1, 3], np.float32), "FP32"),
        ]
        answer = triton.client.infer(name, inputs)
        assert answer.as_numpy("twice").tolist() == [12]
        assert answer.as_numpy("last").tolist() == [0, 3]
        status, said = triton.post(f"{name}/infer", {"inputs": [json.loads(json.dumps(inputs[0]._get_tensor()))]})
        assert status == 400 and said["error"]


def test_what_it_takes_in_memory_is_what_was_said(triton: Triton, tmp_path: Path) -> None:
    """Weights are held as they are in the file, and as the processor likes them."""
    net = Network()
    y = net.parameter("x", (-1, 1024))
    random = np.random.default_rng(0)
    for index in range(8):
        w = net.constant(random.standard_normal((1024, 1024)).astype(np.float32))
        y = net.layer("MatMul", (y, w), (-1, 1024), data='<data transpose_a="false" transpose_b="false"/>')
        y = net.layer("ReLU", (y,), (-1, 1024), names="y" if index == 7 else "")
    net.result(y)
    drop = net.write(tmp_path / "drop" / "net.xml")
    wanted = servings.memory_bytes(servings.SERVINGS["openvino-python"], analyse(drop), "cpu")
    triton.install("ov-large", drop)
    held = triton.load("ov-large")
    triton.unload("ov-large")
    assert -0.1 < wanted / held - 1 < 0.15, (wanted, held)


def test_files_that_openvino_refuses(triton: Triton, tmp_path: Path) -> None:
    folder = linear(tmp_path / "drop" / "net.xml")
    triton.install("ov-damaged", folder)
    xml = triton.repository / "ov-damaged" / "1" / "model" / "net.xml"
    xml.write_text(xml.read_text().replace('type="Add"', 'type="Nonsense"'))
    with pytest.raises(LoadRejected, match="Nonsense"):
        triton.load("ov-damaged")
