"""What the entry point names: the vLLM runtime backend."""

from __future__ import annotations

from collections.abc import Iterable

from modelium.api import RuntimeBackend, hookimpl
from modelium_plugin_vllm.backend import VllmBackend

MODELIUM_HOOKSPEC_VERSION = (1, 1)


@hookimpl
def modelium_runtime_backends() -> Iterable[RuntimeBackend]:
    return [VllmBackend()]
