"""A runtime plugin whose every model is one address that answers OpenAI's routes: $MODELIUM_BENCH_UPSTREAM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from modelium.api import Analysis, Endpoint, RuntimeInfo, hookimpl
from modelium.api.driver import RuntimeContext
from modelium.api.fakes import FakeBackend, FakeDriver, FakeRuntime

MARK = b"a constant OpenAI server"

MODELIUM_HOOKSPEC_VERSION = (1, 1)


class Driver(FakeDriver):
    async def start(self) -> RuntimeInfo:
        info = await super().start()
        endpoint = Endpoint(protocol="openai", address=os.environ["MODELIUM_BENCH_UPSTREAM"])
        return info.model_copy(update={"endpoints": (endpoint,)})


class Backend(FakeBackend):
    def create(self, context: RuntimeContext) -> FakeDriver:
        return Driver(self.runtime)


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    if not path.is_file() or path.read_bytes() != MARK:
        return None
    return Analysis(analyzer="constant", format="constant", summary="one answer", confidence=1, weights_bytes=1)


@hookimpl
def modelium_runtime_backends() -> Sequence[FakeBackend]:
    return [Backend(FakeRuntime("constant"))]


def installed(site: Path) -> dict[str, str]:
    """The environment in which a service finds this plugin."""
    info = site / "modelium_bench-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modelium-bench\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[modelium]\nconstant = {__name__}\n")
    return {"PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[2]}"}
