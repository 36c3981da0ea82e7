"""GGUF models in drops: files, folders with one model, its parts and its projector, and what is no model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from modelium_plugin_llamacpp.analyzer import modelium_analyze, modelium_completeness
from modelium_plugin_llamacpp.backend import LlamaCppBackend
from tiny_gguf import bert, keys_only, llama, projector

from modelium.api import Analysis
from modelium.errors import ModelError
from modelium.host import PluginHost


def analysed(path: Path) -> Analysis:
    found = modelium_analyze(path)
    assert found is not None
    return found


def test_a_file(tmp_path: Path) -> None:
    found = analysed(llama(tmp_path / "m.gguf", arch="qwen2", kind="Q8_0"))
    assert (found.format, found.architecture, found.task, found.entry) == ("gguf", "qwen2", "text-generation", "")
    assert found.summary == "Tiny (qwen2), 111K parameters, Q8_0, 120 kB, 512 tokens"
    assert found.dtype is None
    facts = found.facts
    assert (facts["quantization"], facts["max_length"], facts["layers"], facts["vocab_size"]) == ("Q8_0", 512, 2, 288)
    assert facts["chat_template"] is True and facts["projector"] is None
    plain = analysed(llama(tmp_path / "x.bin", kind="F16", chat=False))
    assert plain.facts["quantization"] is None and plain.dtype == "float16"
    assert plain.facts["chat_template"] is False


def test_an_encoder(tmp_path: Path) -> None:
    found = analysed(bert(tmp_path / "m.gguf"))
    assert (found.task, found.facts["pooling"]) == ("feature-extraction", "mean")
    assert not any(found.facts["memory"][key] for key in ("k", "v", "window_k", "window_v"))


def test_a_folder_with_what_belongs_to_the_model(tmp_path: Path) -> None:
    llama(tmp_path / "drop" / "net-Q8.gguf", kind="Q8_0")
    projector(tmp_path / "drop" / "mmproj-net.gguf")
    (tmp_path / "drop" / "README.md").write_text("a model")
    found = analysed(tmp_path / "drop")
    assert found.entry == "net-Q8.gguf"
    assert found.facts["projector"] == "mmproj-net.gguf"
    assert found.summary.endswith("with a projector")
    alone = analysed(tmp_path / "drop" / "net-Q8.gguf")
    assert found.weights_bytes == alone.weights_bytes + 8 * 8 * 4
    assert found.confidence < alone.confidence


def test_parts_are_waited_for(tmp_path: Path) -> None:
    drop = llama(tmp_path / "drop" / "net.gguf", split_bytes=200_000).parent
    names = sorted(path.name for path in drop.iterdir())
    assert len(names) == 3
    whole = modelium_completeness(drop)
    assert whole is not None and whole.complete
    assert whole.have_bytes == sum(path.stat().st_size for path in drop.iterdir())
    found = analysed(drop)
    assert found.entry == names[0] and found.facts["files"] == names
    one = analysed(llama(tmp_path / "one.gguf"))
    assert (found.parameters, found.weights_bytes) == (one.parameters, one.weights_bytes)
    (drop / names[1]).rename(tmp_path / "kept")
    waits = modelium_completeness(drop)
    assert waits is not None and not waits.complete and waits.reason == "part 2 of 3 is not there yet"
    with pytest.raises(ModelError, match="one of 3 parts"):
        modelium_analyze(drop / names[0])
    shutil.copy(tmp_path / "kept", drop / "other.gguf")
    with pytest.raises(ModelError, match="2 GGUF models"):
        modelium_analyze(drop)


def test_a_part_that_is_short(tmp_path: Path) -> None:
    drop = llama(tmp_path / "drop" / "net.gguf", split_bytes=200_000).parent
    last = max(drop.iterdir())
    last.write_bytes(last.read_bytes()[:-10])
    waits = modelium_completeness(drop)
    assert waits is not None and not waits.complete and last.name in waits.reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("adapter", r"an adapter \(LoRA\)"), ("imatrix", "an importance matrix"), ("mmproj", "a projector")],
)
def test_what_is_no_model_alone(tmp_path: Path, kind: str, reason: str) -> None:
    file = keys_only(tmp_path / "x.gguf", "llama", general__type=kind)
    with pytest.raises(ModelError, match=reason):
        modelium_analyze(file)


def test_what_a_folder_may_not_hold(tmp_path: Path) -> None:
    llama(tmp_path / "drop" / "a.gguf")
    keys_only(tmp_path / "drop" / "lora.gguf", "llama", general__type="adapter")
    with pytest.raises(ModelError, match=r"lora\.gguf is an adapter"):
        modelium_analyze(tmp_path / "drop")
    (tmp_path / "drop" / "lora.gguf").unlink()
    llama(tmp_path / "drop" / "b.gguf", kind="Q8_0")
    with pytest.raises(ModelError, match=r"2 GGUF models \(a\.gguf, b\.gguf\)"):
        modelium_analyze(tmp_path / "drop")
    (tmp_path / "drop" / "b.gguf").unlink()
    for name in ("1.gguf", "2.gguf"):
        projector(tmp_path / "drop" / name)
    with pytest.raises(ModelError, match="2 projectors"):
        modelium_analyze(tmp_path / "drop")


def test_what_is_no_language_model_says_so(tmp_path: Path) -> None:
    found = analysed(keys_only(tmp_path / "flux.gguf", "flux"))
    assert "has no tokenizer" in found.facts["unsupported"]
    with pytest.raises(ModelError, match="has no tokenizer"):
        LlamaCppBackend().offers(found, None, ())
    ranks = analysed(bert(tmp_path / "rank.gguf", pooling=4))
    assert "ranks texts" in ranks.facts["unsupported"]


def test_what_is_not_ours_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.onnx").write_text("hello")
    llama(tmp_path / "triton" / "1" / "model.gguf")
    (tmp_path / "triton" / "config.pbtxt").write_text("")
    for drop in ("x.txt", "folder", "triton"):
        assert modelium_analyze(tmp_path / drop) is None
        assert modelium_completeness(tmp_path / drop) is None


def test_among_all_plugins(tmp_path: Path) -> None:
    """Nothing that Modelium ships keeps a GGUF model out, and what is wrong with one is told by who reads it."""
    host = PluginHost.load()
    file = llama(tmp_path / "m.gguf")
    folder = llama(tmp_path / "hub" / "m.gguf").parent
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    for drop in (file, folder):
        assert host.analyze(drop).analyzer == "gguf"
        assert host.scan(drop) == ()
        assert (whole := host.completeness(drop)) and whole.complete
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="copy it again"):
        host.analyze(file)
    assert (short := host.completeness(file)) and not short.complete
