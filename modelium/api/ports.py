"""Free ports on loopback for servers that runtimes start."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection

from modelium.errors import DriverError

HOST = "127.0.0.1"


def hold(port: int) -> socket.socket | None:
    """Take a port for a moment (0: any free one), so that the next one asked for is another; None when it is taken."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((HOST, port))
        holder.listen(1)
    except (OSError, OverflowError):
        holder.close()
        return None
    return holder


def free_port(base: int = 0, taken: Collection[int] = ()) -> int:
    """The first free port from `base` on that is not `taken`; any where `base` is 0.

    Raises `DriverError` when there is none.
    """
    for port in range(base, 65536) if base else (0,) * 100:
        if port in taken:
            continue
        holder = hold(port)
        if holder is not None:
            with contextlib.closing(holder):
                found = int(holder.getsockname()[1])
            if found not in taken:
                return found
    raise DriverError(f"there is no free port from {base} on: end what uses them, or choose a lower base port")
