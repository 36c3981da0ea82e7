"""A stand-in for TensorRT's trtexec, which does not run without a GPU: it takes the same options, and computes with
onnxruntime, so that all that is around TensorRT can be tried. Its "engine" is the ONNX file with a mark before it.

Run by a Python that has onnxruntime. WRONG in the environment makes it compute wrongly, FAIL makes it fail so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime

MARK = b"stand-in engine\n"
KNOWN = {
    "--onnx", "--saveEngine", "--stronglyTyped", "--memPoolSize", "--timingCacheFile", "--skipInference",
    "--minShapes", "--optShapes", "--maxShapes", "--loadEngine", "--loadInputs", "--exportOutput", "--iterations",
    "--warmUp", "--duration", "--shapes",
}  # fmt: skip
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Refused(Exception):
    """As trtexec says it."""


def shapes(text: str) -> dict[str, list[int]]:
    parts = [part.rpartition(":") for part in text.split(",") if part]
    return {name: [int(dim) for dim in dims.split("x")] for name, _, dims in parts}


def build(options: dict[str, str]) -> None:
    network = onnxruntime.InferenceSession(options["--onnx"], providers=["CPUExecutionProvider"])
    bounds = [shapes(options.get(f"--{which}Shapes", "")) for which in ("min", "opt", "max")]
    for tensor in network.get_inputs():
        free = any(not isinstance(dim, int) for dim in tensor.shape)
        assert free == all(tensor.name in bound for bound in bounds), f"the profile of {tensor.name}"
    assert "--stronglyTyped" in options and "--skipInference" in options
    assert options["--memPoolSize"].startswith("workspace:")
    cache = Path(options["--timingCacheFile"])
    cache.write_bytes((cache.read_bytes() if cache.exists() else b"") + b"x")
    Path(options["--saveEngine"]).write_bytes(MARK + json.dumps(bounds).encode() + b"\n")
    with open(options["--onnx"], "rb") as source, open(options["--saveEngine"], "ab") as target:
        shutil.copyfileobj(source, target)


def run(options: dict[str, str]) -> None:
    mark, bounds, network = Path(options["--loadEngine"]).read_bytes().split(b"\n", 2)
    assert mark + b"\n" == MARK
    low, _, high = json.loads(bounds)
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    files = dict(part.split(":", 1) for part in options["--loadInputs"].split(","))
    given = shapes(options.get("--shapes", ""))
    inputs = {}
    for tensor in session.get_inputs():
        shape = given.get(tensor.name, tensor.shape)
        if tensor.name in low:
            for least, size, most in zip(low[tensor.name], shape, high[tensor.name], strict=True):
                if not least <= size <= most:
                    raise Refused(f"supplied dimension is {size}, expected [{least}, {most}]")
        inputs[tensor.name] = np.fromfile(files[tensor.name], TYPES[tensor.type]).reshape(shape)
    names = [tensor.name for tensor in session.get_outputs()]
    factor = 1.5 if "WRONG" in os.environ else 1.0
    rows = []
    for name, array in zip(names, session.run(names, inputs), strict=True):
        values = ", ".join(f"{value:.6g}" for value in (array * factor).reshape(-1))
        dims = "x".join(map(str, array.shape))
        rows.append(f'{{ "name" : "{name}"\n  , "dimensions" : "{dims}"\n  , "values" : [ {values} ]\n  }}')
    Path(options["--exportOutput"]).write_text("[\n  " + "\n, ".join(rows) + "\n]\n")


def main() -> int:
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v101303] # {' '.join(sys.argv)}")
    if sys.argv[1:] == ["--help"]:
        return 0
    if failure := os.environ.get("FAIL"):
        print(f"[11/28/2025-17:00:00] [E] {failure}")
        return 1
    options = dict(word.partition("=")[::2] for word in sys.argv[1:])
    assert options.keys() <= KNOWN, options.keys() - KNOWN
    try:
        (build if "--onnx" in options else run)(options)
    except Refused as refusal:
        print(f"[11/28/2025-17:00:00] [E] {refusal}")
        return 1
    print("&&&& PASSED TensorRT.trtexec [TensorRT v101303]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
