"""A server for each model; what vLLM's processes leave behind goes with them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from modelium.api.servers import ModelServers

SHARED_MEMORY = Path("/dev/shm")


class VllmServers(ModelServers):
    """`modelium.api.RuntimeDriver`."""

    async def _end(self, name: str) -> None:
        server = self._servers.get(name)
        pids = await asyncio.to_thread(_family, server.record.pid) if server is not None else []
        await super()._end(name)
        await asyncio.to_thread(_sweep, pids)


def _family(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return [pid]


def _sweep(pids: Iterable[int]) -> None:
    """Intel's OpenMP keeps a file in memory, by which it knows whether it is in a process twice, and vLLM kills its
    engine's before it could take that away (openmp/runtime/src/kmp_runtime.cpp, `__kmp_reg_status_name`)."""
    for pid in pids:
        (SHARED_MEMORY / f"__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").unlink(missing_ok=True)
