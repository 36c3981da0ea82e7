"""What is offered for which model, and the folders that are made of it; no Triton is needed for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_triton.backend import TritonBackend
from modelium_plugin_triton.modelconfig import parse_config, placed
from modelium_plugin_triton.packs import CONSTRAINTS, PACKS
from modelium_plugin_triton.servings import SERVINGS

from modelium.api import Analysis, Device, Offer, RuntimeInfo, Tensor
from modelium.api.environments import Environment
from modelium.api.templates import render, template_names
from modelium.api.testing import plan_of
from modelium.errors import ModelError, PluginError

CPU = Device(id="cpu:0", kind="cpu", name="CPU", total_bytes=2**34, used_bytes=0)
GPU = Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=2**35, used_bytes=0)


def triton(*backends: str, **facts: Any) -> RuntimeInfo:
    return RuntimeInfo(name="triton", version="2.51.0", instance="1", adopted=False, backends=backends, facts=facts)


def model(format: str, **changes: Any) -> Analysis:
    fields: dict[str, Any] = {
        "analyzer": format,
        "format": format,
        "summary": "a model",
        "confidence": 0.9,
        "weights_bytes": 1000,
    }
    return Analysis(**(fields | changes))


ONNX = model(
    "onnx",
    entry="net.onnx",
    inputs=(Tensor(name="x", datatype="FP32", shape=(-1, 4)),),
    outputs=(Tensor(name="y", datatype="BYTES", shape=(-1, -1)),),
    facts={"batch_dim": True, "unknown_rank": []},
)
LLM_FACTS = {"layers": 2, "kv_heads": 2, "heads": 4, "hidden_size": 32, "max_length": 100, "tokenizer": True}
LLM = model(
    "huggingface", task="text-generation", entry="config.json", dtype="bfloat16", parameters=500, facts=LLM_FACTS
)
AS_IS_FACTS = {"backend": "python", "ensemble": False, "instances": [], "imports": []}


def offers(analysis: Analysis, info: RuntimeInfo | None, devices: Sequence[Device] = (CPU,)) -> Sequence[Offer]:
    return TritonBackend().offers(analysis, info, devices)


def texts(analysis: Analysis, offer: Offer, name: str = "m", **settings: Any) -> Mapping[str, str]:
    return TritonBackend().layout(name, analysis, plan_of(offer, **settings)).texts


class TestOffers:
    def test_native_comes_first_where_the_server_has_it(self) -> None:
        found = offers(ONNX, triton("onnxruntime", "python"))
        assert [(o.serving, o.native) for o in found] == [("onnx", True), ("onnx-python", False)]

    def test_the_wheel_has_python_alone(self) -> None:
        assert [o.serving for o in offers(ONNX, triton("python"))] == ["onnx-python"]

    def test_before_triton_was_up_python_is_offered(self) -> None:
        assert [o.serving for o in offers(ONNX, None)] == ["onnx-python"]

    def test_where_nobody_knows_the_backends_python_is_counted_on(self) -> None:
        unseen = triton("dali", backends_known=False)
        assert [o.serving for o in offers(ONNX, unseen)] == ["onnx-python"]
        (offer,) = offers(model("triton", facts=AS_IS_FACTS | {"backend": "tensorrt"}), unseen)
        assert offer.serving == "as-is"

    def test_neither_backend_is_a_reason(self) -> None:
        with pytest.raises(ModelError, match="onnxruntime or python backend, and this Triton has tensorrt"):
            offers(ONNX, triton("tensorrt"))

    def test_the_native_torch_backend_needs_known_tensors(self) -> None:
        unknown = model("torchscript")
        known = model("torchscript", inputs=ONNX.inputs, outputs=ONNX.outputs)
        assert [o.serving for o in offers(unknown, triton("pytorch", "python"))] == ["torchscript-python"]
        assert [o.serving for o in offers(known, triton("pytorch", "python"))] == ["torchscript", "torchscript-python"]

    def test_openvino_computes_on_the_cpu_and_its_backend_wants_names_and_dimensions(self) -> None:
        have = triton("openvino", "python")
        named = ONNX.model_copy(update={"format": "openvino", "facts": {"batch_dim": True, "packed_bytes": 500}})
        native, template = offers(named, have, (CPU, GPU))
        assert (native.serving, template.serving) == ("openvino", "openvino-python")
        assert {native.device_kinds, template.device_kinds} == {("cpu",)}
        assert native.settings.get("max_batch_size") is None and template.settings["max_batch_size"] == 32
        assert template.memory_bytes - SERVINGS["openvino-python"].overhead_bytes == 1500
        assert TritonBackend().layout("m", named, plan_of(native)).files == {"1": "."}
        assert TritonBackend().layout("m", named, plan_of(template)).files == {"1/model": "."}
        for change in (
            {"facts": {"unnamed": ["x"]}},
            {"inputs": (Tensor(name="x", datatype="FP32", shape=()),)},
        ):
            assert [o.serving for o in offers(named.model_copy(update=change), have)] == ["openvino-python"]
        with pytest.raises(ModelError, match="keeps a state"):
            offers(named.model_copy(update={"facts": {"unsupported": "it keeps a state"}}), have)

    def test_bfloat16_tensors_need_the_native_backend(self) -> None:
        half = ONNX.model_copy(update={"inputs": (Tensor(name="x", datatype="BF16", shape=(-1, 4)),)})
        assert [o.serving for o in offers(half, triton("onnxruntime", "python"))] == ["onnx"]
        with pytest.raises(ModelError, match="onnxruntime backend"):
            offers(half, triton("python"))

    @pytest.mark.parametrize(
        "task", ["text-generation", "text-classification", "feature-extraction", "image-classification"]
    )
    def test_each_task_has_its_serving(self, task: str) -> None:
        (offer,) = offers(model("huggingface", task=task), triton("python"))
        assert offer.serving == f"transformers-{task}"
        assert offer.settings["packs"] == ["torch"]

    def test_what_is_still_to_be_installed_is_told(self, tmp_path: Path) -> None:
        llm, somebody_elses = model("huggingface", task="text-generation"), triton("python")
        ours = somebody_elses.model_copy(update={"facts": {"environment": str(tmp_path)}})
        assert [offers(llm, t)[0].requires for t in (None, somebody_elses, ours)] == [("torch",), (), ("torch",)]
        Environment(tmp_path).mark("torch", PACKS["torch"], CONSTRAINTS)
        assert offers(llm, ours)[0].requires == ()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"facts": {"unsupported": "T5 turns one sequence into another"}}, "T5 turns"),
            ({"facts": {"quantization": "gptq"}}, "quantised with gptq"),
            ({"task": "object-detection"}, "object-detection"),
        ],
    )
    def test_why_not(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            offers(model("huggingface", **changes), triton("python"))

    def test_somebody_elses_format_is_left_to_others(self) -> None:
        assert offers(model("toy"), triton("python")) == []

    def test_a_gpu_first_where_there_is_one(self) -> None:
        assert offers(ONNX, triton("python"), (CPU, GPU))[0].device_kinds == ("cuda", "cpu")
        assert offers(ONNX, triton("python", gpu=False), (CPU, GPU))[0].device_kinds == ("cpu",)


class TestEstimates:
    def test_weights_on_a_cpu_are_fp32(self) -> None:
        on_cpu, on_gpu = (offers(LLM, triton("python"), devices)[0] for devices in ((CPU,), (CPU, GPU)))
        cache = 2 * 2 * 2 * 8 * 100  # layers, keys and values, heads, head size, tokens
        overhead = SERVINGS[on_cpu.serving].overhead_bytes
        assert on_cpu.memory_bytes == overhead + 500 * 4 + cache * 4
        assert on_gpu.memory_bytes == overhead + 1000 + cache * 2

    def test_larger_weights_take_more_and_longer(self) -> None:
        small, large = (offers(ONNX.model_copy(update={"weights_bytes": n}), None)[0] for n in (0, 10**9))
        assert large.memory_bytes - small.memory_bytes >= 10**9
        assert large.load_s > small.load_s > 0

    def test_every_serving_has_its_overhead(self) -> None:
        assert all(serving.overhead_bytes > 2**20 and serving.load_s > 0 for serving in SERVINGS.values())


class TestAsIs:
    def test_any_backend_that_the_server_has(self) -> None:
        (offer,) = offers(model("triton", facts=AS_IS_FACTS | {"backend": "dali"}), triton("dali"))
        assert (offer.serving, offer.native) == ("as-is", True)
        layout = TritonBackend().layout("m", model("triton", facts=AS_IS_FACTS), plan_of(offer))
        assert layout.files == {".": "."} and not layout.texts

    def test_one_that_it_lacks_is_a_reason(self) -> None:
        with pytest.raises(ModelError, match="wants Triton's tensorrt backend, and this Triton has python"):
            offers(model("triton", facts=AS_IS_FACTS | {"backend": "tensorrt"}), triton("python"))

    def test_an_ensemble_needs_none_and_takes_nothing(self) -> None:
        facts = AS_IS_FACTS | {"backend": "", "ensemble": True}
        (offer,) = offers(model("triton", facts=facts, depends_on=("a",)), triton())
        assert offer.memory_bytes == 0

    def test_what_its_code_imports_becomes_packs(self) -> None:
        (offer,) = offers(model("triton", facts=AS_IS_FACTS | {"imports": ["numpy", "torch", "transformers"]}), None)
        assert offer.requires == ("torch",) and offer.settings["packs"] == ["torch"]

    def test_instances_count(self) -> None:
        groups = [{"kind": "KIND_CPU", "count": 3, "gpus": []}]
        one, three = (
            offers(model("triton", facts=AS_IS_FACTS | {"instances": g}), None, (CPU, GPU))[0] for g in ([], groups)
        )
        assert three.memory_bytes == 3 * one.memory_bytes
        assert one.device_kinds == ("cuda", "cpu") and three.device_kinds == ("cpu",)

    def test_a_gpu_that_is_not_there(self) -> None:
        groups = [{"kind": "KIND_GPU", "count": 1, "gpus": []}]
        with pytest.raises(ModelError, match="KIND_GPU"):
            offers(model("triton", facts=AS_IS_FACTS | {"instances": groups}), None)


class TestLayouts:
    @pytest.mark.parametrize("serving", sorted(SERVINGS))
    def test_every_template_makes_a_configuration_that_triton_reads(self, serving: str) -> None:
        format = serving.split("-", maxsplit=1)[0].replace("transformers", "huggingface")
        task = serving.removeprefix("transformers-") if format == "huggingface" else None
        base = LLM if format == "huggingface" else ONNX
        analysis = base.model_copy(update={"format": format, "task": task})
        have = triton("onnxruntime", "openvino", "pytorch", "python")
        for devices, kind in (((CPU,), "KIND_CPU"), ((CPU, GPU), "KIND_GPU")):
            offer = next(o for o in offers(analysis, have, devices) if o.serving == serving)
            made = texts(analysis, offer, 'a "quoted" \\ name', instances=2, threads=3)
            config = parse_config(made["config.pbtxt"])
            assert config.name == 'a "quoted" \\ name'
            (group,) = config.instance_group
            kind = "KIND_CPU" if SERVINGS[serving].cpu_only else kind
            assert (type(group).Kind.Name(group.kind), group.count, list(group.gpus)) == (kind, 2, [])
            assert config.backend == SERVINGS[serving].backend
            assert ("1/model.py" in made) == (config.backend == "python")
            assert any(p.string_value == "3" for p in config.parameters.values())
            for name, text in made.items():
                if name.endswith(".py"):
                    compile(text, name, "exec")

    @pytest.mark.parametrize(
        ("setting", "parameters"),
        [
            ("tensorrt", {}),
            (
                {"name": "tensorrt", "parameters": {"precision_mode": "FP16", "max_workspace_size_bytes": 1 << 30}},
                {"precision_mode": "FP16", "max_workspace_size_bytes": "1073741824"},
            ),
        ],
    )
    def test_onnxruntime_s_accelerator_is_a_setting(self, setting: Any, parameters: dict[str, str]) -> None:
        have = triton("onnxruntime")
        for devices, expected in (((CPU, GPU), [("tensorrt", parameters)]), ((CPU,), [])):
            offer = next(o for o in offers(ONNX, have, devices) if o.serving == "onnx")
            config = parse_config(texts(ONNX, offer, accelerator=setting)["config.pbtxt"])
            used = config.optimization.execution_accelerators.gpu_execution_accelerator
            assert [(one.name, dict(one.parameters)) for one in used] == expected

    def test_an_accelerator_that_is_none_is_refused(self) -> None:
        offer = next(o for o in offers(ONNX, triton("onnxruntime"), (CPU, GPU)) if o.serving == "onnx")
        with pytest.raises(ModelError, match=r"accelerator is \['tensorrt'\]"):
            texts(ONNX, offer, accelerator=["tensorrt"])

    def test_there_is_a_template_for_every_serving(self) -> None:
        assert set(SERVINGS) <= set(template_names())

    def test_a_file_is_put_where_triton_looks(self) -> None:
        alone = ONNX.model_copy(update={"entry": ""})
        native, template = offers(alone, triton("onnxruntime", "python"))
        for offer in (native, template):
            assert TritonBackend().layout("m", alone, plan_of(offer)).files == {"1/model.onnx": "."}

    def test_a_folder_goes_as_a_whole_and_meets_no_file_of_the_template(self) -> None:
        native, template = offers(ONNX, triton("onnxruntime", "python"))
        assert TritonBackend().layout("m", ONNX, plan_of(native)).files == {"1": "."}
        assert parse_config(texts(ONNX, native)["config.pbtxt"]).default_model_filename == "net.onnx"
        assert TritonBackend().layout("m", ONNX, plan_of(template)).files == {"1/model": "."}
        parameters = parse_config(texts(ONNX, template)["config.pbtxt"]).parameters
        assert parameters["model_file"].string_value == "model/net.onnx"

    def test_a_hugging_face_folder_inside_the_drop(self) -> None:
        nested = LLM.model_copy(update={"entry": "deep/er/config.json"})
        (offer,) = offers(nested, None)
        parameters = parse_config(texts(nested, offer)["config.pbtxt"]).parameters
        assert parameters["model_folder"].string_value == "model/deep/er"

    @pytest.mark.parametrize(
        ("batch_dim", "shape", "size", "dims"),
        [(True, (-1, 4), 32, [4]), (False, (-1, 4), 0, [-1, 4]), (True, (-1,), 0, [-1])],
    )
    def test_batching_needs_a_free_first_dimension_and_another(
        self, batch_dim: bool, shape: tuple[int, ...], size: int, dims: list[int]
    ) -> None:
        x = Tensor(name="x", datatype="FP32", shape=shape)
        analysis = ONNX.model_copy(update={"inputs": (x,), "facts": {"batch_dim": batch_dim}})
        (offer,) = offers(analysis, None)
        config = parse_config(texts(analysis, offer)["config.pbtxt"])
        assert config.max_batch_size == size
        assert config.HasField("dynamic_batching") == (size > 0)
        assert list(config.input[0].dims) == dims

    def test_one_number_is_a_tensor_of_one_element(self) -> None:
        number = Tensor(name="x", datatype="INT64", shape=())
        analysis = ONNX.model_copy(update={"inputs": (number,), "facts": {"batch_dim": False}})
        native, template = (
            parse_config(texts(analysis, o)["config.pbtxt"]) for o in offers(analysis, triton("onnxruntime", "python"))
        )
        assert list(template.input[0].dims) == [1]
        assert not native.input, "onnxruntime completes it: Triton has no scalars without batching"

    def test_a_plan_for_something_else(self) -> None:
        (offer,) = offers(ONNX, None)
        with pytest.raises(ModelError, match="no way of serving called 'teleport'"):
            TritonBackend().layout("m", ONNX, plan_of(offer).model_copy(update={"serving": "teleport"}))


class TestTemplates:
    def test_a_value_that_is_missing_is_an_error(self) -> None:
        with pytest.raises(PluginError, match="'name' is undefined"):
            render("onnx", {})

    def test_a_template_that_is_not_there(self) -> None:
        with pytest.raises(PluginError, match="expected one of"):
            render("teleport", {})


class TestPlaced:
    def test_gpu_instances_get_their_gpus_and_nothing_else_changes(self) -> None:
        text = (
            'name: "m" backend: "python" instance_group { kind: KIND_GPU count: 2 } instance_group { kind: KIND_CPU }'
        )
        made = placed(text, [3])
        assert '"gpus":[3]' in made.replace(" ", "")
        assert made.count("gpus") == 1
        assert '"name":"m"' in made.replace(" ", "")
