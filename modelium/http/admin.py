"""What people and programs ask of the service itself: models and orders about them, state, decisions, events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from pydantic import BaseModel

import modelium
from modelium.core.states import RuntimeState, State
from modelium.engine.views import ChecksView, EventView, HealthView, ModelView, PinView, RemovedView
from modelium.errors import ModelNotFound
from modelium.http import openapi
from modelium.http.admission import deadline_of
from modelium.http.answers import BadRequest, json_answer
from modelium.http.bodies import read_object
from modelium.http.settings import HttpSettings

if TYPE_CHECKING:
    from modelium.engine.service import Service

AT_ONCE = 50
"""Models that are looked at before the event loop gets its turn again."""

BAD = ("FAILED", "INVALID")


class Admin:
    """The service's own routes."""

    def __init__(self, service: Service, settings: HttpSettings):
        self._service = service
        self._settings = settings
        self._feeds: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[web.RouteDef]:
        get, post = web.get, web.post
        # a drop that is no model yet is called by its place, which has a slash in it
        name = "/models/{name:.+}"
        return [
            get("/", self.index),
            get("/openapi.json", self.described),
            get("/livez", self.livez),
            get("/readyz", self.readyz),
            get("/health", self.health),
            get("/status", self.status),
            get("/check", self.check),
            get("/plugins", self.plugins),
            get("/decisions", self.decisions),
            get("/events", self.events),
            get("/models", self.models),
            post("/plan", self.plan),
            get(f"{name}/explain", self.explain),
            get(f"{name}/logs", self.logs),
            post(f"{name}/load", self.load),
            post(f"{name}/unload", self.unload),
            post(f"{name}/pin", self.pin),
            post(f"{name}/unpin", self.unpin),
            get(name, self.model),
            web.delete(name, self.remove),
        ]

    async def close_feeds(self, app: web.Application) -> None:
        """End open `/events`, which never end by themselves."""
        for task in self._feeds:
            task.cancel()

    # ------------------------------------------------------------------ models

    async def models(self, request: web.Request) -> web.Response:
        state = request.query.get("state")
        if state is not None and state not in openapi.STATES:
            raise BadRequest(f"expected state to be one of {', '.join(State)}, found {state!r:.40}")
        picked = list(State) if state is None else [state.upper()]
        await self._service.fresh()
        shown = [view.model_dump_json() async for view in views(self._service) if view.state in picked]
        return web.Response(text=f"[{','.join(shown)}]", content_type="application/json")

    async def model(self, request: web.Request) -> web.Response:
        await self._service.fresh()
        return _shown(await self._service.model(request.match_info["name"]))

    async def explain(self, request: web.Request) -> web.Response:
        await self._service.fresh()
        return _shown(await self._service.explain(request.match_info["name"]))

    async def logs(self, request: web.Request) -> web.Response:
        lines = await self._service.logs(request.match_info["name"], _number(request, "lines", 200, openapi.MAX_LISTED))
        return web.Response(text="".join(f"{line}\n" for line in lines))

    async def load(self, request: web.Request) -> web.Response:
        name, deadline_s = request.match_info["name"], deadline_of(request.headers, self._settings.max_deadline_s)
        await self._service.load(name, deadline_s=deadline_s)
        return _shown(self._service.view(name))

    async def unload(self, request: web.Request) -> web.Response:
        name, deadline_s = request.match_info["name"], deadline_of(request.headers, self._settings.max_deadline_s)
        await self._service.unload(name, deadline_s=deadline_s)
        return _shown(self._service.view(name))

    async def pin(self, request: web.Request) -> web.Response:
        return await self._pin(request, True)

    async def unpin(self, request: web.Request) -> web.Response:
        return await self._pin(request, False)

    async def _pin(self, request: web.Request, pinned: bool) -> web.Response:
        name = request.match_info["name"]
        await self._service.pin(name, pinned)
        return _shown(PinView(name=name, pinned=pinned))

    async def remove(self, request: web.Request) -> web.Response:
        """Goes on to its end when the client leaves: nothing half-moved stays behind."""
        name = request.match_info["name"]
        place = await asyncio.shield(self._service.remove(name))
        return _shown(RemovedView(name=name, moved_to=str(place)))

    async def plan(self, request: web.Request) -> web.Response:
        asked = await read_object(request)
        path, name = asked.get("path"), asked.get("name")
        if not isinstance(path, str) or not Path(path).is_absolute():
            raise BadRequest(f'expected {{"path": "/absolute/path"}} on the service\'s machine, found {path!r:.200}')
        if not isinstance(name, str | None):
            raise BadRequest(f'expected "name" to be a string, found {name!r:.200}')
        return _shown(await self._service.plan(Path(path), name))

    # ------------------------------------------------------------------ the service

    async def index(self, request: web.Request) -> web.Response:
        found = {
            "name": "modelium",
            "version": modelium.__version__,
            "routes": openapi.index(metrics=self._settings.metrics),
        }
        return web.Response(text=json.dumps(found, indent=2) + "\n", content_type="application/json")

    async def described(self, request: web.Request) -> web.Response:
        return json_answer(openapi.description(metrics=self._settings.metrics))

    async def livez(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        if self._service.ready():
            return web.Response(text="ok\n")
        return web.Response(text="not ready: the repository is being read, or no runtime is up\n", status=503)

    async def health(self, request: web.Request) -> web.Response:
        """200 with `ok` or `degraded` and what is wrong: 503 is for `/readyz`."""
        status = self._service.status()
        wrong = [
            f"runtime {runtime.name} is {runtime.state}: {runtime.reason}"
            for runtime in status.runtimes
            if runtime.state != RuntimeState.UP
        ]
        wrong += [f"plugin {plugin.name} is left out: {plugin.error}" for plugin in status.plugins if plugin.error]
        wrong += [f"models {state}: {status.models[state]}" for state in BAD if status.models.get(state)]
        return _shown(
            HealthView(
                status="degraded" if wrong else "ok",
                ready=self._service.ready(),
                wrong=tuple(wrong),
                models=status.models,
                waiting=status.waiting,
            )
        )

    async def status(self, request: web.Request) -> web.Response:
        return _shown(self._service.status())

    async def check(self, request: web.Request) -> web.Response:
        found = await self._service.check()
        return _shown(ChecksView(ok=all(view.ok for view in found), checks=tuple(found)))

    async def plugins(self, request: web.Request) -> web.Response:
        return _listed(self._service.status().plugins)

    async def decisions(self, request: web.Request) -> web.Response:
        limit = _number(request, "limit", 100, openapi.MAX_LISTED)
        return _listed(self._service.decisions(request.query.get("subject"), limit))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events. Who reads too slowly misses some, and is told how many by an event `missed`."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        task = asyncio.current_task()
        assert task is not None
        self._feeds.add(task)
        try:
            async with self._service.subscribe() as events:
                await response.prepare(request)
                await response.write(b": connected\n\n")
                async for text in _feed(events, self._settings.heartbeat_s):
                    await response.write(text)
        finally:
            self._feeds.discard(task)
        return response


async def views(service: Service) -> AsyncIterator[ModelView]:
    """All models by name, giving way to others in between; one that goes meanwhile is left out."""
    for number, name in enumerate(service.names(), 1):
        try:
            view = service.view(name)
        except ModelNotFound:
            continue
        yield view
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)


async def _feed(events: AsyncIterator[EventView], heartbeat_s: float) -> AsyncIterator[bytes]:
    """Events as they are sent, and a comment when there was none for a while, so that a dead client is noticed."""
    last: int | None = None
    waiting = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=heartbeat_s)
            if not done:
                yield b": still here\n\n"
                continue
            event = waiting.result()
            if last is not None and event.id > last + 1:
                yield f'event: missed\ndata: {{"events": {event.id - last - 1}}}\n\n'.encode()
            last = event.id
            yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
            waiting = asyncio.ensure_future(anext(events))
    finally:
        waiting.cancel()


def _shown(value: BaseModel) -> web.Response:
    return web.Response(text=value.model_dump_json(), content_type="application/json")


def _listed(values: Iterable[BaseModel]) -> web.Response:
    return web.Response(text=f"[{','.join(v.model_dump_json() for v in values)}]", content_type="application/json")


def _number(request: web.Request, key: str, default: int, most: int) -> int:
    text = request.query.get(key, str(default))
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= most:
        raise BadRequest(f"expected {key} from 1 to {most}, found {text!r:.40}")
    return int(text)
