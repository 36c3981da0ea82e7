"""A program for a Python with `tensorrt` (10 or newer) and PyTorch: makes an engine of an ONNX file, and runs it.

It is given a JSON file (see `modelium_plugin_tensorrt.building`), and writes `network.plan`; `engine.npz`, with the
arrays `e/N/NAME` that the engine made of the inputs `i/N/NAME` in `samples.npz`; and `engine.json`. Lines on standard
output that begin with `@` are as those of `export`.

Networks are strongly typed: TensorRT computes in the types that the ONNX file says, which is the only way since its
version 11. https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html#strongly-typed-networks
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tensorrt as trt  # type: ignore[import-not-found,unused-ignore]


class Refused(Exception):
    """TensorRT can't make it of this model."""


class Monitor(trt.IProgressMonitor):  # type: ignore[misc,unused-ignore]
    """Tells how far the build is; a phase may have phases of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        if parent_phase is None:
            self.steps[phase_name] = int(num_steps)

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        if phase_name in self.steps:
            say(stage=f"building the engine: {phase_name}", done=int(step) + 1, total=self.steps[phase_name])
        return True

    def phase_finish(self, phase_name: str) -> None:
        self.steps.pop(phase_name, None)


def build(request: dict[str, Any], plan: Path) -> None:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise Refused(f"TensorRT does not take its ONNX: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    config.progress_monitor = Monitor()
    if request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profiles"].items():
            profile.set_shape(name, *(trt.Dims(shapes[which]) for which in ("min", "opt", "max")))
        if config.add_optimization_profile(profile) < 0:
            raise Refused(f"TensorRT does not take these optimization profiles: {request['profiles']}")
    kept = Path(request["timing_cache"])
    cache = config.create_timing_cache(kept.read_bytes() if kept.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RuntimeError("TensorRT could not build the engine: what it wrote before this says why")
    # Their memory has Python's buffer protocol, which no stub tells.
    plan.write_bytes(memoryview(made))  # type: ignore[arg-type,unused-ignore]
    fresh = kept.with_name(f".{kept.name}.new")
    fresh.write_bytes(memoryview(config.get_timing_cache().serialize()))  # type: ignore[arg-type,unused-ignore]
    fresh.replace(kept)


def run(request: dict[str, Any], target: Path, plan: Path) -> None:
    sys.path.append(request["templates"])
    on_tensorrt: Any = importlib.import_module("on_tensorrt")
    engine = on_tensorrt.Engine(plan, 0)
    inputs: dict[str, dict[str, np.ndarray]] = {}
    with np.load(target / "samples.npz", allow_pickle=False) as samples:
        for key in samples.files:
            part, number, name = key.split("/", 2)
            if part == "i":
                inputs.setdefault(number, {})[name] = samples[key]
    try:
        found = {number: engine.run(arrays) for number, arrays in inputs.items()}
    except ValueError as error:
        raise Refused(f"its TensorRT engine can't be compared with the model as it was dropped: {error}") from error
    made: dict[str, Any] = {
        f"e/{number}/{name}": array for number, arrays in found.items() for name, array in arrays.items()
    }
    np.savez(target / "engine.npz", **made)
    told = {
        "memory_bytes": engine.engine.device_memory_size_v2,
        "types": {name: str(engine.type_of(name)) for name in (*engine.inputs, *engine.outputs)},
    }
    (target / "engine.json").write_text(json.dumps(told), encoding="utf-8")


def say(**what: Any) -> None:
    print(f"@{json.dumps(what)}", flush=True)


def main(request: dict[str, Any]) -> None:
    target = Path(request["target"])
    say(stage="reading the network")
    build(request, target / "network.plan")
    say(stage="comparing the engine with the model as it was dropped")
    run(request, target, target / "network.plan")


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Refused as refusal:
        say(refused=str(refusal))
        raise SystemExit(1) from None
