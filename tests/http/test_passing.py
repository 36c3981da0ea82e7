"""Requests and answers pass through byte for byte, and nothing is ever sent twice."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_proto import ResponseHandler

from modelium.http.settings import HttpSettings
from modelium.http.upstream import WHOLE_BYTES
from tests.http.conftest import Surface
from tests.http.fakes import FakeService
from tests.http.upstreams import Recorder, exchange, in_two_pieces, read_request, scripted


@pytest.fixture(autouse=True)
def _nothing_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]


SIZES = [0, 1, 100, 65_535, 65_537, WHOLE_BYTES, WHOLE_BYTES + 1, 3_000_000]
INFER = "/v2/models/m/infer"


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def pieces(data: bytes, size: int = 50_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


# --------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_of_any_size_pass_both_ways(
    surface: Surface, upstream: Recorder, size: int, chunked: bool
) -> None:
    data = noise(size)

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        if not chunked:
            return web.Response(body=body)
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        async for piece in pieces(body):
            await response.write(piece)
        return response

    upstream.answer = answer
    async with surface.client.post(surface.url + INFER, data=pieces(data) if chunked else data) as response:
        body = await response.read()
        assert (response.headers.get("Content-Length") is None) == chunked
    assert hashlib.sha256(body).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(upstream.seen[0].body).digest() == hashlib.sha256(data).digest()
    assert ("Transfer-Encoding" in upstream.seen[0].headers) == chunked
    assert upstream.seen[0].headers.get("Content-Length") == (None if chunked else str(size))


async def test_a_body_that_trickles_in_is_passed_whole(surface: Surface, upstream: Recorder) -> None:
    host, port = surface.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 6\r\n\r\n".encode())
    for byte in b"abcdef":
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(6) == b"abcdef"
    writer.close()


async def test_packed_bodies_stay_packed(surface: Surface, upstream: Recorder) -> None:
    packed = gzip.compress(b"x" * 1000)

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    upstream.answer = answer
    headers = {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    async with surface.client.post(surface.url + INFER, data=packed, headers=headers) as response:
        assert await response.read() == packed
        assert response.headers["Content-Encoding"] == "gzip"
    seen = upstream.seen[0]
    assert (seen.body, seen.headers["Content-Encoding"]) == (packed, "gzip")
    assert seen.headers["Accept-Encoding"] == "gzip"


async def test_pieces_pass_as_they_come(surface: Surface, upstream: Recorder) -> None:
    go_on = asyncio.Event()
    upstream.answer = in_two_pieces(go_on, b"data: 1\n\n", b"data: 2\n\n")
    async with surface.client.post(f"{surface.url}/v2/models/m/generate_stream", data=b"{}") as response:
        assert await response.content.readany() == b"data: 1\n\n"
        go_on.set()
        assert await response.content.readany() == b"data: 2\n\n"
        assert await response.content.readany() == b""


async def test_who_does_not_read_holds_up_who_sends(surface: Surface, service: FakeService) -> None:
    """Both ways: what lies between is bounded by buffers, not by the body."""
    size, limit = 100_000_000, 40_000_000

    async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            await asyncio.Event().wait()
        await read_request(reader)
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        while True:
            writer.write(bytes(1_000_000))
            await writer.drain()
            written.append(1_000_000)

    written: list[int] = []
    async with scripted(never_reads) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        host, port = surface.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n".encode())
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < size:
                writer.write(bytes(1_000_000))
                await asyncio.wait_for(writer.drain(), 1.0)
                sent += 1_000_000
        assert sent < limit
        writer.transport.abort()

        _, writer = await asyncio.open_connection(host, int(port), limit=1000)
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
        before = -1
        while len(written) > before:  # until it no longer grows
            before = len(written)
            await asyncio.sleep(0.5)
        assert 0 < sum(written) < limit
        writer.transport.abort()


# --------------------------------------------------------------------------- heads


async def test_headers_pass_and_those_of_the_connection_do_not(surface: Surface, upstream: Recorder) -> None:
    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.Response(body=b"ab", headers={"Inference-Header-Content-Length": "1", "Keep-Alive": "timeout=5"})
        response.headers.add("Set-Cookie", "a=1")
        response.headers.add("Set-Cookie", "b=2")
        response.headers["Connection"] = "X-Private"
        response.headers["X-Private"] = "1"
        return response

    upstream.answer = answer
    head = [
        f"POST {INFER}?a=%20b&c HTTP/1.1", "Host: localhost", "Connection: close, X-Secret", "X-Secret: 1",
        "traceparent: 00-1-2-01", "X-Twice: 1", "X-Twice: 2", "Inference-Header-Content-Length: 2", "TE: trailers",
        "Content-Length: 3", "Upgrade: h2c", "Keep-Alive: 3", "Proxy-Authorization: x", "Authorization: y",
        "x-modelium-organisation: team", "X-Request-ID: 7", "", "",
    ]  # fmt: skip
    found = await exchange(surface.url, "\r\n".join(head).encode() + b"abc")
    answered, _, body = found.partition(b"\r\n\r\n")
    assert body == b"ab"
    lines = [line.lower() for line in answered.decode().split("\r\n")]
    assert "inference-header-content-length: 1" in lines
    assert "set-cookie: a=1" in lines and "set-cookie: b=2" in lines
    assert not [line for line in lines if line.startswith(("x-private", "keep-alive"))]
    seen = upstream.seen[0]
    assert (seen.method, seen.target, seen.body) == ("POST", f"{INFER}?a=%20b&c", b"abc")
    assert sorted(seen.headers.items()) == sorted(
        {
            "Host": upstream.url.removeprefix("http://"), "traceparent": "00-1-2-01", "Authorization": "y",
            "Inference-Header-Content-Length": "2", "Content-Length": "3", "x-modelium-organisation": "team",
            "X-Request-ID": "7",
        }.items() | {("X-Twice", "1"), ("X-Twice", "2")}
    )  # fmt: skip
    assert surface.service.usage.model("m").results() == [("team", (1, 0, 0))]


@pytest.mark.parametrize("status", [200, 204, 302, 400, 404, 418, 500, 503])
async def test_status_and_words_pass(surface: Surface, upstream: Recorder, status: int) -> None:
    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        body = b"" if status == 204 else b'{"error":"x"}'
        return web.Response(status=status, reason="As It Is", body=body, headers={"Location": "/elsewhere"})

    upstream.answer = answer
    async with surface.client.post(surface.url + INFER, data=b"x", allow_redirects=False) as response:
        assert (response.status, response.reason) == (status, "As It Is")
        assert await response.read() == (b"" if status == 204 else b'{"error":"x"}')
    assert len(upstream.seen) == 1
    usage = surface.service.usage.model("m")
    assert (usage.in_flight, usage.requests, usage.failures) == (0, 1, int(status >= 500))


@pytest.mark.parametrize("status", [400, 500])
async def test_a_process_that_died_is_no_fault_of_the_client(surface: Surface, upstream: Recorder, status: int) -> None:
    """As Triton tells it: in an answer to `infer`, or as the first event of a stream."""

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"error":"Stub process \'m_0_0\' is not healthy."}\n\n')
        return response

    upstream.answer = answer
    async with surface.client.post(f"{surface.url}/v2/models/m/generate_stream", data=b"{}") as response:
        assert response.status == 502
        assert "the process of m has ended" in (await response.json())["error"]
    assert surface.service.poked == ["triton"]


async def test_paths_pass_as_they_are_written(surface: Surface, upstream: Recorder) -> None:
    surface.service.add("a b")
    target = "/v2/models/a%20b/versions/1/infer?x=%2F+%2f"
    await exchange(surface.url, f"POST {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    absolute = f"POST http://localhost{target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    await exchange(surface.url, absolute.encode())
    assert [seen.target for seen in upstream.seen] == [target, target]


async def test_old_clients_are_answered_in_their_way(surface: Surface, upstream: Recorder) -> None:
    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"abc")
        return response

    upstream.answer = answer
    found = await exchange(surface.url, f"POST {INFER} HTTP/1.0\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.0 200 OK\r\n")
    assert found.endswith(b"\r\n\r\nabc")


async def test_a_client_that_asks_before_it_sends_is_told_to(surface: Surface, upstream: Recorder) -> None:
    host, port = surface.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"abc")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert "Expect" not in upstream.seen[0].headers
    writer.close()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("Inference-Header-Content-Length: abc\r\nContent-Length: 3\r\n", b"found 'abc'"),
        ("Inference-Header-Content-Length: -1\r\nContent-Length: 3\r\n", b"found '-1'"),
        ("Inference-Header-Content-Length: 4\r\nContent-Length: 3\r\n", b"0 to the body's 3 bytes"),
        ("Inference-Header-Content-Length: x\r\nTransfer-Encoding: chunked\r\n", b"a number of bytes"),
        ("Content-Length: abc\r\n", b"Content-Length"),
        ("Content-Length: 1\r\nContent-Length: 2\r\n", b"Content-Length"),
        ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"Content-Length"),
        (f"X-Big: {'x' * 100_000}\r\n", b"bytes"),
        ("Bad Header\r\n", b"header"),
    ],
)
async def test_bad_heads_are_refused_and_reach_no_runtime(
    surface: Surface, upstream: Recorder, caplog: pytest.LogCaptureFixture, head: str, words: bytes
) -> None:
    body = "3\r\nabc\r\n0\r\n\r\n" if "chunked" in head else "abc"
    request = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n{body}"
    found = await exchange(surface.url, request.encode())
    assert found.split(b" ")[1] == b"400"
    assert words in found
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert b"Traceback" not in found
    assert upstream.seen == []


# --------------------------------------------------------------------------- failures


async def test_a_runtime_that_is_not_there_was_sent_nothing(surface: Surface, service: FakeService) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        service.runtime(kserve_http=f"http://127.0.0.1:{free.getsockname()[1]}")
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=b"x") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert "nothing was sent" in (await response.json())["error"]
    assert service.poked == ["triton"]
    assert (service.usage.model("m").failures, service.usage.model("m").in_flight) == (1, 0)


@pytest.mark.parametrize("size", [0, 10, 1_000_000])
async def test_a_runtime_that_dies_on_a_request_is_asked_once(
    surface: Surface, service: FakeService, size: int
) -> None:
    taken = 0

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal taken
        await read_request(reader)
        taken += 1

    async with scripted(dies) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=noise(size)) as response:
            assert response.status == 502
            assert "did not answer" in (await response.json())["error"]
    assert taken == 1
    assert service.poked == ["triton"]
    assert service.usage.model("m").failures == 1


async def test_a_kept_connection_that_died_on_the_request_is_not_tried_again(
    surface: Surface, service: FakeService
) -> None:
    """The runtime may have worked on what it read from the old connection."""
    taken: list[int] = []

    async def second_dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        taken.append(number)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await read_request(reader)
        taken.append(number)

    async with scripted(second_dies) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=b"1") as response:
            assert response.status == 200
        async with surface.client.post(surface.url + INFER, data=b"2") as response:
            assert response.status == 502
    assert taken == [1, 1]


async def test_a_connection_closed_while_idle_is_not_used(surface: Surface, service: FakeService) -> None:
    closed = asyncio.Event()

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        closed.set()

    async with scripted(once) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        for _ in range(5):
            closed.clear()
            async with surface.client.post(surface.url + INFER, data=b"1") as response:
                assert response.status == 200
            await closed.wait()


@pytest.mark.parametrize(("size", "status"), [(10, 200), (1_000_000, 502)])
async def test_a_connection_found_closed_before_a_byte_went_out_is_replaced(
    surface: Surface, service: FakeService, monkeypatch: pytest.MonkeyPatch, size: int, status: int
) -> None:
    """The race that a pool can't exclude. A streamed body can't be sent anew, so there the client is told."""
    taken: list[int] = []

    async def serves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            await read_request(reader)
            taken.append(number)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    kept: list[ResponseHandler] = []

    def connected(handler: ResponseHandler) -> bool:
        if not kept:  # the pool takes it for alive, and then it is not
            kept.append(handler)
            assert handler.transport is not None
            handler.transport.close()
            return True
        return handler.transport is not None and not handler.transport.is_closing()

    async with scripted(serves) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=b"1") as response:
            assert response.status == 200
        async with aiohttp.ClientSession() as other:
            host = surface.url.removeprefix("http://")
            url = f"http://{host}{INFER}"
            # a connection of its own, so that only the pool towards the runtime meets the patch
            async with other.post(url, data=b"2") as response:
                assert response.status == 200
        monkeypatch.setattr(ResponseHandler, "is_connected", connected)
        async with aiohttp.ClientSession() as other, other.post(url, data=noise(size)) as response:
            assert response.status == status
    assert len(taken) == (3 if status == 200 else 2)


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_that_breaks_off_is_seen_to(surface: Surface, service: FakeService, chunked: bool) -> None:
    size = 2 * WHOLE_BYTES

    async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        if chunked:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        else:
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\nabc".encode())

    async with scripted(breaks_off) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=b"x") as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
    assert (service.usage.model("m").failures, service.poked) == (1, ["triton"])


async def test_a_short_answer_that_breaks_off_is_a_502(surface: Surface, service: FakeService) -> None:
    async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")

    async with scripted(breaks_off) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=b"x") as response:
            assert response.status == 502
            assert "broke off its answer" in (await response.json())["error"]


async def test_an_answer_that_is_no_http_is_a_502(surface: Surface, service: FakeService) -> None:
    async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(b"what?\r\n\r\n")

    async with scripted(babbles) as url:
        service.runtime(kserve_http=url)
        service.add("m")
        async with surface.client.post(surface.url + INFER, data=b"x") as response:
            assert response.status == 502


async def test_a_client_that_leaves_takes_its_request_along(surface: Surface, upstream: Recorder) -> None:
    arrived = asyncio.Event()

    async def never(request: web.Request, body: bytes) -> web.StreamResponse:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError

    upstream.answer = never
    asking = asyncio.create_task(surface.client.post(surface.url + INFER, data=b"x").__aenter__())
    await arrived.wait()
    assert surface.service.usage.model("m").in_flight == 1
    asking.cancel()
    await asyncio.wait_for(upstream.cancelled.wait(), 10)
    usage = surface.service.usage.model("m")
    assert (usage.in_flight, usage.failures) == (0, 0)


async def test_a_client_that_leaves_no_longer_waits(surface: Surface, upstream: Recorder) -> None:
    service = surface.service
    service.put("m", "COLD")
    asking = asyncio.create_task(surface.client.post(surface.url + INFER, data=b"x").__aenter__())
    while not service.waiting("m"):
        await asyncio.sleep(0.01)
    asking.cancel()
    while not service.withdrawn:
        await asyncio.sleep(0.01)
    assert upstream.seen == []


# --------------------------------------------------------------------------- bounds


class TestBounded:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(max_body_bytes=WHOLE_BYTES * 2)

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_too_large_a_body(self, surface: Surface, upstream: Recorder, chunked: bool) -> None:
        data = noise(WHOLE_BYTES * 4)
        async with surface.client.post(surface.url + INFER, data=pieces(data) if chunked else data) as response:
            assert response.status == 413
            assert "max_body_bytes" in (await response.json())["error"]
        assert not [seen for seen in upstream.seen if len(seen.body) >= len(data)]
        async with surface.client.post(surface.url + INFER, data=pieces(data[: WHOLE_BYTES * 2])) as response:
            assert response.status == 200
        async with surface.client.post(surface.url + "/predict/m", data=pieces(data) if chunked else data) as response:
            assert response.status == 413
            assert "max_body_bytes" in (await response.json())["error"]["message"]


class TestStalled:
    @pytest.fixture
    def settings(self) -> HttpSettings:
        return HttpSettings(client_stall_s=0.2)

    @pytest.mark.parametrize(
        ("head", "part", "rest"),
        [
            ("Content-Length: 6", b"abc", b""),
            ("Content-Length: 6", b"", b""),
            (f"Content-Length: {2 * WHOLE_BYTES}", b"abc", b""),
            ("Transfer-Encoding: chunked", b"3\r\nabc\r\n", b""),
            ("Transfer-Encoding: chunked", b"3\r\nabc\r\n", b"zz\r\n"),
            ("Transfer-Encoding: chunked", b"3\r\nabc\r\n", b"3\r\nabcdef\r\n"),
        ],
    )
    async def test_a_body_that_stops_coming_is_the_clients_fault(
        self, surface: Surface, upstream: Recorder, head: str, part: bytes, rest: bytes
    ) -> None:
        host, port = surface.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n".encode() + part)
        usage = surface.service.usage.model("m")
        while not usage.in_flight:
            await asyncio.sleep(0.01)
        writer.write(rest)
        assert b" 408 " in await reader.readline()
        writer.close()
        assert (usage.in_flight, usage.failures, surface.service.poked, upstream.seen) == (0, 0, [], [])

    @pytest.mark.parametrize("part", [b"", b"\r\n\r\n", b"GET /livez HTTP/1.1\r\nHost: local"])
    async def test_a_head_that_does_not_come_whole(self, surface: Surface, part: bytes) -> None:
        host, port = surface.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(part)
        assert b" 408 " in await reader.readline()
        await reader.read()
        writer.close()

    async def test_a_connection_that_was_used_may_rest(self, surface: Surface) -> None:
        host, port = surface.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(2):
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"ok\n")
            await asyncio.sleep(0.5)
        writer.close()

    @pytest.mark.parametrize("path", ["/predict/m", "/v2/repository/models/m/load"])
    async def test_a_body_that_is_read_here(self, surface: Surface, upstream: Recorder, path: str) -> None:
        request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\nConnection: close\r\n\r\nabc"
        host, port = surface.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        assert b" 408 " in await reader.readline()
        writer.close()
        assert surface.service.calls == []
