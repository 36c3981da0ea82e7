"""Whether what was made answers like the original: the largest difference, and how large it may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from modelium.errors import ModelError

Samples = Mapping[str, Mapping[str, np.ndarray]]
"""Arrays by the number of a sample and by their name."""

TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1}
"""What an output may differ by, as a share of its largest value in all samples. FP32 leaves room for TF32, which
TensorRT computes in (a mantissa of 10 bits, as FP16 has), BF16 has 8 bits; INT8 loses about a hundredth in each of
several layers."""
SMALLEST = 1e-6
"""Of what an output is compared with: one that is nearly nothing everywhere has no scale."""


def read(file: Path, part: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays `part/NUMBER/NAME` of a file of the programs. Runs in a thread."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(file, allow_pickle=False) as stored:
        for key in stored.files:
            kind, number, name = key.split("/", 2)
            if kind == part:
                found.setdefault(number, {})[name] = stored[key]
    return found


def largest_difference(expected: Samples, found: Samples, precision: str, what: str) -> float:
    """The largest of any output, as a share of its largest value. Raises `ModelError` when it is too large."""
    allowed = TOLERANCE[precision]
    scales: dict[str, float] = {}
    for outputs in expected.values():
        for name, array in outputs.items():
            scales[name] = max(scales.get(name, SMALLEST), _largest(array))
    worst = 0.0
    for number, outputs in expected.items():
        for name, array in outputs.items():
            other = found.get(number, {}).get(name)
            if other is None:
                raise ModelError(f"{what} has no output {name}")
            if other.shape != array.shape:
                raise ModelError(
                    f"{what} gives {name} the shape {list(other.shape)}, and the original {list(array.shape)}"
                )
            difference = _difference(array, other, scales[name])
            if not difference <= allowed:
                raise ModelError(
                    f"{what} does not answer like the original: {name} differs by {difference:.3g} of its largest "
                    f"value, in sample {number}, and {allowed:g} is allowed in {precision}"
                )
            worst = max(worst, difference)
    return worst


def _largest(array: np.ndarray) -> float:
    """Of its values without sign; 0 where there is no finite one."""
    finite = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else array[:0]
    return float(finite.max()) if finite.size else 0.0


def _difference(array: np.ndarray, other: np.ndarray, scale: float) -> float:
    """Of whole numbers the share that is another; infinite where one of both is no number."""
    if array.size == 0:
        return 0.0
    if array.dtype.kind != "f":
        return float(np.mean(array != other))
    one, two = array.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(two)) or not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(one[finite] - two[finite]).max(initial=0.0)) / scale
