from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelium.api import Analysis, Completeness, Severity
from modelium.builtin import hf_tasks
from modelium.builtin import huggingface as plugin
from modelium.errors import ModelError
from tests.builtin.making import QWEN, hugging_face, onnx_model, safetensors


def analyze(path: Path) -> Analysis:
    found = plugin.modelium_analyze(path)
    assert found is not None
    return found


def completeness(path: Path) -> Completeness:
    found = plugin.modelium_completeness(path)
    assert found is not None
    return found


# --------------------------------------------------------------------------- whole folders


def test_a_causal_language_model(tmp_path: Path) -> None:
    found = analyze(hugging_face(tmp_path / "qwen"))
    assert (found.format, found.task, found.architecture) == ("huggingface", "text-generation", "Qwen2ForCausalLM")
    assert (found.entry, found.weights_bytes, found.parameters, found.dtype) == ("config.json", 20, 10, "bfloat16")
    assert found.summary == "Qwen2ForCausalLM, 10 parameters, bfloat16, 20 B"
    wanted = {"layers": 2, "hidden_size": 8, "heads": 2, "kv_heads": 1, "max_length": 32, "vocab_size": 16}
    assert {key: found.facts[key] for key in wanted} == wanted
    assert found.facts["files"] == ["model.safetensors"]
    assert (found.facts["tokenizer"], found.facts["processor"], found.facts["quantization"]) == (True, False, None)
    told = completeness(tmp_path / "qwen")
    assert told.complete
    assert told.have_bytes == told.want_bytes == (tmp_path / "qwen" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"architectures": ["BartForSequenceClassification"], "is_encoder_decoder": True}, "text-classification"),
        ({"architectures": ["ViTForImageClassification"]}, "image-classification"),
        ({"architectures": ["BertForMaskedLM"]}, "feature-extraction"),
        ({"architectures": ["BertForPreTraining"]}, "feature-extraction"),
        ({"architectures": ["BertModel"], "vocab_size": 5}, "feature-extraction"),
        ({"architectures": ["Qwen3Model"], "vocab_size": 5}, "feature-extraction"),
    ],
)
def test_tasks(config: dict[str, Any], task: str) -> None:
    assert hf_tasks.task_of(config, ()).task == task


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "turns one sequence into another",
        ),
        (
            {"architectures": ["T5Model"], "vocab_size": 5, "is_encoder_decoder": True},
            "turns one sequence into another",
        ),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "an image or sound"),
        ({"architectures": ["BertForTokenClassification"]}, "labels tokens"),
        ({"architectures": ["CLIPModel"], "text_config": {}, "vision_config": {}}, "images and text together"),
        ({"architectures": ["ViTModel"]}, "takes no text"),
        ({"architectures": ["Strange"]}, "says nothing of what it does"),
        ({"model_type": "bert"}, "names no class"),
        ({"architectures": [5]}, "names no class"),
    ],
)
def test_tasks_that_are_not_served_say_why(config: dict[str, Any], reason: str) -> None:
    task = hf_tasks.task_of(config, ())
    assert task.task is None
    assert reason in task.unsupported


def test_an_unsupported_class_is_analysed_all_the_same(tmp_path: Path) -> None:
    config = {"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}
    found = analyze(hugging_face(tmp_path / "whisper", config, files=""))
    assert found.task is None
    assert found.weights_bytes == 20
    assert "Modelium serves text generation" in found.facts["unsupported"]


def test_an_image_model_needs_its_processor(tmp_path: Path) -> None:
    config = {"architectures": ["ViTForImageClassification"], "id2label": {"0": "cat", "1": "dog"}}
    folder = hugging_face(tmp_path / "vit", config, files="")
    assert "preprocessor_config.json" in completeness(folder).reason
    with pytest.raises(ModelError, match=r"preprocessor_config.json"):
        plugin.modelium_analyze(folder)
    found = analyze(hugging_face(folder, config, files="image"))
    assert (found.task, found.facts["labels"], found.facts["processor"]) == ("image-classification", 2, True)


@pytest.mark.parametrize(
    ("files", "enough"),
    [
        (["tokenizer.json"], True),
        (["tokenizer.model"], True),
        (["vocab.txt"], True),
        (["vocab.json", "merges.txt"], True),
        (["vocab.json"], False),
        (["qwen.tiktoken"], True),
        (["special_tokens_map.json"], False),
    ],
)
def test_a_text_model_needs_its_tokenizer(tmp_path: Path, files: list[str], enough: bool) -> None:
    folder = hugging_face(tmp_path / "m", files="")
    for name in files:
        (folder / name).write_text("{}")
    assert completeness(folder).complete is enough
    if enough:
        assert analyze(folder).facts["tokenizer"] is True
    else:
        with pytest.raises(ModelError, match="the tokenizer is missing"):
            plugin.modelium_analyze(folder)


def test_a_tokenizer_of_bytes_has_no_file(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", files="")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "chat_template": "x"}')
    found = analyze(folder)
    assert (found.facts["tokenizer"], found.facts["chat_template"]) == (True, True)


def test_several_parts(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", shards=3)
    found = analyze(folder)
    assert (found.weights_bytes, found.parameters, len(found.facts["files"])) == (72, 18, 3)
    assert completeness(folder).complete


def test_a_folder_in_a_folder(tmp_path: Path) -> None:
    hugging_face(tmp_path / "drop" / "snapshot")
    (tmp_path / "drop" / "README.md").write_text("x")
    found = analyze(tmp_path / "drop")
    assert (found.entry, found.facts["folder"], found.confidence) == ("snapshot/config.json", "snapshot", 0.8)


def test_quantised_weights(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {**QWEN, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    safetensors(folder / "model.safetensors", {"packed": (4, 4)}, "I32")
    found = analyze(folder)
    assert (found.facts["quantization"], found.parameters) == ("gptq", None)
    assert "gptq" in found.summary
    hugging_face(folder, {**QWEN, "quantization": {"group_size": 64, "bits": 4}})
    assert analyze(folder).facts["quantization"] == "mlx"


def test_what_belongs_to_others_is_left_to_them(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    assert plugin.modelium_analyze(folder / "config.json") is None
    (folder / "config.pbtxt").write_text("")
    assert plugin.modelium_analyze(folder) is None
    (folder / "config.pbtxt").unlink()
    (folder / "model_index.json").write_text("{}")
    assert plugin.modelium_analyze(folder) is None
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"learning_rate": 1}')
    assert plugin.modelium_analyze(other) is None
    onnx = hugging_face(tmp_path / "onnx")
    (onnx / "model.safetensors").unlink()
    onnx_model(onnx / "model.onnx")
    assert plugin.modelium_analyze(onnx) is None
    openvino = hugging_face(tmp_path / "openvino")
    (openvino / "model.safetensors").unlink()
    (openvino / "openvino_model.xml").write_text("<net/>")
    (openvino / "openvino_model.bin").write_bytes(bytes(8))
    assert plugin.modelium_analyze(openvino) is None
    assert plugin.modelium_completeness(openvino) is None


# --------------------------------------------------------------------------- what is not whole


def test_weights_that_are_still_arriving(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    told = completeness(folder)
    assert (told.complete, told.have_bytes, told.want_bytes) == (False, len(whole) - 7, len(whole))
    assert f"{len(whole) - 7} of {len(whole)} bytes" in told.reason
    with pytest.raises(ModelError, match=f"{len(whole) - 7} of {len(whole)} bytes"):
        plugin.modelium_analyze(folder)
    file.unlink()
    assert "no weights are there yet" in completeness(folder).reason
    with pytest.raises(ModelError, match="no weights"):
        plugin.modelium_analyze(folder)


def test_parts_that_are_still_arriving(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    told = completeness(folder)
    assert not told.complete
    assert told.reason == "model-00002-of-00003.safetensors is not there yet"
    with pytest.raises(ModelError, match="1 of 3 parts that the index names are missing"):
        plugin.modelium_analyze(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in completeness(folder).reason


def test_a_configuration_that_is_still_arriving(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(QWEN)[:-1])
    assert not completeness(folder).complete
    (folder / "config.json").write_text("")
    assert not completeness(folder).complete


def test_damage_is_not_waited_for(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"<html>" + bytes(100))
    assert completeness(folder).complete
    with pytest.raises(ModelError, match="is no safetensors file"):
        plugin.modelium_analyze(folder)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 5])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: object) -> None:
    folder = hugging_face(tmp_path / "m", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(ModelError, match="must lie beside its index") as caught:
        plugin.modelium_analyze(folder)
    assert caught.value.code == "unsafe_path"


def test_an_index_that_does_not_match(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", shards=2)
    table = {"t1": "model-00001-of-00002.safetensors", "t9": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ModelError, match=r"places tensor 't9' in model-00002-of-00002.safetensors, which does not"):
        plugin.modelium_analyze(folder)


def test_weights_by_another_name(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "finetuned.safetensors")
    with pytest.raises(ModelError, match=r"reads weights from model.safetensors, and the folder holds finetuned"):
        plugin.modelium_analyze(folder)


def test_weights_for_another_framework(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    with pytest.raises(ModelError, match=r"tf_model.h5 is for another framework"):
        plugin.modelium_analyze(folder)


@pytest.mark.parametrize(
    ("file", "value", "key"),
    [
        ("config.json", {**QWEN, "auto_map": {"AutoModel": "modeling_evil.Evil"}}, "auto_map"),
        ("config.json", {**QWEN, "text_config": {"auto_map": {"AutoModel": "x.Y"}}}, "auto_map"),
        ("config.json", {**QWEN, "custom_pipelines": {"p": {"impl": "x.Y"}}}, "custom_pipelines"),
        ("config.json", {**QWEN, "attn_implementation": "somebody/kernel"}, "attn_implementation"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map"),
    ],
)
def test_code_of_its_own_is_refused(tmp_path: Path, file: str, value: dict[str, Any], key: str) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / file).write_text(json.dumps(value))
    (finding,) = plugin.modelium_scan(folder)
    assert (finding.severity, finding.code, finding.path) == (Severity.REFUSE, "custom_code", file)
    assert f"({key}: " in finding.message
    assert "trust_remote_code" in finding.message


def test_padding_hides_nothing(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    text = json.dumps({**QWEN, "auto_map": {"AutoModel": "x.Y"}})
    (folder / "config.json").write_text(" " * (2 << 20) + text)
    (folder / "tokenizer.json").write_text(" " * (2 << 20) + text)  # a vocabulary, where it means nothing
    assert [f.path for f in plugin.modelium_scan(folder)] == ["config.json"]
    with (folder / "config.json").open("r+b") as file:
        file.truncate(100 << 20)
    assert [f.code for f in plugin.modelium_scan(folder)] == ["too_large"]


def test_no_code_no_finding(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {**QWEN, "auto_map": {}, "attn_implementation": "sdpa"})
    (folder / "broken.json").write_text("{")
    assert list(plugin.modelium_scan(folder)) == []
    assert list(plugin.modelium_scan(folder / "config.json")) == []


# --------------------------------------------------------------------------- pickled weights, as PyTorch wrote them


def test_pickled_weights_are_analysed_by_their_configuration(torch_files: Path) -> None:
    found = analyze(torch_files / "bert")
    assert (found.task, found.facts["weights"], found.parameters) == ("feature-extraction", "pickle", None)
    assert found.weights_bytes == (torch_files / "bert" / "pytorch_model.bin").stat().st_size
    assert completeness(torch_files / "bert").complete


@pytest.mark.parametrize("source", ["state_dict.pt", "legacy.pt"])
def test_pickled_weights_that_are_still_arriving(tmp_path: Path, torch_files: Path, source: str) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    whole = (torch_files / source).read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole)
    assert completeness(folder).complete
    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        (folder / "pytorch_model.bin").write_bytes(whole[:kept])
        assert not completeness(folder).complete, kept


def test_two_files_that_may_be_the_weights(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "a.pt").write_bytes(b"x")
    (folder / "b.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="holds 2 files that may be its weights"):
        plugin.modelium_analyze(folder)
