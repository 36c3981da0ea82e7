"""ONNX models in the Python backend of a real tritonserver, against the same arithmetic by hand."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from real_triton import Triton
from tritonclient import http
from tritonclient.utils import InferenceServerException

from modelium.errors import LoadRejected
from tests import models

pytestmark = pytest.mark.timeout(600)  # the first test of a new machine installs libraries

W = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
B = np.array([0.5, 1.0, 1.5], np.float32)


def tensor(name: str, array: np.ndarray, datatype: str) -> http.InferInput:
    made = http.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def linear(triton: Triton, name: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(triton.client.infer(name, [tensor("x", x, "FP32")]).as_numpy("y"))


def test_a_file(triton: Triton, tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with triton.serving("file", models.onnx_linear(tmp_path / "net.onnx")) as name:
        np.testing.assert_allclose(linear(triton, name, x), x @ W + B)


def test_a_folder_with_external_data(triton: Triton, tmp_path: Path) -> None:
    x = np.ones((1, 4), np.float32)
    models.onnx_linear(tmp_path / "drop" / "sub" / "net.onnx", external=True)
    (tmp_path / "drop" / "model.py").write_text("raise SystemExit('the drop may bring a file of this name')")
    with triton.serving("external", tmp_path / "drop") as name:
        np.testing.assert_allclose(linear(triton, name, x), x @ W + B)


def test_a_fixed_batch(triton: Triton, tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    with triton.serving("fixed", models.onnx_linear(tmp_path / "net.onnx", fixed_batch=2)) as name:
        np.testing.assert_allclose(linear(triton, name, x), x @ W + B)
        with pytest.raises(InferenceServerException, match="shape"):
            linear(triton, name, x[:1])


def test_requests_that_wait_are_one_batch(triton: Triton, tmp_path: Path) -> None:
    triton.install("batched", models.onnx_linear(tmp_path / "net.onnx"))
    load_batching(triton, "batched", 8)
    rows = [1, 2, 1, 3, 1]
    inputs = [np.full((count, 4), index, np.float32) for index, count in enumerate(rows)]
    with ThreadPoolExecutor(len(rows)) as pool:
        answers = list(pool.map(lambda x: linear_alone(triton.address, "batched", x), inputs))
    for x, y in zip(inputs, answers, strict=True):
        np.testing.assert_allclose(y, x @ W + B)
    (stats,) = triton.client.get_inference_statistics("batched")["model_stats"]
    triton.unload("batched")
    assert stats["inference_count"] == sum(rows)
    assert stats["execution_count"] == 1


def test_one_that_fails_spoils_no_other_of_its_batch(triton: Triton, tmp_path: Path) -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "rows"], ["found"])],
        "lookup",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["n", "k"])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["n", "k", 3])],
        [numpy_helper.from_array(table, "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "l.onnx")
    triton.install("lookup", tmp_path / "l.onnx")
    load_batching(triton, "lookup", 3)

    def ask(row: int) -> tuple[int, dict[str, Any]]:
        rows = {"name": "rows", "datatype": "INT64", "shape": [1, 1], "data": [row]}
        return triton.post("lookup/infer", {"inputs": [rows]})

    with ThreadPoolExecutor(3) as pool:
        first, bad, last = pool.map(ask, (0, 99, 2))
    triton.unload("lookup")
    assert (bad[0], first[0], last[0]) == (400, 200, 200)
    assert "out of data bounds" in bad[1]["error"]
    assert [answer[1]["outputs"][0]["data"] for answer in (first, last)] == [table[0].tolist(), table[2].tolist()]


def load_batching(triton: Triton, name: str, rows: int) -> None:
    """Load it so that a batch is run when it has `rows` rows, and not before: no matter of luck."""
    triton.load(name)
    config = triton.client.get_model_config(name)
    triton.unload(name)
    config["dynamic_batching"] = {"preferred_batch_size": [rows], "max_queue_delay_microseconds": 10_000_000}
    config["max_batch_size"] = rows
    triton.load(name, config)


def linear_alone(url: str, name: str, x: np.ndarray) -> np.ndarray:
    """With a client of its own: tritonclient's is not made for several threads."""
    with http.InferenceServerClient(url, network_timeout=60) as client:
        return np.asarray(client.infer(name, [tensor("x", x, "FP32")]).as_numpy("y"))


def test_all_that_is_less_usual(triton: Triton, tmp_path: Path) -> None:
    words = np.array(["häh", ""], dtype=object)
    with triton.serving("odd", models.onnx_odd(tmp_path / "odd.onnx")) as name:
        answer = triton.client.infer(
            name, [tensor("words", words, "BYTES"), tensor("times", np.array([6], np.int64), "INT64")]
        )
    assert [word.decode() for word in answer.as_numpy("same")] == list(words)
    assert answer.as_numpy("twice").tolist() == [12]
    assert answer.as_numpy("half").tolist() == [0.5, 2.0] and answer.as_numpy("half").dtype == np.float16
    assert answer.as_numpy("large").tolist() == [False]
    assert answer.as_numpy("free").tolist() == [[[6]]]


def test_bad_requests_are_refused_and_say_why(triton: Triton, tmp_path: Path) -> None:
    with triton.serving("refusing", models.onnx_odd(tmp_path / "odd.onnx")) as name:
        times = {"name": "times", "datatype": "INT64", "shape": [1], "data": [1]}
        words = {"name": "words", "datatype": "BYTES", "shape": [1], "data": ["a"]}
        twice = [{"name": "twice"}]  # FP16, which the model also gives, has no form in JSON
        assert triton.post(f"{name}/infer", {"inputs": [words, times], "outputs": twice})[0] == 200
        for bad, reason in (
            ([words | {"shape": [1, 1]}, times], "shape"),
            ([words, times | {"datatype": "INT32"}], "INT32"),
            ([words], "expected 2 inputs"),
        ):
            status, body = triton.post(f"{name}/infer", {"inputs": bad, "outputs": twice})
            assert status == 400 and reason in json.dumps(body)
        raw = http.InferInput("words", [1], "BYTES")
        raw.set_data_from_numpy(np.array([b"\xff"], dtype=object))
        with pytest.raises(InferenceServerException, match="words must be UTF-8"):
            triton.client.infer(name, [raw, tensor("times", np.array([1], np.int64), "INT64")])


def test_two_instances_answer_alike(triton: Triton, tmp_path: Path) -> None:
    x = np.ones((1, 4), np.float32)
    with triton.serving("twice", models.onnx_linear(tmp_path / "net.onnx"), instances=2, threads=1) as name:
        assert triton.client.get_model_config(name)["instance_group"][0]["count"] == 2
        for _ in range(6):
            np.testing.assert_allclose(linear(triton, name, x), x @ W + B)


def test_a_file_that_onnxruntime_refuses(triton: Triton, tmp_path: Path) -> None:
    triton.install("damaged", models.onnx_linear(tmp_path / "net.onnx"))
    (triton.repository / "damaged" / "1" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(LoadRejected, match=r"model\.onnx failed"):
        triton.load("damaged")
