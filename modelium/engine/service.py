"""The engine as its surfaces see it: acquire a model, ask, and give orders."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from modelium import __version__
from modelium.api.types import Transition
from modelium.core import events as e
from modelium.core.states import State
from modelium.core.world import Model, queued
from modelium.engine import checks, preview, showing
from modelium.engine.admission import Lease, Route
from modelium.engine.fastpath import FRESH_S
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.usage import UsageBook
from modelium.engine.views import (
    CheckView,
    EventView,
    Explanation,
    ModelDetail,
    ModelView,
    PlanPreview,
    RuntimeView,
    StatusView,
)
from modelium.errors import ConfigError, DeadlinePassed, ModelConflict, ModelError, ModelLoading, ModelNotFound

MAX_PRIORITY = 10
TEAM_PRIORITY = 5
"""What `high_priority_teams` adds to a request's own priority."""


class Service:
    def __init__(self, engine: Orchestrator):
        self._engine = engine
        self._loading_soon: dict[str, asyncio.Task[Lease]] = {}
        """For requests that did not want to wait: one for each model."""

    @property
    def usage(self) -> UsageBook:
        return self._engine.usage

    # ------------------------------------------------------------------ requests

    def try_acquire(self, name: str, organisation: str = "") -> Lease | None:
        """The hot path: a lease if the model is READY."""
        return self._engine.admission.try_acquire(name, organisation)

    def route(self, name: str) -> Route | None:
        """Where a model answers, while it is READY."""
        return self._engine.admission.routes.get(name)

    async def acquire(
        self, name: str, *, deadline_s: float | None = None, priority: int = 0, organisation: str = ""
    ) -> Lease:
        """A lease on a model, which is loaded first when it has to be.

        Raises ModelNotFound, ModelFailed, QueueFull, NeverFits, RuntimeUnavailable, and DeadlinePassed after
        `deadline_s`. Cancelling withdraws the ticket.
        """
        await self._read(name, deadline_s)
        whole = bounded(priority + self._standing(name, organisation))
        lease = await self._ask(
            lambda ticket, now, deadline_at: e.ReadyAsked(now, ticket, name, deadline_at, whole),
            deadline_s,
            organisation,
        )
        assert lease is not None
        return lease

    def _standing(self, name: str, organisation: str) -> int:
        """What the configuration adds to the priority of a request."""
        policies = self._engine.config.policies
        own = next((p for pattern, p in policies.model_priorities.items() if fnmatchcase(name, pattern)), 0)
        team = TEAM_PRIORITY if organisation in policies.high_priority_teams else 0
        return own + team + policies.organisation_priorities.get(organisation, 0)

    async def load_soon(self, name: str, *, priority: int = 0, organisation: str = "") -> None:
        """Have a model loaded without waiting for it. Raises `ModelLoading` with how far it is, unless it is READY.

        Errors are those of `acquire`, where they are known at once.
        """
        task = self._loading_soon.get(name)
        if task is None:
            task = asyncio.ensure_future(self.acquire(name, priority=priority, organisation=organisation))
            self._loading_soon[name] = task
            task.add_done_callback(lambda done: self._loaded_soon(name, done))
        await asyncio.wait([task], timeout=0.02)
        if task.done() and task.exception() is not None:
            task.result()
        model = self._engine.loop.world.models.get(name)
        if model is not None and model.state is not State.READY:
            far = showing.outlook(self._engine, model)
            expected = f", and is expected in {far['expected_s']:.0f} s" if far["expected_s"] is not None else ""
            raise ModelLoading(
                f"{name} is {model.state}: {model.reason}{expected}", retry_after_s=far["expected_s"] or 1.0, **far
            )

    def _loaded_soon(self, name: str, done: asyncio.Task[Lease]) -> None:
        self._loading_soon.pop(name, None)
        if not done.cancelled() and done.exception() is None:
            done.result().release()

    async def _read(self, name: str, deadline_s: float | None) -> None:
        """A folder that is not read or looked into yet is no unknown model."""
        coming = self._engine.catalog.coming(name)
        if coming is None:
            return
        if deadline_s is None:
            deadline_s = self._engine.config.policies.request_deadline_s
        done, _ = await asyncio.wait([coming], timeout=deadline_s)
        if not done:
            raise DeadlinePassed(
                f"{name} was not looked into within {deadline_s:.0f} s: `modelium ps` shows how far it is",
                retry_after_s=5.0,
            )

    async def _ask(self, event: Any, deadline_s: float | None, organisation: str | None) -> Lease | None:
        engine = self._engine
        await self.fresh(FRESH_S)  # what follows may evict
        now = engine.clock()
        if deadline_s is None:
            deadline_s = engine.config.policies.request_deadline_s
        ticket = engine.new_ticket()
        future = engine.admission.wait(ticket, organisation)
        engine.loop.post(event(ticket, now, now + deadline_s))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                lease = future.result()
                if lease is not None:
                    lease.release()
            else:
                engine.admission.withdraw(ticket)
                engine.loop.post(e.TicketWithdrawn(engine.clock(), ticket))
            raise

    # ------------------------------------------------------------------ orders

    async def load(
        self, name: str, *, deadline_s: float | None = None, parameters: Mapping[str, Any] | None = None
    ) -> None:
        """Return when it is READY with the files that are on disk now, and with `parameters` if any are given."""
        await self._engine.catalog.look(name, settled=True)
        await self._ask(
            lambda ticket, now, deadline_at: e.ReadyAsked(
                now, ticket, name, deadline_at, person=True, parameters=dict(parameters or {})
            ),
            deadline_s,
            None,
        )

    async def unload(self, name: str, *, deadline_s: float | None = None) -> None:
        """Return when it is unloaded and its memory is back."""
        await self._ask(
            lambda ticket, now, deadline_at: e.UnloadAsked(now, ticket, name, deadline_at), deadline_s, None
        )

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep a model loaded whatever happens, or no longer. A pinned model is loaded if it is not."""
        model = self._usable(name)
        self._engine.store.pin(model.name, pinned)
        self._engine.loop.post(e.PinAsked(self._engine.clock(), model.name, pinned))

    async def remove(self, name: str) -> Path:
        """Unload a model and take its folder, or a refused drop, out of the way; returns where it lies now."""
        engine = self._engine
        model = self._engine.loop.world.models.get(name)
        if model is None:
            raise ModelNotFound(f"there is no model named {name}; `modelium ps` lists those there are")
        if model.spec is None and "/" in name:
            return await engine.discard_drop(name)
        if name in engine.catalog.known and not engine.catalog.known[name].managed and not engine.owns_repository:
            raise ModelConflict(
                f"{name} belongs to the repository {engine.paths.repository}, which Modelium does not change: "
                "remove its folder there yourself"
            )
        needed = [n for n in engine.loop.world.dependents.get(name, ()) if self._there(n).held is not None]
        if needed:
            raise ModelConflict(f"{', '.join(needed)} is made of it: unload that first")
        await engine.forget(name)
        try:
            place = await asyncio.to_thread(engine.repository.remove, name)
            engine.store.pin(name, False)
            return place
        finally:
            engine.catalog.leave(name, False)

    # ------------------------------------------------------------------ questions

    def names(self) -> list[str]:
        """All models, and drops on their way, by name."""
        return sorted(self._engine.loop.world.models)

    def view(self, name: str) -> ModelView:
        return showing.view(self._engine, self._there(name))

    def models(self) -> list[ModelView]:
        return [self.view(name) for name in self.names()]

    async def model(self, name: str) -> ModelDetail:
        return await showing.detail(self._engine, self._there(name))

    async def explain(self, name: str) -> Explanation:
        return await showing.explanation(self._engine, self._there(name))

    async def plan(self, path: Path, name: str | None = None) -> PlanPreview:
        """What would happen if `path` were dropped, as `name` or as it is called; nothing is done."""
        return await preview.preview(self._engine, path, name)

    @property
    def runtimes(self) -> tuple[RuntimeView, ...]:
        return showing.runtimes(self._engine)

    def status(self) -> StatusView:
        engine = self._engine
        world = engine.loop.world
        return StatusView(
            version=__version__,
            root=str(engine.paths.root),
            repository=str(engine.paths.repository),
            incoming=str(engine.paths.incoming) if engine.paths.incoming else None,
            started_at=engine.started_at,
            models=dict(Counter(str(m.state) for m in world.models.values())),
            queue=tuple(sorted(n for n in world.queue if queued(world.models[n]))),
            waiting=len(world.tickets),
            devices=showing.devices(engine),
            runtimes=self.runtimes,
            data_path=showing.data_path(engine),
            listening=engine.listening,
            plugins=tuple(engine.host.plugins()),
        )

    async def check(self) -> list[CheckView]:
        return await asyncio.to_thread(checks.check, self._engine, self.status())

    def decisions(self, subject: str | None = None, limit: int = 100) -> list[Transition]:
        return self._engine.journal.last(subject, limit)

    def subscribe(self) -> AbstractAsyncContextManager[AsyncIterator[EventView]]:
        return self._engine.journal.subscribe()

    async def logs(self, name: str, lines: int) -> list[str]:
        """The last lines that a runtime wrote, or that it wrote about a model."""
        engine = self._engine
        if engine.fast is not None and name == engine.fast.name:
            return await asyncio.to_thread(engine.fast.driver.logs, lines)
        running = engine.running.get(name.removeprefix("runtime:"))
        model = None
        if running is None:
            model = self._usable(name)
            running = engine.running.get(model.runtime)
            if running is None:
                raise ConfigError(f"{name} belongs to the runtime {model.runtime}, which is not there")
        return await asyncio.to_thread(running.driver.logs, model.name if model else None, lines)

    async def fresh(self, within_s: float = 0.0) -> None:
        """Bring counts of use up to date that are not kept here, unless they were `within_s` seconds ago."""
        if self._engine.fast is not None:
            await self._engine.fast.read(within_s=within_s)

    def ready(self) -> bool:
        """The repository was read and at least one runtime is up."""
        return self._engine.ready()

    def poke(self, runtime: str) -> None:
        """A request to it failed: look at it now."""
        self._engine.runtimes.poke(runtime)

    # ------------------------------------------------------------------

    def _there(self, name: str) -> Model:
        model = self._engine.loop.world.models.get(name)
        if model is None:
            raise ModelNotFound(f"there is no model named {name}; `modelium ps` lists those there are")
        return model

    def _usable(self, name: str) -> Model:
        model = self._there(name)
        if model.spec is None:
            raise ModelError(f"{name} is no usable model: {model.reason}")
        return model


def bounded(priority: int) -> int:
    return max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))
