from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelium.api.names import check_model_name, name_of_drop, suggest_model_name
from modelium.errors import ModelError


@pytest.mark.parametrize("name", ["a", "Qwen2.5-0.5B_Instruct", "7b", "x" * 200, "Stats2"])
def test_allowed(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "starts with"),
        (".hidden", "starts with"),
        ("-x", "starts with"),
        ("a b", "letters, digits"),
        ("a/b", "letters, digits"),
        ("modèle", "letters, digits"),
        ("a\n", "letters, digits"),
        ("a..b", "'..'"),
        ("..", "'..'"),
        ("x" * 201, "201 characters"),
        ("stats", "meaning of its own"),
        ("STATS", "meaning of its own"),
    ],
)
def test_refused_with_a_reason(name: str, part: str) -> None:
    with pytest.raises(ModelError, match="can't be a model's name") as caught:
        check_model_name(name)
    assert part in caught.value.message
    assert caught.value.code == "bad_name"


def test_the_message_names_a_better_one() -> None:
    with pytest.raises(ModelError, match="rename it, to 'my-model' for example"):
        check_model_name("my model")


@given(st.text(max_size=300))
def test_what_is_suggested_is_allowed(name: str) -> None:
    better = suggest_model_name(name)
    if better:
        check_model_name(better)


@pytest.mark.parametrize(
    ("drop", "name"),
    [
        ("in/x.onnx", "x"),
        ("X.ONNX", "X"),
        ("a.b.safetensors", "a.b"),
        ("m.pt", "m"),
        ("m.pth", "m"),
        ("pytorch_model.bin", "pytorch_model"),
        ("qwen2.5", "qwen2.5"),
        ("folder/llama", "llama"),
    ],
)
def test_name_of_drop(drop: str, name: str) -> None:
    assert name_of_drop(drop) == name
    assert name_of_drop(Path(drop)) == name
