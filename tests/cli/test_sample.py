"""The sample model tells flowers apart, and the command that asks it is right."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from modelium.commands.sample import EXAMPLE, SPECIES, curl, write_sample

FLOWERS = {
    "setosa": ((5.1, 3.5, 1.4, 0.2), (4.9, 3.0, 1.4, 0.2)),
    "versicolor": ((7.0, 3.2, 4.7, 1.4), (5.5, 2.3, 4.0, 1.3)),
    "virginica": ((6.3, 3.3, 6.0, 2.5), (5.8, 2.7, 5.1, 1.9)),
}
"""Two of each kind from Fisher's data of 1936."""


def test_it_knows_its_flowers(tmp_path: Path) -> None:
    file = tmp_path / "iris.onnx"
    write_sample(file)
    onnx.checker.check_model(str(file), full_check=True)
    model = ReferenceEvaluator(str(file))
    for species, flowers in FLOWERS.items():
        (answer,) = model.run(None, {"measures": np.array(flowers, np.float32)})
        probabilities = np.asarray(answer)
        assert probabilities.shape == (2, 3)
        assert [SPECIES[i] for i in probabilities.argmax(axis=1)] == [species, species]
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_the_command_asks_for_the_example() -> None:
    program, *arguments = shlex.split(curl("http://127.0.0.1:8000"))
    assert program == "curl"
    assert "http://127.0.0.1:8000/v2/models/iris/infer" in arguments
    (asked,) = json.loads(arguments[arguments.index("-d") + 1])["inputs"]
    assert asked == {"name": "measures", "datatype": "FP32", "shape": [1, 4], "data": list(EXAMPLE)}
