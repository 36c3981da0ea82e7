"""ONNX models in the Python backend of a real tritonserver, against the same arithmetic by hand."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
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
    return triton.client.infer(name, [tensor("x", x, "FP32")]).as_numpy("y")


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
    triton.load("batched")
    config = triton.client.get_model_config("batched")
    triton.unload("batched")
    # Eight rows fill a batch, and until then Triton waits for more: how the requests meet is no matter of luck.
    config["dynamic_batching"] = {"preferred_batch_size": [8], "max_queue_delay_microseconds": 5_000_000}
    config["max_batch_size"] = 8
    triton.load("batched", config)
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


def linear_alone(url: str, name: str, x: np.ndarray) -> np.ndarray:
    """With a client of its own: tritonclient's is not made for several threads."""
    with http.InferenceServerClient(url, network_timeout=60) as client:
        return client.infer(name, [tensor("x", x, "FP32")]).as_numpy("y")


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
