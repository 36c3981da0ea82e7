"""What the tests of the driver share: a root folder with drivers on it, and small models written on the spot."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
from modelium_plugin_triton.driver import TritonDriver
from modelium_plugin_triton.server import sweep_shm
from modelium_plugin_triton.settings import TritonSettings

from modelium.api import Analysis, LoadRequest, Plan, Progress, RuntimeContext, RuntimeDriver
from modelium.api.fakes import load_request
from modelium.api.testing import DriverContract
from modelium.engine.processes import ProcessSupervisor
from modelium.paths import cache_dir

CONFIG = """\
name: "{name}"
backend: "{backend}"
max_batch_size: 0
input [{{ name: "x" data_type: TYPE_FP32 dims: [-1] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [-1] }}]
instance_group [{{ kind: KIND_CPU count: {count} }}]
"""

MODEL = """\
import triton_python_backend_utils as pb_utils
{head}

class TritonPythonModel:
    def initialize(self, args):
{initialize}

    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([
                pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy() * {factor})
            ])
            for r in requests
        ]
"""


def code(initialize: str = "pass", *, head: str = "", factor: int = 1) -> str:
    return MODEL.format(head=head, initialize=indent(dedent(initialize).strip(), " " * 8), factor=factor)


SLEEPS = code("import time; time.sleep(600)")
"""What never has loaded."""


class Lab:
    """A root with a repository, and drivers that all mean the same server."""

    def __init__(self, root: Path):
        self.root = root
        self.repository = root / "repository"
        self.repository.mkdir(parents=True, exist_ok=True)
        self.progress: list[Progress] = []
        self.processes = self.supervisor()

    def supervisor(self) -> ProcessSupervisor:
        state = self.root / ".modelium"
        return ProcessSupervisor(self.root, state_dir=state / "processes", log_dir=state / "logs")

    def driver(self, **settings: Any) -> TritonDriver:
        """A new one, as after a restart of Modelium."""
        self.processes = self.supervisor()
        return TritonDriver(
            RuntimeContext(
                name="triton",
                repository=self.repository,
                state_dir=self.root / ".modelium/runtimes/triton",
                cache_dir=cache_dir(),
                settings=TritonSettings(**settings),
                processes=self.processes,
                report=self.progress.append,
            )
        )

    def model(self, name: str, text: str | None = None, *, backend: str = "python", count: int = 1) -> LoadRequest:
        """A Python-backend model in the repository; without code a trivial one."""
        folder = self.repository / name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / "config.pbtxt").write_text(CONFIG.format(name=name, backend=backend, count=count))
        (folder / "1/model.py").write_text(code() if text is None else text)
        return load_request(name, folder)

    def request(self, name: str, plan: Plan, analysis: Analysis) -> LoadRequest:
        """To load what lies in the repository by this name."""
        return LoadRequest(
            name=name,
            path=self.repository / name,
            plan=plan,
            analysis=analysis,
            devices=("cpu:0",),
            memory_bytes=plan.memory_bytes,
        )

    def remove(self, name: str) -> None:
        shutil.rmtree(self.repository / name)

    def crash(self) -> None:
        """kill -9 for the server alone: its stubs are left behind."""
        record = self.processes.find("triton")
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)

    async def end(self) -> None:
        for name in self.processes.names():
            await self.processes.stop(name, grace_s=5)
        sweep_shm(self.repository.resolve())


class TritonContract(DriverContract):
    """What the contract needs whatever is served; `lab` comes from the module."""

    @pytest.fixture
    def make_driver(self, lab: Lab) -> Callable[[], RuntimeDriver]:
        return lab.driver

    @pytest.fixture
    def slow_model(self, lab: Lab) -> LoadRequest:
        return lab.model("slow", SLEEPS)

    @pytest.fixture
    def crash(self, lab: Lab) -> Callable[[], None]:
        return lab.crash
