"""Python models: read without being run, and told of as programs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from modelium.api import Analysis, Tensor
from modelium.builtin import python_model, scanners
from modelium.errors import ModelError
from tests.builtin.making import hugging_face

GOOD = """\
import numpy as np
import helper
from torch import nn

class Model:
    inputs = {"x": ("FP32", [-1, 4]), "words": ("BYTES", [1])}
    outputs: dict = {"y": ("INT64", [-1])}
    other = np.zeros(3)

    def __init__(self, folder):
        raise AssertionError("this must not be run")

    def predict(self, inputs):
        return {}

raise AssertionError("nor this")
"""


def drop(tmp_path: Path, text: str = GOOD) -> Path:
    folder = tmp_path / "drop"
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(text)
    return folder


def analyse(path: Path) -> Analysis:
    found = python_model.modelium_analyze(path)
    assert found is not None
    return found


def test_its_declarations_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    folder = drop(tmp_path)
    (folder / "helper.py").write_text("import onnxruntime.capi\nfrom . import x\n")
    (folder / "weights.bin").write_bytes(bytes(1000))
    found = analyse(folder)
    assert found.format == "python-model" and found.entry == "model.py" and found.weights_bytes == 1000
    assert found.inputs == (
        Tensor(name="x", datatype="FP32", shape=(-1, 4)),
        Tensor(name="words", datatype="BYTES", shape=(1,)),
    )
    assert found.outputs == (Tensor(name="y", datatype="INT64", shape=(-1,)),)
    assert found.facts == {"device_kinds": ["cpu"], "imports": ["helper", "numpy", "onnxruntime", "torch"]}


def test_kinds_of_devices_are_its_own_to_say(tmp_path: Path) -> None:
    text = GOOD.replace("    other", '    device_kinds = ["cuda", "cpu"]\n    other')
    assert analyse(drop(tmp_path, text)).facts["device_kinds"] == ["cuda", "cpu"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('    inputs = {"x"', '    given = {"x"', "say its inputs as a literal"),
        ("    outputs: dict = {", "    outputs = dict() or {", "say its outputs as a literal"),
        ('("FP32", [-1, 4])', '("FLOAT", [-1, 4])', "'x': .'FLOAT'"),
        ('("FP32", [-1, 4])', '("FP32", [-2])', "a datatype"),
        ('("FP32", [-1, 4])', '"FP32"', "a datatype"),
        ("    other", '    device_kinds = ["tpu"]\n    other', "device_kinds"),
    ],
)
def test_what_it_should_have_said(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(ModelError, match=words):
        analyse(drop(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize("text", ["class Model: pass", "def predict(inputs): ...", "class Model(", "x" * 10, "\0"])
def test_other_files_of_that_name_are_nobodys_model(tmp_path: Path, text: str) -> None:
    assert python_model.modelium_analyze(drop(tmp_path, text)) is None


def test_a_config_pbtxt_says_more(tmp_path: Path) -> None:
    folder = drop(tmp_path)
    (folder / "config.pbtxt").touch()
    assert python_model.modelium_analyze(folder) is None


def test_it_is_told_of_as_a_program_and_may_keep_pickles(tmp_path: Path) -> None:
    folder = drop(tmp_path)
    (folder / "data.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    found = {(f.severity, f.code, f.path) for f in scanners.modelium_scan(folder)}
    assert found == {("warn", "python_code", "model.py"), ("warn", "pickle_unused", "data.pkl")}
    assert all("trust" in f.message for f in scanners.modelium_scan(folder) if f.code == "python_code")


def test_a_pickle_made_to_harm_is_refused_there_too(tmp_path: Path) -> None:
    folder = drop(tmp_path)
    (folder / "data.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert ("refuse", "pickle_code") in {(f.severity, f.code) for f in scanners.modelium_scan(folder)}


def test_beside_a_hugging_face_model_the_program_counts(tmp_path: Path) -> None:
    """Whoever writes such a class means it."""
    folder = hugging_face(tmp_path / "drop")
    (folder / "model.py").write_text(GOOD)
    assert analyse(folder).confidence > 0.9
