"""What the entry point names."""

from __future__ import annotations

MODELIUM_HOOKSPEC_VERSION = (1, 1)
