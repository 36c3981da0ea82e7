"""Serves a TorchScript file with PyTorch in Triton's Python backend, on a CPU or a GPU.

A configuration without inputs is completed from the program itself, see `signature`. Parameters: `model_file` (relative
to the version's folder), `threads`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import on_torch
import triton_python_backend_utils as pb_utils
from memory import give_back_memory
from serving import Refused, answer, parameters, version_folder


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        known = config.as_dict()
        if known["input"] and known["output"]:
            return config
        from signature import read_signature

        model_file = known["parameters"]["model_file"]["string_value"]
        inputs, outputs = read_signature(Path(__file__).parent / model_file)
        for tensor in inputs:
            config.add_input(tensor)
        for tensor in outputs:
            config.add_output(tensor)
        return config

    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import torch
        from signature import flat

        self.torch, self.flat = torch, flat
        settings = parameters(args)
        self.device = on_torch.device(args, settings)
        self.model = torch.jit.load(str(version_folder(args) / settings["model_file"]), map_location=self.device).eval()
        give_back_memory()
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.arguments = self.model.forward.schema.arguments[1:]

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.read, id, self.run)

    def read(self, request: Any) -> dict[str, Any]:
        """The arguments of `forward`; one that was not sent has its default, and is None where there is none."""
        given = {tensor.name(): tensor for tensor in request.inputs()}
        values = {}
        for name, argument in zip(self.inputs, self.arguments, strict=True):
            if name in given:
                values[argument.name] = self.value(given[name], str(argument.type))
            elif not argument.has_default_value():
                values[argument.name] = None
        return values

    def value(self, tensor: Any, kind: str) -> Any:
        # BF16 has no numpy type, so tensors go in and out by DLPack.
        values = self.torch.from_dlpack(tensor.to_dlpack())
        return values.item() if kind in ("int", "float", "bool") else values.to(self.device)

    def run(self, jobs: list[dict[str, Any]]) -> list[list[Any]]:
        (arguments,) = jobs
        try:
            with self.torch.inference_mode():
                made = list(self.flat(self.model(**arguments)))
        except RuntimeError as error:
            # What the program raises is about the shapes and types that it was given; its last line says so.
            raise Refused(str(error).strip().splitlines()[-1]) from None
        if len(made) != len(self.outputs):
            raise ValueError(f"the program gave {len(made)} outputs, and the configuration names {len(self.outputs)}")
        return [[self.tensor(name, value) for name, value in zip(self.outputs, made, strict=True)]]

    def tensor(self, name: str, value: Any) -> Any:
        values = self.torch.as_tensor(value).cpu().contiguous()
        values = values.reshape(1) if values.ndim == 0 else values
        if values.dtype == self.torch.bool:
            return pb_utils.Tensor(name, np.asarray(values))
        return pb_utils.Tensor.from_dlpack(name, self.torch.utils.dlpack.to_dlpack(values))
