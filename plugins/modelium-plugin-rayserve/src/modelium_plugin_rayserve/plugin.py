"""What the entry point names: the runtime backend."""

from __future__ import annotations

from collections.abc import Iterable

from modelium.api import RuntimeBackend, hookimpl
from modelium_plugin_rayserve.backend import RayServeBackend

MODELIUM_HOOKSPEC_VERSION = (1, 1)


@hookimpl
def modelium_runtime_backends() -> Iterable[RuntimeBackend]:
    return [RayServeBackend()]


__all__ = ["MODELIUM_HOOKSPEC_VERSION", "modelium_runtime_backends"]
