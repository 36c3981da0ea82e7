"""Rewrites an FP32 network in a lower precision."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .original import Arrays, Refused, session


def lower(file: Path, precision: str, calibration: Path) -> None:
    """Rewrite an FP32 network in another precision; what goes in and comes out of it keeps its type."""
    import onnx

    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), file)
    elif precision == "int8":
        _quantize(file, calibration)
    else:
        raise Refused(f"ONNX can't be rewritten in {precision}: ask for fp32, fp16 or int8")


def _quantize(file: Path, calibration: Path) -> None:
    """Statically, by what the calibration's inputs bring about; TensorRT wants both scales symmetric."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = [tensor.name for tensor in session(file).get_inputs()]
    with np.load(calibration, allow_pickle=False) as given:
        missing = [name for name in names if name not in given]
        if missing:
            raise Refused(f"{calibration} has no array {', '.join(missing)}: it has to have one for each input")
        arrays = {name: given[name] for name in names}
    rows = min(len(array) for array in arrays.values())

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """One row at a time."""

        def __init__(self) -> None:
            self.place = 0

        def get_next(self) -> Arrays | None:
            self.place += 1
            if self.place > rows:
                return None
            return {name: array[self.place - 1 : self.place] for name, array in arrays.items()}

    quantized = file.with_name("quantized.onnx")
    quantize_static(
        str(file),
        str(quantized),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    os.replace(quantized, file)
