from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from modelium.api import Finding, Severity
from modelium.builtin import scanners as plugin
from tests.builtin.making import Touch, evil_pickle, hugging_face, onnx_model, safetensors, zip_checkpoint


def scan(path: Path) -> list[Finding]:
    return list(plugin.modelium_scan(path))


def codes(path: Path) -> set[tuple[str, str, str]]:
    return {(f.severity.value, f.code, f.path) for f in scan(path)}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


# --------------------------------------------------------------------------- harmless drops


def test_good_drops_have_no_findings(tmp_path: Path) -> None:
    assert scan(onnx_model(tmp_path / "x.onnx")) == []
    assert scan(hugging_face(tmp_path / "hf", shards=2)) == []


def test_a_safetensors_header_that_looks_like_a_pickle(tmp_path: Path) -> None:
    """A header of 640 bytes begins with the two bytes that mark a pickle of protocol 2."""
    path = safetensors(tmp_path / "model.safetensors", {"a": (1,)})
    table = path.read_bytes()[8:-4]
    path.write_bytes((640).to_bytes(8, "little") + table.ljust(640) + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert scan(path) == []


def test_text_and_numbers_under_a_pickles_suffix(drop: Path) -> None:
    (drop / "notes.bin").write_text("These are notes, no pickle.\n")
    (drop / "raw.bin").write_bytes(np.arange(1000, dtype=np.float32).tobytes())
    (drop / "empty.bin").write_bytes(b"")
    assert scan(drop) == []


# --------------------------------------------------------------------------- what is not a model's file


def test_links_pipes_and_setuid(drop: Path) -> None:
    (drop / "out").symlink_to("../../etc/passwd")
    os.mkfifo(drop / "pipe")
    (drop / "tool").write_text("x")
    (drop / "tool").chmod(0o4755)
    (drop / ".git").mkdir()
    (drop / ".git" / "out").symlink_to("/etc")
    assert codes(drop) == {
        ("refuse", "symlink", "out"),
        ("refuse", "special_file", "pipe"),
        ("refuse", "setuid", "tool"),
        ("refuse", "symlink", ".git/out"),
    }


def test_programs(drop: Path) -> None:
    (drop / "lib.so").write_bytes(b"\x7fELF" + bytes(60))
    (drop / "install.sh").write_text("#!/bin/sh\nrm -rf /\n")
    (drop / "setup.exe").write_bytes(b"MZ" + bytes(60))
    (drop / "MZ.txt").write_bytes(b"MZ is a tag\n")
    (drop / "modeling.py").write_text("x = 1\n")
    (drop / ".git" / "hooks").mkdir(parents=True)
    (drop / ".git" / "hooks" / "post-merge.sample").write_text("#!/bin/sh\n")
    assert codes(drop) == {
        ("refuse", "program", "lib.so"),
        ("refuse", "program", "install.sh"),
        ("refuse", "program", "setup.exe"),
        ("warn", "python_code", "modeling.py"),
    }
    alone = drop / "modeling.py"
    assert codes(alone) == {("refuse", "program", "modeling.py")}


def test_a_triton_directory_may_hold_code(drop: Path, marker: Path) -> None:
    (drop / "config.pbtxt").write_text('backend: "python"')
    (drop / "1").mkdir()
    (drop / "1" / "model.py").write_text("#!/usr/bin/env python\n")
    (drop / "1" / "start.sh").write_text("#!/bin/sh\n")
    (drop / "1" / "op.so").write_bytes(b"\x7fELF" + bytes(60))
    (drop / "1" / "vocabulary.pkl").write_bytes(pickle.dumps(np.dtype("f4")))
    assert codes(drop) == {
        ("warn", "program", "1/start.sh"),
        ("warn", "pickle_unused", "1/vocabulary.pkl"),
    }
    (drop / "1" / "evil.pkl").write_bytes(evil_pickle(marker))
    assert ("refuse", "pickle_code", "1/evil.pkl") in codes(drop)


def test_a_pointer_of_git_lfs(drop: Path) -> None:
    (drop / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (finding,) = scan(drop)
    assert (finding.severity, finding.code) == (Severity.REFUSE, "lfs_pointer")
    assert "git lfs pull" in finding.message


def test_an_archive_made_to_fill_the_disk(drop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "BOMB_BYTES", 1 << 20)
    with zipfile.ZipFile(drop / "weights.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(2 << 20))
    assert codes(drop) == {("refuse", "zip_bomb", "weights.pt")}


def test_an_archive_that_is_cut_short(drop: Path, torch_files: Path) -> None:
    data = (torch_files / "state_dict.pt").read_bytes()
    (drop / "x.pt").write_bytes(data[:-50])
    assert codes(drop) == {("refuse", "truncated", "x.pt")}


def test_there_is_an_end_to_findings_and_none_hides_behind_others(drop: Path, marker: Path) -> None:
    for i in range(1000):
        (drop / f"{i}.py").write_text("x = 1")
    (drop / "zzz.pkl").write_bytes(evil_pickle(marker))
    found = scan(drop)
    assert len(found) == plugin.MAX_FINDINGS + 1
    assert (found[0].severity, found[0].path) == (Severity.REFUSE, "zzz.pkl")
    assert (found[-1].severity, found[-1].message[:12]) == (Severity.WARN, "and 951 more")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_different_readers_read_differently(drop: Path, marker: Path) -> None:
    with zipfile.ZipFile(drop / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", evil_pickle(marker))
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    (finding,) = scan(drop)
    assert finding.severity is Severity.REFUSE
    assert "two entries of one name" in finding.message


# --------------------------------------------------------------------------- pickles


def test_weights_alone_are_marked_for_conversion(torch_files: Path) -> None:
    for name in ("state_dict.pt", "legacy.pt", "training.pt"):
        assert codes(torch_files / name) == {("convert", "pickle", name)}, name
    assert codes(torch_files / "bert") == {("convert", "pickle", "pytorch_model.bin")}


def test_torchscript_is_no_pickle_for_python(torch_files: Path) -> None:
    assert scan(torch_files / "script.pt") == []


def test_a_class_is_refused_by_name(torch_files: Path) -> None:
    (finding,) = scan(torch_files / "whole_module.pt")
    assert (finding.severity, finding.code) == (Severity.REFUSE, "pickle_code")
    assert "torch.nn.modules.linear.Linear, and would run it" in finding.message
    assert "state_dict() as safetensors" in finding.message


@pytest.mark.parametrize("name", ["x.pkl", "x.bin", "x.pt", "x.pth", "x.ckpt", "x.joblib", "innocent.dat", "README"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_harm_is_found_under_any_name(tmp_path: Path, marker: Path, name: str, protocol: int) -> None:
    path = tmp_path / name
    path.write_bytes(evil_pickle(marker, protocol))
    (finding,) = scan(path)
    assert (finding.severity, finding.code) == (Severity.REFUSE, "pickle_code")
    assert "posix.system" in finding.message
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_oldest_pickles_have_no_mark_but_a_suffix(tmp_path: Path, marker: Path, protocol: int) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(evil_pickle(marker, protocol))
    assert codes(path) == {("refuse", "pickle_code", "x.pkl")}
    assert not marker.exists()


def test_harm_inside_archives(tmp_path: Path, marker: Path) -> None:
    assert codes(zip_checkpoint(tmp_path / "x.pt", evil_pickle(marker))) == {("refuse", "pickle_code", "x.pt")}
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("a/b/c.pkl", evil_pickle(marker))
    assert codes(tmp_path / "y.zip") == {("refuse", "pickle_code", "y.zip")}
    assert not marker.exists()


def test_arrays_of_objects(drop: Path, marker: Path) -> None:
    objects = np.array([Touch(marker)], dtype=object)
    np.save(drop / "objects.npy", objects, allow_pickle=True)
    np.savez(drop / "objects.npz", a=np.zeros(3), b=objects)
    np.savez(drop / "plain.npz", a=np.zeros(3))
    assert codes(drop) == {("refuse", "pickle_code", "objects.npy"), ("refuse", "pickle_code", "objects.npz")}
    assert not marker.exists()


def trainers_pickle() -> bytes:
    """What a trainer keeps beside the weights."""
    return b"\x80\x02ctransformers.training_args\nTrainingArguments\n)\x81}b."


def test_beside_safetensors_pickles_are_only_told_of(tmp_path: Path, torch_files: Path, marker: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    shutil.copy(torch_files / "state_dict.pt", folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(trainers_pickle())
    assert codes(folder) == {
        ("warn", "pickle_unused", "pytorch_model.bin"),
        ("warn", "pickle_unused", "training_args.bin"),
    }
    (folder / "optimizer.pt").write_bytes(evil_pickle(marker))
    assert ("refuse", "pickle_code", "optimizer.pt") in codes(folder)


def test_beside_pickled_weights_only_these_are_converted(tmp_path: Path, torch_files: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(torch_files / "bert", folder)
    (folder / "training_args.bin").write_bytes(trainers_pickle())
    assert codes(folder) == {
        ("convert", "pickle", "pytorch_model.bin"),
        ("warn", "pickle_unused", "training_args.bin"),
    }


def test_a_pickle_that_can_not_be_read_is_refused(tmp_path: Path, torch_files: Path) -> None:
    data = (torch_files / "legacy.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:300])
    assert codes(tmp_path / "x.pt") == {("refuse", "pickle_damaged", "x.pt")}


@pytest.mark.parametrize(
    ("value", "advice"), [(b"csklearn.svm\nSVC\n)\x81.", "skl2onnx"), (b"cmy.module\nModel\n)\x81.", "as ONNX")]
)
def test_what_to_do_instead(tmp_path: Path, value: bytes, advice: str) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + value)
    (finding,) = scan(tmp_path / "x.pkl")
    assert advice in finding.message


# --------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("name", ["x.part", "x.safetensors.crdownload", "model.bin.incomplete", "a.filepart"])
def test_what_a_download_tool_still_writes(drop: Path, name: str) -> None:
    assert plugin.modelium_completeness(drop) is None
    (drop / name).write_text("x")
    told = plugin.modelium_completeness(drop)
    assert told is not None
    assert not told.complete
    assert name in told.reason


def test_marks_of_a_download_in_the_tools_own_folder(drop: Path) -> None:
    cache = drop / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").write_text("x")
    told = plugin.modelium_completeness(drop)
    assert told is not None
    assert not told.complete
