"""Serves an encoder of transformers whose network was exported: onnxruntime or TensorRT computes it, and what comes
before and after it is as in the templates of its task. PyTorch is not loaded unless TensorRT is there to need it.

Parameters: those of the template of the `task`, and `network` (a file beside this one: `.onnx` or `.plan`), `longest`
(the most tokens that it takes; 0 where nothing limits it).
"""

from __future__ import annotations

import os
from typing import Any

from serving import Refused, answer, parameters, version_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        settings = parameters(args)
        file = version_folder(args) / settings["network"]
        if file.suffix == ".plan":
            from on_tensorrt import Engine

            self.network: Any = Engine(file, int(args["model_instance_device_id"]))
        else:
            from on_onnx import Session

            self.network = Session(file, int(settings["threads"]))
        from tasks import TASKS

        self.task = TASKS[settings["task"]](version_folder(args) / settings["model_folder"], settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.task.read, self.task.alike, self.run)

    def run(self, jobs: list[Any]) -> list[list[Any]]:
        inputs = self.task.inputs(jobs)
        try:
            arrays = self.network.run(inputs)
        except ValueError as error:
            raise Refused(str(error)) from None
        return list(self.task.outputs(jobs, inputs, arrays))
