from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelium.api import Analysis, Candidate, Device, Offer, Plan, Situation
from modelium.builtin import brain as plugin
from modelium.builtin import lru
from modelium.builtin.brain import DEFAULT_RULES, SMALL_BYTES, Rule, RulesBrain
from modelium.errors import ConfigError, ModelError

GB = 10**9


def analysis(**more: Any) -> Analysis:
    return Analysis(**{"analyzer": "t", "format": "onnx", "summary": "a model", "confidence": 1.0, **more})


def offer(serving: str = "onnx", **more: Any) -> Offer:
    return Offer(**{"runtime": "triton", "serving": serving, "native": True, "memory_bytes": GB, **more})


def situation(**gib: float) -> Situation:
    """`cpu=16, cuda=8`: one device of each kind with that budget."""
    devices = tuple(
        Device(id=f"{kind}:0", kind=kind, name=kind, total_bytes=int(size * GB), used_bytes=0)
        for kind, size in gib.items()
    )
    return Situation(devices=devices, budgets={d.id: d.total_bytes for d in devices})


def brain(*rules: dict[str, Any]) -> Any:
    (found,) = plugin.modelium_brains({"rules": list(rules)})
    return found


def plan(offers: list[Offer], where: Situation, about: Analysis | None = None, *rules: dict[str, Any]) -> Plan:
    found: Plan = brain(*rules).plan("m", about or analysis(), offers, where)
    return found


BOTH = ("cuda", "cpu")


@pytest.mark.parametrize(
    ("offers", "where", "taken"),
    [
        ([offer()], situation(cpu=16), ("onnx", "cpu")),
        ([offer(device_kinds=BOTH)], situation(cpu=16), ("onnx", "cpu")),
        ([offer(device_kinds=BOTH)], situation(cpu=16, cuda=8), ("onnx", "cuda")),
        ([offer(device_kinds=("cpu", "cuda"))], situation(cpu=16, cuda=8), ("onnx", "cuda")),
        ([offer(device_kinds=BOTH, memory_bytes=12 * GB)], situation(cpu=16, cuda=8), ("onnx", "cpu")),
        ([offer("python", native=False), offer("onnx")], situation(cpu=16), ("onnx", "cpu")),
        ([offer("onnx", memory_bytes=99 * GB), offer("python", native=False)], situation(cpu=16), ("python", "cpu")),
        ([offer("other", runtime="aaa"), offer("onnx")], situation(cpu=16), ("onnx", "cpu")),
        ([offer("first"), offer("second")], situation(cpu=16), ("first", "cpu")),
        ([offer(memory_bytes=99 * GB)], situation(cpu=16), ("onnx", "cpu")),
    ],
)
def test_the_built_in_table(offers: list[Offer], where: Situation, taken: tuple[str, str]) -> None:
    found = plan(offers, where)
    assert (found.serving, found.device_kind) == taken
    assert found.brain == "rules"


def test_a_plan_says_why() -> None:
    found = plan(
        [offer("onnx-python", native=False, device_kinds=("cpu",)), offer(device_kinds=BOTH, settings={"a": 1})],
        situation(cpu=16, cuda=8),
    )
    assert found.reason == (
        "triton serves it as onnx with its own backend on cuda, where it takes about 1.0 GB of 8.0 GB, because a GPU "
        "has room for it (rule gpu-where-it-fits)"
    )
    assert found.confidence == 0.9
    assert found.settings == {"a": 1}
    assert found.alternatives == (
        "triton/onnx on cpu: the rule prefers cuda",
        "triton/onnx-python on cpu: a template, and there is a backend of the runtime's own",
    )


def test_what_does_not_fit_is_planned_with_doubt() -> None:
    found = plan([offer(device_kinds=BOTH, memory_bytes=99 * GB)], situation(cpu=16, cuda=8))
    assert found.confidence == 0.3
    assert "about 99.0 GB, more than the" in found.reason
    found = plan([offer(device_kinds=BOTH, memory_bytes=12 * GB)], situation(cpu=16, cuda=8))
    assert found.alternatives == ("triton/onnx on cuda: needs about 12.0 GB, and models may have 8.0 GB there",)
    assert "no GPU has room for it" in found.reason


def test_the_largest_budget_of_a_kind_counts() -> None:
    devices = tuple(Device(id=f"cuda:{i}", kind="cuda", name="g", total_bytes=n * GB, used_bytes=0) for i, n in
                    enumerate((4, 16)))  # fmt: skip
    where = Situation(devices=devices, budgets={"cuda:0": 4 * GB, "cuda:1": 2 * GB})
    assert plan([offer(device_kinds=("cuda",), memory_bytes=3 * GB)], where).confidence == 0.9
    assert plan([offer(device_kinds=("cuda",), memory_bytes=5 * GB)], where).confidence == 0.3


def test_quantised_weights_and_triton_directories_have_rules_of_their_own() -> None:
    quantised = analysis(facts={"quantization": "gptq"})
    assert "rule quantized-on-a-gpu" in plan([offer(device_kinds=BOTH)], situation(cpu=16, cuda=8), quantised).reason
    own = plan([offer("as-is")], situation(cpu=16), analysis(format="triton"))
    assert (own.confidence, "its own Triton configuration" in own.reason) == (1.0, True)


def test_what_a_person_s_rule_prefers_and_nobody_offers_is_told() -> None:
    where = situation(cpu=16)
    for prefer, told in (
        ({"runtime": "vlm"}, "prefers the runtime vlm, which is not on offer"),
        ({"serving": "nope"}, "prefers the way of serving nope, which is not on offer"),
        ({"runtime": "tri*/onnx"}, ""),
    ):
        rule = Rule.model_validate({"name": "mine", "prefer": prefer})
        reason = RulesBrain([rule]).plan("m", analysis(), [offer()], where).reason
        assert told in reason and ("not on offer" in reason) == bool(told)
    gguf = analysis(format="gguf", task="text-generation")
    assert "transformers" not in plan([offer("gguf", runtime="llamacpp")], where, gguf).reason


LANGUAGE_MODEL = analysis(format="huggingface", task="text-generation", weights_bytes=2 * GB)
IN_TRITON = {
    "native": offer("vllm", device_kinds=("cuda",)),
    "alone": offer("vllm", runtime="vllm", device_kinds=BOTH),
    "template": offer("vllm-python", native=False, device_kinds=BOTH),
    "transformers": offer("transformers-text-generation", native=False, device_kinds=BOTH),
}


@pytest.mark.parametrize("where", [situation(cpu=16, cuda=8), situation(cpu=16)])
def test_language_models_go_to_vllm_where_it_is(where: Situation) -> None:
    """In Triton, then by itself, then from a template; each is the choice where those before it are not on offer."""
    on_gpu = len(where.devices) > 1
    order = [name for name in IN_TRITON if on_gpu or name != "native"]
    for left_out in range(len(order)):
        offers = [IN_TRITON[name] for name in order[left_out:]]
        best = offers[0]
        for shown in (offers, offers[::-1]):
            found = plan(shown, where, LANGUAGE_MODEL)
            assert (found.runtime, found.serving) == (best.runtime, best.serving)
            assert found.device_kind == ("cuda" if on_gpu else "cpu")


def test_small_ones_on_a_cpu_stay_with_transformers() -> None:
    offers = list(IN_TRITON.values())
    small = LANGUAGE_MODEL.model_copy(update={"weights_bytes": SMALL_BYTES - 1})
    found = plan(offers, situation(cpu=16), small)
    assert found.serving == "transformers-text-generation"
    assert "starts in seconds (rule small-language-model-on-the-cpu)" in found.reason
    assert "triton/vllm-python on cpu: the rule prefers triton/transformers-text-generation" in found.alternatives
    assert plan(offers, situation(cpu=16, cuda=8), small).serving == "vllm", "on a GPU it loses nothing"
    assert plan(offers[1:2], situation(cpu=16), small).runtime == "vllm", "where there is nothing else"


def test_quantised_language_models_go_to_vllm() -> None:
    quantised = LANGUAGE_MODEL.model_copy(update={"facts": {"quantization": "awq"}})
    found = plan([IN_TRITON["alone"], IN_TRITON["native"]], situation(cpu=16, cuda=8), quantised)
    assert (found.runtime, found.serving) == ("triton", "vllm")
    assert "rule quantized-on-a-gpu" in found.reason


def test_nothing_on_offer_says_what_it_is() -> None:
    with pytest.raises(ModelError, match="x is a GGUF model") as caught:
        plan([], situation(cpu=16), analysis(facts={"unsupported": "x is a GGUF model"}))
    assert caught.value.code == "no_runtime"
    with pytest.raises(ModelError, match=r"no runtime here serves m \(toy: a model\)"):
        plan([], situation(cpu=16), analysis(format="toy"))
    with pytest.raises(ModelError, match="could be served on npu, and this machine has cpu"):
        plan([offer(device_kinds=("npu",))], situation(cpu=16))


# --------------------------------------------------------------------------- rules from the configuration


SMALL_ON_CPU = {"name": "small", "when": {"smaller_than_bytes": 100}, "prefer": {"device_kind": ["cpu"]}}


def test_rules_of_ones_own_come_first() -> None:
    where = situation(cpu=16, cuda=8)
    assert plan([offer(device_kinds=BOTH)], where, analysis(weights_bytes=99), SMALL_ON_CPU).device_kind == "cpu"
    assert plan([offer(device_kinds=BOTH)], where, analysis(weights_bytes=100), SMALL_ON_CPU).device_kind == "cuda"


@pytest.mark.parametrize(
    ("when", "applies"),
    [
        ({}, True),
        ({"name": "m"}, True),
        ({"name": ["llama-*", "m*"]}, True),
        ({"name": "llama-*"}, False),
        ({"format": "onnx"}, True),
        ({"format": ["triton", "on*"]}, True),
        ({"format": "triton"}, False),
        ({"task": "text-*"}, True),
        ({"task": "image-*"}, False),
        ({"architecture": "Qwen*"}, True),
        ({"dtype": "float16"}, False),
        ({"quantization": "*"}, False),
        ({"larger_than_bytes": 49}, True),
        ({"larger_than_bytes": 50}, False),
        ({"device_kind": "cpu"}, True),
        ({"device_kind": "cuda"}, False),
        ({"fits": "cpu"}, True),
        ({"fits": "cuda"}, False),
        ({"format": "onnx", "task": "image-*"}, False),
    ],
)
def test_conditions(when: dict[str, Any], applies: bool) -> None:
    about = analysis(task="text-generation", architecture="Qwen2ForCausalLM", dtype="bfloat16", weights_bytes=50)
    found = plan([offer()], situation(cpu=16), about, {"name": "mine", "when": when})
    assert ("(rule mine)" in found.reason) is applies


def test_preferences_and_settings() -> None:
    offers = [offer("a"), offer("b", native=False, settings={"x": 1, "y": 1}), offer("c", runtime="vllm")]
    found = plan(offers, situation(cpu=16), None, {"name": "r", "prefer": {"native": False}, "settings": {"y": 2}})
    assert (found.serving, found.settings) == ("b", {"x": 1, "y": 2})
    assert plan(offers, situation(cpu=16), None, {"name": "r", "prefer": {"runtime": "vllm"}}).serving == "c"
    assert plan(offers, situation(cpu=16), None, {"name": "r", "prefer": {"serving": ["z", "a"]}}).serving == "a"
    named = {"name": "r", "prefer": {"runtime": ["*/b", "triton/a"], "native": False}}
    assert plan(offers, situation(cpu=16), None, named).serving == "b"
    assert plan([offers[0], offers[2]], situation(cpu=16), None, named).serving == "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rulez": []}, r"brain\.rulez is not a setting; did you mean 'rules'\?"),
        ({"rules": [{"name": "r", "wenn": {}}]}, r"brain\.rules\.0\.wenn is not a setting; did you mean 'when'\?"),
        (
            {"rules": [{"name": "r", "when": {"formats": "x"}}]},
            r"when\.formats is not a setting; did you mean 'format'",
        ),
        (
            {"rules": [{"name": "r", "prefer": {"xyz": 1}}]},
            r"prefer\.xyz is not a setting; there are: device_kind",
        ),
        ({"rules": [{}]}, r"brain\.rules\.0\.name: Field required"),
        ({"rules": [{"name": "r", "confidence": 2}]}, "less than or equal to 1"),
    ],
)
def test_a_wrong_configuration(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugin.modelium_brains(settings)


def test_the_table_ends_with_a_rule_for_all() -> None:
    assert DEFAULT_RULES[-1].when == plugin.When()
    assert len({rule.name for rule in DEFAULT_RULES}) == len(DEFAULT_RULES)


servings = st.builds(
    offer,
    serving=st.sampled_from("abcd"),
    runtime=st.sampled_from(["triton", "vllm"]),
    native=st.booleans(),
    device_kinds=st.sampled_from([("cpu",), ("cuda",), BOTH]),
    memory_bytes=st.integers(0, 20 * GB),
)


@given(st.lists(servings, min_size=1, max_size=6), st.sampled_from([{"cpu": 16}, {"cuda": 8}, {"cpu": 16, "cuda": 8}]))
def test_it_fits_where_anything_does_and_is_always_the_same(offers: list[Offer], gib: dict[str, float]) -> None:
    where = situation(**gib)
    try:
        found = RulesBrain().plan("m", analysis(), offers, where)
    except ModelError:
        assert not any(kind in gib for o in offers for kind in o.device_kinds)
        return
    assert found == RulesBrain().plan("m", analysis(), offers, where)
    fitting = [(o, k) for o in offers for k in o.device_kinds if k in gib and o.memory_bytes <= gib[k] * GB]
    assert not fitting or found.memory_bytes <= gib[found.device_kind] * GB
    if any(o.runtime == "triton" for o, _ in fitting):
        assert found.runtime == "triton"


# --------------------------------------------------------------------------- the eviction policy


def candidate(name: str, last_used: float, memory: int = 1) -> Candidate:
    return Candidate(
        name=name, memory_bytes=memory, loaded_at=0, last_used=last_used, requests=0, qps=0, load_s=1, priority=0
    )


def test_the_least_recently_used_goes_first() -> None:
    (policy,) = lru.modelium_eviction_policies({})
    candidates = [
        candidate("new", 9),
        candidate("b", 5),
        candidate("large", 5, 7),
        candidate("a", 5),
        candidate("old", 1),
    ]
    assert policy.name == "lru"
    assert policy.rank(candidates, 10) == ["old", "large", "a", "b", "new"]
    assert policy.rank(candidates[::-1], 10) == ["old", "large", "a", "b", "new"]


def test_it_has_nothing_to_set() -> None:
    with pytest.raises(ConfigError, match=r"eviction\.idle is not a setting; there are: none"):
        lru.modelium_eviction_policies({"idle": 5})


def gpus(count: int, budget: int, **more: Any) -> tuple[Device, ...]:
    return tuple(
        Device(id=f"cuda:{n}", kind="cuda", name="GPU", total_bytes=budget, used_bytes=0, **more) for n in range(count)
    )


def test_a_model_over_two_devices_needs_room_on_each() -> None:
    whole = offer("one", device_kinds=("cuda",), memory_bytes=12 * GB)
    split = offer("two", device_kinds=("cuda",), memory_bytes=13 * GB, devices=2)
    devices = gpus(2, 8 * GB)
    where = Situation(devices=devices, budgets={d.id: d.total_bytes for d in devices})
    taken = plan([whole, split], where)
    assert (taken.serving, taken.devices) == ("two", 2)
    assert "on 2 devices of kind cuda" in taken.reason and "16.0 GB" in taken.reason
    assert any("triton/one on cuda: needs about 12.0 GB" in line for line in taken.alternatives)
    uneven = Situation(devices=devices, budgets={"cuda:0": 8 * GB, "cuda:1": 6 * GB})
    assert plan([whole, split], uneven).confidence <= 0.3
    with pytest.raises(ModelError, match="2 devices of kind cuda"):
        plan([split], Situation(devices=devices[:1], budgets={}))


def test_devices_of_another_runtime_are_no_room() -> None:
    there = gpus(1, 80 * GB, runtime="far")
    here = situation(cpu=16)
    where = Situation(devices=(*here.devices, *there), budgets=dict(here.budgets))
    assert plan([offer(device_kinds=BOTH)], where).device_kind == "cpu"
    assert plan([offer(device_kinds=BOTH, runtime="far")], where).device_kind == "cuda"
