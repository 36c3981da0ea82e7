"""An engine on a scripted runtime, a clock that tests move, and drops of a toy format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modelium.api import (
    HOOKSPEC_VERSION,
    Analysis,
    Candidate,
    Completeness,
    Device,
    Finding,
    Inspection,
    Offer,
    Optimizer,
    Plan,
    Severity,
    Situation,
    hookimpl,
)
from modelium.api.driver import Converter
from modelium.api.fakes import FakeBackend, FakeRuntime
from modelium.config import Config
from modelium.core.states import State
from modelium.discovery import Source
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.service import Service
from modelium.errors import ModelError, ModeliumError
from modelium.host import PluginHost
from modelium.paths import Paths

MB = 10**6


class Clock:
    """Moves only when a test says so."""

    def __init__(self, now: float = 1_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


class ToyInspector:
    """Looks at drops in the test's own process. A toy is a JSON file: `{"size": bytes, "whole": bool, ...}`."""

    def __init__(self) -> None:
        self.inspected: list[str] = []
        self._turn = asyncio.Lock()

    def _read(self, path: Path) -> dict[str, Any]:
        file = path
        if path.is_dir():
            file = next(iter(sorted(path.rglob("*.toy"))), path / "none.toy")
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, ValueError) as exc:
            raise ModelError(f"{path.name} is no toy") from exc

    async def completeness(self, path: Path) -> Completeness | None:
        try:
            toy = self._read(path)
        except ModelError:
            return None
        return Completeness(complete=toy.get("whole", True), reason="half of it is missing")

    async def inspect_all(self, paths: Sequence[Path]) -> list[Inspection | ModeliumError]:
        """One batch after the other, as the real one has it."""
        found: list[Inspection | ModeliumError] = []
        async with self._turn:
            for path in paths:
                try:
                    found.append(await self.inspect(path))
                except ModeliumError as exc:
                    found.append(exc)
        return found

    async def inspect(self, path: Path) -> Inspection:
        self.inspected.append(path.name)
        toy = self._read(path)
        findings = []
        if "bad" in toy:
            findings.append(Finding(severity=Severity.REFUSE, code="bad", message=toy["bad"]))
        if toy.get("pickled"):
            findings.append(Finding(severity=Severity.CONVERT, code="pickle", message="it is pickled"))
        analysis = Analysis(
            analyzer="toy",
            format="toy",
            summary="a toy",
            confidence=1,
            weights_bytes=toy.get("size", MB),
            entry="" if path.is_file() else "x.toy",
            depends_on=tuple(toy.get("parts", ())),
        )
        return Inspection(content_key=f"toy-{toy}", total_bytes=1, findings=tuple(findings), analysis=analysis)

    async def convert(self, path: Path, target: Path, findings: Sequence[Finding]) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**self._read(path), "pickled": False}))
        return "converted from a pickle"

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


class First:
    """A brain that takes the first offer."""

    name = "rules"

    def plan(self, name: str, analysis: Analysis, offers: Sequence[Offer], situation: Situation) -> Plan:
        if not offers:
            raise ModelError("nothing is on offer")
        best = offers[0]
        return Plan(
            brain=self.name,
            runtime=best.runtime,
            serving=best.serving,
            device_kind=best.device_kinds[0],
            memory_bytes=best.memory_bytes,
            load_s=1.0,
            standby=best.standby,
            reason="it is the first on offer",
            confidence=1.0,
        )


class Oldest:
    name = "lru"

    def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
        return [c.name for c in sorted(candidates, key=lambda c: c.last_used)]


class Rig:
    """One engine, and what a test does with it."""

    def __init__(self, engine: Orchestrator, runtime: FakeRuntime, clock: Clock, devices: list[Device]):
        self.engine = engine
        self.service = Service(engine)
        self.runtime = runtime
        self.clock = clock
        self.devices = devices

    def state(self, name: str) -> str:
        model = self.engine.loop.world.models.get(name)
        return str(model.state) if model is not None else "-"

    def reason(self, name: str) -> str:
        model = self.engine.loop.world.models.get(name)
        return model.reason if model is not None else ""

    def loaded(self, name: str) -> bool:
        """Whether what is loaded is what lies on disk, as far as is known."""
        model = self.engine.loop.world.models[name]
        return model.spec is not None and model.loaded_revision == model.spec.revision

    async def until(self, true: Callable[[], object], what: str = "") -> None:
        """Let everything go on until something holds; the bound is a failure, not a measure."""
        for _ in range(3000):
            if true():
                return
            await asyncio.sleep(0.002)
        states = {n: f"{m.state}: {m.reason}" for n, m in self.engine.loop.world.models.items()}
        raise AssertionError(f"never: {what or true}; {states}; {self.engine.loop.world.runtimes}")

    async def is_(self, name: str, state: State | str) -> None:
        await self.until(lambda: self.state(name) == state, f"{name} {state}")

    def drop(self, name: str, **toy: Any) -> Path:
        """Rename a toy into the incoming folder."""
        incoming = self.engine.paths.incoming
        assert incoming is not None
        hidden = incoming / f".{name}"
        hidden.write_text(json.dumps(toy))
        return hidden.rename(incoming / name)

    async def add(self, name: str, size: int = MB, **toy: Any) -> None:
        """Drop a toy and wait until it is a model, loaded if there is room."""
        self.drop(name, size=size, **toy)
        await self.until(lambda: self.state(name) in ("READY", "COLD", "FAILED"), f"{name} accepted")

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.engine.loop.tick()

    async def look(self) -> None:
        """Let time pass, and the runtime be looked at."""
        self.clock.now += 1
        await self.engine.runtimes.observe(self.runtime.name)

    def crash(self) -> None:
        self.runtime.crash()
        self.engine.runtimes.poke(self.runtime.name)


@asynccontextmanager
async def rig(
    root: Path,
    *,
    budget: int = 10 * MB,
    runtime: FakeRuntime | None = None,
    repository: Path | None = None,
    converters: Sequence[Converter] = (),
    optimizers: Sequence[Optimizer] = (),
    others: Sequence[FakeRuntime] = (),
    clock: Clock | None = None,
    standby: tuple[int, ...] = (),
    host_bytes: int = 100 * MB,
    **policies: Any,
) -> AsyncIterator[Rig]:
    """Models are loaded on `runtime`, and not on `others`. With levels of `standby` they are on a GPU of `budget`, and
    can be parked on a host of `host_bytes`.
    """
    runtime = runtime or FakeRuntime()
    clock = clock or Clock()
    kind = "cuda" if standby else "cpu"
    devices = [Device(id=f"{kind}:0", kind=kind, name="device", total_bytes=budget, used_bytes=0)]
    if standby:
        devices.append(Device(id="cpu:0", kind="cpu", name="host", total_bytes=host_bytes, used_bytes=0))
    toys = SimpleNamespace(
        MODELIUM_HOOKSPEC_VERSION=HOOKSPEC_VERSION,
        modelium_runtime_backends=hookimpl(lambda: [FakeBackend(runtime, (kind,), standby), *map(FakeBackend, others)]),
        modelium_devices=hookimpl(lambda: devices),
        modelium_brains=hookimpl(lambda settings: [First()]),
        modelium_optimizers=hookimpl(lambda: list(optimizers)),
        modelium_eviction_policies=hookimpl(lambda settings: [Oldest()]),
    )
    host = PluginHost.of([Source("toys", "toys", "1", lambda: toys)])
    config = Config.model_validate(
        {
            "orchestration": {
                "root": root,
                "model_repository": repository,
                "settle_s": 0.05,
                "policies": {"max_gpu_memory_utilization": 1.0, **policies},
            }
        }
    )
    paths = Paths(
        root=root,
        repository=repository or root / "repository",
        incoming=root / "incoming",
        quarantine=root / "quarantine",
        trash=root / "trash",
        state=root / ".modelium",
        cache=root / "cache",
    )
    sections = {name: model() for name, model in host.sections().items()}
    engine = Orchestrator(config, paths, host, sections, ToyInspector(), clock=clock)  # type: ignore[arg-type]
    made = Rig(engine, runtime, clock, devices)
    await engine.start()
    try:
        yield made
    finally:
        await engine.stop()
