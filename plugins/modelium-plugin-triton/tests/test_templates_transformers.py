"""Classifiers and encoders of transformers in a real tritonserver, against transformers itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_triton import Triton
from tritonclient import http
from tritonclient.utils import InferenceServerException

from modelium.errors import LoadRejected
from tests import models

pytestmark = pytest.mark.timeout(600)  # the first test of a new machine installs libraries

TEXTS = ["hello", "a longer text, with more in it", "ü"]
LABELS = ["cat", "dog", "bird", "fish"]


def strings(name: str, values: list[Any]) -> http.InferInput:
    tensor = http.InferInput(name, [len(values), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=object).reshape(-1, 1))
    return tensor


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected, np.float32), rtol=1e-3, atol=1e-4)


def make(triton: Triton, factory: pytest.TempPathFactory, kind: str, **options: Any) -> Path:
    return models.make(triton.python, kind, factory.mktemp(kind) / "drop", **options)


# --------------------------------------------------------------------------- text classification


@pytest.fixture(scope="module")
def classifier(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    drop = make(triton, tmp_path_factory, "text-classification", shards=50_000)
    assert len(list(drop.glob("*.safetensors"))) > 1, "the weights should be in several files"
    with triton.serving("classifier", drop):
        yield drop


def test_a_batch_of_texts_is_classified_as_each_alone(triton: Triton, classifier: Path) -> None:
    answer = triton.client.infer("classifier", [strings("text_input", TEXTS)])
    logits = answer.as_numpy("logits")
    expected = models.original(triton.python, "text-classification", classifier, texts=TEXTS)
    close(logits, expected)
    order = np.argsort(-np.array(expected), axis=1)
    assert [[word.decode() for word in row] for row in answer.as_numpy("label")] == [
        [LABELS[index] for index in row] for row in order
    ]
    chances = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    close(answer.as_numpy("score"), -np.sort(-chances, axis=1))


def test_pairs_of_texts(triton: Triton, classifier: Path) -> None:
    pairs = ["one", "two", "three"]
    answer = triton.client.infer("classifier", [strings("text_input", TEXTS), strings("text_pair", pairs)])
    expected = models.original(triton.python, "text-classification", classifier, texts=TEXTS, pairs=pairs)
    close(answer.as_numpy("logits"), expected)


def test_a_text_that_is_too_long_is_refused_and_spoils_no_other(triton: Triton, classifier: Path) -> None:
    status, body = triton.post(
        "classifier/infer",
        {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["x" * 129]}]},
    )
    assert status == 400
    assert "129 tokens, and the model takes 128" in body["error"]
    triton.client.infer("classifier", [strings("text_input", ["x" * 128])])


def test_weights_for_another_task_are_refused_at_the_load(
    triton: Triton, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drop = make(triton, tmp_path_factory, "feature-extraction")
    config = json.loads((drop / "config.json").read_text())
    (drop / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    triton.install("headless", drop)
    with pytest.raises(LoadRejected, match=r"the weights lack classifier\.bias"):
        triton.load("headless")


# --------------------------------------------------------------------------- feature extraction


@pytest.fixture(scope="module")
def encoder(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    drop = make(triton, tmp_path_factory, "feature-extraction")
    with triton.serving("encoder", drop):
        yield drop


def test_the_embedding_of_each_token_and_of_the_whole(triton: Triton, encoder: Path) -> None:
    answer = triton.client.infer("encoder", [strings("text_input", TEXTS)])
    tokens, mask = answer.as_numpy("last_hidden_state"), answer.as_numpy("attention_mask")
    expected = models.original(triton.python, "feature-extraction", encoder, texts=TEXTS)
    assert tokens.shape == (len(TEXTS), max(map(len, expected)), 32)
    for index, vectors in enumerate(expected):
        assert mask[index].sum() == len(vectors)
        close(tokens[index][mask[index] == 1], vectors)
        close(answer.as_numpy("sentence_embedding")[index], np.mean(vectors, axis=0))


def test_only_what_was_asked_for_is_sent(triton: Triton, encoder: Path) -> None:
    answer = triton.client.infer(
        "encoder", [strings("text_input", TEXTS)], outputs=[http.InferRequestedOutput("sentence_embedding")]
    )
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["sentence_embedding"]


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_it_is_pooled_as_its_own_files_say(
    triton: Triton, tmp_path_factory: pytest.TempPathFactory, pooling: str
) -> None:
    drop = make(triton, tmp_path_factory, "feature-extraction", pooling=pooling)
    expected = models.original(triton.python, "feature-extraction", drop, texts=TEXTS)
    with triton.serving(f"pooled-{pooling}", drop) as name:
        got = triton.client.infer(name, [strings("text_input", TEXTS)]).as_numpy("sentence_embedding")
    for index, vectors in enumerate(expected):
        whole = np.array(vectors[0]) if pooling == "cls" else np.max(vectors, axis=0)
        close(got[index], whole / np.linalg.norm(whole))


# --------------------------------------------------------------------------- image classification


@pytest.fixture(scope="module")
def seer(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    drop = make(triton, tmp_path_factory, "image-classification")
    with triton.serving("seer", drop, top_k=2):
        yield drop


def test_encoded_images(triton: Triton, seer: Path, tmp_path: Path) -> None:
    images = [models.png(tmp_path / f"{seed}.png", seed=seed, width=30 + seed) for seed in range(3)]
    expected = models.original(triton.python, "image-classification", seer, images=[str(i) for i in images])
    answer = triton.client.infer("seer", [strings("image", [image.read_bytes() for image in images])])
    close(answer.as_numpy("logits"), expected)
    assert [row[0].decode() for row in answer.as_numpy("label")] == [LABELS[int(np.argmax(row))] for row in expected]
    assert answer.as_numpy("score").shape == (3, 2)


def test_an_image_as_text_and_its_pixels(triton: Triton, seer: Path, tmp_path: Path) -> None:
    image = models.png(tmp_path / "one.png", seed=7)
    expected = models.original(triton.python, "image-classification", seer, images=[str(image)])
    encoded = base64.b64encode(image.read_bytes()).decode()
    status, body = triton.post(
        "seer/infer", {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [encoded]}]}
    )
    assert status == 200
    close(next(o for o in body["outputs"] if o["name"] == "logits")["data"], expected[0])
    pixels = http.InferInput("pixel_values", [2, 3, 32, 32], "FP32")
    pixels.set_data_from_numpy(np.zeros((2, 3, 32, 32), np.float32))
    assert triton.client.infer("seer", [pixels]).as_numpy("logits").shape == (2, 4)


def test_what_is_no_image_is_refused(triton: Triton, seer: Path) -> None:
    with pytest.raises(InferenceServerException, match="image must be a JPEG, PNG or alike"):
        triton.client.infer("seer", [strings("image", [b"GIF87a but no"])])
    pixels = http.InferInput("pixel_values", [1, 3, 32, 32], "FP32")
    pixels.set_data_from_numpy(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(InferenceServerException, match="one of the two"):
        triton.client.infer("seer", [pixels, strings("image", [b""])])
