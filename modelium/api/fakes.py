"""Runtimes, drivers and processes that exist only in memory, for tests that need one.

They hold no clock and never sleep: a test says what each call does and when it ends, so the order of things is the
test's own.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modelium.api.driver import ProcessRecord, RuntimeContext
from modelium.api.types import (
    Analysis,
    Device,
    Endpoint,
    Frozen,
    Layout,
    LoadOutcome,
    LoadRequest,
    Observation,
    ObservedModel,
    Offer,
    ParkOutcome,
    Plan,
    Progress,
    Report,
    RuntimeInfo,
    UnloadOutcome,
)
from modelium.errors import DriverError, RuntimeUnavailable


def silent(progress: Progress) -> None:
    """A `Report` that tells nobody."""


def load_request(name: str, path: Path = Path("."), *, memory_bytes: int = 1, **changes: Any) -> LoadRequest:
    """A request with everything that a test does not care about filled in; `changes` are fields of `LoadRequest`."""
    plan = Plan(
        brain="test",
        runtime="fake",
        serving="as-is",
        device_kind="cpu",
        memory_bytes=memory_bytes,
        load_s=1.0,
        reason="a test wants it",
        confidence=1.0,
    )
    analysis = Analysis(analyzer="test", format="fake", summary="a model for tests", confidence=1.0)
    fields: dict[str, Any] = {
        "plan": plan,
        "analysis": analysis,
        "devices": ("cpu:0",),
        "memory_bytes": memory_bytes,
    } | changes
    return LoadRequest(name=name, path=path, **fields)


class Held:
    """One call that a test holds: it arrives, waits, and ends when and how the test says. Never released: silence."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        """Set when the call is there."""
        self.ended = asyncio.Event()
        """Set when its waiting is over, by release, crash or cancellation."""
        self.cancelled = False
        self.report: Report = silent
        """The call's own, for a test to tell progress by."""
        self._go = asyncio.Event()
        self._error: Exception | None = None

    def release(self, error: Exception | None = None) -> None:
        """Let the call go on, or raise `error` in it. The first release counts."""
        if not self._go.is_set():
            self._error = error
            self._go.set()

    async def wait(self, report: Report) -> None:
        self.report = report
        self.arrived.set()
        try:
            await self._go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()
        if self._error is not None:
            raise self._error


class FakeRuntime:
    """A runtime in memory, and the script of what calls to it do; it outlives the drivers that talk to it."""

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.up = False
        self.starts = 0
        self.contact = True
        self.models: dict[str, ObservedModel] = {}
        self.asleep: dict[str, ObservedModel] = {}
        """What parked models were before, and are again once they are woken."""
        self.memory: dict[str, Mapping[str, int]] = {}
        """What loading a model takes, by its name; what the ledger booked where it is not given."""
        self.parked_memory: dict[str, Mapping[str, int]] = {}
        """What a parked model holds, by its name; half of what it took, as host memory, where it is not given."""
        self.residue: dict[str, Mapping[str, int]] = {}
        """What unloading a model does not give back, by its name."""
        self.overhead: Mapping[str, int] = {}
        self.external = False
        self.devices: tuple[Device, ...] = ()
        """Those that only it reaches."""
        self.endpoints: dict[str, str] = {}
        """Where a model answers, by its name, if it is not where the runtime does."""
        self.calls: list[tuple[str, str | None]] = []
        """Every call so far: the method and the model."""
        self.busy: dict[str, str] = {}
        """The operation under way on each model. One model never has two: a second raises AssertionError."""
        self._script: defaultdict[tuple[str, str | None], deque[Held]] = defaultdict(deque)
        self._under_way: list[Held] = []

    # what tests say

    def hold(self, method: str, model: str | None = None) -> Held:
        """Hold the next call of `method`, for `model` or (None) for any; calls of one kind are held in turn."""
        held = Held()
        self._script[method, model].append(held)
        return held

    def fail(self, method: str, error: Exception, model: str | None = None) -> Held:
        """Let the next such call fail at once."""
        held = self.hold(method, model)
        held.release(error)
        return held

    def put(self, name: str, memory: Mapping[str, int] | None = None, **fields: Any) -> None:
        """Let it hold a model that nobody loaded through a driver."""
        self.models[name] = ObservedModel(name=name, memory=memory or {}, **({"ready": True} | fields))

    def crash(self) -> None:
        """End it at once, with all that it holds; calls under way fail. The next start is a new instance."""
        self.up = False
        self.models.clear()
        self.asleep.clear()
        self._drop_calls("the runtime has died")

    def lose_contact(self) -> None:
        """It lives on with all that it holds, but no call gets through until `regain_contact`."""
        self.contact = False
        self._drop_calls("contact was lost")

    def regain_contact(self) -> None:
        self.contact = True

    @property
    def instance(self) -> str:
        return f"{self.name}-{self.starts}"

    def count(self, method: str, model: str | None = None) -> int:
        """How often `method` was called, for `model` or (None) for any."""
        return sum(1 for m, n in self.calls if m == method and (model is None or n == model))

    # what drivers ask

    async def call(self, method: str, model: str | None, report: Report = silent) -> None:
        self.calls.append((method, model))
        for key in ((method, model), (method, None)):
            if self._script[key]:
                held = self._script[key].popleft()
                self._under_way.append(held)
                try:
                    await held.wait(report)
                finally:
                    self._under_way.remove(held)
                break
        if not self.contact:
            raise RuntimeUnavailable(f"{self.name} does not answer")
        if not self.up and method != "start":
            raise RuntimeUnavailable(f"{self.name} is not running")

    def _drop_calls(self, reason: str) -> None:
        for held in self._under_way:
            held.release(RuntimeUnavailable(f"{self.name}: {reason}"))


class FakeDriver:
    """A `RuntimeDriver` for a `FakeRuntime`."""

    def __init__(self, runtime: FakeRuntime | None = None) -> None:
        self.runtime = runtime or FakeRuntime()
        self.closed = False

    async def start(self) -> RuntimeInfo:
        rt = self.runtime
        await rt.call("start", None)
        adopted = rt.up
        if not adopted:
            rt.up = True
            rt.starts += 1
        return RuntimeInfo(
            name=rt.name,
            version="1.0",
            instance=rt.instance,
            adopted=adopted,
            external=rt.external,
            backends=("fake",),
            endpoints=(Endpoint(protocol="kserve-http", address=f"http://{rt.name}.invalid"),),
        )

    async def observe(self) -> Observation:
        rt = self.runtime
        await rt.call("observe", None)
        loading = [
            ObservedModel(name=name, ready=False, reason=doing)
            for name, doing in rt.busy.items()
            if name not in rt.models
        ]
        models = (*rt.models.values(), *loading)
        return Observation(instance=rt.instance, models=models, overhead=rt.overhead, devices=rt.devices)

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        rt, name = self.runtime, request.name
        async with _Turn(rt, name, "loading"):
            await rt.call("load", name, report)
            booked = {request.devices[0]: request.memory_bytes} if request.devices else {}
            memory = rt.memory.get(name, booked)
            address = rt.endpoints.get(name)
            endpoints = (Endpoint(protocol="openai", address=address),) if address else ()
            rt.models[name] = ObservedModel(
                name=name, ready=True, versions=("1",), memory=memory, requests=0, endpoints=endpoints
            )
            rt.asleep.pop(name, None)
            return LoadOutcome(memory=memory, load_s=request.plan.load_s, endpoints=endpoints)

    async def park(self, name: str, level: int) -> ParkOutcome:
        rt = self.runtime
        async with _Turn(rt, name, "parking"):
            await rt.call("park", name)
            awake = rt.models.get(name)
            if awake is None or awake.parked:
                raise DriverError(f"{name} can't be parked: it is {'parked already' if awake else 'not loaded'}")
            memory = rt.parked_memory.get(name, {"cpu:0": sum(awake.memory.values()) // 2})
            rt.asleep[name] = awake
            rt.models[name] = ObservedModel(name=name, ready=False, parked=level, memory=memory, reason="parked")
            return ParkOutcome(memory=memory, park_s=0.5)

    async def wake(self, name: str, report: Report) -> LoadOutcome:
        rt = self.runtime
        async with _Turn(rt, name, "waking"):
            await rt.call("wake", name, report)
            shown = rt.models.get(name)
            if shown is None or not shown.parked:
                raise DriverError(f"{name} can't be woken: it is not parked")
            awake = rt.asleep.pop(name, shown.model_copy(update={"ready": True, "parked": 0, "reason": ""}))
            rt.models[name] = awake
            return LoadOutcome(memory=awake.memory, load_s=0.25, endpoints=awake.endpoints)

    async def unload(self, name: str) -> UnloadOutcome:
        rt = self.runtime
        async with _Turn(rt, name, "unloading"):
            await rt.call("unload", name)
            gone = rt.models.pop(name, None)
            rt.asleep.pop(name, None)
            return UnloadOutcome(residue=rt.residue.get(name, {}) if gone else {})

    async def stop(self) -> None:
        self.runtime.calls.append(("stop", None))
        self.runtime.crash()

    async def close(self) -> None:
        self.runtime.calls.append(("close", None))
        self.closed = True

    def logs(self, model: str | None, lines: int) -> list[str]:
        return [" ".join(filter(None, call)) for call in self.runtime.calls if model in (None, call[1])][-lines:]


class _Turn:
    """Holds a model for one operation: two at once on one model break the driver's contract."""

    def __init__(self, runtime: FakeRuntime, name: str, doing: str) -> None:
        self.runtime, self.name, self.doing = runtime, name, doing

    async def __aenter__(self) -> None:
        other = self.runtime.busy.get(self.name)
        assert other is None, f"{self.name} was asked to start {self.doing} while {other}"
        self.runtime.busy[self.name] = self.doing

    async def __aexit__(self, *_: object) -> None:
        self.runtime.busy.pop(self.name, None)


class FakeSettings(Frozen):
    """The configuration section of a `FakeBackend`."""


class FakeBackend:
    """A `RuntimeBackend` that serves any analysis in one way, as it is, from a `FakeRuntime`."""

    settings_model: type[BaseModel] = FakeSettings

    def __init__(
        self,
        runtime: FakeRuntime | None = None,
        device_kinds: tuple[str, ...] = ("cpu",),
        standby: tuple[int, ...] = (),
    ) -> None:
        self.runtime = runtime or FakeRuntime()
        self.name = self.runtime.name
        self.device_kinds = device_kinds
        self.standby = standby

    def create(self, context: RuntimeContext) -> FakeDriver:
        return FakeDriver(self.runtime)

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        memory = analysis.weights_bytes
        return [
            Offer(
                runtime=self.name,
                serving="as-is",
                device_kinds=self.device_kinds,
                memory_bytes=memory,
                standby=self.standby,
            )
        ]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        if analysis.format == "triton":
            return Layout(files={".": "."})
        place = "1" if analysis.entry else "1/model"
        return Layout(files={place: "."}, texts={"config.pbtxt": f'name: "{name}"\nbackend: "fake"\n'})


class FakeProcesses:
    """`Processes` without processes: spawning only writes down; a test ends one by `die`."""

    def __init__(self, logs: Path = Path("logs")) -> None:
        self.logs = logs
        self.living: dict[str, ProcessRecord] = {}
        self.spawned: list[ProcessRecord] = []
        self.stopped: list[str] = []
        self.environments: dict[str, Mapping[str, str | None]] = {}
        self.lines: dict[str, list[str]] = {}

    async def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> ProcessRecord:
        number = len(self.spawned) + 1
        record = ProcessRecord(
            name=name,
            pid=2**22 + number,  # above the kernel's largest pid: never anybody's
            created_at=float(number),
            argv=tuple(argv),
            log=self.logs / f"{name}.log",
            facts=dict(facts or {}),
        )
        self.living[name] = record
        self.spawned.append(record)
        self.environments[name] = dict(env or {})
        return record

    def find(self, name: str) -> ProcessRecord | None:
        return self.living.get(name)

    async def stop(self, name: str, *, grace_s: float = 30) -> None:
        self.stopped.append(name)
        self.living.pop(name, None)

    def tail(self, name: str, lines: int = 200, *, this_run: bool = False) -> list[str]:
        return self.lines.get(name, [])[-lines:]

    def ended(self, record: ProcessRecord) -> str:
        return ""

    def names(self) -> list[str]:
        return sorted(self.living)

    def die(self, name: str) -> None:
        """Let the process end by itself."""
        self.living.pop(name, None)
