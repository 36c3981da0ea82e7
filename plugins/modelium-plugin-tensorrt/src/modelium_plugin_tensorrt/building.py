"""An engine of an ONNX file, made on the GPU that serves it and found to answer like the original.

By TensorRT's Python package, or by `trtexec`, whose options are read in TensorRT's own sources
(https://github.com/NVIDIA/TensorRT, samples/common/sampleOptions.cpp, versions 10 and 11). Both make strongly typed
networks: the precision is that of the ONNX file.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelium.api import Job, Progress
from modelium.api.templates import template_root
from modelium.errors import DriverError, ModelError
from modelium_plugin_tensorrt.compare import largest_difference, read
from modelium_plugin_tensorrt.exporting import SAMPLES, Exported
from modelium_plugin_tensorrt.running import run_program
from modelium_plugin_tensorrt.settings import Profile
from modelium_plugin_tensorrt.tools import Tool

PLAN = "network.plan"

MIB = 2**20
_ODD = re.compile(r"[,=:'\s]")
"""What a name must not hold to be named on trtexec's command line."""
_TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "int8": "INT8",
    "uint8": "UINT8", "bool": "BOOL",
}  # fmt: skip
"""PyTorch's names, and KServe's."""


@dataclass(frozen=True, slots=True)
class Engine:
    difference: float
    """From the original, the largest, as a share of an output's largest value."""
    bytes: int
    """Of the file."""
    memory_bytes: int
    """That it needs while it computes, beside its weights."""


async def build(
    job: Job,
    tool: Tool,
    target: Path,
    exported: Exported,
    *,
    precision: str,
    profiles: Mapping[str, Profile],
    workspace_bytes: int,
    timing_cache: Path,
    gpu: str,
) -> Engine:
    """Into `target`, where the samples lie; `gpu` is what CUDA_VISIBLE_DEVICES is to be.

    Raises `ModelError` when TensorRT can't make it, or it does not answer like the original.
    """
    await asyncio.to_thread(timing_cache.parent.mkdir, parents=True, exist_ok=True)
    env = {"CUDA_VISIBLE_DEVICES": gpu}
    if tool.python:
        memory = await _by_package(job, tool, target, exported, profiles, workspace_bytes, timing_cache, env)
        found = await asyncio.to_thread(read, target / "engine.npz", "e")
    else:
        memory = workspace_bytes
        command = build_command(tool.path, exported.file, target / PLAN, profiles, workspace_bytes, timing_cache)
        await _trtexec(job, command, env, "building the engine", "TensorRT can't make an engine of it")
        found = await _run_by_trtexec(job, tool, target, exported, profiles, env)
    expected = await asyncio.to_thread(read, target / SAMPLES, "o")
    difference = largest_difference(expected, found, precision, "its TensorRT engine")
    return Engine(difference, (target / PLAN).stat().st_size, memory)


# --------------------------------------------------------------------------- the Python package


async def _by_package(
    job: Job,
    tool: Tool,
    target: Path,
    exported: Exported,
    profiles: Mapping[str, Profile],
    workspace_bytes: int,
    timing_cache: Path,
    env: Mapping[str, str],
) -> int:
    asked = {
        "onnx": str(exported.file),
        "target": str(target),
        "profiles": {name: profile.model_dump() for name, profile in profiles.items()},
        "workspace_bytes": workspace_bytes,
        "timing_cache": str(timing_cache),
        "templates": str(template_root() / "_shared"),
    }
    request = target / "build.json"
    await asyncio.to_thread(request.write_text, json.dumps(asked), encoding="utf-8")
    await run_program(job, tool.path, "build", request, env=env)
    told = json.loads(await asyncio.to_thread((target / "engine.json").read_bytes))
    check_types(exported, told["types"])
    return int(told["memory_bytes"])


def check_types(exported: Exported, types: Mapping[str, str]) -> None:
    """What goes in and comes out must be what clients send and get. Raises `ModelError`."""
    for tensor in (*exported.inputs, *exported.outputs):
        name = tensor["name"]
        found = _TYPES.get(types.get(name, "").removeprefix("torch."), "nothing")
        if name in types and found != tensor["datatype"]:
            raise ModelError(f"its TensorRT engine has {name} as {found}, and clients know it as {tensor['datatype']}")


# --------------------------------------------------------------------------- trtexec


def build_command(
    trtexec: Path,
    onnx: Path,
    plan: Path,
    profiles: Mapping[str, Profile],
    workspace_bytes: int,
    timing_cache: Path,
) -> list[str]:
    """Raises `ModelError` for names that can't be said to trtexec."""
    command = [
        str(trtexec),
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        "--stronglyTyped",
        f"--memPoolSize=workspace:{max(1, workspace_bytes // MIB)}M",
        f"--timingCacheFile={timing_cache}",
        "--skipInference",
    ]
    for which in ("min", "opt", "max") if profiles else ():
        shapes = {name: getattr(profile, which) for name, profile in profiles.items()}
        command.append(f"--{which}Shapes={_shapes(shapes)}")
    return command


def run_command(
    trtexec: Path, plan: Path, shapes: Mapping[str, Sequence[int]], inputs: Mapping[str, Path], output: Path
) -> list[str]:
    """One inference with these inputs, each a file of its bytes; what comes out is written as JSON."""
    given = ",".join(f"{_named(name)}:{path}" for name, path in inputs.items())
    command = [
        str(trtexec),
        f"--loadEngine={plan}",
        f"--loadInputs={given}",
        f"--exportOutput={output}",
        "--iterations=1",
        "--warmUp=0",
        "--duration=0",
    ]
    return [*command, f"--shapes={_shapes(shapes)}"] if shapes else command


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{_named(name)}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _named(name: str) -> str:
    if _ODD.search(name):
        raise ModelError(f"its input {name!r} has a name that trtexec can't be told: point tensorrt.python to a Python")
    return name


async def _trtexec(job: Job, command: Sequence[str], env: Mapping[str, str], stage: str, wrong: str) -> None:
    """trtexec says itself whether it passed; `wrong` is what it means when it did not."""
    job.report(Progress(stage=stage))
    said: list[str] = []

    def tell(line: str) -> None:
        if "[E]" in line:
            said.append(line.partition("[E]")[2].strip())

    try:
        await job.run(command, env=env, tell=tell)
    except DriverError as exc:
        text = "; ".join(said[:3])
        if re.search(r"out of memory|OutOfMemory|could not allocate", text, re.IGNORECASE) or not text:
            raise
        raise ModelError(f"{wrong}: {text}") from exc


async def _run_by_trtexec(
    job: Job,
    tool: Tool,
    target: Path,
    exported: Exported,
    profiles: Mapping[str, Profile],
    env: Mapping[str, str],
) -> dict[str, dict[str, np.ndarray]]:
    """What the engine makes of the samples."""
    samples = await asyncio.to_thread(read, target / SAMPLES, "i")
    types = {tensor["name"]: tensor["datatype"] for tensor in exported.outputs}
    found = {}
    for number, arrays in samples.items():
        arrays = {tensor["name"]: arrays[tensor["name"]] for tensor in exported.inputs}
        files = {name: target / f"input-{number}-{place}.bin" for place, name in enumerate(arrays)}
        for name, array in arrays.items():
            await asyncio.to_thread(files[name].write_bytes, np.ascontiguousarray(array).tobytes())
        shapes = {name: array.shape for name, array in arrays.items() if name in profiles}
        output = target / f"output-{number}.json"
        command = run_command(tool.path, target / PLAN, shapes, files, output)
        stage = "comparing the engine with the model as it was dropped"
        await _trtexec(job, command, env, stage, f"its TensorRT engine does not run on sample {number}")
        found[number] = parse_outputs(await asyncio.to_thread(output.read_text), types)
    return found


_KINDS = {"BOOL": np.dtype(np.bool_), "INT64": np.dtype(np.int64), "INT32": np.dtype(np.int32)}


def parse_outputs(text: str, types: Mapping[str, str]) -> dict[str, np.ndarray]:
    """What trtexec's `--exportOutput` wrote: numbers as C++ prints them, `nan` and `inf` among them."""
    made: dict[str, np.ndarray] = {}
    try:
        for tensor in json.loads(re.sub(r"(?<=[\[,\s])(-?)(nan|inf)(?=[\s,\]])", _word, text)):
            shape = [int(dim) for dim in re.findall(r"\d+", tensor["dimensions"])]
            dtype = _KINDS.get(types.get(tensor["name"], ""), np.dtype(np.float32))
            made[tensor["name"]] = np.array(tensor["values"]).astype(dtype).reshape(shape)
    except (ValueError, KeyError, TypeError) as exc:
        raise DriverError(f"trtexec wrote outputs that can't be read: {exc}") from exc
    return made


def _word(match: re.Match[str]) -> str:
    return "NaN" if math.isnan(float(match[2])) else f"{match[1]}Infinity"
