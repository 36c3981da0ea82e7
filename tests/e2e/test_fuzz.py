"""Malformed HTTP and gRPC on both data paths: answered or closed, never a 500, and never does one
reach a model that it does not name.

`MODELIUM_FUZZ_SEED` says again what the random part did; the seed is printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import psutil
import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.e2e.kit import Toy, infer, toy, x_body
from tests.service import Served

SEED = int(os.environ.get("MODELIUM_FUZZ_SEED") or random.SystemRandom().randrange(10**6))
MUTATED = 200
AT_ONCE = 16

STALL_S = 0.4
ENDS_S = 15.0
"""Long after the stall: whatever has not ended by then hangs."""

REFUSED = {400, 403, 404, 405, 408, 411, 413, 414, 415, 417, 421, 422, 426, 431, 501, 505}


@dataclass
class Room:
    service: Served
    front: Toy
    victim: Toy

    @property
    def port(self) -> int:
        return self.service.port


@pytest.fixture(scope="module", params=["haproxy", "service"])
def room(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Room]:
    folder = tmp_path_factory.mktemp("fuzz")
    service = Served(folder / "root", {"server": {"data_path": request.param, "client_stall_s": STALL_S}})
    try:
        service.start()
        toys = toy(folder / "front", factor=2), toy(folder / "victim", factor=3)
        for made in toys:
            service.drop(made.path)
            service.until_state(made.name, "READY")
        yield Room(service, *toys)
    finally:
        service.down()


def request_to(name: str, *headers: str, body: bytes | None = None, length: bool = True) -> bytes:
    body = json.dumps(x_body([1])).encode() if body is None else body
    lines = [f"POST /v2/models/{name}/infer HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(body: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body) + end


WHOLE = request_to("front")
BODY = json.dumps(x_body([1])).encode()
INNER = request_to("victim")

AMBIGUOUS = {
    "two lengths": request_to("front", "Content-Length: 5", body=BODY + INNER),
    "two lengths in one": request_to(
        "front", f"Content-Length: 5, {len(BODY + INNER)}", body=BODY + INNER, length=False
    ),
    "a length and chunks": request_to("front", "Transfer-Encoding: chunked", body=chunked(BODY) + INNER),
    "chunks and a short length": request_to(
        "front", "Transfer-Encoding: chunked", "Content-Length: 4", body=chunked(BODY + INNER), length=False
    ),
    "no chunks that anybody knows": request_to("front", "Transfer-Encoding: xchunked", body=chunked(BODY) + INNER),
    "chunks in two codings": request_to("front", "Transfer-Encoding: chunked, identity", body=chunked(BODY) + INNER),
    "chunked behind a tab": request_to(
        "front", "Transfer-Encoding:\tchunked", body=chunked(BODY) + INNER, length=False
    ),
    "chunked, dressed up": request_to("front", "Transfer-Encoding: \x0bchunked", body=chunked(BODY) + INNER),
    "a blank before the colon": request_to("front", "Transfer-Encoding : chunked", body=chunked(BODY) + INNER),
    "a folded header": request_to("front", "X: y", " Transfer-Encoding: chunked", body=chunked(BODY) + INNER),
    "a bare line feed": request_to("front", "X: y\nTransfer-Encoding: chunked", body=chunked(BODY) + INNER),
    "a bare carriage return": request_to("front", "X: y\rTransfer-Encoding: chunked", body=chunked(BODY) + INNER),
    "a zero in a header": request_to("front", "X: a\x00b", body=BODY + INNER),
    "a length with a sign": request_to("front", f"Content-Length: +{len(BODY)}", body=BODY + INNER, length=False),
    "a length below zero": request_to("front", "Content-Length: -1", body=BODY + INNER, length=False),
    "a length in hex": request_to("front", f"Content-Length: {len(BODY):#x}", body=BODY + INNER, length=False),
    "a length beyond all": request_to("front", f"Content-Length: {2**64 + len(BODY)}", body=BODY + INNER, length=False),
    "a chunk of endless size": request_to(
        "front", "Transfer-Encoding: chunked", body=b"f" * 40 + b"\r\n" + BODY + INNER, length=False
    ),
    "a chunk size below zero": request_to(
        "front", "Transfer-Encoding: chunked", body=b"-5\r\n" + BODY + INNER, length=False
    ),
    "a chunk longer than it says": request_to(
        "front", "Transfer-Encoding: chunked", body=b"3\r\n" + BODY + b"\r\n0\r\n\r\n" + INNER, length=False
    ),
    "a chunk of 2**64 bytes": request_to(
        "front", "Transfer-Encoding: chunked", body=b"10000000000000000\r\n" + BODY + INNER, length=False
    ),
    "trailers that look like a request": request_to(
        "front", "Transfer-Encoding: chunked", body=chunked(BODY, b"0\r\n" + INNER), length=False
    ),
    "a get with a body": WHOLE.replace(b"POST", b"GET", 1).replace(BODY, BODY + INNER),
    "more json than there is": request_to("front", "Inference-Header-Content-Length: 100000", body=BODY),
    "less than no json": request_to("front", "Inference-Header-Content-Length: -1", body=BODY),
    "a second path in the first": WHOLE.replace(b"/infer HTTP", b"/infer%20HTTP/1.1%0d%0aX:%20y HTTP", 1),
    "a path that climbs": WHOLE.replace(b"/front/infer", b"/front/../victim/infer", 1),
    "a path that climbs in code": WHOLE.replace(b"/front/infer", b"/front%2f..%2fvictim/infer", 1),
    "an absolute address": WHOLE.replace(b"POST /v2", b"POST http://victim.example/v2", 1),
    "two hosts": request_to("front", "Host: victim.example"),
    "http of another time": WHOLE.replace(b"HTTP/1.1", b"HTTP/9.9", 1),
    "http before its time": WHOLE.replace(b" HTTP/1.1\r\n", b"\r\n", 1),
}  # fmt: skip

NONSENSE = {
    "nothing": b"",
    "blank lines": b"\r\n" * 1000,
    "tls": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "a long line": b"POST /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    "a long header": request_to("front", "X: " + "y" * 200_000),
    "endless headers": WHOLE[: WHOLE.index(b"\r\n") + 2] + b"".join(b"x-%d: y\r\n" % i for i in range(20_000)),
    "endless extensions of a chunk": request_to(
        "front", "Transfer-Encoding: chunked", body=b"5;" + b"x=y;" * 50_000, length=False
    ),
    "endless trailers": request_to(
        "front", "Transfer-Encoding: chunked", length=False,
        body=chunked(BODY, b"0\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(20_000))),
    ),
    "a chunk for each byte": request_to(
        "front", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n", length=False
    ),
    "a body that never comes": WHOLE[:-5],
    "deep json": request_to("front", body=b'{"inputs":' + b"[" * 5_000),
    "numbers that are none": request_to("front", body=BODY.replace(b"[1]", b"[1e999999]")),
    "no utf-8": request_to("front", body=BODY.replace(b'"x"', b'"\xff\xfe"')),
}  # fmt: skip


async def spoken(port: int, data: bytes, *, leave: bool = False) -> bytes:
    """What came back until the other side closed, or was silent for a while after an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        async with asyncio.timeout(ENDS_S):
            writer.write(data)
            try:
                await writer.drain()
                while not leave:
                    async with asyncio.timeout(STALL_S if got else ENDS_S):
                        piece = await reader.read(65536)
                    got += piece
                    if not piece:
                        break
            except ConnectionError:
                pass
            except TimeoutError:
                assert got, f"no answer within {ENDS_S} s"
    finally:
        writer.close()
    return got


def statuses(got: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"^HTTP/\d\.\d (\d{3})", got, re.MULTILINE)]


def answers(got: bytes, factor: int) -> int:
    """How many of them are inferences of the model with that factor, on x = 1."""
    return len(re.findall(rb'"data":\s*\[%d(\.0)?\]' % factor, got))


def check(name: str, got: bytes) -> None:
    told = set(statuses(got)) - {200, 100}
    assert told <= REFUSED, (name, got[:2000])


@pytest.fixture
def unharmed(room: Room) -> Iterator[Callable[[int], None]]:
    """Afterwards all is as before; `seen` is told of each answer of the victim's that a client got."""
    assert room.service.process is not None
    processes = [psutil.Process(room.service.process.pid)]
    path = room.service.get("/status")["data_path"]
    if path["info"] is not None:
        processes.append(psutil.Process(path["info"]["pid"]))
    assert infer(room.service, "front", [4]) == [8] and infer(room.service, "victim", [4]) == [12]
    before = room.victim.count("requests")
    open_before = [p.num_fds() for p in processes]
    got = 0

    def seen(count: int) -> None:
        nonlocal got
        got += count

    yield seen
    assert room.victim.count("requests") - before == got, "a request reached a model that it was not sent to"
    for x in range(20):
        assert infer(room.service, "front", [x]) == [2 * x]
    assert infer(room.service, "victim", [5]) == [15]
    room.service.until(
        lambda: all(p.num_fds() <= n + 8 for p, n in zip(processes, open_before, strict=True)), 20, "no leak"
    )
    room.service.until(lambda: not room.service.model("front")["in_flight"], 20, "no request under way")
    assert "Traceback" not in room.service.log.read_text(errors="replace")


async def test_what_can_be_read_in_two_ways(room: Room, unharmed: Callable[[int], None]) -> None:
    for name, data in AMBIGUOUS.items():
        got = await spoken(room.port, data)
        check(name, got)
        unharmed(answers(got, 3))


async def test_what_is_no_request(room: Room, unharmed: Callable[[int], None]) -> None:
    for name, data in NONSENSE.items():
        check(name, await spoken(room.port, data))


async def test_who_leaves_early(room: Room, unharmed: Callable[[int], None]) -> None:
    for at in range(0, len(WHOLE), 7):
        await spoken(room.port, WHOLE[:at], leave=True)


def mutated(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(found))
        match rng.randrange(5):
            case 0:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + rng.choice([1, 1, 4, 40])]
            case 2:
                found[at:at] = rng.choice([b"\r\n", b"\n", b"\x00", b" ", b":", b"%", b"\xff", b"0", b"9" * 30])
            case 3:
                found[at:at] = found[at : at + rng.randrange(60)]
            case 4:
                del found[at:]
        if not found:
            break
    return bytes(found)


async def test_requests_with_bytes_changed(room: Room, unharmed: Callable[[int], None]) -> None:
    print(f"MODELIUM_FUZZ_SEED={SEED}")
    rng = random.Random(SEED)
    chunks = request_to("front", "Transfer-Encoding: chunked", body=chunked(BODY), length=False)
    binary = json.dumps({"inputs": [
        {"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]}).encode()  # fmt: skip
    tensors = request_to("front", f"Inference-Header-Content-Length: {len(binary)}", body=binary + struct.pack("<f", 1))
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(data: bytes) -> None:
        async with gate:
            got = await spoken(room.port, data)
        check(repr(data), got)

    await asyncio.gather(*(one(mutated(rng, rng.choice([WHOLE, chunks, tensors]))) for _ in range(MUTATED)))


# --------------------------------------------------------------------------- gRPC

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHOD = "/inference.GRPCInferenceService/ModelInfer"


def named(*names: str) -> bytes:
    """A request for the model `front`, or one that names several."""
    message = pb.ModelInferRequest(raw_input_contents=[struct.pack("<f", 1)])
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    rest: bytes = message.SerializeToString()
    return b"".join(b"\x0a" + bytes([len(n)]) + n.encode() for n in names or ("front",)) + rest


def framed(message: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


CALLS = {
    "longer than it says": framed(named(), length=3),
    "shorter than it says": framed(named(), length=10_000),
    "of four GiB": framed(named(), length=2**32 - 1),
    "packed by nobody knows what": framed(named(), flag=1),
    "with a flag that is none": framed(named(), flag=255),
    "no message": b"",
    "half a frame": b"\x00\x00",
    "an empty message": framed(b""),
    "no protobuf": framed(b"\xff" * 50),
    "cut off": framed(named()[:-3]),
    "a name that is no text": framed(b"\x0a\x02\xff\xfe"),
    "a name of endless length": framed(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
    "a group that never ends": framed(b"\x0b" * 500),
    "two messages": framed(named()) + framed(named()),
}


async def called(address: str, data: bytes, headers: list[tuple[str, str]], *, leave: bool = False) -> dict[str, str]:
    """One call by hand: headers and trailers of its answer, or `closed`."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
    )
    found: dict[str, str] = {}
    try:
        async with asyncio.timeout(ENDS_S):
            connection.initiate_connection()
            connection.send_headers(1, headers)
            connection.send_data(1, data, end_stream=True)
            writer.write(connection.data_to_send())
            await writer.drain()
            while not leave:
                piece = await reader.read(65536)
                if not piece:
                    return {**found, "closed": "yes"}
                for event in connection.receive_data(piece):
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        found |= {str(k): str(v) for k, v in event.headers or ()}
                    elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                        return {**found, "closed": "yes"}
                    elif isinstance(event, h2.events.StreamEnded):
                        return found
                writer.write(connection.data_to_send())
    except (ConnectionError, h2.exceptions.ProtocolError):
        found["closed"] = "yes"
    finally:
        writer.close()
    return found


def grpc_headers(method: str = METHOD, **more: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost"),
        ("te", "trailers"), ("content-type", "application/grpc"), *more.items(),
    ]  # fmt: skip


def ordinary(address: str, name: str, factor: float) -> None:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)
        answer = pb.ModelInferResponse.FromString(call(named(name), timeout=30))
        assert struct.unpack("<f", answer.raw_output_contents[0]) == (factor,)


async def test_calls_that_are_none(room: Room, unharmed: Callable[[int], None]) -> None:
    address = room.service.grpc_address()
    for name, data in CALLS.items():
        got = await called(address, data, grpc_headers())
        assert got.get("closed") or got.get("grpc-status"), (name, got)
        assert got.get("grpc-status") != "2", (name, got)  # UNKNOWN is what an exception of ours would be
        await called(address, data, grpc_headers(), leave=True)
    for method in ("/", "/inference.GRPCInferenceService/None", "/inference.GRPCInferenceService/ModelInfer/x"):
        got = await called(address, framed(named()), grpc_headers(method))
        assert got.get("grpc-status") == "12" or got.get(":status") in ("404", "405"), (method, got)
    got = await called(address, framed(named()), grpc_headers(**{"x-long": "y" * 100_000}))
    assert got.get("closed") or got.get("grpc-status") == "8" or got.get(":status") == "431", got
    await asyncio.to_thread(ordinary, address, "front", 2)


async def test_a_call_that_names_two_models_is_the_lasts(room: Room, unharmed: Callable[[int], None]) -> None:
    """As for every protobuf parser. HAProxy counts it for the first."""
    got = await called(room.service.grpc_address(), framed(named("front", "victim")), grpc_headers())
    assert got.get("grpc-status") == "0"
    unharmed(1)


async def test_frames_that_are_none(room: Room, unharmed: Callable[[int], None]) -> None:
    print(f"MODELIUM_FUZZ_SEED={SEED}")
    rng = random.Random(f"{SEED} frames")
    port = int(room.service.grpc_address().rpartition(":")[2])
    gate = asyncio.Semaphore(AT_ONCE)

    def frames() -> bytes:
        data = PREFACE + struct.pack(">I", 0)[1:] + bytes([4, 0]) + bytes(4)
        for _ in range(rng.randrange(1, 6)):
            payload = rng.randbytes(rng.choice([0, 1, 4, 5, 8, 40, 300]))
            length = rng.choice([len(payload), len(payload), 0, 2**24 - 1])
            data += struct.pack(">I", length)[1:] + bytes([rng.randrange(12), rng.randrange(256)])
            data += struct.pack(">I", rng.choice([0, 1, 2, 3, 2**31 + 1, 2**31 - 1])) + payload
        return data

    async def one(data: bytes) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                await writer.drain()
                async with asyncio.timeout(1):
                    while await reader.read(65536):
                        pass
            except (TimeoutError, ConnectionError):
                pass
            finally:
                writer.close()

    await asyncio.gather(*(one(frames()) for _ in range(MUTATED)), one(rng.randbytes(5000)), one(WHOLE))
    await asyncio.to_thread(ordinary, room.service.grpc_address(), "front", 2)
