"""A `Service` without an engine: the same facade over a table of models that tests put in the states they need."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from modelium.api import Endpoint, Plan, RuntimeInfo, Transition
from modelium.engine.admission import Admission, Lease, Route
from modelium.engine.journal import Journal
from modelium.engine.usage import UsageBook
from modelium.engine.views import (
    CheckView,
    DeviceView,
    Explanation,
    ModelDetail,
    ModelView,
    PlanPreview,
    PluginView,
    RuntimeView,
    StatusView,
)
from modelium.errors import DeadlinePassed, ModelConflict, ModeliumError, ModelLoading, ModelNotFound


class FakeService:
    def __init__(self) -> None:
        self.usage = UsageBook(organisations=3)
        self.admission = Admission(self.usage)
        self.journal = Journal(None)
        self.states: dict[str, str] = {}
        self.routes: dict[str, Route] = {}
        self.failures: dict[str, ModeliumError] = {}
        """What `acquire`, `load` and `unload` of a model raise."""
        self.calls: list[tuple[Any, ...]] = []
        self.withdrawn: list[str] = []
        self.poked: list[str] = []
        self.pinned: set[str] = set()
        self.runtimes: list[RuntimeView] = []
        self.tasks: dict[str, str] = {}
        self.is_ready = True
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    # ------------------------------------------------------------------ for tests

    def runtime(self, name: str = "triton", **endpoints: str) -> None:
        """A runtime that is up; `kserve_http=...` names its addresses."""
        info = RuntimeInfo(
            name=name,
            version="1",
            instance="1",
            adopted=False,
            endpoints=tuple(Endpoint(protocol=p.replace("_", "-"), address=a) for p, a in endpoints.items()),
        )
        self.runtimes.append(RuntimeView(name=name, state="UP", reason="answers", since=0.0, info=info))

    def add(self, name: str, state: str = "READY", *, runtime: str = "triton", decoupled: bool = False) -> None:
        info = next((view.info for view in self.runtimes if view.name == runtime), None)
        endpoints = {e.protocol: e.address for e in info.endpoints} if info is not None else {}
        self.routes[name] = Route(name, runtime, endpoints, decoupled, self.usage.model(name))
        self.put(name, state)

    def put(self, name: str, state: str) -> None:
        self.states[name] = state
        if state == "READY":
            self.admission.open(self.routes[name])
            for future in self._waiting.pop(name, []):
                if not future.done():
                    future.set_result(None)
        else:
            self.admission.close(name, None)

    def waiting(self, name: str) -> int:
        return sum(not future.done() for future in self._waiting.get(name, []))

    def tell(self, subject: str, before: str, after: str, reason: str) -> None:
        transition = Transition(decision=1, at=time.time(), subject=subject, before=before, after=after, reason=reason)
        self.journal.add(transition)
        self.usage.observe(transition)

    # ------------------------------------------------------------------ the facade

    async def fresh(self) -> None:
        pass

    def try_acquire(self, name: str, organisation: str = "") -> Lease | None:
        return self.admission.try_acquire(name, organisation)

    def route(self, name: str) -> Route | None:
        return self.admission.routes.get(name)

    async def acquire(
        self, name: str, *, deadline_s: float | None = None, priority: int = 0, organisation: str = ""
    ) -> Lease:
        self.calls.append(("acquire", name, deadline_s, priority, organisation))
        self._there(name)
        if name in self.failures:
            raise self.failures[name]
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(future)
        try:
            await asyncio.wait_for(future, deadline_s)
        except TimeoutError:
            raise DeadlinePassed(f"{name} was not READY within {deadline_s:.0f} s") from None
        except asyncio.CancelledError:
            self.withdrawn.append(name)
            raise
        lease = self.admission.try_acquire(name, organisation)
        assert lease is not None
        return lease

    async def load_soon(self, name: str, *, priority: int = 0, organisation: str = "") -> None:
        self.calls.append(("load_soon", name, priority, organisation))
        self._there(name)
        if name in self.failures:
            raise self.failures[name]
        raise ModelLoading(
            f"{name} is LOADING", retry_after_s=7, model=name, state="LOADING", progress=None, expected_s=7.0
        )

    async def load(
        self, name: str, *, deadline_s: float | None = None, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self.calls.append(("load", name, deadline_s, dict(parameters or {})))
        self._order(name)
        self.put(name, "READY")

    async def unload(self, name: str, *, deadline_s: float | None = None) -> None:
        self.calls.append(("unload", name))
        self._order(name)
        self.put(name, "COLD")

    async def pin(self, name: str, pinned: bool) -> None:
        self._there(name)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    async def remove(self, name: str) -> Path:
        if name in self.pinned:
            raise ModelConflict(f"{name} is pinned: unpin it first")
        self._there(name)
        del self.states[name]
        return Path("/root/.modelium/trash") / name

    def models(self) -> list[ModelView]:
        return [self.view(name) for name in self.names()]

    def names(self) -> list[str]:
        return sorted(self.states)

    def view(self, name: str) -> ModelView:
        return ModelView(**self._fields(name))

    async def model(self, name: str) -> ModelDetail:
        return ModelDetail(**self._fields(name), path=f"/root/repository/{name}", revision="r1")

    async def explain(self, name: str) -> Explanation:
        return Explanation(
            model=await self.model(name),
            estimate_bytes=10,
            measured=None,
            room="cpu:0: 5 of 10 bytes free",
            next="a request loads it",
            transitions=tuple(self.decisions(name)),
        )

    async def plan(self, path: Path, name: str | None = None) -> PlanPreview:
        plan = Plan(
            brain="rules",
            runtime="triton",
            serving="as-is",
            device_kind="cpu",
            memory_bytes=1,
            load_s=1,
            reason="it is one already",
            confidence=1,
        )
        return PlanPreview(name=name or path.name, analysis=None, findings=(), plan=plan, layout=None)

    def status(self) -> StatusView:
        device = DeviceView(
            id="cpu:0",
            kind="cpu",
            name="host",
            total_bytes=100,
            used_bytes=50,
            budget_bytes=90,
            booked_bytes=30,
            promised_bytes=5,
            foreign_bytes=20,
            utilization=0.5,
        )
        return StatusView(
            version="1.2.3",
            root="/root",
            repository="/root/repository",
            incoming="/root/incoming",
            started_at=1000.0,
            models=dict(Counter(self.states.values())),
            queue=tuple(n for n, s in self.states.items() if s == "QUEUED"),
            waiting=sum(map(self.waiting, self._waiting)),
            devices=(device,),
            runtimes=tuple(self.runtimes),
            plugins=(PluginView(name="bad", version="1", distribution="modelium-plugin-bad", error="it broke"),),
        )

    async def check(self) -> list[CheckView]:
        return [CheckView(name="repository", ok=True, found="writable"), CheckView(name="gpu", ok=False, found="none")]

    def decisions(self, subject: str | None = None, limit: int = 100) -> list[Transition]:
        return self.journal.last(subject, limit)

    def subscribe(self) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
        return self.journal.subscribe()

    async def logs(self, name: str, lines: int) -> list[str]:
        if name != "triton":
            self._there(name)
        return [f"{name} line {number}" for number in range(lines)]

    def ready(self) -> bool:
        return self.is_ready

    def poke(self, runtime: str) -> None:
        self.poked.append(runtime)

    # ------------------------------------------------------------------ inside

    def _there(self, name: str) -> None:
        if name not in self.states:
            raise ModelNotFound(f"there is no model named {name}")

    def _order(self, name: str) -> None:
        self._there(name)
        if name in self.failures:
            raise self.failures[name]

    def _fields(self, name: str) -> dict[str, Any]:
        self._there(name)
        usage = self.usage.get(name)
        state = self.states[name]
        return {
            "name": name,
            "state": state,
            "reason": f"it is {state.lower()}",
            "since": 1000.0,
            "created_at": 500.0,
            "task": self.tasks.get(name),
            "runtime": "triton" if name not in self.routes else self.routes[name].runtime,
            "memory_bytes": 10,
            "pinned": name in self.pinned,
            "in_flight": usage.in_flight if usage else 0,
            "waiting": self.waiting(name),
            "requests": usage.requests if usage else 0,
            "qps": 0.5 if usage and usage.requests else 0.0,
            "idle_s": 7.0 if state == "READY" else None,
        }
