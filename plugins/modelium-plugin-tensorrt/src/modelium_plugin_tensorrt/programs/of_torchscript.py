"""TorchScript programs, whose signatures are concluded as the template that serves them concludes them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .original import OPSET, SIZES, Arrays, Original, Refused, drawn


class TorchScript(Original):
    """A program, whose signature is concluded as the template that serves it concludes it."""

    def __init__(self, request: dict[str, Any]):
        import torch

        sys.path.append(request["templates"])
        signature: Any = importlib.import_module("signature")
        self.torch, self.flat = torch, signature.flat
        self.max_batch = max(1, int(request["max_batch"]))
        file = Path(request["source"])
        inputs, outputs = signature.read_signature(file)
        self.model = torch.jit.load(str(file), map_location="cpu").eval()
        kinds = {argument.name: str(argument.type) for argument in self.model.forward.schema.arguments[1:]}
        odd = [f"{name} ({kind})" for name, kind in kinds.items() if kind != "Tensor"]
        if odd:
            raise Refused(f"its forward takes {', '.join(odd)}: only tensors that must be given can be exported")
        self.random = np.random.default_rng(0)
        self.inputs = [_tensor(tensor) for tensor in inputs]
        if any(tensor["datatype"] == "BF16" for tensor in (*self.inputs, *map(_tensor, outputs))):
            raise Refused("it takes or gives BF16, which numpy has no type for")
        self.shapes = request["shapes"]
        if self.shapes:
            self.check_shapes()
            tried = [self.shaped(shapes) for shapes in self.shapes]
        else:
            self._settle_dims()
            tried = [self._arrays(2, size) for size in (self.sizes[0], self.sizes[-1])]
        self.example = tried[len(tried) // 2]
        made = list(zip(*(self.run(arrays).values() for arrays in tried), strict=True))
        self.outputs = [
            {**_tensor(tensor), "shape": _in_common([array.shape for array in arrays])}
            for tensor, arrays in zip(outputs, made, strict=True)
        ]

    def _settle_dims(self) -> None:
        """Which free dimensions are really free: where one size alone works, it is that."""
        working = [size for size in SIZES if self._works(2, size)]
        if not working:
            raise Refused(f"it runs on no input of the shapes that were tried ({', '.join(map(str, SIZES))})")
        if not self._works(1, working[0]):
            raise Refused("its first dimension is no batch: it does not run on one row")
        self.sizes = working
        if len(working) == 1:
            for tensor in self.inputs:
                tensor["shape"] = [-1, *(working[0] if dim == -1 else dim for dim in tensor["shape"][1:])]

    def _works(self, batch: int, size: int) -> bool:
        try:
            self.run(self._arrays(batch, size))
        except RuntimeError:
            return False
        return True

    def _arrays(self, batch: int, size: int) -> Arrays:
        shapes = {t["name"]: [batch, *(size if d == -1 else d for d in t["shape"][1:])] for t in self.inputs}
        return {t["name"]: drawn(self.random, t["datatype"], shapes[t["name"]]) for t in self.inputs}

    def shaped(self, shapes: dict[str, list[int]]) -> Arrays:
        made = self._arrays(next(iter(shapes.values()))[0], SIZES[0])
        for tensor in self.inputs:
            if (shape := shapes.get(tensor["name"])) is not None:
                made[tensor["name"]] = drawn(self.random, tensor["datatype"], shape)
        return made

    def samples(self) -> list[Arrays]:
        if self.shapes:
            return [self.shaped(shapes) for shapes in self.shapes]
        batches = sorted({1, min(self.max_batch, 2), min(self.max_batch, 8)})
        return [self._arrays(batch, self.sizes[n % len(self.sizes)]) for n, batch in enumerate(batches)]

    def run(self, arrays: Arrays) -> Arrays:
        with self.torch.inference_mode():
            made = list(self.flat(self.model(*(self.torch.from_numpy(array) for array in arrays.values()))))
        return {f"OUTPUT__{n}": self.torch.as_tensor(value).numpy() for n, value in enumerate(made)}

    def export(self, file: Path, precision: str) -> bool:
        torch = self.torch
        names = [tensor["name"] for tensor in (*self.inputs, *self.outputs)]
        free = {
            tensor["name"]: {place: f"d{place}" for place, dim in enumerate(tensor["shape"]) if dim == -1}
            for tensor in (*self.inputs, *self.outputs)
        }
        with torch.inference_mode():
            # The newer exporter takes no TorchScript.
            torch.onnx.export(
                self.model,
                tuple(torch.from_numpy(array) for array in self.example.values()),
                str(file),
                dynamo=False,
                input_names=names[: len(self.inputs)],
                output_names=names[len(self.inputs) :],
                dynamic_axes=free,
                opset_version=OPSET,
            )
        return precision == "fp32"


def _in_common(shapes: list[tuple[int, ...]]) -> list[int]:
    """The first dimension is the batch; others are free where they differ."""
    if not shapes[0]:
        return [1]
    _, *places = zip(*shapes, strict=True)
    return [-1, *(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in places)]


def _tensor(tensor: dict[str, Any]) -> dict[str, Any]:
    """Of Triton's configuration, as the others are written."""
    return {
        "name": tensor["name"],
        "datatype": tensor["data_type"].removeprefix("TYPE_"),
        "shape": [-1, *tensor["dims"][1:]],
    }
