"""What the entry point names."""

from __future__ import annotations

from collections.abc import Iterable

from modelium.api import Optimizer, hookimpl
from modelium_plugin_tensorrt.optimizer import TensorRTOptimizer

MODELIUM_HOOKSPEC_VERSION = (1, 2)


@hookimpl
def modelium_optimizers() -> Iterable[Optimizer]:
    return [TensorRTOptimizer()]
