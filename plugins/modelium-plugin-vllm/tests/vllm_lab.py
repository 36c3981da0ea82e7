"""What tests with the real vLLM share: a root with drivers on it, and models laid out as the engine does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from modelium_plugin_vllm.backend import VllmBackend
from modelium_plugin_vllm.settings import VllmSettings

from modelium.api import Analysis, Device, LoadRequest, Plan, RuntimeContext, RuntimeDriver, RuntimeInfo
from modelium.api.fakes import silent
from modelium.api.servers import ModelServers
from modelium.api.testing import lay_out, plan_of
from modelium.builtin.devices import host_device
from modelium.builtin.huggingface import modelium_analyze
from modelium.engine.processes import ProcessSupervisor
from modelium.paths import cache_dir

SMALL = {"kv_cache_memory_bytes": 16 * 2**20, "threads": 1}
"""Settings with which little memory is taken."""


class Lab:
    def __init__(self, root: Path, **settings: Any):
        self.repository = root / "repository"
        self.processes = ProcessSupervisor(root, state_dir=root / "processes", log_dir=root / "logs")
        self.context = RuntimeContext(
            name="vllm",
            repository=self.repository,
            state_dir=root / "state",
            cache_dir=cache_dir(),
            settings=VllmSettings(**{"enabled": True, "base_port": 0, **settings}),
            processes=self.processes,
            report=silent,
        )
        self.info: RuntimeInfo | None = None

    def driver(self) -> ModelServers:
        driver = VllmBackend().create(self.context)
        assert isinstance(driver, ModelServers)
        return driver

    def external(self) -> RuntimeDriver:
        return VllmBackend().create(self.context)

    def model(self, name: str, drop: Path, info: RuntimeInfo, **settings: Any) -> LoadRequest:
        """Lay a copy of the drop out; `settings` are put over those of the first offer."""
        analysis = analyse(drop)
        backend = VllmBackend()
        device = host_device()
        offer = backend.offers(analysis, info, (device,))[0]
        small = SMALL if offer.serving == "generate" else {}
        plan = plan_of(offer, **{**small, **settings})
        folder = self.repository / name
        lay_out(backend.layout(name, analysis, plan), drop, folder)
        return request(name, folder, plan, analysis, device)

    def crash(self) -> None:
        """kill -9 for all servers with what they started; returns when they have ended."""
        for name in self.processes.names():
            if (record := self.processes.find(name)) is not None:
                os.killpg(record.pid, signal.SIGKILL)
                os.waitid(os.P_PID, record.pid, os.WEXITED | os.WNOWAIT)

    async def end(self) -> None:
        for name in self.processes.names():
            await self.processes.stop(name, grace_s=0)


def request(name: str, folder: Path, plan: Plan, analysis: Analysis, *devices: Device) -> LoadRequest:
    return LoadRequest(
        name=name,
        path=folder,
        plan=plan,
        analysis=analysis,
        devices=tuple(device.id for device in devices),
        memory_bytes=plan.memory_bytes,
        device_bytes={device.id: device.total_bytes for device in devices},
    )


def analyse(drop: Path) -> Analysis:
    found = modelium_analyze(drop)
    assert found is not None
    return found
