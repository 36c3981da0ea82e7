from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelium.builtin.files import Truncated
from modelium.builtin.safetensors_header import read_header
from modelium.errors import ModelError
from tests.builtin.making import raw_safetensors


def entry(dtype: str = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def test_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    arrays: dict[str, Any] = {
        "a": np.zeros((2, 3), np.float32),
        "b": np.zeros((5,), np.int8),
        "c": np.zeros((), np.float16),
    }
    save_file(arrays, path, metadata={"k": "v"})
    header = read_header(path)
    assert header.shapes == {"a": ("F32", (2, 3)), "b": ("I8", (5,)), "c": ("F16", ())}
    assert header.file_bytes == path.stat().st_size
    assert (header.parameters, header.data_bytes) == (12, 31)
    assert header.bytes_by_dtype() == {"F32": 24, "I8": 5, "F16": 2}


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1])
def test_every_cut_is_told_from_damage(tmp_path: Path, kept: int) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": entry()}, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(Truncated) as caught:
        read_header(path)
    assert caught.value.have_bytes == len(whole[:kept])


def test_a_cut_in_the_data_says_how_much_is_missing(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": entry(shape=(256,), place=(0, 1024))}, 1000)
    with pytest.raises(Truncated) as caught:
        read_header(path)
    assert caught.value.want_bytes == path.stat().st_size + 24
    assert f"{path.stat().st_size} of {caught.value.want_bytes} bytes" in caught.value.message


@pytest.mark.parametrize(
    "table",
    [
        {"a": entry(place=(0, 4))},  # too little room
        {"a": entry(place=(4, 12))},  # a hole at the beginning
        {"a": entry(), "b": entry(place=(4, 12))},  # an overlap
        {"a": entry(), "b": entry(place=(12, 20))},  # a hole
        {"a": entry(place=(8, 0))},
        {"a": entry(place=(-8, 0))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(2**64,))},
        {"a": entry(shape=("2",))},
        {"a": entry(shape=[1] * 65, place=(0, 4))},
        {"a": entry(dtype="F99")},
        {"a": entry(dtype="F4", shape=(1,), place=(0, 0))},  # half a byte
        {"a": {"dtype": "F32"}},
        {"a": 5},
    ],
)
def test_a_header_that_contradicts_itself(tmp_path: Path, table: Any) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", table, 20)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert not isinstance(caught.value, Truncated)


@pytest.mark.parametrize(
    "data", [b"<html><body>not found</body></html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(64)]
)
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="is no safetensors file") as caught:
        read_header(tmp_path / "x.safetensors")
    assert not isinstance(caught.value, Truncated)


def test_more_data_than_announced(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": entry()}, 9)
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_a_file_that_grows_is_read_again(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": entry()}, 0)
    with pytest.raises(Truncated):
        read_header(path)
    raw_safetensors(path, {"a": entry()}, 8)
    assert read_header(path).parameters == 2
