"""A program for a Python with onnxruntime, and PyTorch where the model needs it: makes ONNX of a model, in the wanted
precision, and runs both on the same inputs.

It is given a JSON file (see `modelium_plugin_tensorrt.exporting`) and writes into its `target`:
`network.onnx`, unless the model is ONNX already and stays as it is; `samples.npz`, with the arrays `i/N/NAME` (inputs),
`o/N/NAME` (what the original made of them) and `x/N/NAME` (what the ONNX did); and `report.json`. A line on standard
output that begins with `@` is JSON for whoever started it: `{"stage": …}`, or `{"refused": …}` with the reason why the
model can't be exported, which ends the program with status 1.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .original import Arrays, Original, Refused, session

BF16 = "bf16"
"""onnxruntime can't compute in it on a CPU: what was exported is compared when TensorRT has it."""
TIMED_S = 0.5
"""For so long each sample is run again and again to see which is faster."""


def of(request: dict[str, Any]) -> Original:
    """The model that is asked for; what its kind needs is imported then."""
    if request["kind"] == "transformers":
        from .of_transformers import Transformers

        return Transformers(request)
    if request["kind"] == "torchscript":
        from .of_torchscript import TorchScript

        return TorchScript(request)
    from .of_onnx import Onnx

    return Onnx(request)


def main(request: dict[str, Any]) -> None:
    target, precision = Path(request["target"]), str(request["precision"])
    say(stage="loading the model as it was dropped")
    original = of(request)
    samples = original.samples()
    expected = [original.told(arrays, original.run(arrays)) for arrays in samples]
    before_s = [timed(original.run, arrays) for arrays in samples] if request["timed"] else []
    say(stage="exporting it to ONNX")
    file = target / "network.onnx"
    if not original.export(file, precision):
        from .precision import lower

        say(stage=f"rewriting it in {precision}")
        lower(file, precision, Path(request["calibration"]))
    made_file = file if file.exists() else Path(request["source"])
    names = [tensor["name"] for tensor in original.outputs]
    made: list[Arrays] = []
    after_s: list[float] = []
    taken = {tensor["name"] for tensor in original.inputs}
    if precision != BF16:
        say(stage="comparing both")
        # Without VNNI, some sums of onnxruntime's own INT8 kernels overflow: TensorRT's don't.
        network = session(made_file, plain=precision == "int8")
        taken = {tensor.name for tensor in network.get_inputs()}

        def run(arrays: Arrays) -> Arrays:
            given = {name: array for name, array in arrays.items() if name in taken}
            return original.told(arrays, dict(zip(names, network.run(names, given), strict=True)))

        made = [run(arrays) for arrays in samples]
        after_s = [timed(run, arrays) for arrays in samples] if request["timed"] else []
    stored: dict[str, Any] = {
        f"{part}/{number}/{name}": array
        for part, several in (("i", samples), ("o", expected), ("x", made))
        for number, arrays in enumerate(several)
        for name, array in arrays.items()
    }
    np.savez(target / "samples.npz", **stored)
    report = {
        "inputs": [tensor for tensor in original.inputs if tensor["name"] in taken],
        "outputs": original.outputs,
        "longest": original.longest,
        "bytes": sum(path.stat().st_size for path in weights(made_file)),
        "before_s": before_s,
        "after_s": after_s,
    }
    (target / "report.json").write_text(json.dumps(report), encoding="utf-8")


def weights(file: Path) -> Iterator[Path]:
    """An ONNX file, and the files beside it that may hold its weights."""
    yield file
    yield from file.parent.glob(f"{file.name}.*")


def timed(run: Callable[[Arrays], Arrays], arrays: Arrays) -> float:
    """The median of its times, in seconds."""
    times: list[float] = []
    end = time.perf_counter() + TIMED_S
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        run(arrays)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def say(**what: Any) -> None:
    print(f"@{json.dumps(what)}", flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Refused as refusal:
        say(refused=str(refusal))
        raise SystemExit(1) from None
