"""What vLLM is offered for, with what settings and how much memory. Of vLLM nothing runs here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_vllm import memory
from modelium_plugin_vllm.backend import VllmBackend
from modelium_plugin_vllm.registry import known
from modelium_plugin_vllm.settings import ModelSettings
from tiny_hf import alphabet, bert
from vllm_lab import analyse

from modelium.api import Analysis, Device, RuntimeInfo
from modelium.api.testing import plan_of
from modelium.errors import ModelError

GIB = 2**30

REGISTRY = """
_TEXT_GENERATION_MODELS = {"Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"), **{"x": 1}}
_EMBEDDING_MODELS: dict = {"BertModel": ("bert", "BertEmbeddingModel")}
_MULTIMODAL_MODELS = {}
"""
METHODS = 'from typing import Literal\nQuantizationMethods = Literal["awq", "fp8", "gptq"]\n'

CPU = Device(id="cpu:0", kind="cpu", name="host", total_bytes=16 * GIB, used_bytes=0)


def gpus(count: int, size: int = 24 * GIB) -> list[Device]:
    return [Device(id=f"cuda:{n}", kind="cuda", name="GPU", total_bytes=size, used_bytes=0) for n in range(count)]


@dataclass
class Made:
    package: Path

    def info(self, **facts: Any) -> RuntimeInfo:
        base = {"installed": True, "kind": "cpu", "package": str(self.package), "repository": "/r", "bf16": True}
        return RuntimeInfo(name="vllm", version="0.32.0", instance="vllm", adopted=True, facts={**base, **facts})


@pytest.fixture
def vllm(tmp_path: Path) -> Made:
    package = tmp_path / "vllm"
    for name, text in (
        ("model_executor/models/registry.py", REGISTRY),
        ("model_executor/layers/quantization/__init__.py", METHODS),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return Made(package)


@pytest.fixture
def causal(tmp_path: Path) -> Analysis:
    return analyse(alphabet(tmp_path / "m"))


def large(**facts: Any) -> Analysis:
    """A model of 14 GB in two bytes, as by its header."""
    sizes = {
        "layers": 32, "heads": 32, "kv_heads": 8, "hidden_size": 4096, "vocab_size": 32000, "max_length": 32768,
        "tokenizer": True, "weights": "safetensors", "dtypes": {"BF16": 14 * GIB},
    }  # fmt: skip
    return Analysis(
        analyzer="huggingface",
        format="huggingface",
        summary="large",
        confidence=0.9,
        task="text-generation",
        architecture="Qwen2ForCausalLM",
        entry="config.json",
        weights_bytes=14 * GIB,
        dtype="bfloat16",
        facts={**sizes, **facts},
    )


def test_on_a_cpu(vllm: Made, causal: Analysis) -> None:
    (offer,) = VllmBackend().offers(causal, vllm.info(), [CPU, *gpus(1)])
    assert (offer.serving, offer.device_kinds, offer.devices, offer.native) == ("generate", ("cpu",), 1, True)
    # 2 layers, keys and values of 2 heads of 32 numbers, two bytes each; 4 requests of 512 tokens and a block
    cache = 2 * 2 * 2 * 32 * 2 * (4 * 512 + 128)
    assert offer.settings == {
        "dtype": "auto", "max_model_len": 512, "kv_cache_memory_bytes": cache, "repository": "/r",
    }  # fmt: skip
    assert 0 <= offer.memory_bytes - cache - causal.weights_bytes - memory.ON_CPU_BYTES < 8 * 2**20
    assert "room for 3 requests of 512 tokens" in offer.note


def test_where_the_cpu_has_no_bfloat16(vllm: Made, causal: Analysis) -> None:
    backend = VllmBackend()
    wide, half = backend.offers(causal, vllm.info(bf16=False), [CPU])
    assert (wide.serving, wide.settings["dtype"]) == ("generate", "float32")
    assert (half.serving, half.settings["dtype"]) == ("generate-half", "bfloat16")
    assert wide.settings["kv_cache_memory_bytes"] == 2 * half.settings["kv_cache_memory_bytes"]
    one, other = backend.offers(large(), vllm.info(bf16=False), [CPU])
    assert one.memory_bytes > 28 * GIB > 18 * GIB > other.memory_bytes > 14 * GIB
    asked = vllm.info(bf16=False, default_settings={"dtype": "bfloat16"})
    assert [offer.serving for offer in backend.offers(causal, asked, [CPU])] == ["generate"]


def test_as_many_gpus_as_it_takes(vllm: Made) -> None:
    info = vllm.info(kind="cuda")
    (one,) = VllmBackend().offers(large(), info, [CPU, *gpus(4, 40 * GIB)])
    assert (one.devices, one.device_kinds) == (1, ("cuda",))
    assert "tensor_parallel_size" not in one.settings
    first, second = VllmBackend().offers(large(), info, gpus(4, 16 * GIB))
    assert (first.devices, second.devices, second.settings["tensor_parallel_size"]) == (1, 2, 2)
    assert first.memory_bytes > 0.9 * 16 * GIB >= second.memory_bytes / 2
    assert second.memory_bytes > first.memory_bytes
    # A cache that leaves less than there would be is made smaller, down to one request.
    (small,) = VllmBackend().offers(large(), info, gpus(1, 20 * GIB))
    token = 32 * 2 * 8 * 128 * 2
    assert token * 8192 < small.settings["kv_cache_memory_bytes"] < 4 * token * 8192
    assert small.memory_bytes <= 0.9 * 20 * GIB
    asked = vllm.info(kind="cuda", default_settings={"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    (spread,) = VllmBackend().offers(large(), asked, gpus(4))
    assert (spread.devices, spread.settings["tensor_parallel_size"]) == (4, 2)
    assert not VllmBackend().offers(large(), info, [CPU])
    remote = [gpu.model_copy(update={"runtime": "box"}) for gpu in gpus(1)]
    assert not VllmBackend().offers(large(), info, remote)


def test_defaults_of_the_configuration_count(vllm: Made, causal: Analysis) -> None:
    plain = VllmBackend().offers(causal, vllm.info(), [CPU])[0]
    info = vllm.info(default_settings={"concurrent": 8, "max_model_len": 256, "threads": 2})
    (offer,) = VllmBackend().offers(causal, info, [CPU])
    assert offer.settings["max_model_len"] == 256 and offer.settings["threads"] == 2
    assert offer.settings["kv_cache_memory_bytes"] == plain.settings["kv_cache_memory_bytes"]


def test_latent_attention_takes_a_small_cache() -> None:
    plain = memory.token_bytes(large(), ModelSettings())
    latent = memory.token_bytes(large(kv_lora_rank=512, qk_rope_head_dim=64), ModelSettings())
    assert (plain, latent) == (32 * 2 * 8 * 128 * 2, 32 * 576 * 2)


def test_embeddings(vllm: Made, tmp_path: Path) -> None:
    encoder = analyse(bert(tmp_path / "words"))
    (offer,) = VllmBackend().offers(encoder, vllm.info(), [CPU])
    assert offer.serving == "embed"
    assert "max_model_len" not in offer.settings and offer.settings["kv_cache_memory_bytes"] == memory.NO_CACHE_BYTES
    decoder = encoder.model_copy(update={"architecture": "Qwen2ForCausalLM", "facts": {**encoder.facts, "kv_heads": 2}})
    (offer,) = VllmBackend().offers(decoder, vllm.info(), [CPU])
    assert offer.serving == "embed" and offer.settings["kv_cache_memory_bytes"] == 2 * 2 * 2 * 32 * 2 * 256


@pytest.mark.parametrize(
    ("change", "facts", "reason"),
    [
        ({"architecture": "MysteryForCausalLM"}, {}, "it has no MysteryForCausalLM"),
        ({}, {"weights": "pickle"}, "not in safetensors"),
        ({}, {"tokenizer": False}, "no tokenizer"),
        ({}, {"quantization": "mlx"}, "quantised with mlx"),
        ({}, {"quantization": "fp8"}, "fp8 take a GPU"),
        ({}, {"quantization": "awq"}, "processor with AVX-512"),
        ({}, {"head_dim": 16}, "heads have 16 numbers"),
    ],
)
def test_what_it_can_t_serve_says_why(
    vllm: Made, causal: Analysis, change: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    model = causal.model_copy(update={**change, "facts": {**causal.facts, **facts}})
    with pytest.raises(ModelError, match=reason):
        VllmBackend().offers(model, vllm.info(int4=False), [CPU])


def test_quantised_weights_where_they_are_computed(vllm: Made, tmp_path: Path) -> None:
    model = analyse(alphabet(tmp_path / "m", bits=4, dtype="F16"))
    (offer,) = VllmBackend().offers(model, vllm.info(int4=True, bf16=False), [CPU])
    assert offer.settings["dtype"] == "auto"
    assert VllmBackend().offers(model, vllm.info(kind="cuda"), gpus(1))
    fp8 = model.model_copy(update={"facts": {**model.facts, "quantization": "fp8"}})
    assert VllmBackend().offers(fp8, vllm.info(kind="cuda"), gpus(1))


def test_where_there_is_no_vllm(vllm: Made, causal: Analysis) -> None:
    assert not VllmBackend().offers(causal, None, [CPU])
    with pytest.raises(ModelError, match="modelium runtimes install vllm"):
        VllmBackend().offers(causal, vllm.info(installed=False), [CPU])
    for other in ({"format": "onnx"}, {"task": "text-classification"}, {"facts": {"unsupported": "says no"}}):
        assert not VllmBackend().offers(causal.model_copy(update=other), vllm.info(installed=False), [CPU])
    outside = vllm.info().model_copy(update={"external": True})
    assert not VllmBackend().offers(causal, outside, [CPU])


def test_the_folder_is_one_that_triton_serves(vllm: Made, causal: Analysis) -> None:
    offer = VllmBackend().offers(causal, vllm.info(kind="cuda"), gpus(1))[0]
    plan = plan_of(offer, lora_adapters={"loud": "adapters/loud"}, max_model_len=128)
    layout = VllmBackend().layout("m", causal, plan)
    assert layout.files == {"1/model": "."}
    assert 'backend: "vllm"' in layout.texts["config.pbtxt"] and "KIND_GPU" in layout.texts["config.pbtxt"]
    arguments = json.loads(layout.texts["1/model.json"])
    assert arguments["model"] == "/r/m/1/model"
    assert arguments["max_model_len"] == 128 and arguments["enable_lora"] is True
    assert arguments["gpu_memory_utilization"] == round(offer.memory_bytes / (24 * GIB), 4)
    assert json.loads(layout.texts["1/multi_lora.json"]) == {"loud": "/r/m/1/model/adapters/loud"}
    with pytest.raises(ModelError, match=r"max_model_length: Extra inputs.*there are: dtype, quantization"):
        VllmBackend().layout("m", causal, plan_of(offer, max_model_length=128))


def test_what_a_vllm_knows_is_read_and_not_run(vllm: Made, tmp_path: Path) -> None:
    found = known(vllm.package)
    assert found.generate == {"Qwen2ForCausalLM"} and found.embed == {"BertModel"}
    assert found.quantization == {"awq", "fp8", "gptq"}
    assert not any(known(tmp_path / "nothing"))
