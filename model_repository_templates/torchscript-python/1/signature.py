"""What a TorchScript program takes and gives.

The file keeps the number of arguments and whether they are tensors, and nothing of the tensors' types and shapes. Those
are concluded from what the program first does with each argument (a convolution's weight gives the rank and the
channels, an embedding takes token ids), and tried out. Where nothing can be concluded, an argument is taken to be FP32
with two dimensions. A configuration that names its inputs and outputs is never changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Shape = list[int]

TYPES = {
    torch.bool: "TYPE_BOOL", torch.uint8: "TYPE_UINT8", torch.int8: "TYPE_INT8", torch.int16: "TYPE_INT16",
    torch.int32: "TYPE_INT32", torch.int64: "TYPE_INT64", torch.float16: "TYPE_FP16", torch.bfloat16: "TYPE_BF16",
    torch.float32: "TYPE_FP32", torch.float64: "TYPE_FP64",
}  # fmt: skip

PLAIN = {"int": "TYPE_INT64", "float": "TYPE_FP64", "bool": "TYPE_BOOL"}

SAME_SHAPE = {
    "aten::to", "aten::contiguous", "aten::float", "aten::half", "aten::detach", "aten::clone", "aten::relu",
    "aten::dropout", "aten::type_as",
}  # fmt: skip
"""What hands on a tensor of the same shape."""

SAME_SHAPE_WITH_NUMBER = {"aten::add", "aten::sub", "aten::mul", "aten::div"}

TRIES = (1, 8, 16, 32, 64, 128, 224, 256)
"""Sizes of free dimensions that are tried, smallest first; 224 is what most image models were made for."""


def read_signature(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The inputs and outputs for Triton's configuration. Raises `ValueError` for arguments that Triton can't send."""
    model = torch.jit.load(str(file), map_location="cpu").eval()
    arguments = model.forward.schema.arguments[1:]
    graph = torch.jit.freeze(model).graph
    inputs = []
    for index, (argument, value) in enumerate(zip(arguments, list(graph.inputs())[1:], strict=True)):
        kind = str(argument.type)
        tensor: dict[str, Any] = {"name": f"INPUT__{index}"}
        if kind in PLAIN:
            tensor |= {"data_type": PLAIN[kind], "dims": [1]}
        elif kind in ("Tensor", "Optional[Tensor]"):
            dtype, dims = conclude(value)
            tensor |= {"data_type": TYPES[dtype], "dims": dims}
        else:
            raise ValueError(
                f"forward's argument {argument.name} is a {kind}, and Triton sends tensors and numbers only"
            )
        if argument.has_default_value() or kind.startswith("Optional"):
            tensor["optional"] = True
        inputs.append(tensor)
    return inputs, outputs(model, inputs)


def conclude(value: Any) -> tuple[torch.dtype, Shape]:
    """Type and dims of a tensor, by the first use that tells; -1 where any size may do."""
    for node, place in uses(value):
        parts = list(node.inputs())
        weight = next((p.toIValue() for p in parts[1:2] if isinstance(p.toIValue(), torch.Tensor)), None)
        if node.kind() == "aten::embedding" and place == 1:
            return torch.int64, [-1, -1]
        if place != 0 or weight is None:
            continue
        if node.kind() in ("aten::_convolution", "aten::conv1d", "aten::conv2d", "aten::conv3d"):
            groups = parts[8 if node.kind() == "aten::_convolution" else 6].toIValue()
            return weight.dtype, [-1, weight.shape[1] * groups, *([-1] * (weight.ndim - 2))]
        if node.kind() == "aten::linear":
            return weight.dtype, [-1, weight.shape[1]]
        if node.kind() in ("aten::matmul", "aten::mm") and weight.ndim == 2:
            return weight.dtype, [-1, weight.shape[0]]
    return torch.float32, [-1, -1]


def uses(value: Any) -> Iterator[tuple[Any, int]]:
    """Nodes that use a tensor, itself or after steps that keep its shape, and which of their inputs it is."""
    for use in value.uses():
        node, kind = use.user, use.user.kind()
        second = list(node.inputs())[1].type().kind() if node.inputsSize() > 1 else ""
        if kind in SAME_SHAPE or (kind in SAME_SHAPE_WITH_NUMBER and second != "TensorType"):
            yield from uses(node.output())
        else:
            yield node, use.offset


def outputs(model: Any, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs, seen by running the program on zeros; where no size that was tried suits it, by its declaration."""
    for size in TRIES:
        try:
            with torch.inference_mode():
                made = list(flat(model(*(zeros(tensor, size) for tensor in inputs))))
        except RuntimeError:
            continue
        return [
            {"name": f"OUTPUT__{i}", "data_type": TYPES[one.dtype], "dims": [-1] * max(one.ndim, 1)}
            for i, one in enumerate(torch.as_tensor(value) for value in made)
        ]
    declared = str(model.forward.schema.returns[0].type)
    count = max(declared.count("Tensor"), 1)
    return [{"name": f"OUTPUT__{i}", "data_type": "TYPE_FP32", "dims": [-1]} for i in range(count)]


def zeros(tensor: dict[str, Any], size: int) -> Any:
    dtype = next(key for key, name in TYPES.items() if name == tensor["data_type"])
    made = torch.zeros(
        [size if dim == -1 and place else abs(dim) for place, dim in enumerate(tensor["dims"])], dtype=dtype
    )
    return made.item() if tensor["dims"] == [1] else made


def flat(value: Any) -> Iterator[Any]:
    """The tensors and numbers of what a program returned, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(flat, value))
    else:
        yield value
