from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from modelium.builtin import files
from modelium.builtin.files import Truncated, read_json, walk
from modelium.errors import ModelError


def test_a_single_file(tmp_path: Path) -> None:
    drop = tmp_path / "x.onnx"
    drop.write_bytes(b"abc")
    (entry,) = walk(drop)
    assert (entry.name, entry.size, entry.problem) == ("x.onnx", 3, "")


def test_a_folder_is_listed_by_name_without_its_folders(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "deep").write_text("1")
    (tmp_path / "a").write_text("22")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    assert [e.name for e in walk(tmp_path)] == [".git/config", "a", "b/c/deep"]
    assert [e.name for e in files.files(tmp_path)] == ["a", "b/c/deep"]


def test_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    drop = tmp_path / "drop"
    drop.mkdir()
    (drop / "real").write_text("12345")
    (drop / "inside").symlink_to("real")
    (drop / "absolute").symlink_to(drop / "real")
    (drop / "outside").symlink_to("../outside")
    (drop / "gone").symlink_to("nowhere")
    (drop / "self").symlink_to("self")
    (drop / "folder").symlink_to(".")
    (drop / "blob").symlink_to("../../blobs/abc")
    found = {e.name: e for e in walk(drop)}
    assert found["inside"].size == 5
    assert not found["inside"].problem
    bad = {name: e.problem for name, e in found.items() if e.code == "symlink"}
    assert bad.keys() == {"absolute", "outside", "gone", "self", "folder", "blob"}
    assert all("cp -rL" in problem for problem in bad.values())
    assert "Hugging Face's cache" in bad["blob"]
    assert [e.name for e in files.files(drop)] == ["inside", "real"]


def test_a_drop_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (entry,) = walk(tmp_path / "link")
    assert entry.code == "symlink"


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        found = {e.name: e for e in walk(tmp_path)}
    assert "a named pipe" in found["pipe"].problem
    assert "a socket" in found["socket"].problem


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"w\xff.bin")).write_text("x")
    (entry,) = walk(tmp_path)
    assert entry.code == "bad_file_name"
    assert entry.name == "w\\xff.bin"


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 10)
    for i in range(11):
        (tmp_path / str(i)).mkdir()
    with pytest.raises(ModelError, match="more than 10 files") as caught:
        walk(tmp_path)
    assert caught.value.code == "too_many_files"


def test_too_deep(tmp_path: Path) -> None:
    (tmp_path / "/".join(["d"] * 40)).mkdir(parents=True)
    with pytest.raises(ModelError, match="deep"):
        walk(tmp_path)


def test_a_drop_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read"):
        walk(tmp_path / "gone")


@pytest.mark.parametrize("text", ["", "{", '{"a"', '{"a": "b', '{"a": tru', '{"a": [1, 2', '{"a": 1}'[:-1]])
def test_json_cut_short_may_still_be_arriving(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Truncated):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "data", [b'{"a": nonsense, "b": 1, "c": 2}', b"\xff\xfe", b"[" * 100_000 + b" " * 20 + b"x" * 50]
)
def test_json_that_is_wrong_is_wrong_for_good(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_json(tmp_path / "x.json")
    assert not isinstance(caught.value, Truncated)


def test_json_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text('{"a": 1234567}')
    with pytest.raises(ModelError, match="more than such a file ever needs"):
        read_json(tmp_path / "x.json")


def test_within_one_look_a_drop_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with files.listed_once():
        before = files.walk(tmp_path)
        (tmp_path / "b").write_text("x")
        assert files.walk(tmp_path) == before
    assert [e.name for e in files.walk(tmp_path)] == ["a", "b"]
