from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from modelium.api import Converter
from modelium.builtin import huggingface, safetensors_writer
from modelium.builtin import pickle_converter as plugin
from modelium.builtin.safetensors_header import read_header
from modelium.builtin.safetensors_writer import write_safetensors
from modelium.builtin.torch_file import Checkpoint, read_checkpoint
from modelium.errors import ModelError, ModeliumError
from tests.builtin.making import evil_pickle, hugging_face, zip_checkpoint
from tests.builtin.test_pickles import tensor, text

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def tensors(path: Path) -> Tensors:
    """Dtype, shape and bytes of every tensor."""
    read_header(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    table.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), data[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in table.items()
    }


@pytest.fixture
def converter() -> Converter:
    (found,) = plugin.modelium_converters()
    return found


@pytest.fixture
def bert(tmp_path: Path, torch_files: Path) -> Path:
    return Path(shutil.copytree(torch_files / "bert", tmp_path / "bert"))


def state_dict(**views: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(text(name) + view + b"s" for name, view in views.items()) + b"."


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("source", ["state_dict.pt", "legacy.pt"])
def test_every_tensor_is_what_pytorch_says(tmp_path: Path, torch_files: Path, source: str) -> None:
    wanted = tensors(torch_files / "expected.safetensors")
    if source == "legacy.pt":
        del wanted["float8"]  # younger than the old format
    written = write_safetensors(read_checkpoint(torch_files / source), tmp_path / "out.safetensors")
    found = tensors(tmp_path / "out.safetensors")
    assert found == wanted
    assert written == sum(len(data) for _, _, data in wanted.values())
    with safe_open(tmp_path / "out.safetensors", "np") as file:  # the library reads it too
        assert set(file.keys()) == set(wanted)


def test_in_small_chunks(tmp_path: Path, torch_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "CHUNK_BYTES", 3)
    checkpoint = read_checkpoint(torch_files / "bert" / "pytorch_model.bin")
    write_safetensors(checkpoint, tmp_path / "a.safetensors")
    monkeypatch.undo()
    write_safetensors(checkpoint, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_storage_that_is_short(tmp_path: Path, torch_files: Path) -> None:
    checkpoint = read_checkpoint(torch_files / "legacy.pt")
    short = tmp_path / "short.pt"
    short.write_bytes((torch_files / "legacy.pt").read_bytes()[:-3])
    moved = Checkpoint(short, checkpoint.tensors, checkpoint.root, checkpoint.places, checkpoint.file_bytes)
    with pytest.raises(ModelError, match="ends inside its storage"):
        write_safetensors(moved, tmp_path / "out.safetensors")


def test_flipped_bits_are_seen(tmp_path: Path) -> None:
    path = zip_checkpoint(tmp_path / "x.pt", state_dict(a=tensor("2 3", "3 1")), {"data/0": b"\x01" * 24})
    path.write_bytes(path.read_bytes().replace(b"\x01" * 24, b"\x01" * 23 + b"\x02"))
    with pytest.raises(ModelError, match=r"damaged|CRC"):
        write_safetensors(read_checkpoint(path), tmp_path / "out.safetensors")


def test_a_tensor_that_repeats_its_numbers_without_end(tmp_path: Path) -> None:
    path = zip_checkpoint(tmp_path / "x.pt", state_dict(a=tensor("1000000000 6", "0 1")), {"data/0": bytes(24)})
    with pytest.raises(ModelError, match="repeats its weights"):
        write_safetensors(read_checkpoint(path), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_full_disk_is_not_the_models_fault(torch_files: Path) -> None:
    checkpoint = read_checkpoint(torch_files / "state_dict.pt")
    with pytest.raises(ModeliumError) as caught:
        write_safetensors(checkpoint, Path("/nonexistent/x.safetensors"))
    assert caught.value.code == "storage"
    assert not isinstance(caught.value, ModelError)


# --------------------------------------------------------------------------- folders


def test_a_folder_is_converted_and_left_as_it_is(tmp_path: Path, bert: Path, converter: Converter) -> None:
    (bert / "training_args.bin").write_bytes(b"x")
    (bert / "modeling.py").write_text("x = 1")
    (bert / "sub").mkdir()
    (bert / "sub" / "notes.txt").write_text("kept")
    before = {p: p.read_bytes() for p in bert.rglob("*") if p.is_file()}
    assert converter.accepts(bert, ["pickle"])
    note = converter.convert(bert, tmp_path / "out")
    assert "of pytorch_model.bin were written as safetensors" in note
    assert {p: p.read_bytes() for p in bert.rglob("*") if p.is_file()} == before
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["config.json", "model.safetensors", "sub/notes.txt", "vocab.txt"]
    analysis = huggingface.modelium_analyze(tmp_path / "out")
    assert analysis is not None
    assert (analysis.facts["weights"], analysis.dtype) == ("safetensors", "float32")
    names = read_header(tmp_path / "out" / "model.safetensors").shapes
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "cls.predictions.decoder.weight" in names  # tied to the other, and written for itself


def test_several_parts(tmp_path: Path, bert: Path, converter: Converter, torch_files: Path) -> None:
    (bert / "pytorch_model.bin").rename(bert / "pytorch_model-00001-of-00002.bin")
    shutil.copy(torch_files / "state_dict.pt", bert / "pytorch_model-00002-of-00002.bin")
    table = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (bert / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    converter.convert(bert, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert huggingface.modelium_analyze(tmp_path / "out") is not None
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()


def test_one_tensor_in_two_parts(tmp_path: Path, bert: Path, converter: Converter) -> None:
    shutil.copy(bert / "pytorch_model.bin", bert / "two.bin")
    (bert / "pytorch_model.bin").rename(bert / "one.bin")
    (bert / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    with pytest.raises(ModelError, match=r"is in both one.bin and two.bin"):
        converter.convert(bert, tmp_path / "out")


def test_a_nested_folder_comes_out_flat(tmp_path: Path, bert: Path, converter: Converter) -> None:
    (tmp_path / "drop").mkdir()
    bert.rename(tmp_path / "drop" / "inner")
    converter.convert(tmp_path / "drop", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_state_dict_by_another_name(tmp_path: Path, bert: Path, converter: Converter) -> None:
    (bert / "pytorch_model.bin").rename(bert / "finetuned.pt")
    assert converter.accepts(bert, ["pickle"])
    converter.convert(bert, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_it_does_not_take(tmp_path: Path, bert: Path, torch_files: Path, converter: Converter) -> None:
    assert not converter.accepts(bert, ["pickle", "something_else"])
    assert not converter.accepts(bert, [])
    assert not converter.accepts(torch_files / "state_dict.pt", ["pickle"])
    assert not converter.accepts(hugging_face(tmp_path / "hf"), ["pickle"])


def test_harm_is_refused_by_name_and_leaves_nothing(tmp_path: Path, bert: Path, converter: Converter) -> None:
    marker = tmp_path / "marker"
    zip_checkpoint(bert / "pytorch_model.bin", evil_pickle(marker))
    with pytest.raises(ModelError, match=r"asks for posix\.system"):
        converter.convert(bert, tmp_path / "out")
    (bert / "pytorch_model.bin").write_bytes(evil_pickle(marker))
    with pytest.raises(ModelError, match="no PyTorch checkpoint but a pickle"):
        converter.convert(bert, tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, bert: Path, converter: Converter) -> None:
    zip_checkpoint(bert / "pytorch_model.bin", state_dict(a=tensor("2 3", "3 1")))  # without its numbers
    with pytest.raises(ModelError, match="lacks its storage"):
        converter.convert(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_is_not_touched(tmp_path: Path, bert: Path, converter: Converter) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ModeliumError, match="can't be written"):
        converter.convert(bert, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
