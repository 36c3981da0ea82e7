"""The reader of GGUF headers: what it finds, and what it makes of files that are cut short, damaged or made to harm."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelium_plugin_llamacpp.analyzer import modelium_analyze, modelium_completeness
from modelium_plugin_llamacpp.gguf import TYPES, Truncated, read_header
from tiny_gguf import Model, llama

from modelium.api import Analysis, Completeness
from modelium.errors import ModelError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*pairs: bytes, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, len(pairs)) + b"".join(pairs) + tensors


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def tensor(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        return path

    return write


def test_what_the_library_wrote(tmp_path: Path) -> None:
    path = llama(tmp_path / "m.gguf", kind="Q8_0")
    found = read_header(path)
    assert found.file_bytes == found.size == path.stat().st_size
    assert found.text("general.architecture") == "llama"
    assert found.integer("llama.block_count") == 2
    assert found.values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert found.lengths["tokenizer.ggml.tokens"] == 288
    assert "tokenizer.ggml.tokens" not in found.values
    assert found.tensors == 3 + 9 * 2
    assert found.parameters == 2 * 288 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64)
    norms = 5 * 64 * 4
    assert found.bytes_by_type == {"Q8_0": (found.parameters - 5 * 64) * 34 // 32, "F32": norms}


@pytest.mark.parametrize("kind", sorted(set(TYPES) - {42}))
def test_sizes_of_types_are_the_librarys(kind: int) -> None:
    name, block, size = TYPES[kind]
    assert gguf.GGMLQuantizationType[name] == kind
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (block, size)


def test_every_prefix_is_told_from_the_whole(tmp_path: Path) -> None:
    whole = llama(tmp_path / "m.gguf").read_bytes()
    begin = read_header(tmp_path / "m.gguf").size - read_header(tmp_path / "m.gguf").data_bytes
    for length in (*range(0, begin, 97), begin, begin + 1, len(whole) - 1):
        part = tmp_path / "part.gguf"
        part.write_bytes(whole[:length])
        said = modelium_completeness(part)
        assert said is not None and not said.complete and said.reason, length
        assert said.have_bytes == length
        with pytest.raises(ModelError):
            modelium_analyze(part)
    assert (done := modelium_completeness(tmp_path / "m.gguf")) and done.complete
    assert done.want_bytes == len(whole)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(60), "is no GGUF file"),
        (header(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "keys"),
        (header(struct.pack("<Q", 2**40) + b"k"), "a key has"),
        (header(number("a", 1), number("a", 2)), "there twice"),
        (header(text("a") + struct.pack("<I", 99)), "unknown type"),
        (header(text("a") + struct.pack("<IQ", 8, 2**50)), "a text has"),
        (header(text("a") + struct.pack("<IIQ", 9, 4, 2**50)), "elements"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1)), "array of type 9"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**27)), "texts"),
        (header(number("general.alignment", 3)), "alignment is 3"),
        (header(number("general.alignment", 0)), "alignment is 0"),
        (header(text("general.alignment") + struct.pack("<IQ", 10, 32)), "no UINT32"),
        (header(count=1, tensors=struct.pack("<Q", 64) + bytes(99)), "a tensor's name has 64"),
        (header(count=1, tensors=text("t") + struct.pack("<I", 5)), "5 dimensions"),
        (header(count=1, tensors=tensor("t", 2**40, 2**40)), "impossible shape"),
        (header(count=1, tensors=tensor("t", 4, offset=32)), "starts at 32"),
        (header(count=1, tensors=tensor("t", 33, kind=8)), "rows of 33"),
        (header(count=2, tensors=tensor("a", 64) + tensor("b", 64, offset=64)), "starts at 64, the one before ends at"),
    ],
)
def test_what_cannot_be_is_refused(file: Callable[[bytes], Path], content: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        read_header(file(content))
    assert not isinstance(caught.value, Truncated)


def test_types_that_are_too_new_leave_the_end_open(file: Callable[[bytes], Path]) -> None:
    parts = tensor("a", 32, kind=77) + tensor("b", 32, offset=4096)
    found = read_header(file(header(count=2, tensors=parts)))
    assert found.file_bytes is not None and found.data_bytes == 4096 + 128
    found = read_header(file(header(count=1, tensors=tensor("a", 32, kind=77))))
    assert found.file_bytes is None
    assert modelium_completeness(file(header(count=1, tensors=tensor("a", 32, kind=77)))) is None


def test_a_large_vocabulary_is_skipped(tmp_path: Path) -> None:
    model = Model(tmp_path / "m.gguf", "llama")
    model.bytes_vocabulary(50_000)
    model.tensor("t", 4)
    found = read_header(model.write())
    assert found.lengths["tokenizer.ggml.tokens"] == 50_288
    assert sum(len(str(value)) for value in found.values.values()) < 1000


def test_a_sparse_file_of_any_size_costs_nothing(tmp_path: Path) -> None:
    """Its counts are larger than any model's, and the file is long enough for all of them."""
    for pair in (
        text("a") + struct.pack("<IIQ", 9, 8, 3_000_000),  # the most texts, all of them empty
        text("a") + struct.pack("<IIQ", 9, 10, 2**28),
        text("a") + struct.pack("<IQ", 8, 2**26),
    ):
        path = tmp_path / "x.gguf"
        path.write_bytes(header(pair))
        os.truncate(path, 2**40)
        assert read_header(path).tensors == 0


# --------------------------------------------------------------------------- anything at all

WHOLE = header(
    text("general.architecture") + struct.pack("<I", 8) + text("llama"),
    text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("llama"),
    number("llama.block_count", 2),
    number("llama.embedding_length", 64),
    number("llama.attention.head_count", 4),
    text("llama.attention.head_count_kv") + struct.pack("<IIQ2I", 9, 4, 2, 4, 0),
    number("llama.attention.sliding_window", 16),
    text("llama.attention.sliding_window_pattern") + struct.pack("<IIQ2?", 9, 7, 2, True, False),
    text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    tensors=tensor("token_embd.weight", 64, 2) + tensor("x", 32, kind=8, offset=512),
    count=2,
) + bytes(600)


def look(content: bytes, name: str = "x.gguf") -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "drop", name)
        path.parent.mkdir()
        path.write_bytes(content)
        for drop in (path, path.parent):
            for hook, kind in ((modelium_completeness, Completeness), (modelium_analyze, Analysis)):
                try:
                    found = hook(drop)
                except ModelError as error:
                    assert error.message
                else:
                    assert found is None or isinstance(found, kind)
                    if found is not None:
                        found.model_dump_json()


def test_the_whole_is_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.gguf")
        path.write_bytes(WHOLE)
        assert (found := modelium_analyze(path)) is not None
        assert found.facts["memory"]["window_k"] == 4 * 16


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
@example(b"")
@example(b"GGUF")
def test_any_bytes(content: bytes) -> None:
    look(content)
    look(b"GGUF" + struct.pack("<I", 3) + content)
    look(content, "anything")


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
    st.integers(0, len(WHOLE)),
)
def test_a_model_with_bytes_changed_and_cut_short(changes: list[tuple[int, bytes]], length: int) -> None:
    content = bytearray(WHOLE)
    for place, new in changes:
        content[place : place + len(new)] = new
    look(bytes(content))
    look(bytes(content[:length]))
