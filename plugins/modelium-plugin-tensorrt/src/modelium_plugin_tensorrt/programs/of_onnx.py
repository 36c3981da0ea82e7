"""Models that are ONNX already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .original import SIZES, Arrays, Original, Refused, described, drawn, session


class Onnx(Original):
    """A model that is ONNX already."""

    def __init__(self, request: dict[str, Any]):
        self.source = Path(request["source"])
        self.session = session(self.source)
        self.max_batch = max(1, int(request["max_batch"]))
        self.random = np.random.default_rng(0)
        self.free = {tensor.name: tensor.shape for tensor in self.session.get_inputs()}
        self.inputs = [described(tensor) for tensor in self.session.get_inputs()]
        self.outputs = [described(tensor) for tensor in self.session.get_outputs()]
        if any(tensor["datatype"] in ("BYTES", "BF16") for tensor in (*self.inputs, *self.outputs)):
            raise Refused("it takes or gives strings or BF16")
        self.shapes = request["shapes"]
        self.check_shapes()
        if self.shapes:
            return
        self.sizes = [size for size in SIZES if self._works(2, size)] or [s for s in SIZES if self._works(1, s)]
        if not self.sizes:
            raise Refused(f"it runs on no input of the shapes that were tried ({', '.join(map(str, SIZES))})")

    def _arrays(self, batch: int, size: int) -> Arrays:
        return self._drawn({}, {}, batch, size)

    def shaped(self, shapes: dict[str, list[int]]) -> Arrays:
        known = {name: self.free[name] for name in shapes if name in self.free}
        sizes = {dim: n for name, dims in known.items() for dim, n in zip(dims, shapes[name], strict=False)}
        return self._drawn(shapes, sizes, 1, SIZES[0])

    def _drawn(self, shapes: dict[str, list[int]], sizes: dict[Any, int], batch: int, size: int) -> Arrays:
        """Dimensions of one name have one size."""
        made = {}
        for tensor in self.inputs:
            name = tensor["name"]
            shape = shapes.get(name) or [
                dim if isinstance(dim, int) else sizes.get(dim, batch if place == 0 else size)
                for place, dim in enumerate(self.free[name])
            ]
            made[name] = drawn(self.random, tensor["datatype"], shape)
        return made

    def _works(self, batch: int, size: int) -> bool:
        try:
            self.run(self._arrays(batch, size))
        except Exception:  # onnxruntime's own kinds, which have no common one
            return False
        return True

    def samples(self) -> list[Arrays]:
        if self.shapes:
            return [self.shaped(shapes) for shapes in self.shapes]
        tried = [(1, self.sizes[0]), (min(self.max_batch, 2), self.sizes[-1]), (min(self.max_batch, 8), self.sizes[0])]
        return [self._arrays(*one) for one in dict.fromkeys(tried) if self._works(*one)]

    def run(self, arrays: Arrays) -> Arrays:
        names = [tensor["name"] for tensor in self.outputs]
        return dict(zip(names, self.session.run(names, arrays), strict=True))

    def export(self, file: Path, precision: str) -> bool:
        if precision == "fp32":
            return True
        import onnx

        onnx.save(onnx.load(self.source), file)
        return False
