"""A network computed by onnxruntime on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from memory import give_back_memory

# transformers imports PyTorch where it finds it, for its tokenizers too: 180 MiB that nothing here uses.
sys.modules["torch"] = None  # type: ignore[assignment]


class Session:
    def __init__(self, file: Path, threads: int):
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        self.invalid = InvalidArgument
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads would spin, and take the processor from the other models.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        give_back_memory()
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name; inputs that the network has no use for are left out. Raises `ValueError` for shapes that
        it does not take."""
        try:
            arrays = self.session.run(self.outputs, {name: inputs[name] for name in self.inputs})
        except self.invalid as error:
            raise ValueError(str(error)) from None
        return dict(zip(self.outputs, arrays, strict=True))
