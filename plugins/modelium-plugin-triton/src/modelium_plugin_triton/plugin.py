"""What the entry point names: the Triton runtime backend, and the analyzer of Triton's own model directories."""

from __future__ import annotations

from collections.abc import Iterable

from modelium.api import RuntimeBackend, hookimpl
from modelium_plugin_triton.analyzer import modelium_analyze, modelium_completeness, modelium_scan
from modelium_plugin_triton.backend import TritonBackend

MODELIUM_HOOKSPEC_VERSION = (1, 0)


@hookimpl
def modelium_runtime_backends() -> Iterable[RuntimeBackend]:
    return [TritonBackend()]


__all__ = [
    "MODELIUM_HOOKSPEC_VERSION",
    "modelium_analyze",
    "modelium_completeness",
    "modelium_runtime_backends",
    "modelium_scan",
]
