"""Serves an ONNX model with onnxruntime in Triton's Python backend, on a CPU or a GPU.

Parameters: `model_file` (relative to the version's folder), `threads` (of one operator; 0 leaves it to onnxruntime).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from memory import give_back_memory
from serving import Refused, answer, parameters, text, version_folder

Inputs = dict[str, np.ndarray]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        self.invalid = InvalidArgument
        settings = parameters(args)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(settings.get("threads", "0"))
        # Idle threads would spin, and take the processor from the other models.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise RuntimeError("this instance is of KIND_GPU, and onnxruntime has no CUDA: install onnxruntime-gpu")
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}))
        path = version_folder(args) / settings["model_file"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        give_back_memory()
        self.types = {tensor.name: tensor.type for tensor in self.session.get_inputs()}
        config = json.loads(args["model_config"])
        # Triton knows no scalars: one comes as a tensor of one element. (A shape that nobody knows is empty here, too.)
        alone = {tensor["name"] for tensor in config["input"] if tensor["dims"] == [1]}
        self.scalars = alone & {tensor.name for tensor in self.session.get_inputs() if not tensor.shape}
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.read, shapes, self.run)

    def read(self, request: Any) -> Inputs:
        return {tensor.name(): self.array(tensor) for tensor in request.inputs()}

    def array(self, tensor: Any) -> np.ndarray:
        name, array = tensor.name(), tensor.as_numpy()
        if self.types[name] == "tensor(string)":
            words = [text(value, name) for value in array.reshape(-1)]
            array = np.array(words, dtype=object).reshape(array.shape)
        return array.reshape(()) if name in self.scalars else array

    def run(self, jobs: list[Inputs]) -> list[list[Any]]:
        """Run jobs of like shapes as one batch, where the model gives the batch back."""
        if len(jobs) == 1:
            return [self.tensors(self.compute(jobs[0]))]
        counts = [next(iter(job.values())).shape[0] for job in jobs]
        arrays = self.compute({name: np.concatenate([job[name] for job in jobs]) for name in jobs[0]})
        if any(array.ndim == 0 or array.shape[0] != sum(counts) for array in arrays):
            return [self.tensors(self.compute(job)) for job in jobs]
        parts = [np.split(array, np.cumsum(counts)[:-1]) for array in arrays]
        return [self.tensors(part) for part in zip(*parts, strict=True)]

    def compute(self, inputs: Inputs) -> list[np.ndarray]:
        try:
            return self.session.run(self.outputs, inputs)
        except self.invalid as error:
            raise Refused(str(error)) from None

    def tensors(self, arrays: Any) -> list[Any]:
        return [
            pb_utils.Tensor(name, array if array.ndim else array.reshape(1))
            for name, array in zip(self.outputs, map(np.asarray, arrays), strict=True)
        ]


def shapes(job: Inputs) -> tuple[Any, ...]:
    """Jobs with equal ones can be concatenated along the first dimension."""
    return tuple(sorted((name, array.shape[1:]) for name, array in job.items()))
