"""Free ports on loopback for servers that runtimes start."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Iterator

import psutil

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


_given: set[int] = set()
"""Ports of servers that don't listen yet."""


@contextlib.contextmanager
def given_port(base: int = 0, taken: Collection[int] = ()) -> Iterator[int]:
    """The first free port from `base` on that is not `taken`; any where `base` is 0. It is given to nobody else here
    until the block ends.

    Raises `DriverError` when there is none.
    """
    port = _free_port(base, _given.union(taken))
    _given.add(port)
    try:
        yield port
    finally:
        _given.discard(port)


def listens(pid: int, port: int) -> bool:
    """Whether a process, or one that descends from it, listens on a TCP port."""
    try:
        root = psutil.Process(pid)
        return _listens(root, port) or any(_listens(child, port) for child in root.children(recursive=True))
    except psutil.Error:
        return False


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        found = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)


def _free_port(base: int, taken: Collection[int]) -> int:
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
