"""What goes along with a load for Triton's vllm backend, in a real tritonserver.

The backend itself takes GPUs: a stand-in tells what it was given.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from driver_lab import Lab
from modelium_plugin_triton import install, locate
from modelium_plugin_triton.backend import TritonBackend
from modelium_plugin_triton.driver import TritonDriver
from modelium_plugin_triton.settings import TritonSettings
from test_vllm import GB, GPUS, LARGE, request

from modelium.api.fakes import silent
from modelium.paths import cache_dir

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]

BACKEND = """
import json, os
import numpy as np
import triton_python_backend_utils as pb_utils

# GPU_DEVICE_IDS

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]})
        config.set_max_batch_size(0)
        return config

    def initialize(self, args):
        with open(os.path.join(pb_utils.get_model_dir(), "model.json")) as file:
            self.engine = json.load(file)
        parameters = json.loads(args["model_config"])["parameters"]
        self.devices = parameters.get("GPU_DEVICE_IDS", {}).get("string_value")
        assert os.path.isfile(os.path.join(self.engine["model"], "config.json"))

    def execute(self, requests):
        said = json.dumps({"engine": self.engine, "devices": self.devices})
        tensor = pb_utils.Tensor("text_output", np.array([said.encode()], dtype=np.object_))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""


@pytest_asyncio.fixture
async def driver(tmp_path: Path) -> AsyncIterator[TritonDriver]:
    lab = Lab(tmp_path)
    interpreter = await locate.find_interpreter(TritonSettings())
    wheel = await install.prepare(cache_dir(), interpreter, (), silent)
    backends = tmp_path / "backends"
    (backends / "vllm").mkdir(parents=True)
    (backends / "vllm/model.py").write_text(BACKEND)
    (backends / "python").symlink_to(wheel.backends / "python")
    driver = lab.driver(args=(f"--backend-directory={backends}",))
    yield driver
    await driver.stop()
    await lab.end()


async def test_the_model_gets_the_share_and_the_devices_that_were_booked(driver: TritonDriver) -> None:
    info = await driver.start()
    assert "vllm" in info.backends and info.facts["vllm_takes_devices"]
    on_gpus = info.model_copy(update={"facts": {**info.facts, "gpu": True}})
    offer = next(o for o in TritonBackend().offers(LARGE, on_gpus, GPUS) if o.devices == 2)
    folder = driver._repository / "llm"
    asked = request(offer, LARGE, folder, "cuda:2", "cuda:3")
    (folder / "1/model").mkdir()
    (folder / "1/model/config.json").write_text("{}")
    await driver.load(asked, silent)

    async def told() -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"{info.endpoint('kserve-http')}/v2/models/llm/generate", json={"text_input": "hello"}
            ) as answer,
        ):
            assert answer.status == 200
            said: dict[str, Any] = json.loads((await answer.json())["text_output"])
            return said

    given = await told()
    share = round(offer.settings["engine_bytes"] / (100 * GB), 4)
    assert given["engine"]["gpu_memory_utilization"] == share
    assert given["engine"]["model"] == str(folder / "1/model")
    assert given["engine"]["tensor_parallel_size"] == 2
    assert given["devices"] == "2,3"
    assert [(m.name, m.ready) for m in (await driver.observe()).models] == [("llm", True)]
    await driver.unload("llm")
    assert not (await driver.observe()).models
    # Without Modelium the folder serves as well, with the share that was planned.
    await driver._need().client.load("llm", {})
    plain = await told()
    planned = round(offer.settings["engine_bytes"] / (80 * GB), 4)
    assert plain["engine"] == given["engine"] | {"gpu_memory_utilization": planned}
    assert plain["devices"] is None
    await driver.unload("llm")
