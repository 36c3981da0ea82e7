"""What the entry point names: the llama.cpp runtime backend, and the analyzer of GGUF models."""

from __future__ import annotations

from collections.abc import Iterable

from modelium.api import RuntimeBackend, hookimpl
from modelium_plugin_llamacpp.analyzer import modelium_analyze, modelium_completeness
from modelium_plugin_llamacpp.backend import LlamaCppBackend

MODELIUM_HOOKSPEC_VERSION = (1, 1)


@hookimpl
def modelium_runtime_backends() -> Iterable[RuntimeBackend]:
    return [LlamaCppBackend()]


__all__ = ["MODELIUM_HOOKSPEC_VERSION", "modelium_analyze", "modelium_completeness", "modelium_runtime_backends"]
