"""Exported models in a real tritonserver, against transformers itself: what clients send and get stays the same."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelium_plugin_tensorrt.forms import OVERHEAD_EXPORTED
from modelium_plugin_tensorrt.optimizer import TensorRTOptimizer
from real_triton import Triton  # type: ignore[import-not-found,unused-ignore]
from test_optimizer import optimizer, served

from modelium.api import Inspection, Optimized, Served
from modelium.engine.job import Job
from modelium.paths import cache_dir
from tests import models

pytestmark = pytest.mark.timeout(900)

TEXTS = ["hello", "a longer text, with more in it", "ü"]


@pytest.fixture
async def maker(exporter: Path, tmp_path: Path) -> TensorRTOptimizer:
    made = await optimizer(tmp_path, onnx_on_cpu=True)
    made._cache = cache_dir() / "tensorrt"
    return made


Exchange = Callable[[str, Path, str], Any]


@pytest.fixture
def exchange(triton: Triton, maker: TensorRTOptimizer, base: Path, job: Job, tmp_path: Path) -> Exchange:
    """Install a drop as it is, then as it is exported, in the folder that Triton serves it from."""

    async def make(name: str, drop: Path, serving: str) -> Optimized:
        folder = triton.install(name, drop)
        analysis = triton._requests.pop(name).analysis
        model = served(tmp_path, serving, environment=base, settings={"top_k": 5, "dtype": "auto"})
        model = model.model_copy(
            update={
                "name": name,
                "path": folder,
                "inspection": Inspection(content_key="x", total_bytes=1, analysis=analysis),
            }
        )
        optimization = maker.proposes(model)
        assert optimization is not None
        target = tmp_path / f"{name}-made"
        target.mkdir()
        facts = await maker.optimize(model, optimization, target, job)
        form = maker.layout(model, optimization, facts)
        return arranged(model, form, target)

    return make


def arranged(model: Served, form: Optimized, made: Path) -> Optimized:
    """As the engine does it."""
    kept = {place: (model.path / source).read_bytes() for place, source in form.kept.items()}
    shutil.rmtree(model.path)
    for place, data in kept.items():
        (model.path / place).parent.mkdir(parents=True, exist_ok=True)
        (model.path / place).write_bytes(data)
    for place, text in form.texts.items():
        (model.path / place).parent.mkdir(parents=True, exist_ok=True)
        (model.path / place).write_text(text, encoding="utf-8")
    for place, source in form.made.items():
        shutil.copy(made / source, model.path / place)
    return form


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected, np.float32), rtol=1e-3, atol=1e-4)


async def test_embeddings_of_texts(triton: Triton, exchange: Exchange, base: Path, tmp_path: Path) -> None:
    drop = models.make(base / "bin/python", "feature-extraction", tmp_path / "drop", pooling="max")
    expected = models.original(base / "bin/python", "feature-extraction", drop, texts=TEXTS)
    form = await exchange("encoder", drop, "transformers-feature-extraction")
    assert form.serving == "transformers-exported" and form.settings["packs"] == ["torch", "onnx"]
    assert "1/model/1_Pooling/config.json" in form.kept and "1/model/model.safetensors" not in form.kept
    size = triton.load("encoder")
    assert size < OVERHEAD_EXPORTED * 1.25 < form.memory_bytes * 1.5, "PyTorch is not there"
    try:
        asked = {
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [len(TEXTS), 1], "data": TEXTS}],
        }
        status, answer = triton.post("encoder/infer", asked)
        assert status == 200, answer
        found = {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer["outputs"]}
        assert found["last_hidden_state"].shape == (3, max(map(len, expected)), 32)
        for row, vectors in enumerate(expected):
            close(found["last_hidden_state"][row][found["attention_mask"][row] == 1], vectors)
            whole = np.max(vectors, axis=0)
            close(found["sentence_embedding"][row], whole / np.linalg.norm(whole))
        asked["inputs"][0] |= {"shape": [1, 1], "data": ["x" * 129]}
        status, answer = triton.post("encoder/infer", asked)
        assert status == 400 and "129 tokens, and the model takes 128" in answer["error"]
    finally:
        triton.unload("encoder")


async def test_labels_of_images(triton: Triton, exchange: Exchange, base: Path, tmp_path: Path) -> None:
    drop = models.make(base / "bin/python", "image-classification", tmp_path / "drop")
    picture = models.png(tmp_path / "picture.png")
    (expected,) = models.original(base / "bin/python", "image-classification", drop, images=[str(picture)])
    await exchange("seer", drop, "transformers-image-classification")
    triton.load("seer")
    try:
        data = [base64.b64encode(picture.read_bytes()).decode()]
        asked = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": data}]}
        status, answer = triton.post("seer/infer", asked)
        assert status == 200, answer
        found = {one["name"]: one["data"] for one in answer["outputs"]}
        close(found["logits"], expected)
        assert found["label"][0] == ["cat", "dog", "bird", "fish"][int(np.argmax(expected))]
        asked = {"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}]}
        status, answer = triton.post("seer/infer", asked)
        assert status == 400 and "pixel_values" in json.dumps(answer)
    finally:
        triton.unload("seer")
