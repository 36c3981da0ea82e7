"""gRPC: the same answers as Triton's own, tritonclient unchanged, and a model's state told as over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as aio_client
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from modelium.errors import CapacityError, LoadRejected, ModelFailed, QueueFull
from modelium.http.messages import InferRequest
from modelium.http.rpc.channels import Channels
from modelium.http.rpc.wire import text_field
from modelium.http.settings import HttpSettings
from modelium.http.streams import Streams
from tests.http.conftest import Rpc
from tests.http.fakes import FakeService
from tests.http.tritonserver import NAMES, Triton


def floats(name: str = "identity", *values: float) -> Any:
    request = pb.ModelInferRequest(model_name=name)
    values = values or (1, 2, 3)
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1, len(values)])
    request.raw_input_contents.append(np.array(values, np.float32).tobytes())
    return request


def text(value: bytes, count: int | None = None) -> Any:
    request = pb.ModelInferRequest(model_name="pieces", id=value.decode())
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(value)
    if count is not None:
        request.inputs.add(name="count", datatype="INT32", shape=[1]).contents.int_contents.append(count)
    return request


def read(answer: Any) -> list[float]:
    return list(np.frombuffer(answer.raw_output_contents[0], np.float32))


async def rest(call: Any) -> list[Any]:
    answers = []
    while (answer := await call.read()) is not grpc.aio.EOF:
        answers.append(answer)
    return answers


# --------------------------------------------------------------------------- as Triton


SAME = [
    ("ModelInfer", floats()),
    ("ModelInfer", pb.ModelInferRequest(model_name="identity", model_version="7")),
    ("ModelInfer", pb.ModelInferRequest(model_name="identity")),
    ("ModelMetadata", pb.ModelMetadataRequest(name="identity")),
    ("ModelConfig", pb.ModelConfigRequest(name="identity")),
    ("ModelReady", pb.ModelReadyRequest(name="identity")),
    ("ModelReady", pb.ModelReadyRequest(name="identity", version="1")),
    ("ServerLive", pb.ServerLiveRequest()),
    ("ServerReady", pb.ServerReadyRequest()),
    ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
    ("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()),
    ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest()),
    ("TraceSetting", pb.TraceSettingRequest()),
    ("LogSettings", pb.LogSettingsRequest()),
]


@pytest.mark.parametrize(("method", "request_"), SAME)
async def test_the_answer_is_tritons_own(rpc: Rpc, real: Triton, method: str, request_: Any) -> None:
    answers = []
    async with grpc.aio.insecure_channel(real.grpc) as channel:
        for stub in (service_pb2_grpc.GRPCInferenceServiceStub(channel), rpc.stub):
            try:
                answers.append(await getattr(stub, method)(request_))
            except grpc.aio.AioRpcError as exc:
                answers.append((exc.code(), exc.details()))
    assert answers[0] == answers[1]


async def test_tritonclient(rpc: Rpc, real: Triton) -> None:
    def use() -> None:
        with sync_client.InferenceServerClient(rpc.address) as client:
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("identity")
            assert client.get_server_metadata().name == "triton"
            assert "model_repository" in client.get_server_metadata().extensions
            assert {m.name for m in client.get_model_repository_index().models} == set(NAMES)
            given = sync_client.InferInput("INPUT0", [1, 4], "FP32")
            given.set_data_from_numpy(np.arange(4, dtype=np.float32).reshape(1, 4))
            answer = client.infer("identity", [given], compression_algorithm="gzip", headers={"x-own": "1"})
            assert answer.as_numpy("OUTPUT0").tolist() == [[0, 1, 2, 3]]
            counts = client.get_inference_statistics().model_stats
            assert {stats.name for stats in counts} == set(NAMES)
            with pytest.raises(InferenceServerException, match="no model named nobody"):
                client.infer("nobody", [given])

    await asyncio.to_thread(use)


async def test_tritonclient_aio_streams(rpc: Rpc, real: Triton) -> None:
    async def asked() -> AsyncIterator[dict[str, Any]]:
        for word in (b"a", b"b"):
            given = aio_client.InferInput("text_input", [1], "BYTES")
            given.set_data_from_numpy(np.array([word], dtype=object))
            yield {"model_name": "pieces", "inputs": [given], "request_id": word.decode()}

    async with aio_client.InferenceServerClient(rpc.address) as client:
        said = [
            (result.get_response().id, result.as_numpy("text_output")[0])
            async for result, error in client.stream_infer(asked())
            if error is None
        ]
    assert sorted(said) == [(w, f"{w} {n}.".encode()) for w in "ab" for n in range(3)]


async def test_sixty_four_mib_pass(rpc: Rpc, real: Triton) -> None:
    request = floats("identity", *np.arange(16 * 2**20, dtype=np.float32))
    async with grpc.aio.insecure_channel(
        rpc.address, [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    ) as channel:
        answer = await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert answer.raw_output_contents[0] == request.raw_input_contents[0]


# --------------------------------------------------------------------------- streams


async def test_pieces_come_as_they_are_made(rpc: Rpc, real: Triton, service: FakeService) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.write(text(b"one", 2))
    first = await call.read()
    assert first.infer_response.raw_output_contents or first.infer_response.outputs
    usage = service.usage.get("pieces")
    assert usage is not None and usage.in_flight == 1
    await call.write(text(b"two", 1))
    await call.done_writing()
    ids = [first.infer_response.id, *[answer.infer_response.id for answer in await rest(call)]]
    assert ids == ["one", "one", "two"]
    assert usage.in_flight == 0


async def test_what_is_wrong_with_one_message_is_told_in_band(rpc: Rpc, real: Triton) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.write(pb.ModelInferRequest(model_name="nobody", id="7"))
    refused = await call.read()
    assert (refused.infer_response.id, refused.infer_response.model_name) == ("7", "nobody")
    assert "no model named nobody" in refused.error_message
    await call.write(text(b"still", 1))
    await call.done_writing()
    assert [answer.infer_response.id for answer in await rest(call)] == ["still"]


async def test_a_stream_that_is_left_lets_go_of_its_model(rpc: Rpc, real: Triton, service: FakeService) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.write(text(b"slow", 10_000))
    await call.read()
    call.cancel()
    usage = service.usage.get("pieces")
    assert usage is not None
    async with asyncio.timeout(10):
        while usage.in_flight:
            await asyncio.sleep(0.01)
        answer = [one async for one in rpc.stub.ModelStreamInfer(_one(text(b"hi", 1)))]  # it was given up in Triton too
    assert len(answer) == 1


async def _one(message: Any) -> AsyncIterator[Any]:
    yield message


async def test_a_stream_that_says_nothing_ends(rpc: Rpc, real: Triton) -> None:
    call = rpc.stub.ModelStreamInfer()
    await call.done_writing()
    assert await rest(call) == []


# --------------------------------------------------------------------------- models that are not loaded


async def test_a_model_is_loaded_by_its_first_call(rpc: Rpc, real: Triton, service: FakeService) -> None:
    service.put("identity", "COLD")
    call = rpc.stub.ModelInfer(floats(), timeout=30, metadata=(("x-modelium-priority", "3"),))
    await _until(lambda: service.waiting("identity") == 1)
    service.put("identity", "READY")
    assert read(await call) == [1, 2, 3]
    (_, name, deadline_s, priority, _) = service.calls[-1]
    assert (name, priority) == ("identity", 3) and 20 < deadline_s < 31


async def test_each_call_has_an_id(rpc: Rpc, real: Triton) -> None:
    for mine in ((("x-request-id", "mine"),), ()):
        call = rpc.stub.ModelInfer(floats(), metadata=mine)
        told = dict(await call.initial_metadata())["x-request-id"]
        assert told == "mine" if mine else len(told) == 32


async def test_who_does_not_wait_is_told_how_far_it_is(rpc: Rpc, real: Triton, service: FakeService) -> None:
    service.put("identity", "LOADING")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.stub.ModelInfer(floats(), metadata=(("x-modelium-wait", "0"),))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    trailing = dict(caught.value.trailing_metadata())
    assert trailing["retry-after"] == "7"
    assert json.loads(trailing["x-modelium-loading"])["expected_s"] == 7.0


async def test_who_leaves_waits_no_more(rpc: Rpc, real: Triton, service: FakeService) -> None:
    service.put("identity", "COLD")
    call = rpc.stub.ModelInfer(floats())
    await _until(lambda: service.waiting("identity") == 1)
    call.cancel()
    await _until(lambda: service.withdrawn == ["identity"])


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [
        (QueueFull("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "1"),
        (ModelFailed("it broke", retry_after_s=7), grpc.StatusCode.UNAVAILABLE, "7"),
        (CapacityError("no room"), grpc.StatusCode.UNAVAILABLE, None),
    ],
)
async def test_refusals_have_their_status(
    rpc: Rpc, real: Triton, service: FakeService, error: Any, code: grpc.StatusCode, retry_after: str | None
) -> None:
    service.put("identity", "COLD")
    service.failures["identity"] = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.stub.ModelInfer(floats())
    assert (caught.value.code(), caught.value.details()) == (code, error.message)
    trailing = dict(caught.value.trailing_metadata())
    assert trailing.get("retry-after") == retry_after and trailing["x-modelium-code"] == error.code


async def test_bytes_that_are_no_message(rpc: Rpc, real: Triton) -> None:
    async with grpc.aio.insecure_channel(rpc.address) as channel:
        for method in ("ModelInfer", "ModelReady", "RepositoryIndex"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"\xff\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_runtime_that_is_not_there(rpc: Rpc, service: FakeService) -> None:
    service.runtime(kserve_grpc="127.0.0.1:1")
    service.add("m")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.stub.ModelInfer(floats("m"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "nothing was sent to it" in caught.value.details()
    assert service.poked == ["triton"]


class Ending(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A runtime that ends calls with words of its own, and one day dies while it works on one."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if request.id == "die":
            self.arrived.set()
            await asyncio.sleep(60)
        await context.abort(grpc.StatusCode[request.id], "my own words")

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            await context.abort(grpc.StatusCode[request.id], "my own words")
            yield


async def test_what_a_runtime_ends_a_call_with_is_told_apart_from_its_end(rpc: Rpc, service: FakeService) -> None:
    server, ending = grpc.aio.server(), Ending()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(ending, server)
    service.runtime(kserve_grpc=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    service.add("m")
    await server.start()
    for name in ("UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"):
        asked = pb.ModelInferRequest(model_name="m", id=name)
        for call in (rpc.stub.ModelInfer(asked), rest(rpc.stub.ModelStreamInfer(iter([asked])))):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode[name], "my own words")
    assert (service.poked, service.usage.model("m").failures) == ([], 0)
    call = asyncio.ensure_future(_infer(rpc, pb.ModelInferRequest(model_name="m", id="die")))
    await asyncio.wait_for(ending.arrived.wait(), 10)
    await server.stop(0)
    with pytest.raises(grpc.aio.AioRpcError, match="took the call and did not answer"):
        await call
    assert (service.poked, service.usage.model("m").failures) == (["triton"], 1)


async def test_what_is_composed_here_has_its_headers_along() -> None:
    server, channels, found = grpc.aio.server(), Channels(), []

    class Noting(service_pb2_grpc.GRPCInferenceServiceServicer):
        async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
            found.extend(context.invocation_metadata())
            async for request in requests:
                yield pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(id=request.id))

    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Noting(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    asked = InferRequest([], headers={"X-Request-ID": "mine", "traceparent": "00-1-2-01"})
    await Streams(channels).infer(address, "m", "", asked)
    assert {("x-request-id", "mine"), ("traceparent", "00-1-2-01")} <= set(found)
    await channels.close()
    await server.stop(0)


async def test_a_model_that_no_stream_can_reach_is_let_go_of(rpc: Rpc, service: FakeService) -> None:
    service.runtime(kserve_http="http://127.0.0.1:1")
    service.add("m")
    with pytest.raises(grpc.aio.AioRpcError, match="can't be reached") as caught:
        await rest(rpc.stub.ModelStreamInfer(iter([pb.ModelInferRequest(model_name="m")])))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (service.poked, service.usage.model("m").in_flight) == (["triton"], 0)


class TestStalled:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(client_stall_s=0.3)

    async def test_a_call_whose_message_never_comes_is_answered(self, rpc: Rpc) -> None:
        async def nothing() -> AsyncIterator[bytes]:
            await asyncio.sleep(60)
            yield b""

        async with grpc.aio.insecure_channel(rpc.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match=r"no message came within 0\.3 s"):
                await channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(nothing())


async def _infer(rpc: Rpc, request: Any) -> Any:
    return await rpc.stub.ModelInfer(request)


# --------------------------------------------------------------------------- orders, health


async def test_orders(rpc: Rpc, real: Triton, service: FakeService) -> None:
    load = pb.RepositoryModelLoadRequest(model_name="identity")
    load.parameters["config"].string_param = "{}"
    await rpc.stub.RepositoryModelLoad(load)
    assert service.calls[-1] == ("load", "identity", None, {"config": "{}"})
    load.parameters["file:1/model.onnx"].bytes_param = b"x"
    with pytest.raises(grpc.aio.AioRpcError, match="from the repository only"):
        await rpc.stub.RepositoryModelLoad(load)
    for message in (load, pb.RepositoryIndexRequest()):
        message.repository_name = "x"
        with pytest.raises(grpc.aio.AioRpcError, match="one repository") as caught:
            await (rpc.stub.RepositoryModelLoad if message is load else rpc.stub.RepositoryIndex)(message)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    service.failures["identity"] = LoadRejected("no such backend")
    with pytest.raises(grpc.aio.AioRpcError, match="no such backend") as caught:
        await rpc.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="identity"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    service.failures.clear()
    await rpc.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="identity"))
    assert service.states["identity"] == "COLD"
    index = {m.name: m.state for m in (await rpc.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models}
    assert index["identity"] == "UNAVAILABLE" and index["echo"] == "READY"
    assert (await rpc.stub.ModelReady(pb.ModelReadyRequest(name="identity"))).ready


async def test_health(rpc: Rpc, real: Triton, service: FakeService) -> None:
    async def check(name: str) -> int:
        return int((await rpc.health.Check(health_pb2.HealthCheckRequest(service=name))).status)

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert await check("") == serving
    assert await check("identity") == serving
    service.is_ready = False
    assert await check("inference.GRPCInferenceService") == not_serving
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# --------------------------------------------------------------------------- the wire


@given(st.text(max_size=20), st.text(max_size=20), st.binary(max_size=40), st.integers(0, 2**32))
def test_the_name_is_found_as_a_parser_would(name: str, id: str, raw: bytes, number: int) -> None:
    request = pb.ModelInferRequest(model_name=name, id=id, raw_input_contents=[raw])
    request.parameters["p"].int64_param = number
    message = request.SerializeToString()
    assert (text_field(message, 1), text_field(message, 3)) == (name, id)
    twice = message + pb.ModelInferRequest(model_name="last").SerializeToString()
    assert text_field(twice, 1) == pb.ModelInferRequest.FromString(twice).model_name == "last"


@given(st.binary(max_size=60))
def test_anything_else_is_refused_or_has_a_name(message: bytes) -> None:
    try:
        found = text_field(message, 1)
    except ValueError:
        return
    assert isinstance(found, str)


async def _until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)
