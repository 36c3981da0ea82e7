from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from modelium.api import Analysis
from modelium.builtin import recognised as plugin
from modelium.errors import ModelError
from tests.builtin.making import hugging_face, onnx_model, safetensors


def known(path: Path) -> str | None:
    found = plugin.modelium_analyze(path)
    if found is None:
        return None
    assert found.confidence == plugin.CONFIDENCE
    assert "Modelium has no runtime for it here: " in found.facts["unsupported"]
    return found.format


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


@pytest.mark.parametrize(
    ("name", "data", "format"),
    [
        ("x.gguf", b"GGUF\x03\0\0\0", "gguf"),
        ("x.bin", b"GGUF\x03\0\0\0", "gguf"),
        ("x.plan", b"ftrt" + bytes(20), "tensorrt"),
        ("x.engine", b"anything", "tensorrt"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(9), "keras"),
        ("x.tflite", b"\x20\0\0\0TFL3", "tflite"),
        ("x.npy", b"\x93NUMPY\x01\0", "numpy"),
        ("x.pkl", pickle.dumps([1]), "pickle"),
        ("x.joblib", gzip.compress(b"x", mtime=0), "pickle"),
        ("x.tar.gz", gzip.compress(b"x", mtime=0), "archive"),
        ("x.ubj", b"{L", "boosted-trees"),
        ("x.txt", b"hello", None),
        ("x.onnx", b"hello", None),
        ("x.bin", b"hello", None),
    ],
)
def test_files(tmp_path: Path, name: str, data: bytes, format: str | None) -> None:
    assert known(write(tmp_path / name, data)) == format


def test_archives(tmp_path: Path) -> None:
    assert known(zipped(tmp_path / "m.keras", "config.json", "model.weights.h5")) == "keras"
    assert known(zipped(tmp_path / "m.zip", "model.onnx")) == "archive"
    assert known(zipped(tmp_path / "m.pt2", "m/archive_format")) == "torch-export"
    np.savez(tmp_path / "m.npz", a=np.zeros(2))
    assert known(tmp_path / "m.npz") == "numpy"


def test_what_pytorch_writes(torch_files: Path) -> None:
    assert known(torch_files / "state_dict.pt") == "torch-checkpoint"
    assert known(torch_files / "legacy.pt") == "torch-checkpoint"
    assert known(torch_files / "script.pt") is None


def test_safetensors_alone(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "adapter.safetensors", {"a": (2, 3)})
    found = plugin.modelium_analyze(path)
    assert isinstance(found, Analysis)
    assert (found.format, found.summary) == ("safetensors", "1 tensors, 6 numbers, float32")
    told = plugin.modelium_completeness(path)
    assert told is not None
    assert told.complete
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    told = plugin.modelium_completeness(path)
    assert told is not None
    assert (told.complete, told.have_bytes, told.want_bytes) == (False, len(data) - 1, len(data))
    with pytest.raises(ModelError):
        plugin.modelium_analyze(path)


def test_a_folder_whose_configuration_is_still_to_come_waits_for_its_weights(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "model.safetensors", {"a": (2, 3)})
    assert plugin.modelium_completeness(tmp_path) is None  # whole, but whether that is all nobody knows
    path.write_bytes(path.read_bytes()[:-1])
    told = plugin.modelium_completeness(tmp_path)
    assert told is not None
    assert not told.complete


def test_folders(tmp_path: Path) -> None:
    write(tmp_path / "tf" / "saved_model.pb", b"x")
    write(tmp_path / "tf" / "variables" / "variables.index", b"x")
    assert known(tmp_path / "tf") == "saved-model"
    write(tmp_path / "deep" / "export" / "saved_model.pb", b"x")
    assert known(tmp_path / "deep") == "saved-model"
    write(tmp_path / "sd" / "model_index.json", b"{}")
    assert known(tmp_path / "sd") == "diffusers"
    write(tmp_path / "lora" / "adapter_config.json", b"{}")
    assert known(tmp_path / "lora") == "peft"
    write(tmp_path / "gguf" / "README.md", b"x")
    write(tmp_path / "gguf" / "q4.gguf", b"GGUF" + bytes(99))
    assert known(tmp_path / "gguf") == "gguf"
    write(tmp_path / "text" / "README.md", b"x")
    assert known(tmp_path / "text") is None
    (tmp_path / "empty").mkdir()
    assert known(tmp_path / "empty") is None


def test_what_others_serve_is_left_to_them(tmp_path: Path) -> None:
    assert known(hugging_face(tmp_path / "hf")) is None
    write(tmp_path / "broken" / "config.json", b"{nonsense")
    safetensors(tmp_path / "broken" / "model.safetensors", {"a": (1,)})
    assert known(tmp_path / "broken") is None
    write(tmp_path / "triton" / "config.pbtxt", b"")
    write(tmp_path / "triton" / "1" / "model.plan", b"ftrt")
    assert known(tmp_path / "triton") is None
    (tmp_path / "onnx").mkdir()
    onnx_model(tmp_path / "onnx" / "x.onnx")
    write(tmp_path / "onnx" / "x.npz", b"PK")
    assert known(tmp_path / "onnx") is None


def test_the_reason_names_the_drop_and_what_to_do(tmp_path: Path) -> None:
    found = plugin.modelium_analyze(write(tmp_path / "llama.gguf", b"GGUF"))
    assert found is not None
    assert json.loads(json.dumps(dict(found.facts))) == found.facts
    assert found.facts["unsupported"] == (
        "llama.gguf is a GGUF model for llama.cpp; Modelium has no runtime for it here: `pip install "
        "modelium-plugin-llamacpp`, or drop the Hugging Face folder that it was made from, with safetensors"
    )
