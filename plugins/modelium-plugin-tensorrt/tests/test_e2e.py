"""The whole of it: a real service and a real Triton, a model that is exchanged for its ONNX form under requests, one
whose form does not load, and one that is put back."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelium.paths import cache_dir
from tests import models
from tests.service import Served, served

pytestmark = pytest.mark.timeout(1200)

TEXTS = ["hello", "a longer text, with more in it", "ü"]
ALONE = {"disable": ["vllm", "rayserve", "llamacpp"]}
"""Other plugins' runtimes have no part in it."""


def logits(service: Served, name: str) -> list[list[float]]:
    asked = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [len(TEXTS), 1], "data": TEXTS}]}
    answer = service.post(f"/v2/models/{name}/infer", asked)
    (found,) = [one for one in answer["outputs"] if one["name"] == "logits"]
    made: list[list[float]] = np.array(found["data"]).reshape(found["shape"]).tolist()
    return made


class Asking(threading.Thread):
    """Asks again and again, and keeps what is not as expected."""

    def __init__(self, service: Served, name: str, expected: Any):
        super().__init__(daemon=True)
        self.service, self.model, self.expected = service, name, expected
        self.asked = 0
        self.wrong: list[str] = []
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            try:
                found = logits(self.service, self.model)
                np.testing.assert_allclose(found, self.expected, rtol=1e-3, atol=1e-4)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            self.asked += 1

    def end(self) -> None:
        self._done.set()
        self.join(60)


def told(service: Served, name: str) -> list[str]:
    return [transition["reason"] for transition in service.get(f"/models/{name}/explain")["transitions"]]


def said(service: Served, name: str, words: str) -> bool:
    return any(words in reason for reason in told(service, name))


def manifest(root: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((root / "repository" / name / "modelium.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def service(base: Path, exporter: Path, tmp_path: Path) -> Iterator[Served]:
    """One that exports; the environments are made already."""
    made = cache_dir() / "optimized"
    before = set(made.iterdir()) if made.is_dir() else set()
    with served(tmp_path / "root", {"tensorrt": {"onnx_on_cpu": True}, "plugins": ALONE}) as running:
        yield running
    for folder in set(made.iterdir()) - before if made.is_dir() else ():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def test_a_model_is_exchanged_under_requests_falls_back_and_is_put_back(
    service: Served, base: Path, tmp_path: Path
) -> None:
    # Of a content that no earlier run has made anything of.
    drop = models.make(base / "bin/python", "text-classification", tmp_path / "made/one", seed=os.getpid())
    expected = models.original(base / "bin/python", "text-classification", drop, texts=TEXTS)
    service.drop(drop)
    service.until_state("one", "READY")
    before = contents(service.root / "repository/one")

    service.until(lambda: said(service, "one", "converted: it is served as an ONNX export"), 600, "it is converted")
    asking = Asking(service, "one", expected)
    asking.start()
    service.until(lambda: said(service, "one", "reloaded"), 300, "the new form serves")
    seen = asking.asked
    service.until(lambda: asking.asked > seen + 5, 60, "it is asked in its new form")
    asking.end()
    assert not asking.wrong, asking.wrong[:3]
    assert [step for step in service.get("/models/one/explain")["transitions"] if step["after"] == "FAILED"] == []

    record = manifest(service.root, "one")["optimization"]
    assert record["optimizer"] == "tensorrt" and "outputs differ by at most" in record["note"]
    assert contents(service.root / "repository/one/unconverted") == before
    assert service.model("one")["serving"] == "transformers-exported"
    assert "an ONNX export" in service.cli("explain", "one").stdout

    # What lies in the cache is damaged: it is taken up for another model of that content, and does not load.
    network = cache_dir() / "optimized" / record["key"] / "files/network.onnx"
    (tmp_path / "damaged").write_bytes(network.read_bytes()[:1000])
    os.replace(tmp_path / "damaged", network)
    service.drop(drop, "two")
    service.until_state("two", "READY")
    service.until(lambda: said(service, "two", "it stays as it was dropped, and not an ONNX export"), 300)
    assert said(service, "two", "put back as it was dropped: an ONNX export for ONNX Runtime failed")
    np.testing.assert_allclose(logits(service, "two"), expected, rtol=1e-3, atol=1e-4)
    assert manifest(service.root, "two")["optimization"] is None
    assert manifest(service.root, "one")["optimization"] is not None, "what serves well goes on"

    service.stop()
    service.configure({"plugins": ALONE})
    service.start()
    service.until(lambda: manifest(service.root, "one")["optimization"] is None, 120, "it is put back")
    service.until(lambda: service.model("one")["serving"] == "transformers-text-classification", 60)
    assert contents(service.root / "repository/one") == before
    np.testing.assert_allclose(logits(service, "one"), expected, rtol=1e-3, atol=1e-4)
