"""What tests with the real llama.cpp share: a root with drivers on it, and models laid out as the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelium_plugin_llamacpp.analyzer import modelium_analyze
from modelium_plugin_llamacpp.backend import LlamaCppBackend
from modelium_plugin_llamacpp.settings import LlamaCppSettings

from modelium.api import LoadRequest, RuntimeContext
from modelium.api.fakes import silent
from modelium.api.servers import ModelServers
from modelium.api.testing import lay_out, plan_of
from modelium.engine.processes import ProcessSupervisor
from modelium.paths import cache_dir


class Lab:
    def __init__(self, root: Path, **settings: Any):
        self.repository = root / "repository"
        self.processes = ProcessSupervisor(root, state_dir=root / "processes", log_dir=root / "logs")
        self.context = RuntimeContext(
            name="llamacpp",
            repository=self.repository,
            state_dir=root / "state",
            cache_dir=cache_dir(),
            settings=LlamaCppSettings(**settings),
            processes=self.processes,
            report=silent,
        )

    def driver(self) -> ModelServers:
        driver = LlamaCppBackend().create(self.context)
        assert isinstance(driver, ModelServers)
        return driver

    def model(self, name: str, drop: Path, **settings: Any) -> LoadRequest:
        """Lay a copy of the drop out; `settings` are put over those of the offer. One thread: threads that wait for one
        another are slow where others want the processor."""
        analysis = modelium_analyze(drop)
        assert analysis is not None
        backend = LlamaCppBackend()
        offer = backend.offers(analysis, None, ())[0]
        plan = plan_of(offer, **{"threads": 1, **settings})
        folder = self.repository / name
        lay_out(backend.layout(name, analysis, plan), drop, folder)
        return LoadRequest(
            name=name,
            path=folder,
            plan=plan,
            analysis=analysis,
            devices=("cpu:0",),
            memory_bytes=plan.memory_bytes,
        )

    async def end(self) -> None:
        for name in self.processes.names():
            await self.processes.stop(name, grace_s=0)
