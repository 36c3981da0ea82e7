"""gRPC channels to runtimes, one for each address, opened when first needed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

DROP_GRACE_S = 60.0
"""For calls that are still under way on a channel that is let go of."""

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # the runtime's own limit counts
    ("grpc.max_metadata_size", 2**20),
    ("grpc.absolute_max_metadata_size", 2**20),
    # else a new channel to an address waits as long as the last one that failed to reach it
    ("grpc.use_local_subchannel_pool", 1),
)


_LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
_CONNECTION = re.compile(
    "failed to connect|connections to all backends|stream removed|socket closed|rst_stream|goaway|recvmsg|sendmsg|"
    "connection reset|connection refused|broken pipe|endpoint closing|end of tcp stream|http2 header with status|"
    "resolv|resolution|handshake|fd shutdown|keepalive|ping timeout|cancelling all calls|locally cancelled|"
    "channel (is )?closed",
    re.IGNORECASE,
)
"""What gRPC itself says of a connection that was lost, under the statuses above (1.85); a runtime that ends a call with
one of these statuses has words of its own, and nothing else tells the two apart."""


def lost(exc: grpc.aio.AioRpcError) -> bool:
    """Whether a call ended with its connection, not by the runtime's own decision."""
    return exc.code() in _LOST and _CONNECTION.search(exc.details() or "") is not None


class Channels:
    """Calls take and give messages as the bytes that they are."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}
        self._dropping: set[asyncio.Task[None]] = set()

    def unary(self, address: str, method: str) -> Callable[..., Any]:
        """A function that calls `method` (`/package.Service/Name`) with one message for one message."""
        return self._call(address, method, "unary_unary")

    def stream(self, address: str, method: str) -> Callable[..., Any]:
        """The same with streams both ways."""
        return self._call(address, method, "stream_stream")

    def _call(self, address: str, method: str, kind: str) -> Callable[..., Any]:
        call = self._calls.get((address, method))
        if call is None:
            call = self._calls[address, method] = getattr(self._channel(address), kind)(method)
        return call

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            if address.startswith("grpcs://"):
                target = address.removeprefix("grpcs://")
                channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), OPTIONS)
            else:
                channel = grpc.aio.insecure_channel(address.removeprefix("grpc://"), OPTIONS)
            self._channels[address] = channel
        return channel

    def drop(self, address: str) -> None:
        """Let go of an address where nobody answers: its runtime may never come back there."""
        for key in [key for key in self._calls if key[0] == address]:
            del self._calls[key]
        channel = self._channels.pop(address, None)
        if channel is not None:
            task = asyncio.ensure_future(channel.close(DROP_GRACE_S))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)

    async def close(self) -> None:
        """Calls under way are cancelled."""
        for task in self._dropping:
            task.cancel()
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
        self._calls.clear()
