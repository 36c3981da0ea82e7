"""Asks the controller (`onray.controller`), over its Unix socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modelium.errors import DriverError, RuntimeUnavailable

ANSWERS_WITHIN_S = 20.0
"""An order to deploy travels to the cluster; a status takes milliseconds."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path):
        super().__init__("controller", timeout=ANSWERS_WITHIN_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """For one controller. Errors are `RuntimeUnavailable` where it does not answer, else `DriverError`."""

    def __init__(self, path: Path):
        self._path = path
        # Apart from the loop's own threads, which others wait for.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="ray-controller")
        self._asking = asyncio.Lock()
        self._status: tuple[float, dict[str, Any]] = (0.0, {})
        """When it was asked for, and what was told."""
        self._ordered = 0.0
        """When something was last ordered: what was told before is not true any more."""

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One question, in this thread."""
        connection = _Connection(self._path)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            status, value = answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RuntimeUnavailable(f"Ray's controller does not answer: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if status != 200:
            raise DriverError(f"Ray refused: {value['error']}", code="ray" if status == 400 else "ray_failed")
        return dict(value)

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self.ask, method, path, body)
        finally:
            if method != "GET":
                self._ordered = time.monotonic()

    async def status(self, within_s: float = 0.0) -> dict[str, Any]:
        """What `GET /status` tells, at most `within_s` seconds old: many who wait ask once."""
        began = time.monotonic()
        async with self._asking:
            at, status = self._status
            if at < max(began - within_s, self._ordered):
                try:
                    at, status = time.monotonic(), await self.call("GET", "/status")
                except DriverError as error:
                    raise RuntimeUnavailable(f"the Ray cluster does not answer: {error.message}") from error
                self._status = at, status
            return status

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
