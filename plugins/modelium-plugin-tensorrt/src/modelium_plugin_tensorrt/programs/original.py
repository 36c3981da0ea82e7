"""A model as it was dropped, which what is made of it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

SIZES = (16, 32, 64, 128, 224, 256, 8)
"""Of free dimensions that nothing tells of, in the order in which they are tried."""
OPSET = 18


class Refused(Exception):
    """The model can't be exported; the message says why."""


class Original:
    """The model as it was dropped."""

    shapes: list[dict[str, list[int]]]
    """By input, of the samples that are asked for; none: whichever it takes."""
    inputs: list[dict[str, Any]]
    """`name`, `datatype` as KServe calls it, `shape` with -1 where any size may do."""
    outputs: list[dict[str, Any]]
    longest = 0
    """The most tokens that it takes at once; 0 where that means nothing, or nothing limits it."""

    def run(self, arrays: Arrays) -> Arrays:
        raise NotImplementedError

    def told(self, arrays: Arrays, made: Arrays) -> Arrays:
        """That of the outputs which clients are told, and which is to be equal."""
        return made

    def samples(self) -> list[Arrays]:
        """Inputs of several shapes."""
        raise NotImplementedError

    def check_shapes(self) -> None:
        """Raises `Refused` where it does not run on a sample that is asked for."""
        for shapes in self.shapes:
            try:
                self.run(self.shaped(shapes))
            except Exception as error:  # onnxruntime's own kinds have no common one
                told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
                raise Refused(f"it does not run on what its profiles say ({told}): {error}") from error

    def shaped(self, shapes: dict[str, list[int]]) -> Arrays:
        """Inputs of these shapes, and others that go with them."""
        raise NotImplementedError

    def export(self, file: Path, precision: str) -> bool:
        """Write it as ONNX; whether it is in that precision now, else it is in FP32."""
        raise NotImplementedError


_TYPES = {
    "float": "FP32", "double": "FP64", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32",
    "int16": "INT16", "int8": "INT8", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "bool": "BOOL", "string": "BYTES",
}  # fmt: skip
"""onnxruntime's names, as in `tensor(float)`, and KServe's."""

_NUMPY = {
    "FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32,
    "INT16": np.int16, "INT8": np.int8, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32,
    "UINT64": np.uint64, "BOOL": np.bool_,
}  # fmt: skip


def described(tensor: Any) -> dict[str, Any]:
    kind = tensor.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _TYPES:
        raise Refused(f"{tensor.name} is a {tensor.type}")
    shape = [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
    return {"name": tensor.name, "datatype": _TYPES[kind], "shape": shape}


def drawn(random: np.random.Generator, datatype: str, shape: list[int]) -> np.ndarray:
    """Whole numbers are 0 or 1, which are in any table of embeddings."""
    dtype = np.dtype(_NUMPY[datatype])
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)


def session(file: Path, *, plain: bool = False) -> Any:
    """`plain`: compute node by node what is written, without onnxruntime's own kernels for several together."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as PyTorch has it here (see `running`)
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
