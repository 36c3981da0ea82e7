"""What is proposed for which model, on which machine, and what its key depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_tensorrt.optimizer import TensorRTOptimizer
from modelium_plugin_tensorrt.settings import TensorRTSettings
from modelium_plugin_tensorrt.tools import Tool
from modelium_plugin_triton.modelconfig import parse_config

from modelium.api import Analysis, Device, Inspection, Optimization, OptimizerContext, Plan, RuntimeInfo, Served
from modelium.errors import ConfigError, ModelError

CPU = Device(id="cpu:0", kind="cpu", name="host", total_bytes=8 << 30, used_bytes=0)
GPU = Device(id="cuda:0", kind="cuda", name="GPU", total_bytes=8 << 30, used_bytes=0)

FORMATS = {"onnx": "onnx", "torchscript": "torchscript", "transformers": "huggingface"}


class Cards:
    """NVML's view of some GPUs."""

    def __init__(self, *capabilities: str):
        self.handles = {f"cuda:{n}": object() for n in range(len(capabilities))}
        self._capabilities = capabilities

    def compute_capability(self, device: str) -> str:
        return self._capabilities[int(device.removeprefix("cuda:"))]

    def uuid(self, device: str) -> str:
        return f"GPU-{device}"


async def optimizer(
    tmp_path: Path, tool: Tool | None = None, cards: Cards | None = None, **settings: Any
) -> TensorRTOptimizer:
    made = TensorRTOptimizer()
    await made.start(OptimizerContext(cache_dir=tmp_path / "cache", settings=TensorRTSettings(**settings)))
    made._gpus, made._tool = cards, tool  # type: ignore[assignment]
    return made


def served(
    tmp_path: Path,
    serving: str,
    device: Device = CPU,
    *,
    settings: dict[str, Any] | None = None,
    content: str = "c0ffee",
    dtype: str | None = "float32",
    environment: Path | None = None,
    backends: tuple[str, ...] = ("python", "onnxruntime", "tensorrt"),
    **plan: Any,
) -> Served:
    kind = serving.partition("-")[0]
    task = serving.removeprefix("transformers-") if kind == "transformers" else None
    entry = "config.json" if kind == "transformers" else ""
    return Served(
        name="m",
        path=tmp_path / "repository/m",
        inspection=Inspection(
            content_key=content,
            total_bytes=1,
            analysis=Analysis(
                analyzer="test", format=FORMATS[kind], summary="", confidence=1, task=task, entry=entry, dtype=dtype
            ),
        ),
        plan=Plan(
            brain="test",
            serving=serving,
            device_kind=device.kind,
            settings={"max_batch_size": 32, **(settings or {})},
            memory_bytes=1,
            load_s=1,
            reason="",
            confidence=1,
            **{"runtime": "triton", **plan},
        ),
        devices=(device,),
        runtime=RuntimeInfo(
            name="triton",
            version="2",
            instance="1",
            adopted=False,
            backends=backends,
            facts={"environment": str(environment) if environment else None},
        ),
    )


TRTEXEC = Tool(Path("/usr/src/tensorrt/bin/trtexec"), "10.13.3", python=False)
HOPPER = Cards("9.0")


def key(found: Optimization | None) -> str:
    assert found is not None
    return found.key


class TestOnACpu:
    async def test_nothing_is_made_unless_it_is_asked_for(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path)
        for serving in ("transformers-text-classification", "torchscript-python", "onnx-python"):
            assert made.proposes(served(tmp_path, serving)) is None

    async def test_networks_of_pytorch_become_onnx(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, onnx_on_cpu=True)
        for serving in ("transformers-text-classification", "transformers-feature-extraction", "torchscript-python"):
            found = made.proposes(served(tmp_path, serving))
            assert found is not None and found.devices == ("cpu:0",) and "ONNX export" in found.what
            assert found.depends_on.keys() == {"precision", "max_batch_size", "exporter"}
        assert made.proposes(served(tmp_path, "onnx-python")) is None

    async def test_generation_stays_and_one_sentence_says_why(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, onnx_on_cpu=True)
        with pytest.raises(ModelError, match="keys and values grow with every token"):
            made.proposes(served(tmp_path, "transformers-text-generation"))

    async def test_what_is_turned_off_is_not_made(self, tmp_path: Path) -> None:
        model = served(tmp_path, "torchscript-python")
        assert (await optimizer(tmp_path, onnx_on_cpu=True)).proposes(model) is not None
        assert (await optimizer(tmp_path, onnx_on_cpu=True, enabled=False)).proposes(model) is None
        assert (await optimizer(tmp_path, onnx_on_cpu=True, models=["bert-*"])).proposes(model) is None
        made = await optimizer(tmp_path, onnx_on_cpu=True)
        assert made.proposes(served(tmp_path, "torchscript-python", settings={"tensorrt": False})) is None
        assert made.proposes(served(tmp_path, "torchscript-python", runtime="ray_serve")) is None
        assert made.proposes(served(tmp_path, "torchscript-python", devices=2)) is None
        text = served(tmp_path, "transformers-text-classification", settings={"dtype": "bfloat16"})
        assert made.proposes(text) is None, "it is to be computed in BF16"


class TestOnAGpu:
    async def test_an_engine_is_made_where_there_is_what_it_takes(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, TRTEXEC, HOPPER)
        found = made.proposes(served(tmp_path, "onnx", GPU))
        assert found is not None and found.devices == ("cuda:0",)
        assert found.what == "a TensorRT 10.13.3 engine in fp32 for compute capability 9.0"
        assert found.depends_on["compute capability"] == "9.0" and found.depends_on["TensorRT"] == "10.13.3"

    async def test_without_tensorrt_one_sentence_says_so(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, None, HOPPER)
        with pytest.raises(ModelError, match=r"^TensorRT is not installed: `pip install tensorrt`"):
            made.proposes(served(tmp_path, "onnx", GPU))
        environment = tmp_path / "triton-env"
        text = served(tmp_path, "transformers-text-classification", GPU, environment=environment)
        with pytest.raises(ModelError, match=rf"models run in: `{environment}/bin/python -m pip install tensorrt`"):
            made.proposes(text)
        (environment / "lib/python3.11/site-packages/tensorrt-10.9.0.dist-info").mkdir(parents=True)
        found = made.proposes(text)
        assert found is not None and "TensorRT 10.9.0" in found.what

    async def test_without_triton_s_backend_the_accelerator_is_named(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, TRTEXEC, HOPPER)
        with pytest.raises(ModelError, match=r"no tensorrt backend.*accelerator: tensorrt"):
            made.proposes(served(tmp_path, "onnx", GPU, backends=("python", "onnxruntime")))

    async def test_gpus_of_two_kinds_have_no_engine_in_common(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, TRTEXEC, Cards("8.6", "9.0"))
        with pytest.raises(ModelError, match=r"different compute capabilities \(8\.6, 9\.0\)"):
            made.proposes(served(tmp_path, "onnx", GPU))

    async def test_what_is_configured_wrongly_is_told(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, None, HOPPER)
        made._wrong = ConfigError("tensorrt.trtexec is /x, which does not run")
        with pytest.raises(ConfigError, match="does not run"):
            made.proposes(served(tmp_path, "onnx", GPU))

    @pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), (None, "fp32")])
    async def test_the_precision_is_the_model_s_own_unless_it_is_set(
        self, tmp_path: Path, dtype: str | None, precision: str
    ) -> None:
        made = await optimizer(tmp_path, TRTEXEC, HOPPER)
        found = made.proposes(served(tmp_path, "onnx", GPU, dtype=dtype))
        assert found is not None and found.depends_on["precision"] == precision
        made = await optimizer(tmp_path, TRTEXEC, HOPPER, precision="fp16")
        model = served(tmp_path, "onnx", GPU, dtype=dtype, settings={"tensorrt": {"precision": "bf16"}})
        found = made.proposes(model)
        assert found is not None and found.depends_on["precision"] == "bf16"

    async def test_int8_takes_a_calibration(self, tmp_path: Path) -> None:
        made = await optimizer(tmp_path, TRTEXEC, HOPPER, precision="int8")
        with pytest.raises(ModelError, match="int8 needs a calibration"):
            made.proposes(served(tmp_path, "onnx", GPU))
        own = {"tensorrt": {"calibration": str(tmp_path / "rows.npz")}}
        with pytest.raises(ModelError, match=r"rows\.npz can't be read"):
            made.proposes(served(tmp_path, "onnx", GPU, settings=own))
        (tmp_path / "rows.npz").write_bytes(b"1")
        first = key(made.proposes(served(tmp_path, "onnx", GPU, settings=own)))
        (tmp_path / "rows.npz").write_bytes(b"22")
        assert key(made.proposes(served(tmp_path, "onnx", GPU, settings=own))) != first

    async def test_the_key_is_another_for_all_that_matters(self, tmp_path: Path) -> None:
        profile = {"x": {"min": [1, 4], "opt": [2, 4], "max": [4, 4]}}

        async def of(tool: Tool = TRTEXEC, cards: Cards = HOPPER, **model: Any) -> str:
            return key((await optimizer(tmp_path, tool, cards)).proposes(served(tmp_path, "onnx", GPU, **model)))

        keys = [
            await of(),
            await of(content="beef"),
            await of(cards=Cards("8.0")),
            await of(Tool(TRTEXEC.path, "10.14.0", python=False)),
            await of(dtype="float16"),
            await of(settings={"max_batch_size": 8}),
            await of(settings={"tensorrt": {"workspace_bytes": 1 << 28}}),
            await of(settings={"tensorrt": {"profiles": profile}}),
        ]
        assert len(set(keys)) == len(keys)
        assert await of() == keys[0]

    async def test_a_model_of_texts_is_served_around_its_engine(self, tmp_path: Path) -> None:
        environment = tmp_path / "triton-env"
        (environment / "lib/python3.11/site-packages/tensorrt-10.9.0.dist-info").mkdir(parents=True)
        made = await optimizer(tmp_path, None, HOPPER)
        model = served(
            tmp_path, "transformers-text-classification", GPU, environment=environment,
            settings={"instances": 1, "threads": 0, "dtype": "float16", "top_k": 5},
        )  # fmt: skip
        optimization = made.proposes(model)
        assert optimization is not None and optimization.depends_on["precision"] == "fp16"
        (model.path / "1/model").mkdir(parents=True)
        (model.path / "1/model/tokenizer.json").write_text("{}")
        facts = {
            "inputs": [], "outputs": [], "longest": 128, "kept": ["1/model/tokenizer.json", "1/model/gone.json"],
            "files": ["network.plan"], "memory_bytes": 7, "difference": 0.004, "speed": None, "precision": "fp16",
        }  # fmt: skip
        form = made.layout(model, optimization, facts)
        config = parse_config(form.texts["config.pbtxt"])
        assert config.backend == "python" and config.max_batch_size == 32
        (group,) = config.instance_group
        assert type(group).Kind.Name(group.kind) == "KIND_GPU"
        told = {key: value.string_value for key, value in config.parameters.items()}
        assert (told["network"], told["task"], told["longest"]) == ("network.plan", "text-classification", "128")
        assert form.made == {"1/network.plan": "network.plan"}
        assert form.kept == {"1/model/tokenizer.json": "1/model/tokenizer.json"}
        assert form.settings["packs"] == ["torch"] and "0.004" in form.note
        for name, text in form.texts.items():
            if name.endswith(".py"):
                compile(text, name, "exec")
