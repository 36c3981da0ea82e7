"""The wheel's tritonserver for tests that are not about the driver: models are dropped, loaded, and asked."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tritonclient.http
from driver_lab import Lab
from modelium_plugin_triton import analyzer
from modelium_plugin_triton.backend import TritonBackend
from modelium_plugin_triton.install import install_pack

from modelium.api import Analysis, LoadRequest, Plan
from modelium.api.environments import Environment
from modelium.api.fakes import silent
from modelium.api.testing import lay_out, plan_of
from modelium.builtin import huggingface, onnx, openvino, torchscript

T = TypeVar("T")


def analyse(path: Path) -> Analysis:
    """What the host would find: the surest claim of all analyzers."""
    claims = (m.modelium_analyze(path) for m in (analyzer, huggingface, onnx, openvino, torchscript))
    found: list[Analysis] = [a for a in claims if a]
    return max(found, key=lambda a: a.confidence)


class Triton:
    """A running server, the driver that runs it on a loop in a thread, and an HTTP client."""

    def __init__(self, root: Path, **settings: Any):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._lab = Lab(root)
        self._driver = self._lab.driver(**settings)
        self._requests: dict[str, LoadRequest] = {}
        self.repository = self._lab.repository
        self.info = self._run(self._driver.start())
        self.address = (self.info.endpoint("kserve-http") or "").removeprefix("http://")
        self.client = tritonclient.http.InferenceServerClient(self.address, network_timeout=120, connection_timeout=120)

    @cached_property
    def python(self) -> Path:
        """An interpreter with torch and transformers, the one that the models run in."""
        environment = Environment(Path(self.info.facts["environment"]))
        self._run(install_pack(environment, "torch", (), silent))
        return environment.python

    def close(self) -> None:
        self.client.close()
        self._run(self._driver.stop())
        self._run(self._lab.end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def install(self, name: str, drop: Path, **settings: Any) -> Path:
        """Make the model's folder of a copy of the drop, as the engine makes it of the drop itself."""
        analysis = analyse(drop)
        folder = self.repository / name
        plan = self._plan(analysis, settings)
        lay_out(TritonBackend().layout(name, analysis, plan), drop, folder)
        self._requests[name] = self._lab.request(name, plan, analysis)
        return folder

    def _plan(self, analysis: Analysis, settings: dict[str, Any]) -> Plan:
        """With Triton's first offer."""
        offer = TritonBackend().offers(analysis, self.info, ())[0]
        return plan_of(offer, **settings)

    def load(self, name: str, config: dict[str, Any] | None = None) -> int:
        """Load what was installed, or what lies in the repository; `config` goes with the load. Returns its bytes."""
        request = self._requests.get(name)
        if request is None:
            analysis = analyse(self.repository / name)
            request = self._lab.request(name, self._plan(analysis, {}), analysis)
        parameters = {"config": json.dumps(config)} if config else {}
        outcome = self._run(self._driver.load(request.model_copy(update={"parameters": parameters}), silent))
        return sum(outcome.memory.values())

    def unload(self, name: str) -> None:
        self._run(self._driver.unload(name))

    def serving_of(self, name: str) -> str:
        """How what was installed is served."""
        return self._requests[name].plan.serving

    def memory(self, name: str) -> int:
        """Bytes that a loaded model holds now."""
        seen = self._run(self._driver.observe())
        return sum(sum(model.memory.values()) for model in seen.models if model.name == name)

    def is_broken(self, name: str) -> bool:
        return any(model.broken for model in self._run(self._driver.observe()).models if model.name == name)

    @contextmanager
    def serving(self, name: str, drop: Path, **settings: Any) -> Iterator[str]:
        self.install(name, drop, **settings)
        self.load(name)
        try:
            yield name
        finally:
            self.unload(name)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request to `/v2/models/<path>`."""
        request = urllib.request.Request(f"http://{self.address}/v2/models/{path}", data=json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
