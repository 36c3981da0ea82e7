"""Requests passed on to a runtime and its answers passed back, byte for byte.

What is sent is sent once. A request goes out a second time only when its first connection turned out to be closed
before a byte was handed to it, which happens when a runtime closes an idle connection at the moment it is taken from
the pool. Once a byte has left, the runtime may have worked on it, and its failure is the client's to hear.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesPayload, Payload
from multidict import CIMultiDict, istr
from yarl import URL

from modelium.errors import ModeliumError
from modelium.http.answers import ID, REQUEST_ID, UpstreamFailed, unreachable
from modelium.http.bodies import HEADER_LENGTH, BodyStalled, TooLarge, check_header_length, some
from modelium.http.settings import HttpSettings

log = logging.getLogger(__name__)

WHOLE_BYTES = 256 * 1024
"""Bodies up to this size travel as one piece, longer ones and those of unknown length as they come."""

HOP_BY_HOP = tuple(
    istr(name)
    for name in (
        "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "TE", "Trailer",
        "Transfer-Encoding", "Upgrade",
    )
)  # fmt: skip
"""Headers that speak of one connection, not of the message: RFC 9110, 7.6.1."""

FORM = "application/x-www-form-urlencoded"
"""What curl calls any body, which is none here. Triton's HTTP server takes it at its word, looks for fields in it, and
crashes on one of 4 MiB or more (seen on 2.51)."""

ABRUPT = "llama.cpp"
"""The `Server` that closes a connection after a stream without saying so, so that the next request is lost with it
(xllamacpp 2026.10)."""

IDLE_S = 4.0
"""How long a connection waits for its next request: uvicorn and llama.cpp close theirs after 5 s, and a request that
meets that is lost."""

_NOT_FOR_UPSTREAM = (*HOP_BY_HOP, istr("Host"), istr("Expect"))
_AUTO_HEADERS = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, hdrs.USER_AGENT)


class StreamBroken(ConnectionResetError):
    """The runtime was lost while its answer was under way; the client's connection was broken off."""


class _Whole(BytesPayload):
    """A body that knows whether it was handed to a connection, its head going with it in one write."""

    handed = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        transport = writer.transport
        if transport is not None and not transport.is_closing():
            self.handed = True
        await writer.write(self._value)


class _Streamed(Payload):
    """A body passed on as it arrives, no faster than the runtime takes it."""

    def __init__(self, content: aiohttp.StreamReader, settings: HttpSettings, *, bounded: bool):
        super().__init__(content, content_type="application/octet-stream")
        self.fault: ModeliumError | None = None
        """What is wrong with the body itself, so that its end is not taken for the runtime's."""
        self._limit = settings.max_body_bytes if bounded else None
        self._stall_s = settings.client_stall_s

    async def write(self, writer: AbstractStreamWriter) -> None:
        size = 0
        while chunk := await self._next():
            size += len(chunk)
            if self._limit is not None and size > self._limit:
                self.fault = TooLarge(
                    f"expected a body of at most {self._limit} bytes (max_body_bytes), found a longer one"
                )
                raise self.fault
            await writer.write(chunk)

    async def _next(self) -> bytes:
        try:
            return await some(self._value, self._stall_s)
        except ModeliumError as exc:
            self.fault = exc
            raise

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a streamed body can't be read twice")


class Upstream:
    """The one HTTP client of runtimes: plain, without cookies, redirects, decompression or limits."""

    def __init__(self, settings: HttpSettings):
        self._settings = settings
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._abrupt: set[str] = set()  # addresses

    async def open(self) -> None:
        """To be called on the loop that the requests will run on."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_AUTO_HEADERS,
            timeout=self._timeout,
            trust_env=False,
            max_line_size=64 * 1024,
            max_field_size=64 * 1024,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def forward(
        self, request: web.Request, base: str, model: str, *, body: bytes | None = None, stream: bool = False
    ) -> web.StreamResponse:
        """Pass `request` to the runtime at `base`, and its answer to the client.

        `model` is for messages; `body` is the request's where it was read already; `stream` says that an answer in
        server-sent events is wanted. Raises `RuntimeUnavailable` when nothing was sent, `UpstreamFailed` when the
        runtime did not answer, `StreamBroken` when it was lost in the middle of an answer; the client then sees a
        connection that broke.
        """
        payload = await self._body(request) if body is None else _Whole(body)
        headers = CIMultiDict(request.headers)
        _drop_hop_by_hop(headers, _NOT_FOR_UPSTREAM)
        if headers.get(hdrs.CONTENT_TYPE, "").lstrip().lower().startswith(FORM):
            headers[hdrs.CONTENT_TYPE] = "application/octet-stream" if HEADER_LENGTH in headers else "application/json"
        headers[REQUEST_ID] = request[ID]
        if body is not None:
            headers[hdrs.CONTENT_LENGTH] = str(len(body))
        if stream and base in self._abrupt:
            headers[hdrs.CONNECTION] = "close"
        target = request.raw_path
        url = URL(base + (target if target.startswith("/") else str(request.rel_url)), encoded=True)
        async with await self._send(request.method, url, headers, payload, model) as answer:
            if stream:
                self._look_at(base, answer)
            return await self._relay(request, answer, model)

    async def ask(
        self,
        method: str,
        url: str,
        model: str,
        *,
        body: bytes | None = None,
        header_length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, CIMultiDict[str], bytes]:
        """A request of our own: status, headers and body of the answer. Errors as those of `forward`."""
        headers = CIMultiDict(headers or {})
        if header_length is not None:
            headers[HEADER_LENGTH] = str(header_length)
            headers[hdrs.CONTENT_TYPE] = "application/octet-stream"
        payload = None if body is None else _Whole(body)
        async with await self._send(method, URL(url, encoded=True), headers, payload, model) as answer:
            return answer.status, CIMultiDict(answer.headers), await _taken(answer.read(), model)

    @asynccontextmanager
    async def posting(
        self, base: str, path: str, model: str, *, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """As `ask`, with the answer's body as it comes. Leaving early closes the connection."""

        async def pieces() -> AsyncIterator[bytes]:
            while piece := await _taken(answer.content.readany(), model):
                yield piece

        sent = CIMultiDict(headers)
        if base in self._abrupt:
            sent[hdrs.CONNECTION] = "close"
        async with await self._send("POST", URL(base + path, encoded=True), sent, _Whole(body), model) as answer:
            self._look_at(base, answer)
            yield answer.status, pieces()

    def _look_at(self, base: str, answer: aiohttp.ClientResponse) -> None:
        """See to it that an abrupt server's connection is not used again after a stream, from its first answer on."""
        if answer.headers.get(hdrs.SERVER) == ABRUPT:
            self._abrupt.add(base)
            if answer.connection is not None and answer.connection.protocol is not None:
                answer.connection.protocol.force_close()

    async def _body(self, request: web.Request) -> Payload | None:
        headers, content = request.headers, request.content
        declared = headers.get(hdrs.CONTENT_LENGTH)
        length = int(declared) if declared is not None else None  # the parser saw to it that it is a number
        if (head_length := headers.get(HEADER_LENGTH)) is not None:
            packed = headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity"
            check_header_length(head_length, None if packed else length)  # it counts unpacked bytes
        if length is None:
            return _Streamed(content, self._settings, bounded=True) if request.body_exists else None
        most = self._settings.max_body_bytes
        if most is not None and length > most:
            raise TooLarge(f"expected a body of at most {most} bytes (max_body_bytes), found {length}")
        if length > WHOLE_BYTES:
            return _Streamed(content, self._settings, bounded=False)
        if content.total_bytes >= length:  # it came together with its head, as small ones do
            return _Whole(content.read_nowait())
        pieces = []
        while length and (piece := await some(content, self._settings.client_stall_s)):
            pieces.append(piece)
            length -= len(piece)
        return _Whole(b"".join(pieces))

    async def _send(
        self, method: str, url: URL, headers: CIMultiDict[str], body: Payload | None, model: str
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        for last in (False, True):
            try:
                return await self._session.request(method, url, headers=headers, data=body, allow_redirects=False)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
                raise unreachable(model, url.authority, _words(exc)) from exc
            except (aiohttp.ClientError, OSError) as exc:
                if isinstance(body, _Streamed) and body.fault is not None:
                    raise body.fault from exc
                if isinstance(body, _Whole) and not body.handed:
                    if last:
                        raise unreachable(model, url.authority, _words(exc)) from exc
                    continue
                raise UpstreamFailed(
                    f"the runtime of {model} at {url.authority} took the request and did not answer "
                    f"({_words(exc)}); it was not sent again, since it may have been worked on"
                ) from exc
        raise AssertionError("unreachable")

    async def _relay(self, request: web.Request, answer: aiohttp.ClientResponse, model: str) -> web.StreamResponse:
        headers = CIMultiDict(answer.headers)
        _drop_hop_by_hop(headers, HOP_BY_HOP)
        declared = headers.get(hdrs.CONTENT_LENGTH)
        chunked = declared is None and request.version >= aiohttp.HttpVersion11
        begun = b""
        if declared is None and answer.status >= 400:  # most errors are short, and are read before they are passed on
            while len(begun) <= WHOLE_BYTES and (piece := await _taken(answer.content.readany(), model)):
                begun += piece
        short = declared is None and answer.status >= 400 and len(begun) <= WHOLE_BYTES
        if short or (declared is not None and int(declared) <= WHOLE_BYTES):
            body = begun or await _taken(answer.read(), model)
            whole = web.Response(status=answer.status, reason=answer.reason, headers=headers, body=body)
            if chunked:
                whole.enable_chunked_encoding()
            return whole
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        if chunked:
            response.enable_chunked_encoding()
        await response.prepare(request)
        if begun:
            await response.write(begun)
        content = answer.content
        while True:
            try:
                chunk = await content.readany()
            except (aiohttp.ClientError, OSError) as exc:
                log.warning("%s: its runtime was lost while it answered: %s", model, _words(exc))
                break_off(request, declared is None and request.version < aiohttp.HttpVersion11)
                raise StreamBroken(_words(exc)) from exc
            if not chunk:
                break
            try:
                async with asyncio.timeout(self._settings.client_stall_s):
                    await response.write(chunk)
            except TimeoutError:
                raise BodyStalled(
                    f"the client took nothing of the answer for {self._settings.client_stall_s:g} s"
                ) from None
        await response.write_eof()
        return response


def _drop_hop_by_hop(headers: CIMultiDict[str], names: tuple[istr, ...]) -> None:
    connection = headers.get(hdrs.CONNECTION)
    if connection is not None and connection.lower() not in ("keep-alive", "close"):
        for name in connection.split(","):
            headers.popall(name.strip(), None)
    for name in names:
        headers.popall(name, None)


async def _taken(reading: Awaitable[bytes], model: str) -> bytes:
    """What is read of a runtime's answer before the client has any of it."""
    try:
        return await reading
    except (aiohttp.ClientError, OSError) as exc:
        raise UpstreamFailed(f"the runtime of {model} broke off its answer ({_words(exc)}); ask again") from exc


def break_off(request: web.Request, ends_with_connection: bool) -> None:
    """Close the client's connection so that it can't take what it has for the whole answer."""
    transport = request.transport
    if transport is None:
        return
    if ends_with_connection:
        transport.abort()  # an orderly close would mean the end of the body
    else:
        transport.close()


def _words(exc: BaseException) -> str:
    if isinstance(exc, aiohttp.ClientConnectorError):
        return exc.strerror or str(exc.os_error)
    return str(exc) or type(exc).__name__
