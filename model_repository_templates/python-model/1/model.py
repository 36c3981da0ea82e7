"""Runs a person's own class `Model`: `__init__(self, folder)`, `predict(self, inputs)`, both dicts of arrays by name.

A `ValueError` of its `predict` blames the request, any other error the model. Parameters: `model_file` (relative to the
version's folder).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from serving import Refused, answer, parameters, version_folder

Arrays = dict[str, np.ndarray]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        file = version_folder(args) / parameters(args)["model_file"]
        config = json.loads(args["model_config"])
        self.types = {
            tensor["name"]: np.dtype(pb_utils.triton_string_to_numpy(tensor["data_type"]))
            for tensor in config["output"]
        }
        self.model = load(file)(file.parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.read, id, self.run)

    def read(self, request: Any) -> Arrays:
        return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}

    def run(self, jobs: list[Arrays]) -> list[list[Any]]:
        (inputs,) = jobs
        try:
            outputs = self.model.predict(inputs)
        except ValueError as error:
            raise Refused(str(error)) from None
        if not isinstance(outputs, dict) or set(outputs) != set(self.types):
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise TypeError(f"expected predict() to return a dict with {sorted(self.types)}, found {found}")
        return [[self.tensor(name, values) for name, values in outputs.items()]]

    def tensor(self, name: str, values: Any) -> Any:
        array = np.ascontiguousarray(np.asarray(values).astype(self.types[name]))
        return pb_utils.Tensor(name, array.reshape(1) if array.ndim == 0 else array)


def load(file: Path) -> Any:
    """The class. Its file finds what lies beside it."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location("users_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["users_model"] = module
    spec.loader.exec_module(module)
    return module.Model
