"""The best labels of each row of a classifier's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from serving import strings


class Labels:
    """Makes the output tensors of a classifier."""

    def __init__(self, config: Any, count: int):
        self.names = [str(config.id2label.get(index, index)) for index in range(config.num_labels)]
        self.count = min(count, len(self.names))
        self.problem = config.problem_type

    def tensors(self, logits: np.ndarray) -> list[Any]:
        """`logits` as they are, FP32, and the best labels with their scores, best first."""
        scores = self.scores(logits)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., : self.count]
        names = [[self.names[index] for index in row] for row in best.tolist()]
        return [
            pb_utils.Tensor("logits", logits),
            pb_utils.Tensor("label", strings(names)),
            pb_utils.Tensor("score", np.take_along_axis(scores, best, axis=-1)),
        ]

    def scores(self, logits: np.ndarray) -> np.ndarray:
        if self.problem == "regression" or (self.problem is None and len(self.names) == 1):
            return logits
        if self.problem == "multi_label_classification":
            return np.exp(-np.logaddexp(0, -logits))
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return shifted / shifted.sum(axis=-1, keepdims=True)
