"""The model repository extension, whatever protocol asks: index, load and unload, over all runtimes together.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import modelium
from modelium.api import RuntimeInfo
from modelium.core.states import RuntimeState, State
from modelium.engine.views import ModelView
from modelium.errors import LoadRejected, ModelError, ModelFailed, ModeliumError, ModelNotFound, RuntimeUnavailable
from modelium.http.admin import views
from modelium.http.admission import HTTP
from modelium.http.answers import BadRequest, NotSupported, UpstreamFailed
from modelium.http.interfaces import VERSION
from modelium.http.upstream import Upstream

if TYPE_CHECKING:
    from modelium.engine.service import Service

EXTENSIONS = (
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
    "statistics", "trace", "logging",
)  # fmt: skip
"""What the server's metadata names, in the order in which Triton names them."""

INDEX_STATES: Mapping[str, str] = {
    State.QUEUED: "LOADING",
    State.LOADING: "LOADING",
    State.RECOVERING: "LOADING",
    State.READY: "READY",
    State.DRAINING: "UNLOADING",
    State.PARKING: "UNLOADING",
    State.UNLOADING: "UNLOADING",
}
"""In Triton's words; every other state is UNAVAILABLE."""

ALL_S = 10.0
"""For what one runtime contributes to an answer about all."""

LOADED = frozenset({State.READY, State.DRAINING})

PARTS = ("queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
"""What Triton's statistics tell besides."""

NOT_SERVABLE = frozenset({State.DISCOVERED, State.INVALID, State.FAILED})
"""States in which a request would not be answered, now or after waiting."""


_OWN = ("modelium", modelium.__version__)


class Refused(BadRequest):
    code = "load_refused"


class ModelRepository:
    def __init__(self, service: Service, upstream: Upstream):
        self._service = service
        self._upstream = upstream
        self._identity = _OWN

    async def index(self, only_ready: bool) -> list[dict[str, str]]:
        """An entry for each model, with each loaded version: `name`, `state`, and where there is one `version` and
        `reason`."""
        versions = await self._versions()
        telling = {info.name for info in self.runtimes()}
        entries: list[dict[str, str]] = []
        async for model in views(self._service):
            state = INDEX_STATES.get(model.state, "UNAVAILABLE")
            if "/" in model.name or (only_ready and state != "READY"):
                continue  # a name with a slash is a drop that is no model yet
            entry = {"name": model.name, "state": state}
            if state != "READY":
                entry["reason"] = model.reason
            untold = "" if model.runtime in telling else VERSION
            for version in versions.get(model.name, [untold]) if state == "READY" else [""]:
                entries.append({**entry, "version": version} if version else entry)
        return entries

    async def load(self, name: str, parameters: Mapping[str, Any], deadline_s: float | None) -> None:
        """Return when it is loaded; the parameter `config` overrides the configuration, as in Triton.

        Raises `Refused` for what will not load as it is; Triton calls that the request's fault too.
        """
        if files := [key for key in parameters if key.startswith("file:")]:
            raise BadRequest(
                f"{files[0]!r} would load {name} from the request, and models are served from the repository only: "
                "put the files there, or add them with `modelium add`"
            )
        config = parameters.get("config")
        if config is not None and not isinstance(config, str):
            raise BadRequest(f"expected 'config' to be a text that holds JSON, found {type(config).__name__}")
        try:
            await self._service.load(name, deadline_s=deadline_s, parameters=parameters)
        except ModeliumError as exc:
            if not isinstance(exc, ModelFailed | LoadRejected) and exc.code != ModelError.code:
                raise
            raise Refused(exc.message, retry_after_s=exc.retry_after_s, **exc.fields) from exc

    async def unload(self, name: str, deadline_s: float | None = None) -> None:
        """Return when it is unloaded. A model that is not there is unloaded already, as Triton has it.

        Parts of an ensemble go when nobody uses them, so Triton's `unload_dependents` changes nothing.
        """
        with contextlib.suppress(ModelNotFound):
            await self._service.unload(name, deadline_s=deadline_s)

    # ------------------------------------------------------------------ runtimes

    def identity(self, protocol: str = HTTP) -> tuple[str, str]:
        """Name and version as the server's metadata tells them: those of the runtime behind it where there is but one,
        for clients that look which server they talk to."""
        runtimes = self.runtimes(protocol)
        if len(runtimes) == 1:
            self._identity = runtimes[0].name, runtimes[0].version
        elif runtimes:
            self._identity = _OWN
        return self._identity  # while none is up: as it was

    def runtimes(self, protocol: str = HTTP) -> list[RuntimeInfo]:
        """Those that are up and speak `protocol`."""
        return [
            v.info
            for v in self._service.runtimes
            if v.state == RuntimeState.UP and v.info is not None and v.info.endpoint(protocol)
        ]

    def only_runtime(self, what: str, protocol: str = HTTP) -> RuntimeInfo:
        """The one that `what` is about: shared memory, trace and logging are passed on where there is no doubt."""
        runtimes = self.runtimes(protocol)
        if len(runtimes) != 1:
            names = ", ".join(info.name for info in runtimes) or "none"
            raise NotSupported(
                f"{what} is a runtime's own, and passed on where exactly one runtime speaks {protocol}; up are: {names}"
            )
        return runtimes[0]

    def loaded(self, name: str) -> ModelView:
        """A model that is loaded; `BadRequest` where it is not."""
        model = self._service.view(name)
        if model.state not in LOADED:
            raise BadRequest(f"{model.name} is {model.state}: only a loaded model has statistics")
        return model

    def address_of(self, model: ModelView, protocol: str = HTTP) -> str | None:
        """Where a loaded model's runtime tells of it; None where it speaks other protocols."""
        route = self._service.route(model.name)
        if route is not None:
            return route.endpoints.get(protocol)
        for runtime in self._service.runtimes:  # it is draining
            if runtime.name == model.runtime and runtime.state == RuntimeState.UP and runtime.info is not None:
                return runtime.info.endpoint(protocol)
        raise RuntimeUnavailable(f"the runtime {model.runtime} is not up")

    def counted(self, name: str, version: str = "") -> dict[str, Any]:
        """Statistics of a model that its runtime tells none of, by our own counts: all that was asked since we started.

        Times are those of requests that passed through the service, as if all had taken as long.
        """
        if version not in ("", VERSION):
            raise BadRequest(f"{name} has no version {version}: it has version {VERSION}")
        usage = self._service.usage.model(name)
        mean_ns = usage.latency.sum * 1e9 / max(1, sum(usage.latency.counts))
        succeeded = usage.requests - usage.in_flight - usage.failures

        def spent(count: int) -> dict[str, int]:
            return {"count": count, "ns": round(count * mean_ns)}

        success = spent(succeeded)
        return {
            "name": name, "version": VERSION, "last_inference": round(usage.last_used * 1000),
            "inference_count": succeeded, "execution_count": succeeded,
            "inference_stats": {"success": success, "fail": spent(usage.failures), **dict.fromkeys(PARTS, spent(0))},
            "batch_stats": [],
        }  # fmt: skip

    async def untold(self, protocol: str = HTTP) -> list[dict[str, Any]]:
        """`counted` of all loaded models whose runtimes do not speak `protocol`."""
        telling = {info.name for info in self.runtimes(protocol)}
        return [
            self.counted(model.name)
            async for model in views(self._service)
            if model.state in LOADED and model.runtime not in telling
        ]

    async def told(self, info: RuntimeInfo, method: str, path: str, body: bytes | None = None) -> Any:
        """What one runtime contributes, as JSON, to an answer about all. Errors as those of `Upstream.ask`."""
        try:
            async with asyncio.timeout(ALL_S):
                status, _, answer = await self._upstream.ask(
                    method, f"{info.endpoint(HTTP)}{path}", info.name, body=body
                )
            if status != 200:
                raise UpstreamFailed(f"{info.name} answered {status} to {path}: {answer[:200]!r}")
            return json.loads(answer)
        except TimeoutError:
            raise UpstreamFailed(f"{info.name} did not answer {path} within {ALL_S:g} s") from None
        except ValueError:
            raise UpstreamFailed(f"{info.name} answered {path} with no JSON: {answer[:200]!r}") from None

    async def _versions(self) -> dict[str, list[str]]:
        """The loaded versions of each model, where its runtime tells."""
        versions: dict[str, list[str]] = {}
        for info in self.runtimes():
            try:
                entries = await self.told(info, "POST", "/v2/repository/index", b'{"ready":true}')
            except (UpstreamFailed, RuntimeUnavailable):
                continue
            for entry in entries:
                if entry.get("version"):
                    versions.setdefault(entry["name"], []).append(entry["version"])
        return versions
