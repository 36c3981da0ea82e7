"""What the models do about the memory of their process."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_memory() -> None:
    """What loading took and freed: the C library keeps it for later, up to as much again as the weights have."""
    with contextlib.suppress(AttributeError, OSError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)
