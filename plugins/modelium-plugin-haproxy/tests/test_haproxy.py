"""Against a real HAProxy: what goes straight, what goes by the service, what is counted, and what outlives us."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from aiohttp import web
from modelium_plugin_haproxy.configuration import entries
from modelium_plugin_haproxy.driver import HAProxyDriver
from modelium_plugin_haproxy.locate import find_executable, version_of
from modelium_plugin_haproxy.plugin import HAProxyDataPath
from modelium_plugin_haproxy.settings import HAProxySettings
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from yarl import URL

from modelium.api import DataPathContext, DataRoute, Front
from modelium.engine.processes import ProcessSupervisor
from modelium.errors import ConfigError, RuntimeUnavailable
from modelium.paths import socket_folder

JSON = {"Content-Type": "application/json"}


@dataclass
class Server:
    """An HTTP server that says who it is, and can hold requests."""

    name: str
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    held: asyncio.Event | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    ids: list[str] = field(default_factory=list)
    connections: list[str] = field(default_factory=list)
    """What each request said of its connection."""
    address: str = ""
    answer: web.Response | None = None
    product: str = "uvicorn"
    """What it calls itself."""
    delay_s: float = 0.0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.raw_path, request.headers.get("Content-Type", ""), body))
        self.ids.append(request.headers.get("X-Request-ID", ""))
        self.connections.append(request.headers.get("Connection", ""))
        self.arrived.set()
        await asyncio.sleep(self.delay_s)
        if self.held is not None:
            try:
                await self.held.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
        return self.answer or web.json_response({"by": self.name}, headers={"Server": self.product})

    async def start(self, stack: AsyncExitStack, socket: Path | None = None) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{rest:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        if socket is not None:
            socket.unlink(missing_ok=True)
            await web.UnixSite(runner, socket).start()
            return
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"


class Echo(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A gRPC server that says who it is."""

    def __init__(self, name: str):
        self.name = name
        self.address = ""
        self.held: asyncio.Event | None = None
        self.arrived = asyncio.Event()
        self.stop: Callable[[], Any] = lambda: None

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.arrived.set()
        if self.held is not None:
            await self.held.wait()
        return pb.ModelInferResponse(model_name=request.model_name, model_version=self.name)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            answer = pb.ModelInferResponse(model_name=request.model_name, model_version=self.name)
            yield pb.ModelStreamInferResponse(infer_response=answer)

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=self.name == "service")

    async def start(self, stack: AsyncExitStack, address: str) -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port(address)}"
        await server.start()
        self.stop = lambda: server.stop(0)
        stack.push_async_callback(server.stop, 0)


@dataclass
class Lab:
    root: Path
    service: Server
    runtime: Server
    grpc_runtime: Echo
    processes: ProcessSupervisor
    client: aiohttp.ClientSession
    driver: HAProxyDriver
    front: Front
    url: str = ""
    rpc_address: str = ""
    rpc: Any = None

    def another(self, **settings: Any) -> HAProxyDriver:
        """What a Modelium that is started again makes."""
        return make(self.root, self.processes, **settings)

    async def ask(self, path: str, body: bytes = b"{}", **headers: str) -> tuple[int, Any]:
        async with self.client.post(self.url + path, data=body, headers={**JSON, **headers}) as response:
            return response.status, await response.json(content_type=None)

    async def by(self, path: str, body: bytes = b"{}", **headers: str) -> str:
        return str((await self.ask(path, body, **headers))[1]["by"])

    async def counted(self) -> dict[str, tuple[int, int]]:
        return {name: (c.requests, c.in_flight) for name, c in (await self.driver.read()).items()}

    def route(self, model: str = "m", **changes: Any) -> DataRoute:
        endpoints = {
            "kserve-http": self.runtime.address,
            "kserve-grpc": self.grpc_runtime.address,
            "openai": f"{self.runtime.address}/v1",
        }
        return DataRoute(**{"model": model, "endpoints": endpoints, **changes})


def make(root: Path, processes: ProcessSupervisor, **settings: Any) -> HAProxyDriver:
    state = root / "paths" / "haproxy"
    return HAProxyDriver(
        DataPathContext(
            name="haproxy",
            state_dir=state,
            socket_dir=socket_folder(root),
            settings=HAProxySettings(**settings),
            processes=processes,
        )
    )


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    processes = ProcessSupervisor(tmp_path, state_dir=tmp_path / "processes", log_dir=tmp_path / "logs")
    sockets = socket_folder(tmp_path)
    front = Front(
        host="127.0.0.1", port=0, grpc_port=0, hosts=("127.0.0.1", "localhost"), service_http=sockets / "http.sock",
        service_grpc=sockets / "grpc.sock", client_errors=('{"error":"Unable to parse ',),
        dead="Stub process '[^']*' is not healthy|EngineDeadError",
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        service, runtime, grpc_service, grpc_runtime = Server("service"), Server("runtime"), Echo("service"), Echo("rt")
        await service.start(stack, front.service_http)
        await runtime.start(stack)
        await grpc_service.start(stack, f"unix:{front.service_grpc}")
        await grpc_runtime.start(stack, "127.0.0.1:0")
        client = await stack.enter_async_context(aiohttp.ClientSession())
        lab = Lab(tmp_path, service, runtime, grpc_runtime, processes, client, make(tmp_path, processes), front)
        stack.push_async_callback(processes.stop, "haproxy", grace_s=0)
        stack.push_async_callback(processes.stop, "haproxy-2", grace_s=0)
        info = await lab.driver.start(front)
        assert not info.adopted and info.version.startswith(("2.", "3."))
        lab.url = f"http://127.0.0.1:{info.port}"
        lab.rpc_address = f"127.0.0.1:{info.grpc_port}"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(lab.rpc_address))
        lab.rpc = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        yield lab


# --------------------------------------------------------------------------- what goes where


async def test_only_what_is_admitted_goes_straight(lab: Lab) -> None:
    assert await lab.by("/v2/models/m/infer") == "service"
    await lab.driver.admit(lab.route())
    for path in ("infer", "generate", "generate_stream", "versions/3/infer"):
        assert await lab.by(f"/v2/models/m/{path}") == "runtime"
    assert await lab.by("/v2/models/other/infer") == "service"
    await lab.driver.divert("m")
    assert await lab.by("/v2/models/m/infer") == "service"


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/m", "/v2/models/m/ready", "/v2/models/m/load", "/v2/models/m/infer/", "/v2/models/m//infer",
        "/v2/models/m/../n/infer", "/v2/models/%6d/infer", "/v2/models/m/versions/../infer", "/x/v2/models/m/infer",
        "/v2/repository/models/m/load", "/predict/m", "/models", "/", "/v2/models/m/versions/1/2/infer",
    ],
)  # fmt: skip
async def test_everything_else_is_the_services(lab: Lab, path: str) -> None:
    await lab.driver.admit(lab.route())
    await lab.client.post(lab.url, data=b"")
    async with lab.client.post(URL(lab.url + path, encoded=True), data=b"{}") as response:
        assert (await response.json())["by"] == "service"
    assert not lab.runtime.seen


async def test_other_methods_names_and_pages_are_the_services_to_judge(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    async with lab.client.get(f"{lab.url}/v2/models/m/infer") as response:
        assert (await response.json())["by"] == "service"
    assert await lab.by("/v2/models/m/infer", Origin="https://evil.example") == "service"
    assert await lab.by("/v2/models/m/infer", Host="evil.example") == "service"
    assert await lab.by("/v2/models/m/infer", Host="LOCALHOST:1234") == "runtime"


async def test_a_query_passes(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    assert await lab.by("/v2/models/m/infer?wait=0") == "runtime"
    assert lab.runtime.seen[0][0] == "/v2/models/m/infer?wait=0"


async def test_decoupled_models_are_put_together_by_the_service(lab: Lab) -> None:
    await lab.driver.admit(lab.route(decoupled=True))
    assert await lab.by("/v2/models/m/infer") == "service"
    assert await lab.by("/v2/models/m/generate_stream") == "runtime"


async def test_openai_goes_by_the_model_in_the_body(lab: Lab) -> None:
    await lab.driver.admit(lab.route("my.model"))
    asked = b'{"messages": [{"role": "user", "content": "model: other"}], "model": "my.model"}'
    assert await lab.by("/v1/chat/completions", asked) == "runtime"
    assert await lab.by("/v1/embeddings", b'{"model": "other"}') == "service"
    assert await lab.by("/v1/completions", b"no json") == "service"
    assert await lab.by("/v1/models", asked) == "service"
    long = b'{"prompt": "' + b"x" * 300_000 + b'", "model": "my.model"}'
    assert await lab.by("/v1/completions", long) in ("service", "runtime")
    assert long in (lab.service.seen[-1][2], lab.runtime.seen[-1][2])


async def test_of_a_runtime_that_speaks_openai_alone_the_service_translates_all_else(lab: Lab) -> None:
    await lab.driver.admit(lab.route(endpoints={"openai": lab.runtime.address}))
    for path in ("infer", "generate", "generate_stream", "versions/1/generate", "config"):
        assert await lab.by(f"/v2/models/m/{path}") == "service"
    asked = b'{"model": "m"}'
    for path in ("chat/completions/batch", "completions/", "responses", "rerank", "load_lora_adapter", "../sleep"):
        async with lab.client.post(URL(f"{lab.url}/v1/{path}", encoded=True), data=asked) as response:
            assert (await response.json())["by"] == "service"
    assert await lab.by("/v1/completions", b'{"model": "m:adapter"}') == "service"
    assert (await lab.rpc.ModelInfer(pb.ModelInferRequest(model_name="m"))).model_version == "service"
    assert lab.runtime.seen == []
    for path in ("chat/completions", "completions", "embeddings"):
        assert await lab.by(f"/v1/{path}", asked) == "runtime"


@pytest.mark.parametrize("product", ["uvicorn", "llama.cpp"])
async def test_a_connection_that_is_closed_without_a_word_is_not_used_again(lab: Lab, product: str) -> None:
    """As llama.cpp closes it after a stream; the client's own connection stays."""
    lab.runtime.product = product
    await lab.driver.admit(lab.route())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(lab.url.rpartition(":")[2]))
    for stream in ("false", "true", "0", "true"):
        body = b'{"model": "m", "stream": %s}' % stream.encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b'{"by": "runtime"}')
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" not in answer.lower()
    writer.close()
    assert lab.runtime.connections == (["", "close", "", "close"] if product == "llama.cpp" else [""] * 4)
    assert await lab.counted() == {"m": (4, 0)}


async def test_grpc_goes_by_the_model_in_the_message(lab: Lab) -> None:
    async def by(name: str) -> str:
        return str((await lab.rpc.ModelInfer(pb.ModelInferRequest(model_name=name))).model_version)

    assert await by("m") == "service"
    await lab.driver.admit(lab.route())
    assert (await by("m"), await by("n"), await by("m" * 200)) == ("rt", "service", "service")
    assert (await lab.rpc.ServerLive(pb.ServerLiveRequest())).live
    call = lab.rpc.ModelStreamInfer()
    for _ in range(3):
        await call.write(pb.ModelInferRequest(model_name="m", id="a long enough id"))
        assert (await call.read()).infer_response.model_version == "rt"
    await call.done_writing()
    large = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x" * 3_000_000])
    assert (await lab.rpc.ModelInfer(large)).model_version == "rt"


async def test_a_body_that_curl_calls_a_form_is_called_what_it_is(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    await lab.ask("/v2/models/m/infer", b"{}", **form)
    await lab.ask("/v2/models/m/infer", b"{}xx", **form, **{"Inference-Header-Content-Length": "2"})
    await lab.ask("/v2/models/m/infer", b"{}", **{"Content-Type": "Application/X-WWW-Form-Urlencoded; a=b"})
    kinds = [seen[1] for seen in lab.runtime.seen]
    assert kinds == ["application/json", "application/octet-stream", "application/json"]


async def test_each_request_has_an_id(lab: Lab) -> None:
    """On either way, which the runtime or the service sees and the client is told."""
    await lab.driver.admit(lab.route())
    for path, server in (("/v2/models/m/infer", lab.runtime), ("/v2/models/other/infer", lab.service)):
        for given in ("mine", ""):
            headers = {**JSON, "X-Request-ID": given}
            async with lab.client.post(lab.url + path, data=b"{}", headers=headers) as response:
                told = response.headers["X-Request-ID"]
            assert server.ids[-1] == told
            assert told == given if given else len(told) == 36
    call = lab.rpc.ModelInfer(pb.ModelInferRequest(model_name="m"), metadata=(("x-request-id", "mine"),))
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"


async def test_bodies_of_any_size_pass(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    body = os.urandom(20_000_000)
    assert await lab.by("/v2/models/m/infer", body) == "runtime"
    assert lab.runtime.seen[-1][2] == body


# --------------------------------------------------------------------------- use


async def test_use_is_counted_to_the_request(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    assert await lab.driver.read() == {}
    for _ in range(3):
        await lab.ask("/v2/models/m/infer")
    await lab.rpc.ModelInfer(pb.ModelInferRequest(model_name="m"))
    await lab.ask("/v2/models/other/infer")
    assert await lab.counted() == {"m": (4, 0)}
    lab.runtime.held, lab.runtime.arrived = asyncio.Event(), asyncio.Event()
    asking = [asyncio.ensure_future(lab.ask("/v2/models/m/infer")) for _ in range(2)]
    await _until(lambda: len(lab.runtime.seen) == 5)
    assert await lab.counted() == {"m": (6, 2)}
    lab.runtime.held.set()
    await asyncio.gather(*asking)
    assert await lab.counted() == {"m": (6, 0)}
    await asyncio.sleep(0.3)
    assert 0.2 < (await lab.driver.read())["m"].idle_s < 5


async def test_who_asked_and_what_failed_is_counted(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    await lab.ask("/v2/models/m/infer")
    for _ in range(2):
        await lab.ask("/v2/models/m/infer", b"{}", **{"x-modelium-organisation": "the team | one"})
    lab.runtime.answer = web.Response(status=500, body=b"{}")
    await lab.ask("/v2/models/m/infer", b"{}", **{"x-modelium-organisation": "other"})
    await lab.rpc.ModelInfer(pb.ModelInferRequest(model_name="m"), metadata=(("x-modelium-organisation", "other"),))
    carried = (await lab.driver.read())["m"]
    assert (carried.requests, carried.failures) == (5, 1)
    by = {name: (c.requests, c.failures) for name, c in carried.organisations.items()}
    assert by == {"the team | one": (2, 0), "other": (2, 1)}


async def test_a_client_that_leaves_takes_its_request_along(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    for path, server in (("/v2/models/m/infer", lab.runtime), ("/v2/models/cold/infer", lab.service)):
        server.held = asyncio.Event()
        asking = asyncio.ensure_future(lab.ask(path))
        await server.arrived.wait()
        asking.cancel()
        async with asyncio.timeout(5):
            await server.left.wait()
    assert await lab.counted() == {"m": (1, 0)}


async def test_what_is_under_way_when_a_model_is_diverted_ends_well(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    lab.runtime.held = asyncio.Event()
    asking = asyncio.ensure_future(lab.by("/v2/models/m/infer"))
    await lab.runtime.arrived.wait()
    await lab.driver.divert("m")
    assert (await lab.driver.read())["m"].in_flight == 1
    assert await lab.by("/v2/models/m/infer") == "service"
    lab.runtime.held.set()
    assert await asking == "runtime"
    assert (await lab.driver.read())["m"].in_flight == 0


async def test_no_request_is_lost_while_routes_come_and_go(lab: Lab) -> None:
    over = asyncio.Event()
    answered: list[str] = []

    async def client() -> None:
        while not over.is_set():
            answered.append(await lab.by("/v2/models/m/infer"))

    clients = [asyncio.ensure_future(client()) for _ in range(8)]
    for _ in range(60):
        await lab.driver.admit(lab.route())
        await asyncio.sleep(0.01)
        await lab.driver.divert("m")
        let_in = sum(by == "runtime" for by in answered)
        while (await lab.driver.read()).get("m", (0, 0))[1]:
            await asyncio.sleep(0.001)
        asked = len(lab.runtime.seen)
        await asyncio.sleep(0.005)
        assert len(lab.runtime.seen) == asked >= let_in  # nothing comes after the drain
    over.set()
    await asyncio.gather(*clients)
    assert set(answered) == {"service", "runtime"}
    assert (await lab.driver.read())["m"].requests == answered.count("runtime")


# --------------------------------------------------------------------------- trouble


async def test_a_runtime_out_of_reach_is_the_services_to_judge(lab: Lab) -> None:
    gone = {"kserve-http": "http://127.0.0.1:1", "kserve-grpc": "127.0.0.1:1"}
    await lab.driver.admit(lab.route(endpoints=gone))
    assert await lab.by("/v2/models/m/infer") == "service"
    body = os.urandom(5_000_000)
    assert await lab.by("/v2/models/m/infer", body) == "service" and lab.service.seen[-1][2] == body
    assert (await lab.rpc.ModelInfer(pb.ModelInferRequest(model_name="m"))).model_version == "service"


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, b'{"error":"Unable to parse \'data\': no"}', 400),
        (500, b'{"error":"Unable"}', 500),
        (500, b'{"error":"Stub process \'m_0_0\' is not healthy."}', 502),
        (400, b'data: {"error":"Stub process \'m_0_0\' is not healthy."}\n\n', 502),
        (400, b'{"error":"EngineDeadError: EngineCore encountered an issue."}', 502),
        (400, b'{"error":"Unable"}', 400),
        (400, b'{"error":"unexpected input \'smoking is not healthy\'"}', 400),
        (503, b'{"error":"Unable to parse "}', 503),
        (200, b'{"error":"Unable to parse "}', 200),
    ],
)
async def test_whose_fault_it_is_is_told(lab: Lab, status: int, body: bytes, told: int) -> None:
    lab.runtime.answer = web.Response(status=status, body=body)
    await lab.driver.admit(lab.route())
    async with lab.client.post(f"{lab.url}/v2/models/m/infer", data=b"{}") as response:
        assert (response.status, await response.read()) == (told, body)
    assert (await lab.driver.read())["m"].failures == (told >= 500)


async def test_a_runtime_lost_with_a_call_is_told_by_grpc_too(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    lab.grpc_runtime.held = asyncio.Event()
    call = asyncio.ensure_future(_called(lab))
    await lab.grpc_runtime.arrived.wait()
    await lab.grpc_runtime.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "http2 header" not in caught.value.details().lower()


async def _called(lab: Lab) -> Any:
    return await lab.rpc.ModelInfer(pb.ModelInferRequest(model_name="m"))


async def test_it_is_adopted_with_its_routes_by_the_next_one(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    again = lab.another()
    info = await again.start(lab.front)
    assert info.adopted and f":{info.port}" in lab.url
    assert await lab.by("/v2/models/m/infer") == "runtime"
    await again.sync([lab.route("n")])
    assert (await lab.by("/v2/models/m/infer"), await lab.by("/v2/models/n/infer")) == ("service", "runtime")


async def test_another_configuration_takes_over_and_loses_nothing(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    over = asyncio.Event()
    answered: list[str] = []

    async def client() -> None:
        while not over.is_set():
            answered.append(await lab.by("/v2/models/m/infer"))

    clients = [asyncio.ensure_future(client()) for _ in range(4)]
    pids = [_pid(lab)]
    for threads in (2, 1, 3):
        before = len(answered)
        driver = lab.another(threads=threads)
        info = await driver.start(lab.front)
        assert not info.adopted and info.pid not in pids and f":{info.port}" in lab.url
        pids.append(info.pid)
        await _until(lambda before=before: len(answered) > before + 50)  # type: ignore[misc]
        async with asyncio.timeout(10):
            while list(await driver.read()) != ["m"]:  # the former one may have carried those
                await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*clients)
    assert set(answered) == {"runtime"}  # its routes came along
    await driver.divert("m")
    assert await lab.by("/v2/models/m/infer") == "service"
    await lab.client.close()
    await _until(lambda: len(lab.processes.names()) == 1)  # the former ones end by themselves
    await driver.stop()


async def test_what_is_too_long_is_the_services_to_refuse(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    await lab.another().start(lab.front.model_copy(update={"max_body_bytes": 1000}))
    await lab.client.close()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    async with aiohttp.ClientSession() as client, grpc.aio.insecure_channel(lab.rpc_address) as channel:
        for body, by in ((b"x" * 1000, "runtime"), (b"x" * 1001, "service"), (pieces(), "service")):
            async with client.post(f"{lab.url}/v2/models/m/infer", data=body) as response:
                assert (await response.json())["by"] == by
        rpc = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for raw, by in ((b"x" * 900, "rt"), (b"x" * 1100, "service")):
            answer = await rpc.ModelInfer(pb.ModelInferRequest(model_name="m", raw_input_contents=[raw]))
            assert answer.model_version == by
        messages = iter([pb.ModelInferRequest(model_name="m")])
        async for part in rpc.ModelStreamInfer(messages):
            assert part.infer_response.model_version == "service"


async def test_a_client_that_pauses_is_told_and_one_that_waits_is_not(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    await lab.another().start(lab.front.model_copy(update={"client_stall_s": 0.3}))
    port = int(lab.url.rpartition(":")[2])
    whole = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\nabcdef"
    for sent, told in ((whole[:-3], b"nothing came of the body"), (whole[:40], b"complete request in time")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert b" 408 " in await reader.readline()
        answer = await reader.read()
        assert told in answer and b"x-stalled" not in answer
        writer.close()
    lab.runtime.delay_s = 1.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(whole)
    assert b" 200 " in await reader.readline()
    writer.close()


async def test_what_is_no_http_is_told_so(lab: Lab) -> None:
    port = int(lab.url.rpartition(":")[2])
    endless = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(10_000))
    for sent in (b"what is this\r\n\r\n", endless):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert b" 400 " in await reader.readline()
        assert b"invalid request" in await reader.read()
        writer.close()


async def test_long_headers_are_the_services_to_judge(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    assert await lab.by("/v2/models/m/infer", x="y" * 7000) == "runtime"
    assert await lab.by("/v2/models/m/infer", x="y" * 8100) == "service"


async def test_a_stream_waits_for_its_first_message(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    await lab.another().start(lab.front.model_copy(update={"client_stall_s": 0.3}))
    go = asyncio.Event()

    async def messages() -> AsyncIterator[Any]:
        await go.wait()
        yield pb.ModelInferRequest(model_name="m")

    async with grpc.aio.insecure_channel(lab.rpc_address) as channel:
        rpc = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = rpc.ModelStreamInfer(messages())
        asyncio.get_running_loop().call_later(1.0, go.set)
        assert [part.infer_response.model_version async for part in call] == ["rt"]


async def test_many_streams_of_one_connection_are_let_in(lab: Lab) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(lab.rpc_address.rpartition(":")[2]))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0]) + bytes(4))
    head = await reader.readexactly(9)
    assert head[3] == 4  # SETTINGS: RFC 9113, 6.5
    settings = dict(struct.iter_unpack(">HI", await reader.readexactly(int.from_bytes(head[:3], "big"))))
    assert settings[3] >= 1000  # SETTINGS_MAX_CONCURRENT_STREAMS
    writer.close()


async def test_a_call_that_does_not_come_whole_is_told_so(lab: Lab) -> None:
    await lab.another().start(lab.front.model_copy(update={"client_stall_s": 0.3}))

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(5)
        yield b""

    async with grpc.aio.insecure_channel(lab.rpc_address) as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(nothing())
        with pytest.raises(grpc.aio.AioRpcError, match="no message came in time") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_access_log_where_it_is_wanted(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    await lab.ask("/v2/models/m/infer?quiet")
    again = lab.another()
    await again.start(lab.front.model_copy(update={"access_log": True}))
    async with aiohttp.ClientSession() as client, client.post(f"{lab.url}/v2/models/m/infer?loud", data=b"{}"):
        pass
    await _until(lambda: any("infer?loud" in line for line in again.logs(50)))
    assert not any("quiet" in line for line in again.logs(50))


async def test_killed_it_is_missed_and_started_again(lab: Lab) -> None:
    await lab.driver.admit(lab.route())
    os.kill(_pid(lab), signal.SIGKILL)
    await _until(lambda: lab.processes.find("haproxy") is None)
    with pytest.raises(RuntimeUnavailable):
        await lab.driver.read()
    port = int(lab.url.rpartition(":")[2])
    info = await lab.driver.start(lab.front.model_copy(update={"port": port}))
    assert info.port == port and not info.adopted
    await lab.driver.sync([lab.route()])
    assert await lab.by("/v2/models/m/infer") == "runtime"


async def test_a_port_in_use_is_one_clear_error(lab: Lab, tmp_path: Path) -> None:
    processes = ProcessSupervisor(tmp_path / "b", state_dir=tmp_path / "b/p", log_dir=tmp_path / "b/l")
    (tmp_path / "b").mkdir()
    taken = lab.front.model_copy(update={"port": int(lab.url.rpartition(":")[2])})
    with pytest.raises(ConfigError, match=r"port \d+ on 127.0.0.1 is in use: end what"):
        await make(tmp_path / "b", processes).start(taken)
    assert processes.names() == []


async def test_stopped_it_is_gone(lab: Lab) -> None:
    await lab.driver.stop()
    assert lab.processes.names() == []


# --------------------------------------------------------------------------- without one


@pytest.mark.parametrize(
    ("endpoints", "keys"),
    [
        ({"kserve-http": "http://127.0.0.1:1"}, {"http/m/infer", "http/m/generate", "http/m/generate_stream"}),
        ({"kserve-grpc": "localhost:2"}, {"grpc/m"}),
        ({"kserve-grpc": "grpcs://127.0.0.1:2"}, set()),
        ({"kserve-http": "https://127.0.0.1:1"}, set()),
        ({"kserve-http": "http://triton.internal:8000"}, set()),
        ({"kserve-http": "http://[::1]:8000"}, set()),
        ({"kserve-http": "http://127.0.0.1:1/below"}, set()),
        ({"openai": "http://127.0.0.1:3/v1"}, {"openai/m"}),
        ({"metrics": "http://127.0.0.1:4/metrics"}, set()),
    ],
)
def test_what_can_be_reached_straight(endpoints: dict[str, str], keys: set[str]) -> None:
    assert set(entries(DataRoute(model="m", endpoints=endpoints))) == keys


def test_what_is_no_haproxy_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not run as an HAProxy"):
        version_of(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is no HAProxy"):
        version_of(Path("/bin/echo"))
    old = tmp_path / "haproxy"
    old.write_text("#!/bin/sh\necho HAProxy version 2.4.1\n")
    old.chmod(0o755)
    with pytest.raises(ConfigError, match=r"is HAProxy 2\.4: expected 2\.6 or newer"):
        version_of(old)
    assert HAProxyDataPath().usable(HAProxySettings(executable=old)) is None
    assert find_executable(HAProxySettings(executable=old)) == old


def _pid(lab: Lab) -> int:
    record = lab.processes.find("haproxy") or lab.processes.find("haproxy-2")
    assert record is not None
    return record.pid


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)
