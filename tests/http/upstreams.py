"""Runtimes' HTTP ends as tests need them: one that records and answers well, one that does what a script says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from multidict import CIMultiDict


@dataclass
class Seen:
    method: str
    target: str
    headers: CIMultiDict[str]
    body: bytes


Answer = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


async def echo(request: web.Request, body: bytes) -> web.StreamResponse:
    return web.Response(body=body, headers={"Content-Type": "application/octet-stream"})


def in_two_pieces(go_on: asyncio.Event, first: bytes, second: bytes) -> Answer:
    """Server-sent events; the second only once it is told to go on."""

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(first)
        await go_on.wait()
        await response.write(second)
        return response

    return answer


@dataclass
class Recorder:
    """A server that notes each request whole and answers by `answer`."""

    url: str = ""
    answer: Answer = echo
    seen: list[Seen] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            body = b"".join([chunk async for chunk in request.content.iter_any()])
            self.seen.append(Seen(request.method, request.raw_path, CIMultiDict(request.headers), body))
            return await self.answer(request, body)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    recorder = Recorder()
    app = web.Application(client_max_size=2**40)
    app.router.add_route("*", "/{rest:.*}", recorder.handle)
    runner = web.AppRunner(app, access_log=None, auto_decompress=False, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    recorder.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield recorder
    finally:
        await runner.cleanup()


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """A server that runs `script` on each connection, with the connection's number, then closes it."""
    number = 0
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        number += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer, number)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request with a Content-Length, as it came."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
    )
    return head + await reader.readexactly(length)


async def exchange(url: str, request: bytes) -> bytes:
    """What a server answers to exactly these bytes, until it closes; `request` should ask it to."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()
