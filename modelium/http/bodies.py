"""Requests' bodies: taken as they arrive, without waiting for ever; some are read here: bounded, unpacked, parsed."""

from __future__ import annotations

import asyncio
import json
import zlib
from typing import Any

from aiohttp import StreamReader, hdrs, web
from multidict import istr

from modelium.errors import ModeliumError
from modelium.http.answers import BadRequest
from modelium.http.settings import SETTINGS

HEADER_LENGTH = istr("Inference-Header-Content-Length")
"""How much of a body is JSON; binary tensors follow. From Triton's binary tensor data extension."""


LONG_BYTES = 128 * 1024
"""JSON longer than this is parsed in a thread."""


class TooLarge(ModeliumError):
    code = "too_large"


class BodyStalled(ModeliumError):
    """The client stopped in the middle of its request, or of taking the answer, and held a model's lease meanwhile."""

    code = "body_stalled"


async def some(content: StreamReader, stall_s: float) -> bytes:
    """What has arrived of a request's body; empty at its end. Raises `BadRequest` or `BodyStalled`.

    aiohttp's parser does not tell a reader that a chunk is malformed, it falls silent: that too ends as a stall.
    """
    try:
        async with asyncio.timeout(stall_s):
            return await content.readany()
    except TimeoutError:
        raise BodyStalled(f"nothing came of the request's body for {stall_s:g} s, or what came is malformed") from None
    except Exception as exc:
        raise BadRequest(f"the request's body is not whole, or not well formed: {exc}") from exc


def check_header_length(value: str, body_length: int | None) -> int:
    """The number in `Inference-Header-Content-Length`; `body_length` where it is known."""
    expected = f"0 to the body's {body_length} bytes" if body_length is not None else "a number of bytes"
    good = value.isascii() and value.isdigit() and (body_length is None or int(value) <= body_length)
    if not good:
        raise BadRequest(f"expected {HEADER_LENGTH} to be {expected}, found {value!r:.40}")
    return int(value)


def header_length(request: web.Request) -> int | None:
    """`Inference-Header-Content-Length`, where there is one."""
    text = request.headers.get(HEADER_LENGTH)
    return None if text is None else check_header_length(text, None)


async def read_raw(request: web.Request) -> bytes:
    """The body, of at most `max_json_bytes` and `max_body_bytes`, as it came."""
    settings = request.app[SETTINGS]
    most, named = settings.max_json_bytes, "max_json_bytes"
    if settings.max_body_bytes is not None and settings.max_body_bytes < most:
        most, named = settings.max_body_bytes, "max_body_bytes"
    room = most
    pieces = []
    while (request.content_length or 0) <= most and room >= 0:
        piece = await some(request.content, settings.client_stall_s)
        if not piece:
            break
        pieces.append(piece)
        room -= len(piece)
    else:
        raise TooLarge(f"expected a body of at most {most} bytes ({named}), found more")
    return b"".join(pieces)


def unpacked(request: web.Request, body: bytes) -> bytes:
    """The body, unpacked when it came packed, to at most `max_json_bytes`."""
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    return body if coding == "identity" else _unpacked(body, coding, request.app[SETTINGS].max_json_bytes)


async def read_body(request: web.Request) -> bytes:
    """The body, of at most `max_json_bytes`, unpacked when it came packed."""
    return unpacked(request, await read_raw(request))


def _unpacked(body: bytes, coding: str, limit: int) -> bytes:
    if coding not in ("gzip", "deflate"):
        raise BadRequest(f"expected Content-Encoding gzip or deflate, found {coding!r:.40}")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # finds out which of the two it is
    try:
        body = unpacker.decompress(body, limit)
    except zlib.error as exc:
        raise BadRequest(f"expected a body packed by {coding}, found something else: {exc}") from None
    if not unpacker.eof:
        raise BadRequest(f"expected a whole body packed by {coding}, of at most {limit} bytes when unpacked")
    return body


async def read_json(request: web.Request) -> Any:
    """The JSON value in the body; None when the body is empty."""
    body = await read_body(request)
    return parse_json(body) if len(body) <= LONG_BYTES else await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> Any:
    """The JSON value in `body`; None when it is empty."""
    if not body.strip():
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"expected JSON, found something else: {exc}") from None


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty object."""
    return parse_object(await read_body(request))


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; an empty body is an empty object."""
    value = parse_json(body)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"expected a JSON object, found {type(value).__name__}")
    return value
