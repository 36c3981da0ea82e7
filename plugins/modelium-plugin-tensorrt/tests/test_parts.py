"""Tolerances, profiles, settings, and TensorRT as it is found: the parts that need neither it nor PyTorch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from modelium_plugin_tensorrt import tools
from modelium_plugin_tensorrt.building import build_command, check_types, parse_outputs, run_command
from modelium_plugin_tensorrt.compare import largest_difference, read
from modelium_plugin_tensorrt.exporting import Exported
from modelium_plugin_tensorrt.profiles import largest_batch, profiles, sample_shapes
from modelium_plugin_tensorrt.settings import Profile, TensorRTSettings, wanted

from modelium.errors import ConfigError, DriverError, ModelError


class TestDifferences:
    one: ClassVar = {"0": {"y": np.array([[1.0, -4.0]], np.float32)}}

    def other(self, *values: float) -> dict[str, dict[str, np.ndarray]]:
        return {"0": {"y": np.array([values], np.float32)}}

    def test_a_difference_is_a_share_of_the_largest_value(self) -> None:
        found = largest_difference(self.one, self.other(1.0, -4.02), "fp16", "it")
        assert found == pytest.approx(0.005, rel=1e-3)

    def test_what_is_allowed_depends_on_the_precision(self) -> None:
        with pytest.raises(
            ModelError,
            match=r"it does not answer.*y differs by 0\.005 of its largest value, in sample 0.*0\.001 is allowed",
        ):
            largest_difference(self.one, self.other(1.0, -4.02), "fp32", "it")

    @pytest.mark.parametrize("values", [(1.0, float("nan")), (float("inf"), -4.0)])
    def test_what_is_no_number_is_never_near(self, values: tuple[float, ...]) -> None:
        with pytest.raises(ModelError, match="differs by inf"):
            largest_difference(self.one, self.other(*values), "int8", "it")

    def test_the_largest_value_is_that_of_all_samples(self) -> None:
        one = self.one | {"1": {"y": np.array([[0.01, 0.01]], np.float32)}}
        two = self.other(1.0, -4.0) | {"1": {"y": np.array([[0.01, 0.012]], np.float32)}}
        assert largest_difference(one, two, "fp32", "it") == pytest.approx(0.0005, rel=1e-3)

    def test_the_same_infinities_are_equal(self) -> None:
        both = self.other(float("-inf"), 2.0)
        assert largest_difference(both, both, "fp32", "it") == 0

    def test_shapes_and_names_have_to_agree(self) -> None:
        with pytest.raises(ModelError, match=r"shape \[1, 3\], and the original \[1, 2\]"):
            largest_difference(self.one, self.other(1, 2, 3), "int8", "it")
        with pytest.raises(ModelError, match="has no output y"):
            largest_difference(self.one, {"0": {}}, "int8", "it")

    def test_of_whole_numbers_each_one_counts(self) -> None:
        one, two = ({"0": {"y": np.array(v)}} for v in ([1, 2, 3, 4], [1, 2, 3, 9]))
        with pytest.raises(ModelError, match=r"differs by 0\.25"):
            largest_difference(one, two, "int8", "it")

    def test_samples_are_read_by_part_number_and_name(self, tmp_path: Path) -> None:
        stored: dict[str, Any] = {"i/0/a/b": np.ones(2), "o/0/y": np.zeros(1), "i/1/a/b": np.zeros(3)}
        np.savez(tmp_path / "s.npz", **stored)
        assert {n: {k: v.shape for k, v in a.items()} for n, a in read(tmp_path / "s.npz", "i").items()} == {
            "0": {"a/b": (2,)},
            "1": {"a/b": (3,)},
        }


def tensor(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": list(shape)}


class TestProfiles:
    def test_texts_are_bounded_by_batch_and_length(self) -> None:
        made = profiles([tensor("ids", -1, -1)], max_batch_size=32, longest=512, given={})
        assert made == {"ids": Profile(min=(1, 1), opt=(8, 128), max=(32, 512))}
        short = profiles([tensor("ids", -1, -1)], max_batch_size=4, longest=64, given={})
        assert short["ids"].opt == (4, 64)

    def test_what_is_fixed_needs_none(self) -> None:
        assert profiles([tensor("x", 1, 3)], max_batch_size=0, longest=None, given={}) == {}

    def test_images_are_bounded_by_the_batch_alone(self) -> None:
        made = profiles([tensor("x", -1, 3, 224, 224)], max_batch_size=16, longest=None, given={})
        assert made["x"].max == (16, 3, 224, 224)

    @pytest.mark.parametrize(("shape", "batch"), [((-1, -1), 8), ((-1, 4), 0)])
    def test_what_nothing_bounds_is_asked_for(self, shape: tuple[int, ...], batch: int) -> None:
        with pytest.raises(ModelError, match=r"its input x.*nothing tells.*profiles: \{x:"):
            profiles([tensor("x", *shape)], max_batch_size=batch, longest=None, given={})
        own = Profile(min=(1, 4), opt=(2, 4), max=(5, 4))
        assert profiles([tensor("x", *shape)], max_batch_size=batch, longest=None, given={"x": own}) == {"x": own}

    def test_a_profile_that_does_not_fit_is_refused(self) -> None:
        own = Profile(min=(1, 4), opt=(2, 4), max=(5, 4))
        with pytest.raises(ModelError, match=r"profile of x has the shape \[1, 4\].*\[-1, 3\]"):
            profiles([tensor("x", -1, 3)], max_batch_size=8, longest=None, given={"x": own})
        with pytest.raises(ModelError, match="no input z to have a profile: there is x"):
            profiles([tensor("x", -1, 3)], max_batch_size=8, longest=None, given={"z": own})

    def test_what_is_compared_lies_within_them(self) -> None:
        x = Profile(min=(1, 3, 64), opt=(8, 3, 224), max=(16, 3, 640))
        assert sample_shapes({"x": x}, batched=True) == [{"x": [1, 3, 64]}, {"x": [8, 3, 224]}, {"x": [8, 3, 640]}]
        assert sample_shapes({"x": x}, batched=False)[-1] == {"x": [16, 3, 640]}
        y = Profile(min=(2, 5), opt=(2, 5), max=(4, 9))
        both = sample_shapes({"x": x, "y": y}, batched=True)
        assert both == [
            {"x": [2, 3, 64], "y": [2, 5]},
            {"x": [2, 3, 224], "y": [2, 5]},
            {"x": [4, 3, 640], "y": [4, 9]},
        ]
        assert sample_shapes({"y": Profile(min=(1, 4), opt=(1, 4), max=(1, 4))}, batched=True) == [{"y": [1, 4]}]
        assert sample_shapes({}, batched=True) == []

    @pytest.mark.parametrize(("batch", "largest"), [(32, 16), (4, 4), (0, 0)])
    def test_a_batch_is_no_larger_than_any_profile_has_it(self, batch: int, largest: int) -> None:
        given = {"x": Profile(min=(1, 3), opt=(8, 3), max=(16, 3)), "s": Profile(min=(), opt=(), max=())}
        assert largest_batch(batch, given) == largest
        assert largest_batch(batch, {}) == batch


class TestSettings:
    def test_a_plan_may_say_what_it_wants(self) -> None:
        own = wanted({"tensorrt": {"precision": "fp16", "profiles": {"x": {"min": [1], "opt": [2], "max": [3]}}}})
        assert own is not None and own.precision == "fp16" and own.profiles["x"].max == (3,)
        assert wanted({}) is not None
        assert wanted({"tensorrt": False}) is None

    @pytest.mark.parametrize(
        ("given", "where"),
        [
            ({"precission": "fp16"}, "tensorrt.precission"),
            ({"precision": "fp8"}, "tensorrt.precision"),
            ({"profiles": {"x": {"min": [2], "opt": [1], "max": [3]}}}, "min <= opt <= max"),
            ({"profiles": {"x": {"min": [1, 1], "opt": [1], "max": [3]}}}, "different numbers of dimensions"),
            (True, "tensorrt"),
        ],
    )
    def test_what_it_says_wrongly_is_told(self, given: Any, where: str) -> None:
        with pytest.raises(ModelError, match=where):
            wanted({"tensorrt": given})


# --------------------------------------------------------------------------- TensorRT as it is found


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def python_with(path: Path, *packages: str) -> Path:
    for package in packages:
        (path / "lib/python3.11/site-packages" / f"{package}.dist-info").mkdir(parents=True)
    return path / "bin/python"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "CONTAINER", tmp_path / "container")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.executable", str(python_with(tmp_path / "own", "numpy-2.0")))


@pytest.mark.usefixtures("nowhere")
class TestTools:
    async def test_none_is_found_where_there_is_none(self) -> None:
        assert await tools.find(TensorRTSettings()) is None

    @pytest.mark.parametrize(("number", "version"), [("101303", "10.13.3"), ("8601", "8.6.1"), ("110400", "11.4.0")])
    async def test_trtexec_tells_its_version(self, tmp_path: Path, number: str, version: str) -> None:
        path = program(tmp_path / "container/trtexec", f"&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] # --help")
        assert await tools.find(TensorRTSettings()) == tools.Tool(path, version, python=False)

    async def test_a_program_of_that_name_may_be_another(self, tmp_path: Path) -> None:
        program(tmp_path / "bin/trtexec", "hello")
        assert await tools.find(TensorRTSettings()) is None

    async def test_the_package_is_found_without_starting_anything(self, tmp_path: Path) -> None:
        python = python_with(tmp_path / "env", "tensorrt-10.13.3.9", "tensorrt_cu12-10.13.3.9")
        assert tools.package_version(python) == "10.13.3.9"
        found = await tools.find(TensorRTSettings(python=python))
        assert found == tools.Tool(python, "10.13.3.9", python=True)

    async def test_what_is_configured_has_to_be_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not run as TensorRT's trtexec"):
            await tools.find(TensorRTSettings(trtexec=str(program(tmp_path / "x/trtexec", "no"))))
        with pytest.raises(ConfigError, match="does not run as TensorRT's trtexec"):
            await tools.find(TensorRTSettings(trtexec="/nowhere/trtexec"))
        with pytest.raises(ConfigError, match="-m pip install tensorrt"):
            await tools.find(TensorRTSettings(python=python_with(tmp_path / "bare", "numpy-2.0")))


class TestTrtexec:
    def test_what_is_asked_of_it(self, tmp_path: Path) -> None:
        both = {"a": Profile(min=(1, 2), opt=(4, 2), max=(8, 2)), "b": Profile(min=(1,), opt=(1,), max=(9,))}
        command = build_command(Path("/t"), Path("/m.onnx"), Path("/m.plan"), both, 3 << 20, Path("/c"))
        assert command == [
            "/t", "--onnx=/m.onnx", "--saveEngine=/m.plan", "--stronglyTyped", "--memPoolSize=workspace:3M",
            "--timingCacheFile=/c", "--skipInference",
            "--minShapes=a:1x2,b:1", "--optShapes=a:4x2,b:1", "--maxShapes=a:8x2,b:9",
        ]  # fmt: skip
        fixed = build_command(Path("/t"), Path("/m.onnx"), Path("/m.plan"), {}, 1 << 30, Path("/c"))
        assert not [word for word in fixed if "Shapes" in word]
        run = run_command(Path("/t"), Path("/m.plan"), {"a": (4, 2)}, {"a": Path("/a.bin")}, Path("/o.json"))
        assert run[1:] == [
            "--loadEngine=/m.plan", "--loadInputs=a:/a.bin", "--exportOutput=/o.json", "--iterations=1", "--warmUp=0",
            "--duration=0", "--shapes=a:4x2",
        ]  # fmt: skip

    def test_a_name_that_it_can_not_be_told_is_refused(self) -> None:
        odd = {"a:0": Profile(min=(1,), opt=(1,), max=(1,))}
        with pytest.raises(ModelError, match=r"'a:0'.*point tensorrt.python"):
            build_command(Path("/t"), Path("/m.onnx"), Path("/m.plan"), odd, 1 << 30, Path("/c"))

    def test_what_it_writes_is_read(self) -> None:
        text = """[
  { "name" : "y"
  , "dimensions" : "2x2"
  , "values" : [ 0.5, -nan, inf, -inf ]
  }
, { "name" : "n"
  , "dimensions" : "3"
  , "values" : [ 1, 2, -3 ]
  }
]
"""
        made = parse_outputs(text, {"y": "FP32", "n": "INT64"})
        np.testing.assert_array_equal(made["y"], np.array([[0.5, np.nan], [np.inf, -np.inf]], np.float32))
        assert made["n"].dtype == np.int64 and made["n"].tolist() == [1, 2, -3]
        with pytest.raises(DriverError, match="can't be read"):
            parse_outputs("[ { ", {})


def test_an_engine_s_types_are_those_that_clients_know() -> None:
    exported = Exported(
        file=Path(), inputs=[{"name": "ids", "datatype": "INT64", "shape": [-1]}], outputs=[tensor("y", -1)],
        longest=0, bytes=0, difference=None, speed=None,
    )  # fmt: skip
    check_types(exported, {"ids": "torch.int64", "y": "torch.float32"})
    with pytest.raises(ModelError, match="has ids as INT32, and clients know it as INT64"):
        check_types(exported, {"ids": "torch.int32", "y": "torch.float32"})


@pytest.fixture
def build_program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`programs.build`, as it is without TensorRT."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(IProgressMonitor=object))
    monkeypatch.delitem(sys.modules, "modelium_plugin_tensorrt.programs.build", raising=False)
    yield importlib.import_module("modelium_plugin_tensorrt.programs.build")
    sys.modules.pop("modelium_plugin_tensorrt.programs.build")


def test_shapes_that_an_engine_does_not_take_are_no_reason_to_try_again(
    build_program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, plan: Path, device: int):
            pass

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            raise ValueError(f"the engine was not made for x of shape {list(inputs['x'].shape)}")

    monkeypatch.setitem(sys.modules, "on_tensorrt", SimpleNamespace(Engine=Engine))
    monkeypatch.setattr("sys.path", [*sys.path])
    stored: dict[str, Any] = {"i/0/x": np.zeros((1, 3))}
    np.savez(tmp_path / "samples.npz", **stored)
    with pytest.raises(build_program.Refused, match=r"the engine was not made for x of shape \[1, 3\]"):
        build_program.run({"templates": str(tmp_path)}, tmp_path, tmp_path / "network.plan")
