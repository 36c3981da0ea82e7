"""Whatever bytes a drop is made of, each hook answers, or says why not; nothing else ever comes out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelium.api import Analysis, Completeness, Finding
from modelium.builtin import huggingface, onnx, openvino, recognised, scanners, torchscript
from modelium.builtin.pickle_converter import PickleConverter
from modelium.errors import ModeliumError
from tests.builtin.making import QWEN, evil_pickle, hugging_face, onnx_model, zip_checkpoint
from tests.openvino_models import linear

HERE = Path(__file__).parent / "data"
MARKER = Path(tempfile.gettempdir()) / f"modelium-fuzz-{os.getpid()}"

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def look(path: Path) -> None:
    """Ask all hooks, as the host does."""
    for plugin in (onnx, openvino, huggingface, torchscript, recognised, scanners):
        if hook := getattr(plugin, "modelium_completeness", None):
            answer = quietly(hook, path)
            assert answer is None or isinstance(answer, Completeness)
        if hook := getattr(plugin, "modelium_scan", None):
            for finding in quietly(listed, hook, path) or ():
                assert isinstance(finding, Finding)
                json.dumps(finding.model_dump(mode="json")).encode()
        if hook := getattr(plugin, "modelium_analyze", None):
            analysis = quietly(hook, path)
            assert analysis is None or isinstance(analysis, Analysis)
            if analysis is not None:
                json.dumps(analysis.model_dump(mode="json")).encode()
    assert not MARKER.exists()


def listed(hook: Callable[..., Any], path: Path) -> list[Any]:
    return list(hook(path))


def quietly(call: Callable[..., Any], *arguments: object) -> Any:
    try:
        return call(*arguments)
    except ModeliumError as exc:
        assert exc.message
        return None


def samples() -> dict[str, bytes]:
    with folder() as place:
        return {
            "x.onnx": onnx_model(place / "x.onnx").read_bytes(),
            "x.xml": (linear(place / "openvino" / "x.xml") / "x.xml").read_bytes(),
            "x.safetensors": (hugging_face(place / "hf") / "model.safetensors").read_bytes(),
            "script.pt": (HERE / "script.pt").read_bytes(),
            "state_dict.pt": (HERE / "state_dict.pt").read_bytes(),
            "legacy.pt": (HERE / "legacy.pt").read_bytes(),
            "evil.pt": zip_checkpoint(place / "x.pt", evil_pickle(MARKER)).read_bytes(),
            "evil.pkl": evil_pickle(MARKER, 4),
        }


SAMPLES = samples()


@st.composite
def broken(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some changed, some cut off, some put in."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        match draw(st.sampled_from(["flip", "cut", "insert", "zero", "copy"])):
            case "flip" if out:
                place = draw(st.integers(0, len(out) - 1))
                out[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del out[draw(st.integers(0, len(out))) :]
            case "insert":
                place = draw(st.integers(0, len(out)))
                out[place:place] = draw(st.binary(max_size=8))
            case "zero":
                place = draw(st.integers(0, len(out)))
                out[place : place + 4] = bytes(len(out[place : place + 4]))
            case "copy":
                place, start = draw(st.integers(0, len(out))), draw(st.integers(0, len(out)))
                out[place:place] = out[start : start + 40]
    return bytes(out)


@pytest.mark.parametrize("name", SAMPLES)
@given(data=st.data())
@fuzz
def test_damaged_files(name: str, data: st.DataObject) -> None:
    with folder() as place:
        (place / name).write_bytes(data.draw(broken(SAMPLES[name])))
        look(place / name)
        look(place)


@given(
    st.sampled_from(["x.onnx", "x.xml", "x.pt", "x.bin", "x.pkl", "x.safetensors", "x.npz", "x.h5"]),
    st.binary(max_size=300),
)
@fuzz
def test_random_files(name: str, data: bytes) -> None:
    with folder() as place:
        (place / name).write_bytes(data)
        look(place / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([*QWEN, "auto_map", "id2label", "quantization_config", "text_config"]), json_values
    ),
    st.dictionaries(st.sampled_from(["weight_map", "metadata"]), json_values),
    st.booleans(),
)
@fuzz
def test_strange_configurations(config: dict[str, object], index: dict[str, object], indexed: bool) -> None:
    with folder() as place:
        hugging_face(place, {**QWEN, **config})
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        if indexed:
            (place / "model.safetensors").rename(place / "a.safetensors")
            (place / "model.safetensors.index.json").write_text(json.dumps(index))
        look(place)


@given(data=st.data(), source=st.sampled_from(["state_dict.pt", "legacy.pt", "evil.pt", "evil.pkl"]))
@fuzz
def test_converting_damaged_weights(data: st.DataObject, source: str) -> None:
    with folder() as place:
        hugging_face(place / "m")
        (place / "m" / "model.safetensors").unlink()
        (place / "m" / "pytorch_model.bin").write_bytes(data.draw(broken(SAMPLES[source])))
        done = quietly(PickleConverter().convert, place / "m", place / "out")
        assert (place / "out").exists() is (done is not None)
        if done is not None:
            assert huggingface.modelium_analyze(place / "out") is not None
    assert not MARKER.exists()
