"""A TensorRT engine, run with PyTorch's memory for its tensors: TensorRT brings none of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorrt as trt
import torch

TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By `DataType`'s names."""


class Engine:
    """One engine with one context on one GPU; not for several threads at once."""

    def __init__(self, file: Path, device: int):
        self.device = torch.device("cuda", device)
        with torch.cuda.device(self.device):
            self.logger = trt.Logger(trt.Logger.WARNING)
            self.runtime = trt.Runtime(self.logger)
            engine = self.runtime.deserialize_cuda_engine(file.read_bytes())
            if engine is None:
                raise RuntimeError(
                    f"TensorRT can't read {file.name}: it was made by another version, or for another GPU"
                )
            self.engine = engine
            self.context = engine.create_execution_context()
            self.stream = torch.cuda.Stream(self.device)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]

    def type_of(self, name: str) -> torch.dtype:
        """Of an input or output."""
        return TYPES[self.engine.get_tensor_dtype(name).name]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name; inputs that the engine has no use for are left out. Raises `ValueError` for shapes that
        it was not made for."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            given = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self.device) for name in self.inputs}
            for name, tensor in given.items():
                if not self.context.set_input_shape(name, trt.Dims(list(tensor.shape))):
                    raise ValueError(f"the engine was not made for {name} of shape {list(tensor.shape)}")
                self.context.set_tensor_address(name, tensor.data_ptr())
            made: dict[str, torch.Tensor] = {}
            for name in self.outputs:
                dims = self.context.get_tensor_shape(name)
                shape = [dims[place] for place in range(len(dims))]
                made[name] = torch.empty(shape, dtype=self.type_of(name), device=self.device)
                self.context.set_tensor_address(name, made[name].data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError("TensorRT could not compute the network")
            self.stream.synchronize()
            return {name: tensor.cpu().numpy() for name, tensor in made.items()}
