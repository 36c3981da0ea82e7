"""Every format, dropped in every way with nobody writing a configuration: READY, with the original's own answers."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http

from tests import models
from tests.e2e.kit import Toy, cp, ensemble, fingerprint, infer, outputs, toy, transitions
from tests.service import Served, served

WAYS = ("renamed", "copied", "added")

TEXTS = ["hello there", "a"]
PROMPT = "Once upon a time"


class Shelf:
    """Models before they are dropped, and the service that they are dropped into."""

    def __init__(self, service: Served, folder: Path, python: Path):
        self.service = service
        self.folder = folder
        self.python = python
        self.dropped: dict[str, tuple[Path, dict[str, str]]] = {}
        """By the model's name: what was dropped, and its files then."""

    def bring(self, way: str, source: Path, name: str) -> None:
        """Drop a copy of `source`, a file or a folder, as `name`."""
        mark = fingerprint(source) if source.is_dir() else {}
        self.dropped[name.removesuffix(source.suffix) if source.is_file() else name] = (source, mark)
        if way == "renamed":
            self.service.drop(source, name)
        elif way == "copied":
            cp(source, self.service.root / "incoming" / name)
        else:
            stem = name.removesuffix(source.suffix) if source.is_file() else name
            self.service.cli("add", str(source), "--name", stem, "--no-wait")

    def original(self, kind: str, name: str, **inputs: Any) -> Any:
        return models.original(self.python, kind, self.dropped[name][0], **inputs)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, torch_python: Path, made: Callable[..., Path]) -> Iterator[Shelf]:
    """A service into which everything was dropped at once; each test waits for its own."""
    folder = tmp_path_factory.mktemp("formats")
    here = folder / "here"
    with served(folder / "root", {"orchestration": {"settle_s": 0.5}}) as service:
        shelf = Shelf(service, here, torch_python)
        onnx = models.onnx_linear(here / "linear.onnx")
        models.onnx_linear(here / "external" / "net.onnx", external=True)
        versions = toy(here / "versions", versions=(1, 2, 5))
        doubler, tripler = toy(here / "doubler", factor=2), toy(here / "tripler", factor=3)
        for way in WAYS:
            shelf.bring(way, onnx, f"linear-{way}.onnx")
            shelf.bring(way, here / "external", f"external-{way}")
            shelf.bring(way, renamed(versions, here / way / f"versions-{way}").path, f"versions-{way}")
            parts = [renamed(one, here / way / f"{one.name}-{way}") for one in (doubler, tripler)]
            # the whole before its parts: it is loaded when they are there
            whole = ensemble(here / way / f"six-{way}", *(part.name for part in parts))
            for path in (whole, *(part.path for part in parts)):
                shelf.bring(way, path, path.name)
        script = made("torchscript", "file.pt")
        image = made("image-classification", "vit")
        shelf.bring("copied", made("text-generation", "llama"), "llama-copied")
        shelf.bring("renamed", made("text-generation", "sharded", shards=20_000), "sharded-renamed")
        shelf.bring("added", made("text-classification", "bert"), "bert-added")
        shelf.bring("copied", made("feature-extraction", "encoder"), "encoder-copied")
        shelf.bring("renamed", image, "vit-renamed")
        shelf.bring("added", script, "script-added.pt")
        shelf.bring("copied", script, "script-copied.pt")
        yield shelf


def renamed(source: Toy, path: Path) -> Toy:
    """The same directory under another name, which its configuration must bear too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source.path, path)
    config = path / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{source.name}"', f'name: "{path.name}"'))
    return Toy(path, source.control)


# --------------------------------------------------------------------------- ONNX


def linear(x: list[list[float]]) -> list[list[float]]:
    weights = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    found: list[list[float]] = (np.array(x, np.float32) @ weights + np.array([0.5, 1, 1.5], np.float32)).tolist()
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["linear", "external"])
def test_onnx(shelf: Shelf, name: str, way: str) -> None:
    name = f"{name}-{way}"
    shelf.service.until_state(name, "READY")
    x = [[1.0, 2.0, 3.0, 4.0], [0.0, -1.0, 0.5, 2.0]]
    body = {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": x}]}
    answer = shelf.service.post(f"/v2/models/{name}/infer", body)
    np.testing.assert_allclose(outputs(answer)["y"], np.array(linear(x)).reshape(-1), rtol=1e-5)
    assert answer["outputs"][0]["shape"] == [2, 3]


def test_a_copy_that_takes_its_time_is_waited_for(shelf: Shelf, tmp_path: Path) -> None:
    """Written piece by piece, it is never taken for a broken model."""
    whole = models.onnx_linear(tmp_path / "whole.onnx").read_bytes()
    half = len(whole) // 2
    incoming = shelf.service.root / "incoming" / "slow.onnx"
    with incoming.open("wb", buffering=0) as file:
        file.write(whole[:half])
        shelf.service.until(
            lambda: (
                shelf.service.state("incoming/slow.onnx") == "DISCOVERED"
                and "arriving" in shelf.service.model("incoming/slow.onnx")["reason"]
            ),
            what="the first half to be seen",
        )
        file.write(whole[half:])
    shelf.service.until_state("slow", "READY")
    told = shelf.service.get("/decisions?subject=incoming/slow.onnx")
    assert "INVALID" not in {t["after"] for t in told}


# --------------------------------------------------------------------------- Triton's own directories


@pytest.mark.parametrize("way", WAYS)
def test_numbered_versions(shelf: Shelf, way: str) -> None:
    name = f"versions-{way}"
    shelf.service.until_state(name, "READY")
    assert infer(shelf.service, name, [1, 2]) == [10, 20]  # without a version, the highest
    for version in (1, 2, 5):
        body = {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]}
        answer = shelf.service.post(f"/v2/models/{name}/versions/{version}/infer", body)
        assert outputs(answer)["y"] == [2 * version, 4 * version]
        assert answer["model_version"] == str(version)
    assert set(shelf.service.get(f"/v2/models/{name}")["versions"]) == {"1", "2", "5"}


@pytest.mark.parametrize("way", WAYS)
def test_an_ensemble_with_its_parts(shelf: Shelf, way: str) -> None:
    shelf.service.until_state(f"six-{way}", "READY")
    for name in (f"doubler-{way}", f"tripler-{way}"):
        assert shelf.service.state(name) == "READY"
    assert infer(shelf.service, f"six-{way}", [1, 2]) == [6, 12]
    shown = shelf.service.model(f"six-{way}")
    assert set(shown["depends_on"]) == {f"doubler-{way}", f"tripler-{way}"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["versions", "doubler", "six"])
def test_a_triton_directory_is_adopted_byte_for_byte(shelf: Shelf, name: str, way: str) -> None:
    name = f"{name}-{way}"
    shelf.service.until_state(name, "READY")
    infer(shelf.service, name)
    place = shelf.service.root / "repository" / name
    assert fingerprint(place) == shelf.dropped[name][1]
    assert shelf.service.model(name)["serving"] == "as-is"


# --------------------------------------------------------------------------- Hugging Face: text generation


@pytest.mark.parametrize("name", ["llama-copied", "sharded-renamed"])
def test_a_language_model_generates_what_transformers_does(shelf: Shelf, name: str) -> None:
    shelf.service.until_state(name, "READY")
    expected = shelf.original("text-generation", name, texts=[PROMPT], max_tokens=10)[0]
    answer = shelf.service.post(f"/v2/models/{name}/generate", {"text_input": PROMPT, "max_tokens": 10})
    assert answer["text_output"] == expected["text"]
    assert answer["num_input_tokens"] == expected["prompt"]
    assert answer["num_output_tokens"] == len(expected["ids"])


def test_the_sharded_weights_are_several_files(shelf: Shelf) -> None:
    shards = list(shelf.dropped["sharded-renamed"][0].glob("model-*.safetensors"))
    assert len(shards) > 1


def test_decoding_parameters(shelf: Shelf) -> None:
    name = "llama-copied"
    shelf.service.until_state(name, "READY")

    def generate(**parameters: Any) -> dict[str, Any]:
        found: dict[str, Any] = shelf.service.post(f"/v2/models/{name}/generate", {"text_input": PROMPT, **parameters})
        return found

    assert generate(max_tokens=3)["num_output_tokens"] == 3
    drawn = [generate(max_tokens=12, temperature=1.5, seed=seed)["text_output"] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    plain = generate(max_tokens=12)["text_output"]
    assert generate(max_tokens=12)["text_output"] == plain
    stop = plain[2:4]
    stopped = generate(max_tokens=12, stop=stop)
    assert stopped["text_output"] == plain[: plain.index(stop)]
    assert stopped["finish_reason"] == "stop"
    expected = shelf.original("text-generation", name, texts=[PROMPT], max_tokens=12, repetition_penalty=1.8)[0]
    assert generate(max_tokens=12, repetition_penalty=1.8)["text_output"] == expected["text"]


def test_generate_stream_sends_token_by_token(shelf: Shelf) -> None:
    name = "llama-copied"
    shelf.service.until_state(name, "READY")
    whole = shelf.service.post(f"/v2/models/{name}/generate", {"text_input": PROMPT, "max_tokens": 10})
    body = {"text_input": PROMPT, "max_tokens": 10, "stream": True}
    raw = shelf.service.request("POST", f"/v2/models/{name}/generate_stream", body).decode()
    events = [json.loads(line.removeprefix("data:")) for line in raw.splitlines() if line.startswith("data:")]
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    pieces = [event["text_output"] for event in events if event["text_output"]]
    assert len(pieces) > 1
    assert events[-1]["num_output_tokens"] == 10


def test_a_language_model_by_infer(shelf: Shelf) -> None:
    name = "llama-copied"
    shelf.service.until_state(name, "READY")
    expected = shelf.original("text-generation", name, texts=[PROMPT], max_tokens=6)[0]
    with tritonclient.http.InferenceServerClient(shelf.service.address) as client:
        text = tritonclient.http.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
        tokens = tritonclient.http.InferInput("max_tokens", [1], "INT32")
        tokens.set_data_from_numpy(np.array([6], np.int32))
        found = client.infer(name, [text, tokens])
        assert found.as_numpy("text_output")[0].decode() == expected["text"]
    body = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}]}
    body["inputs"].append({"name": "max_tokens", "shape": [1], "datatype": "INT32", "data": [6]})
    assert outputs(shelf.service.post(f"/v2/models/{name}/infer", body))["text_output"] == [expected["text"]]
    said = shelf.service.post(f"/predict/{name}", {"text": PROMPT, "parameters": {"max_tokens": 6}})
    assert said["text"] == expected["text"]


# --------------------------------------------------------------------------- Hugging Face: the other tasks


def text_body(texts: list[str]) -> dict[str, Any]:
    return {"inputs": [{"name": "text_input", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}]}


def test_sequence_classification(shelf: Shelf) -> None:
    shelf.service.until_state("bert-added", "READY")
    expected = np.array(shelf.original("text-classification", "bert-added", texts=TEXTS))
    found = outputs(shelf.service.post("/v2/models/bert-added/infer", text_body(TEXTS)))
    np.testing.assert_allclose(np.array(found["logits"]).reshape(expected.shape), expected, atol=1e-4)
    best = np.array(found["label"]).reshape(2, -1)[:, 0]
    assert list(best) == [models.LABELS[index] for index in expected.argmax(axis=1)]


def test_feature_extraction(shelf: Shelf) -> None:
    shelf.service.until_state("encoder-copied", "READY")
    expected = shelf.original("feature-extraction", "encoder-copied", texts=TEXTS[:1])[0]
    found = outputs(shelf.service.post("/v2/models/encoder-copied/infer", text_body(TEXTS[:1])))
    states = np.array(found["last_hidden_state"]).reshape(len(expected), -1)
    np.testing.assert_allclose(states, np.array(expected), atol=1e-4)
    np.testing.assert_allclose(found["sentence_embedding"], np.array(expected).mean(axis=0), atol=1e-4)


def test_image_classification(shelf: Shelf, tmp_path: Path) -> None:
    shelf.service.until_state("vit-renamed", "READY")
    image = tmp_path / "image.png"
    script = (
        "import sys; from PIL import Image; i = Image.new('RGB', (40, 30)); "
        "i.putdata([(x * 5 % 256, x * 3 % 256, x % 256) for x in range(1200)]); i.save(sys.argv[1])"
    )
    subprocess.run([str(shelf.python), "-c", script, str(image)], check=True)
    expected = np.array(shelf.original("image-classification", "vit-renamed", images=[str(image)]))
    with tritonclient.http.InferenceServerClient(shelf.service.address) as client:
        given = tritonclient.http.InferInput("image", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[image.read_bytes()]], dtype=object))
        found = client.infer("vit-renamed", [given])
        np.testing.assert_allclose(found.as_numpy("logits"), expected, atol=1e-4)
        assert found.as_numpy("label")[0][0].decode() == models.LABELS[int(expected.argmax())]
    text = base64.b64encode(image.read_bytes()).decode()
    body = {"inputs": [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}
    answer = outputs(shelf.service.post("/v2/models/vit-renamed/infer", body))
    np.testing.assert_allclose(answer["logits"], expected[0], atol=1e-4)


# --------------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize("way", ["copied", "added"])
def test_torchscript(shelf: Shelf, way: str) -> None:
    name = f"script-{way}"
    shelf.service.until_state(name, "READY")
    x = [[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0]]
    expected = np.array(shelf.original("torchscript", name, inputs=[x], dtypes=["float32"])[0])
    metadata = shelf.service.get(f"/v2/models/{name}")
    body = {"inputs": [{"name": metadata["inputs"][0]["name"], "shape": [2, 4], "datatype": "FP32", "data": x}]}
    answer = shelf.service.post(f"/v2/models/{name}/infer", body)
    np.testing.assert_allclose(np.array(answer["outputs"][0]["data"]).reshape(2, 3), expected, atol=1e-5)


# --------------------------------------------------------------------------- whoever adds


def test_add_waits_until_it_answers(shelf: Shelf, tmp_path: Path) -> None:
    source = models.onnx_linear(tmp_path / "waited.onnx")
    told = json.loads(shelf.service.cli("add", str(source), "--json").stdout)
    assert (told["name"], told["state"]) == ("waited", "READY")
    assert source.exists()  # it was copied, since nobody said --move
    moved = models.onnx_linear(tmp_path / "moved.onnx")
    shelf.service.cli("add", str(moved), "--move")
    assert not moved.exists()
    assert shelf.service.state("moved") == "READY"


def test_what_add_is_told_when_it_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    done = shelf.service.cli("add", str(tmp_path / "notes.txt"), check=False)
    assert done.returncode == 1
    assert "notes.txt" in done.stderr and "Traceback" not in done.stderr


def test_nobody_was_taken_for_broken_on_the_way(shelf: Shelf) -> None:
    """However it came, no drop was refused or failed before it served."""
    for name in shelf.dropped:
        shelf.service.until_state(name, "READY")
        states = {after for _, after in transitions(shelf.service, name)}
        if not name.startswith("six-"):  # these came before what they are made of
            assert not states & {"FAILED", "INVALID"}, (name, transitions(shelf.service, name))
    assert not [p for p in (shelf.service.root / "incoming").iterdir() if not p.name.startswith(".")]
    refused = {p.name for p in (shelf.service.root / "quarantine").glob("*")}
    assert refused <= {"notes.txt"}  # what another test drops to see it refused
