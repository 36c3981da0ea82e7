"""What llama.cpp offers, with what settings, and how a model's folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_llamacpp import memory
from modelium_plugin_llamacpp.analyzer import modelium_analyze
from modelium_plugin_llamacpp.backend import LlamaCppBackend
from modelium_plugin_llamacpp.settings import ModelSettings, model_settings
from tiny_gguf import bert, llama, projector

from modelium.api import Analysis, Device, Installable, RuntimeBackend, RuntimeInfo, Situation
from modelium.api.testing import plan_of
from modelium.errors import ModelError
from modelium.host import PluginHost

GIB = 2**30


@pytest.fixture
def analysis(tmp_path: Path) -> Analysis:
    found = modelium_analyze(llama(tmp_path / "m.gguf"))
    assert found is not None
    return found


def gpu(number: int, total: int = 24 * GIB) -> Device:
    return Device(id=f"cuda:{number}", kind="cuda", name="GPU", total_bytes=total, used_bytes=0)


def info(**facts: Any) -> RuntimeInfo:
    return RuntimeInfo(name="llamacpp", version="1", instance="llamacpp", adopted=True, facts=facts)


def test_it_is_a_backend_that_can_be_installed() -> None:
    assert isinstance(LlamaCppBackend(), RuntimeBackend)
    assert isinstance(LlamaCppBackend(), Installable)


def test_offers(analysis: Analysis) -> None:
    backend = LlamaCppBackend()
    (offer,) = backend.offers(analysis, None, (gpu(0),))
    assert offer.device_kinds == ("cpu",), "nobody knows yet whether it can use a GPU"
    assert offer.settings["ctx"] == 512, "never more than the model was trained for"
    assert offer.requires == ()
    (offer,) = backend.offers(analysis, info(gpu=True, installed=False), (gpu(0),))
    assert offer.device_kinds == ("cuda", "cpu") and offer.requires == ("llama.cpp",)
    (offer,) = backend.offers(analysis, info(default_settings={"parallel": 7, "ctx": 0}), ())
    assert (offer.settings["parallel"], offer.settings["ctx"]) == (7, 512)
    assert backend.offers(analysis.model_copy(update={"format": "onnx"}), None, ()) == []


def test_what_one_gpu_cannot_hold_is_offered_to_several(analysis: Analysis) -> None:
    large = analysis.model_copy(update={"weights_bytes": 50 * GIB})
    found = LlamaCppBackend().offers(large, info(gpu=True), [gpu(n) for n in range(4)])
    assert [(offer.devices, offer.device_kinds) for offer in found] == [
        (1, ("cuda", "cpu")),
        (2, ("cuda",)),
        (3, ("cuda",)),
        (4, ("cuda",)),
    ]
    situation = Situation(devices=tuple(gpu(n) for n in range(4)), budgets={f"cuda:{n}": 22 * GIB for n in range(4)})
    brain = PluginHost.load(entry_points=False).brain("rules", {})
    assert brain.plan("m", large, found, situation).devices == 3


def test_embeddings_and_projectors_are_in_the_settings(tmp_path: Path) -> None:
    found = modelium_analyze(bert(tmp_path / "b.gguf"))
    assert found is not None
    (offer,) = LlamaCppBackend().offers(found, None, ())
    assert offer.settings["embedding"] == "mean"
    llama(tmp_path / "drop" / "m.gguf")
    projector(tmp_path / "drop" / "p.gguf")
    found = modelium_analyze(tmp_path / "drop")
    assert found is not None
    (offer,) = LlamaCppBackend().offers(found, None, ())
    assert offer.settings["projector"] == "p.gguf"
    layout = LlamaCppBackend().layout("m", found, plan_of(offer))
    assert layout.files == {"1": "."}
    assert 'default_model_filename: "m.gguf"' in layout.texts["config.pbtxt"]


def test_a_file_is_put_where_a_version_is_looked_for(analysis: Analysis) -> None:
    (offer,) = LlamaCppBackend().offers(analysis, None, ())
    layout = LlamaCppBackend().layout("my.model", analysis, plan_of(offer))
    assert layout.files == {"1/model.gguf": "."}
    assert layout.texts["config.pbtxt"].startswith('name: "my.model"\nbackend: "llamacpp"\n')


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ctxx": 1}, r"ctxx.*there are: ctx, parallel"),
        ({"parallel": 0}, "parallel"),
        ({"cache_type_k": "q3"}, "cache_type_k"),
        ({"ctx": "many"}, "ctx"),
    ],
)
def test_wrong_settings_are_named(analysis: Analysis, settings: dict[str, Any], reason: str) -> None:
    (offer,) = LlamaCppBackend().offers(analysis, None, ())
    with pytest.raises(ModelError, match=reason):
        LlamaCppBackend().layout("m", analysis, plan_of(offer, **settings))
    assert model_settings(offer.settings) == ModelSettings(ctx=512)


# --------------------------------------------------------------------------- memory, as llama.cpp's own log has it


def cache(analysis: Analysis, **settings: Any) -> int:
    """Bytes for keys and values."""
    none = {**analysis.facts, "memory": {**analysis.facts["memory"], "k": 0, "v": 0, "window_k": 0, "window_v": 0}}
    chosen = ModelSettings(**settings)
    whole = memory.estimate(analysis, chosen, embedding=False)
    return whole - memory.estimate(analysis.model_copy(update={"facts": none}), chosen, embedding=False)


def test_caches(tmp_path: Path) -> None:
    found = modelium_analyze(llama(tmp_path / "m.gguf", width=1024, heads=16, kv_heads=8, layers=8, feed_forward=64))
    assert found is not None
    assert cache(found, ctx=4096, parallel=2) == 128 * memory.MIB
    assert cache(found, ctx=4000, parallel=2) == 128 * memory.MIB, "a multiple of 256 tokens"
    assert cache(found, ctx=4096, parallel=2, cache_type_k="q8_0") == 64 * memory.MIB + 34 * memory.MIB
    windowed = modelium_analyze(
        llama(tmp_path / "g.gguf", arch="gemma3", layers=6, width=128, attention__sliding_window=256)
    )
    assert windowed is not None
    # One layer of six keeps all tokens; the others their window and what is computed at once.
    assert cache(windowed, ctx=2048, parallel=2) == 2 * 2 * (2048 * 128 + 768 * 5 * 128)


def test_layers_that_differ(tmp_path: Path) -> None:
    """Heads for each layer; none where a state is kept; every fourth sees all tokens."""
    mixed = modelium_analyze(
        llama(
            tmp_path / "m.gguf",
            layers=4,
            attention__head_count_kv=[2, 0, 2, 0],
            ssm__conv_kernel=4,
            ssm__inner_size=128,
            ssm__state_size=16,
            ssm__group_count=1,
        )
    )
    assert mixed is not None
    facts = mixed.facts["memory"]
    assert (facts["k"], facts["v"]) == (2 * 2 * 16, 2 * 2 * 16)
    assert facts["state"] == 2 * (3 * (128 + 2 * 16) + 128 * 16)
    every = modelium_analyze(llama(tmp_path / "n.gguf", layers=4, full_attention_interval=4))
    assert every is not None and every.facts["memory"]["k"] == 2 * 16
