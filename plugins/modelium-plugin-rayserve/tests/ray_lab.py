"""What the tests of the driver share: a root folder with drivers on it, and small models made on the spot."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import aiohttp
from modelium_plugin_rayserve.backend import RayServeBackend
from modelium_plugin_rayserve.driver import RayServeDriver
from modelium_plugin_rayserve.settings import RayServeSettings

from modelium.api import Analysis, Device, LoadOutcome, LoadRequest, Progress, RuntimeContext
from modelium.api.testing import lay_out, plan_of
from modelium.builtin import huggingface, onnx, python_model
from modelium.engine.processes import ProcessSupervisor
from modelium.paths import cache_dir

HERE = Device(id="cpu:0", kind="cpu", name="memory", total_bytes=2**40, used_bytes=0)

MODEL = """\
{head}

class Model:
    inputs = {{"x": ("FP32", [-1])}}
    outputs = {{"y": ("FP32", [-1]), "pid": ("INT64", [1])}}

    def __init__(self, folder):
        {initialize}

    def predict(self, inputs):
        import os
        {predict}
        return {{"y": inputs["x"] * {factor}, "pid": [os.getpid()]}}
"""


class Lab:
    """A root with a repository, and drivers that all mean the same cluster."""

    def __init__(self, root: Path, **settings: Any):
        self.root = root
        self.repository = root / "repository"
        self.repository.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.progress: list[Progress] = []
        self.processes = self.supervisor()

    def supervisor(self) -> ProcessSupervisor:
        state = self.root / ".modelium"
        return ProcessSupervisor(self.root, state_dir=state / "processes", log_dir=state / "logs")

    def driver(self) -> RayServeDriver:
        """A new one, as after a restart of Modelium."""
        self.processes = self.supervisor()
        return RayServeDriver(
            RuntimeContext(
                name="ray_serve",
                repository=self.repository,
                state_dir=self.root / ".modelium/runtimes/ray_serve",
                cache_dir=cache_dir(),
                settings=RayServeSettings(**self.settings),
                processes=self.processes,
                report=self.progress.append,
            )
        )

    def python_model(
        self,
        name: str,
        *,
        head: str = "",
        initialize: str = "pass",
        predict: str = "pass",
        factor: int = 1,
        **settings: Any,
    ) -> LoadRequest:
        """A person's own `model.py`."""
        drop = self.root / "drops" / name
        drop.mkdir(parents=True, exist_ok=True)
        text = MODEL.format(head=head, initialize=initialize, predict=predict, factor=factor)
        (drop / "model.py").write_text(text)
        return self.install(name, drop, **settings)

    def install(self, name: str, drop: Path, *, devices: tuple[str, ...] = ("cpu:0",), **settings: Any) -> LoadRequest:
        """Make the model's folder of a copy of the drop, as the engine makes it of the drop itself."""
        backend, analysis = RayServeBackend(), analyse(drop)
        offer = backend.offers(analysis, None, [HERE])[0]
        plan = plan_of(offer, **settings).model_copy(update={"devices": len(devices)})
        folder = self.repository / name
        shutil.rmtree(folder, ignore_errors=True)
        lay_out(backend.layout(name, analysis, plan), drop, folder)
        return LoadRequest(
            name=name, path=folder, plan=plan, analysis=analysis, devices=devices, memory_bytes=plan.memory_bytes
        )

    def crash(self) -> None:
        """kill -9 for the controller: its cluster goes with it."""
        record = self.processes.find("ray_serve")
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)

    def end(self) -> None:
        """End what still runs, and see that it is gone."""

        async def end() -> None:
            driver = self.driver()
            await driver.stop()
            await driver.close()

        asyncio.run(end())
        assert not self.processes.names()


def analyse(path: Path) -> Analysis:
    """What the host would find: the surest claim of all analyzers."""
    claims = (m.modelium_analyze(path) for m in (huggingface, onnx, python_model))
    found: list[Analysis] = [a for a in claims if a]
    return max(found, key=lambda a: a.confidence)


async def answer_of(outcome: LoadOutcome, name: str, x: float) -> float:
    """What a `python_model` makes of a number, over HTTP."""
    (endpoint,) = outcome.endpoints
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [x]}]}
    url = f"{endpoint.address}/v2/models/{name}/infer"
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
        outputs = (await answer.json())["outputs"]
    return float(next(output["data"][0] for output in outputs if output["name"] == "y"))
