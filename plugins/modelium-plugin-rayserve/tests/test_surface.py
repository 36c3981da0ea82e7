"""KServe v2 over Ray Serve with Triton's own client, on a real cluster: the same names and words as Triton's."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from real_ray import Ray
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from tests import models

pytestmark = pytest.mark.timeout(900)  # the first test of a new machine installs libraries

ROOM = 20_000
"""Tokens for which the model has room: minutes of work, of which a test waits for none."""

W, B = np.arange(1, 13, dtype=np.float32).reshape(4, 3), np.array([0.5, 1, 1.5], np.float32)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    ray = Ray(tmp_path_factory.mktemp("ray"))
    yield ray
    ray.close()


@pytest.fixture(scope="module")
def linear(ray: Ray, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    drop = models.onnx_linear(tmp_path_factory.mktemp("drop") / "net.onnx")
    with ray.serving("linear", drop) as name:
        yield name


def tensor(name: str, array: Any, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_nothing_of_it_can_be_reached_from_outside(ray: Ray, linear: str) -> None:
    ours = ray.lab.processes.pids()
    listening = [
        c.laddr[0] for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in ours and c.laddr
    ]
    assert len(listening) > 5 and {str(ip).removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_onnx_answers_in_json_and_in_binary(ray: Ray, linear: str, binary_in: bool, binary_out: bool) -> None:
    x = np.random.default_rng(1).random((5, 4), np.float32)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    answer = ray.client.infer(linear, [tensor("x", x, binary=binary_in)], outputs=wanted, request_id="a")
    np.testing.assert_allclose(answer.as_numpy("y"), x @ W + B, rtol=1e-5)
    assert answer.get_response()["id"] == "a"


def test_what_it_tells_of_a_model(ray: Ray, linear: str) -> None:
    assert ray.client.is_model_ready(linear) and ray.client.is_model_ready(linear, "1")
    metadata = ray.client.get_model_metadata(linear)
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert ray.client.get_model_config(linear)["max_batch_size"] == 32
    (told,) = ray.client.get_inference_statistics(linear)["model_stats"]
    assert told["name"] == linear and told["version"] == "1" and told["inference_count"] >= 0


def test_many_at_once_share_batches(ray: Ray, linear: str) -> None:
    def ask(index: int) -> Any:
        with triton.InferenceServerClient(ray.address, network_timeout=60) as client:
            return client.infer(linear, [tensor("x", np.full((1, 4), index, np.float32))]).as_numpy("y")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(answer, np.full((1, 4), index, np.float32) @ W + B)


def test_a_packed_request_is_read(ray: Ray, linear: str) -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 0, 0, 0]}]}
    packed = gzip.compress(json.dumps(body).encode())
    status, answer = ray.ask(f"{linear}/infer", packed, **{"Content-Encoding": "gzip"})
    assert status == 200 and answer["outputs"][0]["data"] == [1.5, 3.0, 4.5]
    assert ray.ask(f"{linear}/infer", packed, **{"Content-Encoding": "br"})[0] == 415


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("linear/infer", {"inputs": []}, 400, "missing required input"),
        ("linear/infer", {"inputs": 3}, 400, "list of objects"),
        ("linear/versions/7/infer", {}, 404, "version 7 is not found"),
        ("linear/nonsense", {}, 404, "there is no"),
        ("linear/generate", {"x": "a"}, 400, "expected values that FP32 has"),
    ],
)
def test_errors_are_told_as_triton_tells_them(
    ray: Ray, linear: str, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    found, answer = ray.post(path, body)
    assert found == status and words in answer["error"]


def test_infer_is_asked_for_by_post(ray: Ray, linear: str) -> None:
    assert ray.ask(f"{linear}/infer")[0] == 405


def test_a_persons_own_model(ray: Ray, tmp_path: Path) -> None:
    drop = tmp_path / "mine"
    drop.mkdir()
    (drop / "helper.py").write_text("FACTOR = 3\n")
    (drop / "model.py").write_text(
        """\
import helper, numpy as np

class Model:
    inputs = {"x": ("FP32", [-1]), "words": ("BYTES", [-1])}
    outputs = {"y": ("FP32", [-1]), "upper": ("BYTES", [-1])}

    def __init__(self, folder):
        self.files = sorted(file.name for file in folder.iterdir())

    def predict(self, inputs):
        if inputs["x"].min() < 0:
            raise ValueError("x must not be negative")
        if inputs["x"].max() > 1000:
            return {"y": inputs["x"]}
        print("asked", inputs["x"], self.files)
        return {"y": (inputs["x"] * helper.FACTOR).tolist(), "upper": [w.decode().upper() for w in inputs["words"]]}
"""
    )
    words = tensor("words", np.array(["ä", "b"], dtype=object), "BYTES")
    with ray.serving("mine", drop) as name:
        answer = ray.client.infer(name, [tensor("x", np.array([1, 2], np.float32)), words])
        assert answer.as_numpy("y").tolist() == [3, 6] and answer.as_numpy("y").dtype == np.float32
        assert [word.decode() for word in answer.as_numpy("upper")] == ["Ä", "B"]
        with pytest.raises(InferenceServerException, match=r"400.*x must not be negative"):
            ray.client.infer(name, [tensor("x", np.array([-1], np.float32)), words])
        with pytest.raises(InferenceServerException, match=r"500.*expected predict\(\) to return a dict"):
            ray.client.infer(name, [tensor("x", np.array([1e6], np.float32)), words])
        assert any("asked [1. 2.] ['helper.py', 'model.py']" in line for line in ray.logs(name))


# --------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def writer(ray: Ray, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    python = ray.python_with(["torch"])
    folder, sizes = tmp_path_factory.mktemp("writer") / "drop", {"max_position_embeddings": ROOM}
    drop = models.make(python, "text-generation", folder, seed=3, sizes=sizes)
    with ray.serving("writer", drop, concurrent=2):
        yield drop


def test_text_is_the_original_librarys(ray: Ray, writer: Path) -> None:
    python = ray.python_with(["torch"])
    (original,) = models.original(python, "text-generation", writer, texts=["hello"], max_tokens=8)
    status, answer = ray.post("writer/generate", {"text_input": "hello", "max_tokens": 8})
    assert status == 200 and answer["text_output"] == original["text"]
    assert answer["num_output_tokens"] == len(original["ids"]) and answer["finish_reason"] in ("length", "stop")
    body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hello"]},
                       {"name": "stream", "datatype": "BOOL", "shape": [1], "data": [True]},
                       {"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [8]}]}  # fmt: skip
    status, answer = ray.post("writer/infer", body)
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs["text_output"] == [original["text"]] and outputs["num_output_tokens"] == [len(original["ids"])]
    assert ray.post("writer/generate", {"text_input": "a", "temperature": -1})[0] == 400
    assert ray.post("writer/generate", {"text_input": "hello", "stream": True})[0] == 400


class Stream:
    """Server-sent events of `generate_stream`, one by one."""

    def __init__(self, ray: Ray, **body: Any):
        self.connection = http.client.HTTPConnection(ray.address, timeout=120)
        self.connection.request("POST", "/v2/models/writer/generate_stream", json.dumps({"stream": True, **body}))
        self.response = self.connection.getresponse()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_a_stream_comes_piece_by_piece(ray: Ray, writer: Path) -> None:
    _, whole = ray.post("writer/generate", {"text_input": "hello", "max_tokens": 8})
    events = list(Stream(ray, text_input="hello", max_tokens=8))
    assert len(events) > 2 and "".join(event["text_output"] for event in events) == whole["text_output"]
    refused = Stream(ray, text_input="hello", messages="[]")
    assert refused.response.status == 400 and b"send one of" in refused.response.read()


def test_a_client_that_hangs_up_ends_its_generation(ray: Ray, writer: Path) -> None:
    """Both places are taken by generations that would take minutes; only when one is given up has another its turn."""
    for _ in range(2):
        stream = Stream(ray, text_input="hello", max_tokens=ROOM)
        next(iter(stream))
        stream.close()
    assert ray.post("writer/generate", {"text_input": "hello", "max_tokens": 2})[1]["num_output_tokens"] == 2
