"""Triton's gRPC calls that managing it takes. Loads go this way: many at once freeze its HTTP front."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from modelium.errors import DriverError, RuntimeUnavailable

T = TypeVar("T")

RECONNECT_MS = 100

NOT_EXPLICIT = "explicit model load / unload is not allowed"
"""Triton's answer to load and unload outside of explicit mode (core/src/model_repository_manager)."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """A version of a model in the repository index; state and version are empty while it was never loaded."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Counted:
    """A live version of a model, with the requests that it has finished."""

    name: str
    version: str
    requests: int


class CallFailed(Exception):
    """Triton answered a call with an error of its own."""

    def __init__(self, code: grpc.StatusCode, details: str):
        super().__init__(details)
        self.code = code
        self.details = details


class TritonClient:
    """One connection to one server. Calls raise `RuntimeUnavailable` when it can't be reached, else `CallFailed`."""

    def __init__(self, address: str):
        self.address = address
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # a server that starts is awaited: the usual wait after a refused connection is a second, and grows
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.min_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", 10 * RECONNECT_MS),
        ]
        if address.startswith("grpcs://"):
            target, credentials = address.removeprefix("grpcs://"), grpc.ssl_channel_credentials()
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(address.removeprefix("grpc://"), options)
        self._stub = GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def live(self, timeout_s: float = 2) -> bool:
        """Whether it answers within `timeout_s`."""
        try:
            answer = await self._stub.ServerLive(pb.ServerLiveRequest(), timeout=timeout_s)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return False
        return bool(answer.live)

    async def metadata(self) -> tuple[str, str, tuple[str, ...]]:
        """The server's name (`--id`), version and extensions."""
        answer = await self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest(), 10)
        return answer.name, answer.version, tuple(answer.extensions)

    async def index(self) -> list[Indexed]:
        """What lies in the repository, with the states of what was ever loaded. Slower with more folders: 4 us each."""
        answer = await self._call(self._stub.RepositoryIndex, pb.RepositoryIndexRequest(), 30)
        return [Indexed(m.name, m.version, m.state, m.reason) for m in answer.models]

    async def statistics(self) -> list[Counted]:
        """What serves now, models that are not in the index included; what is loading or unloading is not in it."""
        answer = await self._call(self._stub.ModelStatistics, pb.ModelStatisticsRequest(), 10)
        return [
            Counted(m.name, m.version, m.inference_stats.success.count + m.inference_stats.fail.count)
            for m in answer.model_stats
        ]

    async def ready(self, name: str) -> bool:
        answer = await self._call(self._stub.ModelReady, pb.ModelReadyRequest(name=name), 10)
        return bool(answer.ready)

    async def backend(self, name: str, version: str = "") -> tuple[str, int]:
        """The backend of a loaded model, empty for an ensemble, and how many instances of it there are."""
        request = pb.ModelConfigRequest(name=name, version=version)
        config = (await self._call(self._stub.ModelConfig, request, 10)).config
        return str(config.backend), sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Returns when it is loaded. Triton goes on with it even when nobody waits any more, so there is no timeout."""
        request = pb.RepositoryModelLoadRequest(model_name=name)
        for key, value in parameters.items():
            set_parameter(request.parameters[key], key, value)
        await self._call(self._stub.RepositoryModelLoad, request)

    async def unload(self, name: str) -> None:
        """Returns when Triton has begun with it; waits for a load of that model that is under way."""
        await self._call(self._stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=name))

    async def _call(self, method: Callable[..., Awaitable[T]], request: Any, timeout_s: float | None = None) -> T:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.UsageError as error:
            raise self._unreachable("the connection was closed") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise self._unreachable("the connection was closed") from error  # so gRPC ends what was under way
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise RuntimeUnavailable(f"Triton at {self.address} did not answer in time") from error
            # The same code says that nobody answers and that the server can't do this: then it lives.
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) and not await self.live():
                raise self._unreachable(details) from error
            raise CallFailed(code, details) from error

    def _unreachable(self, why: str) -> RuntimeUnavailable:
        return RuntimeUnavailable(f"Triton at {self.address} can't be reached: {why}")


def set_parameter(target: Any, key: str, value: Any) -> None:
    """Write one load parameter as Triton takes it (model repository extension): `config` as JSON text, files as bytes.

    Raises `DriverError` for a value of another kind.
    """
    if key.startswith("file:"):
        target.bytes_param = base64.b64decode(value) if isinstance(value, str) else bytes(value)
    elif isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        target.int64_param = value
    elif isinstance(value, str):
        target.string_param = value
    elif isinstance(value, dict | list):
        target.string_param = json.dumps(value)
    else:
        raise DriverError(
            f"load parameter {key!r}: expected text, a number, true or false, or an object; found {value!r}"
        )
