"""KServe v2 over HTTP with Triton's extensions, so that a client written for Triton works by changing nothing.

What is bound to a model is passed to the model's runtime, which is loaded first when it has to be, and its answer is
passed back byte for byte; for a runtime that speaks OpenAI alone it is translated. What is about all models (index,
statistics, load and unload) is answered here. Two answers differ from Triton's on purpose:

- A model that is not loaded counts as ready when a request would load it, so that clients that wait for readiness
  before they ask don't wait for ever. `x-modelium-state` tells its state, as does the repository index.
- A request that Triton can't parse is 400 rather than 500, since it is the client's fault.

Asking for readiness or statistics is no use of a model: a dashboard keeps nothing loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from modelium.core.states import State
from modelium.engine.admission import Lease
from modelium.errors import ModelNotFound, RuntimeUnavailable
from modelium.http.admission import GRPC, HTTP, acquire, deadline_of, endpoint, openai_alone
from modelium.http.answers import (
    BadRequest,
    UpstreamFailed,
    along,
    check_process,
    error_answer,
    json_answer,
)
from modelium.http.bodies import header_length, read_body, read_object
from modelium.http.composed import Composed, inferred
from modelium.http.interfaces import VERSION
from modelium.http.messages import decode_request
from modelium.http.repository import EXTENSIONS, NOT_SERVABLE, ModelRepository
from modelium.http.settings import HttpSettings
from modelium.http.streams import InferenceFailed, Streams, join
from modelium.http.upstream import StreamBroken, Upstream

if TYPE_CHECKING:
    from modelium.engine.service import Service

UNPARSABLE = (
    '{"error":"failed to parse the request JSON',
    '{"error":"Unable to parse ',
    '{"error":"attempt to get members for non-object',
)
"""How Triton's answers begin, under status 500, to bodies that are no JSON, or not of its shape (seen on 2.51)."""
_UNPARSABLE = tuple(begin.encode() for begin in UNPARSABLE)


class KServe:
    """The routes under `/v2`."""

    def __init__(
        self, service: Service, settings: HttpSettings, upstream: Upstream, streams: Streams, composed: Composed
    ):
        self._service = service
        self._settings = settings
        self._upstream = upstream
        self._streams = streams
        self._composed = composed
        self._repository = ModelRepository(service, upstream)

    def routes(self) -> list[web.RouteDef]:
        get, post = web.get, web.post
        model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        routes = [
            # the most used first: they are tried in turn
            post(f"{model}/infer", self.infer),
            post(f"{version}/infer", self.infer),
            post(f"{model}/generate", self.forward),
            post(f"{model}/generate_stream", self.forward),
            get(f"{model}/ready", self.model_ready),
            get("/v2", self.server),
            get("/v2/health/live", self.live),
            get("/v2/health/ready", self.ready),
            get("/v2/models/stats", self.all_statistics),
            get(model, self.forward),
            get(f"{model}/config", self.forward),
            get(f"{model}/stats", self.statistics),
            post(f"{version}/generate", self.forward),
            post(f"{version}/generate_stream", self.forward),
            get(f"{version}/ready", self.model_ready),
            get(version, self.forward),
            get(f"{version}/config", self.forward),
            get(f"{version}/stats", self.statistics),
            post("/v2/repository/index", self.index),
            post("/v2/repository/models/{model}/load", self.load),
            post("/v2/repository/models/{model}/unload", self.unload),
        ]
        for method in (web.get, web.post):
            routes.append(method(f"{model}/trace/setting", self.runtime_setting))
            for area in ("systemsharedmemory", "cudasharedmemory", "trace", "logging"):
                routes.append(method(f"/v2/{area}{{rest:(/.*)?}}", self.runtime_setting))
        return routes

    # ------------------------------------------------------------------ bound to a model

    async def infer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        lease = await acquire(self._service, self._settings, request.headers, name, request.query)
        if openai_alone(lease.endpoints):
            return await self._held(lease, self._composed.answer(request, lease))
        if lease.decoupled and GRPC in lease.endpoints:
            return await self._held(lease, self._infer_decoupled(request, lease))
        return await self._held(lease, self._passed(request, lease))

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Pass on to the model's runtime as it is."""
        name = request.match_info["model"]
        lease = await acquire(self._service, self._settings, request.headers, name, request.query)
        if openai_alone(lease.endpoints):
            return await self._held(lease, self._composed.answer(request, lease))
        return await self._held(lease, self._passed(request, lease))

    async def _held(self, lease: Lease, answering: Any) -> web.StreamResponse:
        """Await `answering`, then give the lease back with what became of it."""
        ok = True  # also when the client leaves: that is no failure of the model's
        try:
            response: web.StreamResponse = await answering
            ok = response.status < 500
            return response
        except (UpstreamFailed, RuntimeUnavailable, StreamBroken):
            ok = False
            self._service.poke(lease.runtime)
            raise
        finally:
            lease.release(ok=ok)

    async def _passed(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        response = await self._upstream.forward(request, endpoint(lease, HTTP), lease.model)
        if response.status >= 400 and isinstance(response, web.Response) and isinstance(response.body, bytes):
            check_process(response.body, lease.model)
            if response.status == 500 and response.body.startswith(_UNPARSABLE):
                response.set_status(400)
        return response

    async def _infer_decoupled(self, request: web.Request, lease: Lease) -> web.StreamResponse:
        wanted = decode_request(await read_body(request), header_length(request))
        wanted.headers = along(request)
        version = request.match_info.get("version", "")
        try:
            answers = await self._streams.infer(lease.endpoints[GRPC], lease.model, version, wanted)
        except InferenceFailed as exc:
            return error_answer(request, exc, exc.status)
        return inferred(join(lease.model, answers), wanted)

    # ------------------------------------------------------------------ no use of a model

    async def model_ready(self, request: web.Request) -> web.StreamResponse:
        """200 when a request would be answered, if need be after a load; a version is asked of the runtime."""
        try:
            model = self._service.view(request.match_info["model"])
        except ModelNotFound as exc:
            return error_answer(request, exc, 400)
        if model.state == State.READY and (version := request.match_info.get("version")):
            if (address := self._repository.address_of(model)) is not None:
                return await self._upstream.forward(request, address, model.name)
            if version != VERSION:
                raise BadRequest(f"{model.name} has no version {version}: it has version {VERSION}")
        headers = {"x-modelium-state": model.state}
        if model.state in NOT_SERVABLE:
            return json_answer({"error": f"{model.name} is {model.state}: {model.reason}"}, 400, headers)
        return web.Response(headers=headers, content_type="text/plain")

    async def statistics(self, request: web.Request) -> web.StreamResponse:
        model = self._repository.loaded(request.match_info["model"])
        if (address := self._repository.address_of(model)) is not None:
            return await self._upstream.forward(request, address, model.name)
        version = request.match_info.get("version", "")
        return json_answer({"model_stats": [self._repository.counted(model.name, version)]})

    async def all_statistics(self, request: web.Request) -> web.StreamResponse:
        """What each runtime tells of its models, in one list, and what is counted here of those that none tells of."""
        found: list[Any] = []
        for info in self._repository.runtimes():
            told = await self._repository.told(info, "GET", "/v2/models/stats")
            try:
                found += told["model_stats"]
            except (KeyError, TypeError):
                raise UpstreamFailed(f"{info.name} answered with no statistics: {told!r:.200}") from None
        return json_answer({"model_stats": [*found, *await self._repository.untold()]})

    async def runtime_setting(self, request: web.Request) -> web.StreamResponse:
        runtime = self._repository.only_runtime(request.path)
        return await self._upstream.forward(request, runtime.endpoint(HTTP) or "", runtime.name)

    # ------------------------------------------------------------------ the server

    async def server(self, request: web.Request) -> web.Response:
        name, version = self._repository.identity()
        return json_answer({"name": name, "version": version, "extensions": EXTENSIONS})

    async def live(self, request: web.Request) -> web.Response:
        return web.Response(content_type="text/plain")

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._service.ready() else 400, content_type="text/plain")

    # ------------------------------------------------------------------ the repository

    async def index(self, request: web.Request) -> web.Response:
        wanted = await read_object(request)
        only_ready = wanted.get("ready", False)
        if not isinstance(only_ready, bool):
            raise BadRequest(f"expected 'ready' to be true or false, found {only_ready!r:.40}")
        return json_answer(await self._repository.index(only_ready))

    async def load(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        parameters = (await read_object(request)).get("parameters", {})
        if not isinstance(parameters, dict):
            raise BadRequest("expected 'parameters' to be an object")
        deadline_s = deadline_of(request.headers, self._settings.max_deadline_s)
        await self._repository.load(name, parameters, deadline_s)
        return web.Response(content_type="application/json")

    async def unload(self, request: web.Request) -> web.Response:
        parameters = (await read_object(request)).get("parameters", {})
        if not isinstance(parameters, dict) or not isinstance(parameters.get("unload_dependents", False), bool):
            raise BadRequest("expected 'parameters' to be an object, in it at most 'unload_dependents', true or false")
        deadline_s = deadline_of(request.headers, self._settings.max_deadline_s)
        await self._repository.unload(request.match_info["model"], deadline_s)
        return web.Response(content_type="application/json")
