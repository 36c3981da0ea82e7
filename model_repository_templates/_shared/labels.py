"""The best labels of each row of a classifier's logits."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils
from serving import strings


class Labels:
    """Makes the output tensors of a classifier."""

    def __init__(self, config: Any, count: int):
        self.names = [str(config.id2label.get(index, index)) for index in range(config.num_labels)]
        self.count = min(count, len(self.names))
        self.problem = config.problem_type

    def tensors(self, logits: Any) -> list[Any]:
        """`logits` as they are, and the best labels with their scores, best first."""
        scores = self.scores(logits).topk(self.count, dim=-1)
        names = [[self.names[index] for index in row] for row in scores.indices.tolist()]
        return [
            pb_utils.Tensor("logits", logits.numpy()),
            pb_utils.Tensor("label", strings(names)),
            pb_utils.Tensor("score", scores.values.contiguous().numpy()),
        ]

    def scores(self, logits: Any) -> Any:
        if self.problem == "regression" or (self.problem is None and len(self.names) == 1):
            return logits
        return logits.sigmoid() if self.problem == "multi_label_classification" else logits.softmax(dim=-1)
