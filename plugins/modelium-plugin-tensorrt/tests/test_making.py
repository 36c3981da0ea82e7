"""Real exports, checked against their originals; and all of the way to an engine but TensorRT itself."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from modelium_plugin_tensorrt.compare import read
from modelium_plugin_tensorrt.exporting import Exported, export
from modelium_plugin_tensorrt.optimizer import TensorRTOptimizer
from modelium_plugin_tensorrt.tools import Tool, trtexec_version
from modelium_plugin_triton.modelconfig import parse_config
from onnx import numpy_helper
from test_optimizer import GPU, Cards, optimizer, served

from modelium.api import Optimized, Served
from modelium.engine.job import Job
from modelium.errors import DriverError, ModelError
from tests import models

pytestmark = pytest.mark.timeout(900)  # the first test of a new machine installs libraries


async def exported(
    job: Job, exporter: Path, target: Path, kind: str, source: Path, precision: str = "fp32", **options: Any
) -> Exported:
    target.mkdir()
    return await export(
        job, exporter, target,
        **{"kind": kind, "task": None, "source": source, "precision": precision, "max_batch_size": 4, **options},
    )  # fmt: skip


def lengths(target: Path, name: str) -> set[tuple[int, ...]]:
    return {arrays[name].shape for arrays in read(target / "samples.npz", "i").values()}


async def test_a_classifier_of_texts(job: Job, exporter: Path, base: Path, tmp_path: Path) -> None:
    drop = models.make(base / "bin/python", "text-classification", tmp_path / "drop")
    made = await exported(job, exporter, tmp_path / "out", "transformers", drop, "fp16", task="text-classification")
    assert made.difference is not None and 0 < made.difference < 1e-2
    assert made.longest == 128
    assert [(t["name"], t["datatype"], t["shape"]) for t in (*made.inputs, *made.outputs)] == [
        ("input_ids", "INT64", [-1, -1]), ("attention_mask", "INT64", [-1, -1]), ("logits", "FP32", [-1, 4]),
    ]  # fmt: skip
    assert lengths(tmp_path / "out", "input_ids") == {(1, 4), (2, 7), (4, 40), (1, 128)}
    weights = [numpy_helper.to_array(w).dtype for w in onnx.load(made.file).graph.initializer]
    assert np.dtype(np.float16) in weights and np.dtype(np.float32) not in weights


async def test_programs_of_torchscript(job: Job, exporter: Path, base: Path, tmp_path: Path) -> None:
    python = base / "bin/python"
    tokens = models.make(python, "torchscript-tokens", tmp_path / "tokens.pt")
    made = await exported(job, exporter, tmp_path / "tokens", "torchscript", tokens, timed=True)
    assert made.difference is not None and made.difference < 1e-5 and made.speed is not None
    assert [(t["name"], t["shape"]) for t in made.outputs] == [("OUTPUT__0", [-1, 3]), ("OUTPUT__1", [-1, -1, 8])]
    image = models.make(python, "torchscript-image", tmp_path / "image.pt")
    made = await exported(job, exporter, tmp_path / "image", "torchscript", image, "fp16")
    assert made.difference is not None and made.difference < 1e-2
    assert made.inputs[0]["shape"] == [-1, 3, -1, -1] and len(lengths(tmp_path / "image", "INPUT__0")) == 3
    odd = models.make(python, "torchscript-options", tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"forward takes scale \(float\), negate \(bool\)"):
        await exported(job, exporter, tmp_path / "odd", "torchscript", odd)


def shapes(name: str, *profile: list[int]) -> list[dict[str, list[int]]]:
    return [{name: shape} for shape in profile]


async def test_samples_have_the_shapes_of_profiles(job: Job, exporter: Path, base: Path, tmp_path: Path) -> None:
    wanted = shapes("INPUT__0", [1, 3, 20, 24], [2, 3, 30, 24], [4, 3, 50, 40])
    image = models.make(base / "bin/python", "torchscript-image", tmp_path / "image.pt")
    made = await exported(job, exporter, tmp_path / "image", "torchscript", image, shapes=wanted)
    assert [t["shape"] for t in (*made.inputs, *made.outputs)] == [[-1, 3, -1, -1], [-1, 4]]
    assert lengths(tmp_path / "image", "INPUT__0") == {(1, 3, 20, 24), (2, 3, 30, 24), (4, 3, 50, 40)}

    drop = models.make(base / "bin/python", "text-classification", tmp_path / "drop")
    options: dict[str, Any] = {"task": "text-classification"}
    await exported(
        job, exporter, tmp_path / "text", "transformers", drop, shapes=shapes("input_ids", [1, 8], [4, 64]), **options
    )
    assert lengths(tmp_path / "text", "attention_mask") == {(1, 8), (4, 64)}
    with pytest.raises(ModelError, match=r"does not run on what its profiles say \(input_ids \[1, 500\]\): "):
        await exported(
            job, exporter, tmp_path / "long", "transformers", drop, shapes=shapes("input_ids", [1, 500]), **options
        )


async def test_onnx_in_a_lower_precision(job: Job, exporter: Path, tmp_path: Path) -> None:
    linear = models.onnx_linear(tmp_path / "linear.onnx")
    as_it_is = await exported(job, exporter, tmp_path / "fp32", "onnx", linear)
    assert as_it_is.file == linear and as_it_is.difference == 0
    rows = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    quantized = await exported(
        job, exporter, tmp_path / "int8", "onnx", linear, "int8", calibration=tmp_path / "rows.npz"
    )
    assert quantized.difference is not None and 0 < quantized.difference < 0.1
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(quantized.file).graph.node}
    np.savez(tmp_path / "small.npz", x=rows / 1000)  # of a range that says nothing of what will come
    with pytest.raises(
        ModelError, match=r"y differs by 0\.\d+ of its largest value, in sample.*0\.1 is allowed in int8"
    ):
        await exported(job, exporter, tmp_path / "wrong", "onnx", linear, "int8", calibration=tmp_path / "small.npz")
    np.savez(tmp_path / "other.npz", z=rows)
    with pytest.raises(ModelError, match="has no array x"):
        await exported(job, exporter, tmp_path / "other", "onnx", linear, "int8", calibration=tmp_path / "other.npz")


async def test_what_fp16_can_not_hold_is_refused_with_the_figures(job: Job, exporter: Path, tmp_path: Path) -> None:
    large = models.onnx_linear(tmp_path / "large.onnx")
    model = onnx.load(large)
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e6), weight.name))
    onnx.save(model, large)
    with pytest.raises(ModelError, match=r"does not answer like the original: y differs.*0\.01 is allowed in fp16"):
        await exported(job, exporter, tmp_path / "out", "onnx", large, "fp16")


# --------------------------------------------------------------------------- engines, by the stand-in


@pytest.fixture
def trtexec(exporter: Path, tmp_path: Path) -> Path:
    path = tmp_path / "trtexec"
    path.write_text(f"#!{exporter}\n" + Path(__file__).with_name("trtexec.py").read_text())
    path.chmod(0o755)
    return path


@pytest.fixture
async def maker(trtexec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTOptimizer:
    from modelium.paths import cache_dir

    version = await trtexec_version(trtexec)
    assert version == "10.13.3"
    made = await optimizer(tmp_path, Tool(trtexec, version, python=False), Cards("9.0"))
    made._cache = cache_dir() / "tensorrt"  # what exports is there already
    monkeypatch.setattr("modelium_plugin_tensorrt.optimizer.FORMAT", 99)
    return made


def linear(tmp_path: Path, base: Path, **settings: Any) -> Served:
    model = served(tmp_path, "onnx", GPU, environment=base, settings=settings)
    models.onnx_linear(model.path / "1/model.onnx")
    return model


async def make(maker: TensorRTOptimizer, model: Served, target: Path, job: Job) -> tuple[dict[str, Any], Optimized]:
    optimization = maker.proposes(model)
    assert optimization is not None
    target.mkdir()
    facts = dict(await maker.optimize(model, optimization, target, job))
    assert json.loads(json.dumps(facts)) == facts
    return facts, maker.layout(model, optimization, facts)


async def test_an_engine_is_made_checked_and_configured(
    maker: TensorRTOptimizer, base: Path, tmp_path: Path, job: Job
) -> None:
    timing = maker._cache / "timing/9.0-10.13.3.cache"
    timing.unlink(missing_ok=True)
    facts, form = await make(maker, linear(tmp_path, base), tmp_path / "made", job)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["network.plan"]
    assert facts["difference"] < 1e-5 and timing.read_bytes() == b"x"
    config = parse_config(form.texts["config.pbtxt"])
    assert (config.backend, config.platform, config.default_model_filename) == (
        "tensorrt", "tensorrt_plan", "network.plan"
    )  # fmt: skip
    assert config.max_batch_size == 32 and [list(t.dims) for t in (*config.input, *config.output)] == [[4], [3]]
    assert form.made == {"1/network.plan": "network.plan"} and form.kept == {} and form.serving == "tensorrt"
    assert "differ by at most" in form.note
    await make(maker, linear(tmp_path, base), tmp_path / "again", job)
    assert timing.read_bytes() == b"xx", "what was timed once is used again"


async def test_the_precision_and_the_profile_are_the_plan_s(
    maker: TensorRTOptimizer, base: Path, tmp_path: Path, job: Job
) -> None:
    profile = {"x": {"min": [1, 4], "opt": [2, 4], "max": [3, 4]}}
    model = linear(
        tmp_path,
        base,
        max_batch_size=0,
        tensorrt={"precision": "fp16", "profiles": profile, "workspace_bytes": 1 << 21},
    )
    facts, form = await make(maker, model, tmp_path / "made", job)
    bounds = json.loads((tmp_path / "made/network.plan").read_bytes().split(b"\n", 2)[1])
    assert [bound["x"] for bound in bounds] == [[1, 4], [2, 4], [3, 4]]
    assert facts["precision"] == "fp16"
    assert parse_config(form.texts["config.pbtxt"]).max_batch_size == 0


IMAGES = {"x": {"min": [1, 3, 64, 64], "opt": [8, 3, 96, 80], "max": [16, 3, 200, 160]}}


async def test_what_is_free_is_compared_within_its_profile(
    maker: TensorRTOptimizer, base: Path, tmp_path: Path, job: Job
) -> None:
    model = served(tmp_path, "onnx", GPU, environment=base, settings={"tensorrt": {"profiles": IMAGES}})
    models.onnx_image(model.path / "1/model.onnx")
    facts, form = await make(maker, model, tmp_path / "made", job)
    assert facts["difference"] < 1e-5
    assert parse_config(form.texts["config.pbtxt"]).max_batch_size == 16, "the plan's is 32"
    assert form.settings["max_batch_size"] == 16


async def test_shapes_that_an_engine_does_not_take_are_told(
    maker: TensorRTOptimizer, base: Path, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelium_plugin_tensorrt.optimizer.sample_shapes", lambda *args, **named: [])
    model = served(tmp_path, "onnx", GPU, environment=base, settings={"tensorrt": {"profiles": IMAGES}})
    models.onnx_image(model.path / "1/model.onnx")
    with pytest.raises(ModelError, match=r"engine does not run on sample 0: supplied dimension is 16, expected \[64"):
        await make(maker, model, tmp_path / "made", job)


async def test_an_engine_that_computes_otherwise_is_refused(
    maker: TensorRTOptimizer, base: Path, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "1")
    with pytest.raises(
        ModelError, match=r"its TensorRT engine does not answer like the original: y differs by 0\.\d+ of"
    ):
        await make(maker, linear(tmp_path, base), tmp_path / "made", job)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [("No importer registered for op: Foo", ModelError), ("CUDA out of memory", DriverError)],
)
async def test_what_tensorrt_says_is_told_and_a_full_gpu_may_be_empty_later(
    maker: TensorRTOptimizer, base: Path, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch,
    failure: str, kind: type[Exception],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAIL", failure)
    with pytest.raises(kind, match=failure):
        await make(maker, linear(tmp_path, base), tmp_path / "made", job)


async def test_giving_up_ends_the_program(exporter: Path, tmp_path: Path, job: Job) -> None:
    began = asyncio.Event()
    job.report = lambda progress: began.set()
    work = exported(job, exporter, tmp_path / "out", "onnx", models.onnx_linear(tmp_path / "linear.onnx"))
    task = asyncio.ensure_future(work)
    await began.wait()
    job.pause(True)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "out/report.json").exists()
