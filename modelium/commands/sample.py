"""A small real model for a first try: which iris a flower is, by its measures."""

from __future__ import annotations

import json
from pathlib import Path

NAME = "iris"

SPECIES = ("setosa", "versicolor", "virginica")

WEIGHTS = (
    (-0.42, 0.53, -0.11),
    (0.97, -0.32, -0.65),
    (-2.52, -0.21, 2.72),
    (-1.08, -0.94, 2.03),
)
BIASES = (9.86, 2.23, -12.09)
"""By measure and species: multinomial logistic regression, fitted to Fisher's iris data of 1936 with scikit-learn's
defaults and rounded; it is right about 146 of the 150 flowers."""

EXAMPLE = (5.1, 3.5, 1.4, 0.2)
"""Sepal length and width, petal length and width of a setosa, in centimetres."""


def write_sample(path: Path) -> None:
    """Write an ONNX file: `measures` FP32 [-1, 4] to `probabilities` FP32 [-1, 3]."""
    from onnx import TensorProto, helper, save

    weights = [value for row in WEIGHTS for value in row]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["measures", "weights", "biases"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
        ],
        NAME,
        [helper.make_tensor_value_info("measures", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("weights", TensorProto.FLOAT, [4, 3], weights),
            helper.make_tensor("biases", TensorProto.FLOAT, [3], BIASES),
        ],
        doc_string=f"probabilities of {', '.join(SPECIES)}",
    )
    # Version 10 of the format and operator set 17 are read by every onnxruntime since 1.18.
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


def curl(url: str) -> str:
    """A command that asks the sample model at the service's address."""
    measures = {"name": "measures", "datatype": "FP32", "shape": [1, 4], "data": list(EXAMPLE)}
    return f"curl -s {url}/v2/models/{NAME}/infer -d '{json.dumps({'inputs': [measures]})}'"
