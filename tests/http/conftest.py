from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
import uvloop
from grpc_health.v1 import health_pb2_grpc
from tritonclient.grpc import service_pb2_grpc

from modelium.http.app import build_app, serving
from modelium.http.rpc.channels import Channels
from modelium.http.rpc.server import serving_rpc
from modelium.http.settings import HttpSettings
from modelium.http.upstream import Upstream
from tests.http.fakes import FakeService
from tests.http.tritonserver import DECOUPLED, NAMES, Triton, running
from tests.http.upstreams import Recorder, recording


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The service runs on uvloop; where connections end in strange ways, its tests run on both loops."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.name == "test_passing.py":
        factories["asyncio"] = asyncio.new_event_loop
    return factories


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A signal does not wake uvloop, so a test that hangs is ended by a thread."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(120, method="thread"))


@dataclass
class Surface:
    """The surface over a fake service, served on `url`, and a client that does nothing by itself."""

    url: str
    service: FakeService
    client: aiohttp.ClientSession


@dataclass
class Rpc:
    """The gRPC surface over the fake service."""

    address: str
    stub: Any
    health: Any


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def settings() -> HttpSettings:
    return HttpSettings(heartbeat_s=0.05, connect_timeout_s=2.0)


@pytest.fixture
async def surface(service: FakeService, settings: HttpSettings) -> AsyncIterator[Surface]:
    app = build_app(service, settings)  # type: ignore[arg-type]  # the same facade
    async with (
        serving(app, "127.0.0.1", 0, grace_s=0.1) as (host, port),
        aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()) as client,
    ):
        yield Surface(f"http://{host}:{port}", service, client)


@pytest.fixture
async def rpc(service: FakeService, settings: HttpSettings) -> AsyncIterator[Rpc]:
    upstream, channels = Upstream(settings), Channels()
    await upstream.open()
    serving = serving_rpc(service, settings, upstream, channels, "127.0.0.1", 0, grace_s=0.1)  # type: ignore[arg-type]
    async with serving as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Rpc(
            f"127.0.0.1:{port}",
            service_pb2_grpc.GRPCInferenceServiceStub(channel),
            health_pb2_grpc.HealthStub(channel),
        )
    await upstream.close()
    await channels.close()


@pytest.fixture
async def upstream(service: FakeService) -> AsyncIterator[Recorder]:
    """A recording runtime, with a model `m` READY in it."""
    async with recording() as recorder:
        service.runtime(kserve_http=recorder.url)
        service.add("m")
        yield recorder


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """A real tritonserver with the models of `tritonserver` loaded."""
    with running(tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture
def real(service: FakeService, triton: Triton) -> Triton:
    """The fake service with the real runtime behind it, all models READY."""
    service.runtime(kserve_http=triton.url, kserve_grpc=triton.grpc)
    for name in NAMES:
        service.add(name, decoupled=name in DECOUPLED)
    return triton
