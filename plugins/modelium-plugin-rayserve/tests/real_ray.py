"""A cluster with its driver for tests that are not about the driver: models are dropped, loaded, and asked."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tritonclient.http
from modelium_plugin_rayserve import packs
from ray_lab import Lab

from modelium.api import LoadOutcome, LoadRequest
from modelium.api.fakes import silent
from modelium.paths import cache_dir

T = TypeVar("T")


class Ray:
    """A running cluster, the driver that runs it on a loop in a thread, and an HTTP client."""

    def __init__(self, root: Path, **settings: Any):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.lab = Lab(root, enabled=True, **settings)
        self._driver = self.lab.driver()
        self.info = self._run(self._driver.start())
        self.url = str(self.info.facts["url"])
        self.address = self.url.removeprefix("http://")
        self.client = tritonclient.http.InferenceServerClient(self.address, network_timeout=120, connection_timeout=120)

    def close(self) -> None:
        self.client.close()
        self._run(self._driver.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.lab.end()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def python_with(self, which: Sequence[str]) -> Path:
        """The interpreter that the models run in, with these packs."""
        return self._run(packs.install(cache_dir(), self.lab.driver()._settings, which, silent))

    def load(self, request: LoadRequest) -> LoadOutcome:
        return self._run(self._driver.load(request, silent))

    def logs(self, name: str) -> list[str]:
        return self._driver.logs(name, 100)

    def unload(self, name: str) -> None:
        self._run(self._driver.unload(name))

    @contextmanager
    def serving(self, name: str, drop: Path, **settings: Any) -> Iterator[str]:
        self.load(self.lab.install(name, drop, **settings))
        try:
            yield name
        finally:
            self.unload(name)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request to `/v2/models/<path>`."""
        return self.ask(path, json.dumps(body).encode())

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"{self.url}/v2/models/{path}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
