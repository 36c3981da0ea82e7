"""The gRPC surface: which call goes where, and how it is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from modelium.core.states import State
from modelium.errors import ConfigError, ModeliumError, ModelNotFound
from modelium.http.admission import GRPC, deadline_of
from modelium.http.answers import REQUEST_ID, BadRequest, NotSupported, request_id
from modelium.http.inference import Inference
from modelium.http.interfaces import VERSION
from modelium.http.over_openai import OverOpenAI
from modelium.http.repository import EXTENSIONS, NOT_SERVABLE, ModelRepository
from modelium.http.rpc.channels import OPTIONS, Channels
from modelium.http.rpc.composed import Composed, made, parsed
from modelium.http.rpc.passing import Context, Passing, metadata_of
from modelium.http.rpc.status import end, refuse
from modelium.http.settings import MAX_METADATA_BYTES, SOCKET_MODE, HttpSettings
from modelium.http.streams import Streams
from modelium.http.upstream import Upstream

if TYPE_CHECKING:
    from modelium.engine.service import Service

log = logging.getLogger(__name__)

INFERENCE = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/"
"""https://github.com/grpc/grpc/blob/master/doc/health-checking.md"""

Unary = Callable[[bytes, Context], Awaitable[bytes]]

_RUNTIMES_OWN = (
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
)  # fmt: skip


class Rpc(grpc.GenericRpcHandler):  # type: ignore[misc]  # gRPC brings no types
    """Every method of `GRPCInferenceService`, and of the health service."""

    def __init__(self, service: Service, settings: HttpSettings, repository: ModelRepository, passing: Passing):
        from tritonclient.grpc import service_pb2

        self._pb: Any = service_pb2
        self._service = service
        self._settings = settings
        self._repository = repository
        self._passing = passing
        unary: dict[str, Unary] = {
            "ServerLive": self.live,
            "ServerReady": self.ready,
            "ServerMetadata": self.server,
            "ModelReady": self.model_ready,
            "ModelStatistics": self.statistics,
            "RepositoryIndex": self.index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
        }
        for name in ("ModelInfer", "ModelMetadata", "ModelConfig"):
            unary[name] = self._to_model(INFERENCE + name)
        for name in _RUNTIMES_OWN:
            unary[name] = self._to_runtime(INFERENCE + name)
        stall_s = settings.client_stall_s
        self._handlers = {
            INFERENCE + name: grpc.stream_unary_rpc_method_handler(_guarded(method, stall_s))
            for name, method in unary.items()
        }
        self._handlers[INFERENCE + "ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream)
        self._handlers[HEALTH + "Check"] = grpc.stream_unary_rpc_method_handler(_guarded(self.check, stall_s))

    def service(self, handler_call_details: Any) -> Any:
        return self._handlers.get(handler_call_details.method)

    # ------------------------------------------------------------------ bound to a model

    def _to_model(self, method: str) -> Unary:
        async def call(message: bytes, context: Context) -> bytes:
            return await self._passing.unary(method, message, context)

        return call

    async def stream(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for answer in self._passing.stream(INFERENCE + "ModelStreamInfer", messages, context):
            yield answer

    # ------------------------------------------------------------------ no use of a model

    async def model_ready(self, message: bytes, context: Context) -> bytes:
        """True when a request would be answered, if need be after a load; a version is asked of the runtime."""
        asked = parsed("ModelReadyRequest", message)
        try:
            model = self._service.view(asked.name)
        except ModelNotFound:
            return self._made("ModelReadyResponse", ready=False)
        if model.state == State.READY and asked.version:
            if (address := self._repository.address_of(model, GRPC)) is not None:
                return await self._passing.forward(address, INFERENCE + "ModelReady", message, context, model.name)
            return self._made("ModelReadyResponse", ready=asked.version == VERSION)
        return self._made("ModelReadyResponse", ready=model.state not in NOT_SERVABLE)

    async def statistics(self, message: bytes, context: Context) -> bytes:
        method = INFERENCE + "ModelStatistics"
        asked = parsed("ModelStatisticsRequest", message)
        if asked.name:
            model = self._repository.loaded(asked.name)
            if (address := self._repository.address_of(model, GRPC)) is not None:
                return await self._passing.forward(address, method, message, context, model.name)
            counted = [self._repository.counted(model.name, asked.version)]
            return bytes(made("ModelStatisticsResponse", {"model_stats": counted}).SerializeToString())
        found = made("ModelStatisticsResponse", {"model_stats": await self._repository.untold(GRPC)})
        for info in self._repository.runtimes(GRPC):
            answer = await self._passing.forward(info.endpoint(GRPC) or "", method, message, context, info.name)
            found.MergeFromString(answer)
        return bytes(found.SerializeToString())

    def _to_runtime(self, method: str) -> Unary:
        async def call(message: bytes, context: Context) -> bytes:
            runtime = self._repository.only_runtime(method, GRPC)
            return await self._passing.forward(runtime.endpoint(GRPC) or "", method, message, context, runtime.name)

        return call

    # ------------------------------------------------------------------ the server

    async def live(self, message: bytes, context: Context) -> bytes:
        return self._made("ServerLiveResponse", live=True)

    async def ready(self, message: bytes, context: Context) -> bytes:
        return self._made("ServerReadyResponse", ready=self._service.ready())

    async def server(self, message: bytes, context: Context) -> bytes:
        name, version = self._repository.identity(GRPC)
        return self._made("ServerMetadataResponse", name=name, version=version, extensions=EXTENSIONS)

    async def check(self, message: bytes, context: Context) -> bytes:
        """Of the server, or of a model named as the service."""
        from grpc_health.v1 import health_pb2 as pb

        name = pb.HealthCheckRequest.FromString(message).service
        serving = self._service.ready()
        if name and name != INFERENCE.strip("/"):
            try:
                serving = self._service.view(name).state not in NOT_SERVABLE
            except ModelNotFound:
                await end(context, grpc.StatusCode.NOT_FOUND, f"there is no model named {name}")
        status = pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
        return bytes(pb.HealthCheckResponse(status=status).SerializeToString())

    # ------------------------------------------------------------------ the repository

    async def index(self, message: bytes, context: Context) -> bytes:
        asked = self._about_repository("RepositoryIndexRequest", message)
        entry = self._pb.RepositoryIndexResponse.ModelIndex
        models = [entry(**found) for found in await self._repository.index(asked.ready)]
        return self._made("RepositoryIndexResponse", models=models)

    async def load(self, message: bytes, context: Context) -> bytes:
        asked = self._about_repository("RepositoryModelLoadRequest", message)
        parameters = {
            key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in asked.parameters.items()
        }
        await self._repository.load(asked.model_name, parameters, self._deadline_s(context))
        return self._made("RepositoryModelLoadResponse")

    async def unload(self, message: bytes, context: Context) -> bytes:
        asked = self._about_repository("RepositoryModelUnloadRequest", message)
        await self._repository.unload(asked.model_name, self._deadline_s(context))
        return self._made("RepositoryModelUnloadResponse")

    def _deadline_s(self, context: Context) -> float | None:
        asked_s = deadline_of(metadata_of(context), self._settings.max_deadline_s)
        return context.time_remaining() if asked_s is None else asked_s

    # ------------------------------------------------------------------ messages

    def _about_repository(self, kind: str, message: bytes) -> Any:
        asked = parsed(kind, message)
        if asked.repository_name:
            raise NotSupported("'repository_name' specification is not supported: there is one repository")
        return asked

    def _made(self, kind: str, **fields: Any) -> bytes:
        return bytes(getattr(self._pb, kind)(**fields).SerializeToString())


def _guarded(method: Unary, within_s: float) -> Callable[[Any, Context], Awaitable[bytes]]:
    """Errors become statuses; what nobody expected is logged once under the id that the call has, or is given.

    The one message is read here, and must come within `within_s`: by gRPC's own reading a call without one is never
    answered (1.85).
    """

    async def call(_: Any, context: Context) -> bytes:
        try:
            try:
                async with asyncio.timeout(within_s):
                    message = await context.read()
            except TimeoutError:
                raise BadRequest(f"no message came within {within_s:g} s") from None
            if message is grpc.aio.EOF:
                raise BadRequest("expected one message, found none, or not all of it")
            return await method(message, context)
        except ModeliumError as exc:
            await refuse(context, exc)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None  # the client has left: nobody hears it
        except Exception:
            id = request_id(metadata_of(context).get(REQUEST_ID.lower()))
            log.exception("call %s failed unexpectedly", id)
            message = f"something went wrong inside Modelium; its log tells more under request {id}"
            await end(context, grpc.StatusCode.INTERNAL, message)

    return call


def _read(tls: tuple[Path, Path]) -> tuple[bytes, bytes]:
    try:
        return tls[0].read_bytes(), tls[1].read_bytes()
    except OSError as exc:
        raise ConfigError(f"the certificate {tls[0]} and its key {tls[1]} can't be used: {exc}") from exc


def _address(host: str | Path, port: int) -> str:
    if isinstance(host, Path):
        host.unlink(missing_ok=True)
        return f"unix:{host}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def serving_rpc(
    service: Service,
    settings: HttpSettings,
    upstream: Upstream,
    channels: Channels,
    host: str | Path,
    port: int = 0,
    *,
    socket: Path | None = None,
    tls: tuple[Path, Path] | None = None,
    grace_s: float = 10.0,
) -> AsyncIterator[int]:
    """Serve gRPC while the context lasts; gives the port bound. Raises `ConfigError` when it can't be.

    A path as `host` is a Unix socket; `socket` is one besides. `tls` is a certificate with its key, both PEM.
    """
    options = dict(OPTIONS) | {
        "grpc.so_reuseport": 0,
        "grpc.max_metadata_size": MAX_METADATA_BYTES,
        "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
    }
    if settings.max_body_bytes is not None:
        options["grpc.max_receive_message_length"] = min(settings.max_body_bytes, 2**31 - 1)
    server = grpc.aio.server(options=tuple(options.items()))
    composed = Composed(Inference(upstream, Streams(channels), OverOpenAI(service, upstream)))
    passing = Passing(service, settings, channels, composed)
    server.add_generic_rpc_handlers((Rpc(service, settings, ModelRepository(service, upstream), passing),))
    try:
        if socket is not None:
            server.add_insecure_port(_address(socket, 0))
        if tls is None:
            bound = server.add_insecure_port(_address(host, port))
        else:
            certificate, key = await asyncio.to_thread(_read, tls)
            bound = server.add_secure_port(_address(host, port), grpc.ssl_server_credentials([(key, certificate)]))
    except RuntimeError as exc:
        raise ConfigError(
            f"port {port} on {host} can't be bound for gRPC: end what uses it, or choose another with --grpc-port",
            code="address",
        ) from exc
    await server.start()
    for path in (host, socket):
        if isinstance(path, Path):
            path.chmod(SOCKET_MODE)
    try:
        yield bound
    finally:
        await server.stop(grace_s)
