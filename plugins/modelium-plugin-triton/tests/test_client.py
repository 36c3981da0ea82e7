"""What calls end with when the connection goes away under them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from modelium_plugin_triton.client import TritonClient
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from modelium.errors import RuntimeUnavailable


class Silent(GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Takes calls and never answers them."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def RepositoryModelLoad(self, request: Any, context: Any) -> None:
        self.asked.set()
        await asyncio.Event().wait()


@pytest.fixture
async def silent() -> AsyncIterator[tuple[Silent, str]]:
    servicer, server = Silent(), grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_connection_that_is_closed_ends_its_calls_as_failed(silent: tuple[Silent, str]) -> None:
    servicer, address = silent
    client = TritonClient(address)
    loading = asyncio.ensure_future(client.load("m", {}))
    await servicer.asked.wait()
    await client.close()
    with pytest.raises(RuntimeUnavailable, match="closed"):
        await loading
    with pytest.raises(RuntimeUnavailable, match="closed"):
        await client.unload("m")
    assert not await client.live()


async def test_who_is_cancelled_hears_just_that(silent: tuple[Silent, str]) -> None:
    servicer, address = silent
    client = TritonClient(address)
    loading = asyncio.ensure_future(client.load("m", {}))
    await servicer.asked.wait()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await client.close()
