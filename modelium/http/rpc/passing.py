"""Calls about one model, passed on to its runtime; the model is loaded first when it has to be.

What is sent is sent once, as over HTTP: a runtime that is lost while it works on a call is the client's to hear of.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from modelium.engine.admission import Lease
from modelium.errors import ModeliumError, RuntimeUnavailable
from modelium.http.admission import DEADLINE, GRPC, acquire, endpoint
from modelium.http.answers import REQUEST_ID, BadRequest, UpstreamFailed, check_process, request_id, unreachable
from modelium.http.rpc.channels import Channels, lost
from modelium.http.rpc.composed import Composed
from modelium.http.rpc.status import end, refuse
from modelium.http.rpc.wire import text_field
from modelium.http.settings import HttpSettings
from modelium.http.streams import InferenceFailed

if TYPE_CHECKING:
    from modelium.engine.service import Service

Context = Any
"""A `grpc.aio.ServicerContext`: gRPC brings no types."""

_ID = REQUEST_ID.lower()

AT_ONCE = 256
"""Messages of one stream that are answered here at a time: what vLLM computes at once by default."""

_OF_THE_CONNECTION = ("grpc-", "content-type", "te", "user-agent")
"""Beginnings of metadata that speak of one connection, or that every client sets for itself."""


class Passing:
    def __init__(self, service: Service, settings: HttpSettings, channels: Channels, composed: Composed):
        self._service = service
        self._settings = settings
        self._channels = channels
        self._composed = composed

    # ------------------------------------------------------------------ one message for one

    async def unary(self, method: str, message: bytes, context: Context) -> bytes:
        """A call on the model that is named in the message's first field."""
        try:
            lease = await self.lease(message, context)
        except ModeliumError as exc:
            await refuse(context, exc)
        ok = True  # also when the client leaves: that is no failure of the model's
        try:
            if GRPC not in lease.endpoints:
                metadata = dict(passed_on(context))
                answer = await self._composed.answer(method, message, lease, metadata)
                await context.send_initial_metadata(((_ID, metadata[_ID]),))
                return answer
            return await self.forward(endpoint(lease, GRPC), method, message, context, lease.model)
        except (UpstreamFailed, RuntimeUnavailable) as exc:
            ok = False
            self._service.poke(lease.runtime)
            await refuse(context, exc)
        except InferenceFailed as exc:
            ok = exc.status < 500
            await refuse(context, exc)
        except ModeliumError as exc:
            await refuse(context, exc)
        finally:
            lease.release(ok=ok)

    async def lease(self, message: bytes, context: Context) -> Lease:
        """A hold on the model that a message names, loaded first when it is not ready."""
        headers = metadata_of(context)
        left_s = context.time_remaining()
        if left_s is not None:
            headers = {DEADLINE: repr(max(0.0, left_s)), **headers}
        return await acquire(self._service, self._settings, headers, name_in(message))

    async def forward(self, address: str, method: str, message: bytes, context: Context, model: str) -> bytes:
        """Pass on a call and its answer, metadata and status included. `model` is for messages."""
        metadata = passed_on(context)
        call = self._channels.unary(address, method)(message, timeout=context.time_remaining(), metadata=metadata)
        try:
            answer: bytes = await call
        except grpc.aio.AioRpcError as exc:
            await self._failed(exc, address, context, model)
        initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
        await context.send_initial_metadata((*initial, *(pair for pair in metadata if pair[0] == _ID)))
        if trailing:
            context.set_trailing_metadata(tuple(trailing))
        return answer

    async def _failed(self, exc: grpc.aio.AioRpcError, address: str, context: Context, model: str) -> None:
        code, details = exc.code(), exc.details() or ""
        if lost(exc):
            if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
                self._channels.drop(address)
                raise unreachable(model, address, details) from exc
            raise UpstreamFailed(
                f"the runtime of {model} at {address} took the call and did not answer ({details})"
            ) from exc
        check_process(details.encode(), model)
        await end(context, code, details, tuple(exc.trailing_metadata() or ()))

    # ------------------------------------------------------------------ streams

    async def stream(self, method: str, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """`ModelStreamInfer`: each message names its model; all that are passed on are of one runtime.

        The models are held until the stream ends. What is wrong with one message is told in band, as Triton does.
        """
        leases: dict[str, Lease] = {}
        answers: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(1)
        incoming: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        upstream: asyncio.Task[None] | None = None
        here: set[asyncio.Task[None]] = set()
        ok = True

        async def pump(address: str) -> None:
            """Everything that the runtime answers."""

            async def feed() -> AsyncIterator[bytes]:
                while (message := await incoming.get()) is not None:
                    yield message

            call = self._channels.stream(address, method)(
                feed(), timeout=context.time_remaining(), metadata=passed_on(context)
            )
            try:
                async for answer in call:
                    await answers.put(answer)
                await answers.put(None)
            except BaseException as exc:
                call.cancel()
                if isinstance(exc, asyncio.CancelledError):
                    raise
                await answers.put(exc)

        async def answer_here(message: bytes, lease: Lease, number: int) -> None:
            try:
                composed = self._composed.responses(message, lease, dict(passed_on(context)), number)
                async with aclosing(composed) as responses:
                    async for response in responses:
                        await answers.put(response)
            except Exception as exc:
                await answers.put(exc)

        async def read() -> None:
            nonlocal upstream
            number = 0
            async for message in messages:
                try:
                    lease = await self._let_in(message, context, leases)
                except ModeliumError as exc:
                    await answers.put(_in_band(message, exc))
                    continue
                if GRPC not in lease.endpoints:
                    while len(here) >= AT_ONCE:
                        await asyncio.wait(here, return_when=asyncio.FIRST_COMPLETED)
                    task = asyncio.ensure_future(answer_here(message, lease, number))
                    here.add(task)
                    task.add_done_callback(here.discard)
                    number += 1
                    continue
                if upstream is None:
                    upstream = asyncio.ensure_future(pump(endpoint(lease, GRPC)))
                await incoming.put(message)
            if here:
                await asyncio.wait(here)
            if upstream is None:
                await answers.put(None)
            else:
                await incoming.put(None)

        reading = asyncio.ensure_future(read())
        try:
            while True:
                answer = await answers.get()
                if answer is None:
                    return
                if isinstance(answer, grpc.aio.AioRpcError):
                    ok = not lost(answer)
                    address = next(lease.endpoints[GRPC] for lease in leases.values() if GRPC in lease.endpoints)
                    await self._failed(answer, address, context, ", ".join(leases))
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    yield answer
        except (UpstreamFailed, RuntimeUnavailable) as exc:
            ok = False
            await refuse(context, exc)
        finally:
            for task in (reading, upstream, *here):
                if task is not None:
                    task.cancel()
            for lease in leases.values():
                if not ok:
                    self._service.poke(lease.runtime)
                lease.release(ok=ok)

    async def _let_in(self, message: bytes, context: Context, leases: dict[str, Lease]) -> Lease:
        """Whose a message of a stream is. The first that names a model takes hold of it."""
        name = name_in(message)
        lease = leases.get(name)
        if lease is None:
            before = next((one for one in leases.values() if GRPC in one.endpoints), None)
            lease = await self.lease(message, context)
            try:
                if GRPC in lease.endpoints:
                    address = endpoint(lease, GRPC)
                    if before is not None and before.endpoints[GRPC] != address:
                        raise BadRequest(
                            f"{name} is served by {lease.runtime}, and this stream began with {before.model} on "
                            f"{before.runtime}: one stream goes to one runtime, so open another for {name}"
                        )
            except ModeliumError:
                lease.release()
                raise
            leases[name] = lease
        return lease


def name_in(message: bytes) -> str:
    try:
        name = text_field(message, 1)
    except ValueError as exc:
        raise BadRequest(f"expected a message of the inference protocol, found something else: {exc}") from None
    if not name:
        raise BadRequest("expected the name of a model, found none")
    return name


def metadata_of(context: Context) -> dict[str, str]:
    """The call's metadata that is text."""
    found: Any = context.invocation_metadata() or ()
    return {key: value for key, value in found if isinstance(value, str)}


def passed_on(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    """The call's metadata for the runtime, with an id of the request, made where the client gave none."""
    found: Any = context.invocation_metadata() or ()
    kept = [(key, value) for key, value in found if key != _ID and not key.startswith(_OF_THE_CONNECTION)]
    given = next((value for key, value in found if key == _ID), None)
    return (*kept, (_ID, request_id(given)))


def _in_band(message: bytes, error: ModeliumError) -> bytes:
    from tritonclient.grpc import service_pb2 as pb

    try:
        name, id = text_field(message, 1), text_field(message, 3)
    except ValueError:
        name = id = ""
    response = pb.ModelInferResponse(model_name=name, id=id)
    return bytes(pb.ModelStreamInferResponse(error_message=error.message, infer_response=response).SerializeToString())
