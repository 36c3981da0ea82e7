"""Serves an OpenVINO model in Triton's Python backend, on the CPU.

Parameters: `model_file` (relative to the version's folder), `threads` (0 leaves it to OpenVINO).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from memory import give_back_memory
from serving import Refused, answer, parameters, version_folder

Inputs = dict[str, np.ndarray]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import openvino

        if args["model_instance_kind"] == "GPU":
            raise RuntimeError("this instance is of KIND_GPU, and OpenVINO knows no such GPU: ask for KIND_CPU")
        settings = parameters(args)
        # One stream: Triton starts as many instances as requests are to be computed at a time.
        hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if int(settings.get("threads", "0")):
            hints["INFERENCE_NUM_THREADS"] = int(settings["threads"])
        path = version_folder(args) / settings["model_file"]
        compiled = openvino.Core().compile_model(path, "CPU", hints)
        self.request = compiled.create_infer_request()
        config = json.loads(args["model_config"])
        self.inputs = {tensor["name"]: port_of(tensor["name"], compiled.inputs) for tensor in config["input"]}
        self.outputs = [(tensor["name"], port_of(tensor["name"], compiled.outputs)) for tensor in config["output"]]
        # Triton knows no scalars: one comes as a tensor of one element.
        scalars = {name for name, port in self.inputs.items() if port.partial_shape.rank == 0}
        self.scalars = scalars & {tensor["name"] for tensor in config["input"] if tensor["dims"] == [1]}

        self.warm_up()
        give_back_memory()

    def warm_up(self) -> None:
        """Let it make its own copy of the weights now rather than for the first request: until then its memory is not
        what it will be."""
        types = {name: port.element_type.to_dtype() for name, port in self.inputs.items()}
        sizes = {
            name: [1 if n.is_dynamic else n.get_length() for n in p.partial_shape] for name, p in self.inputs.items()
        }
        try:
            self.compute({name: np.zeros(sizes[name], types[name]) for name in self.inputs})
        except RuntimeError as error:  # not every size will do for every model
            pb_utils.Logger.log_info(f"no inference with zeros before the first request: {error}")

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.read, shapes, self.run)

    def read(self, request: Any) -> Inputs:
        found = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        for name, array in found.items():
            port = self.inputs[name]
            if name in self.scalars:
                found[name] = array.reshape(())
            elif not port.partial_shape.compatible(type(port.partial_shape)(list(array.shape))):
                raise Refused(f"{name} has the shape {list(array.shape)}, and the model takes {port.partial_shape}")
        return found

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
        found = self.request.infer({self.inputs[name]: array for name, array in inputs.items()})
        return [found[port] for _, port in self.outputs]

    def tensors(self, arrays: Any) -> list[Any]:
        return [
            pb_utils.Tensor(name, array if array.ndim else array.reshape(1))
            for (name, _), array in zip(self.outputs, map(np.asarray, arrays), strict=True)
        ]


def port_of(name: str, ports: Any) -> Any:
    """The input or output of that name; one that has none goes by its layer's."""
    for port in ports:
        if name in port.names or (not port.names and port.node.friendly_name == name):
            return port
    raise RuntimeError(f"config.pbtxt names {name!r}, and the model has {[sorted(port.names) for port in ports]}")


def shapes(job: Inputs) -> tuple[Any, ...]:
    """Jobs with equal ones can be concatenated along the first dimension."""
    return tuple(sorted((name, array.shape[1:]) for name, array in job.items()))
