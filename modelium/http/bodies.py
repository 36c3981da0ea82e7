"""Requests' bodies that are read here rather than passed on: bounded, unpacked, parsed."""

from __future__ import annotations

import json
import zlib
from typing import Any

from aiohttp import hdrs, web

from modelium.http.answers import BadRequest
from modelium.http.upstream import HEADER_LENGTH


async def read_body(request: web.Request) -> bytes:
    """The body, of as many bytes as the application's `client_max_size` allows, unpacked when it came packed."""
    body = await request.read()
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    if coding == "identity":
        return body
    if coding not in ("gzip", "deflate"):
        raise BadRequest(f"expected Content-Encoding gzip or deflate, found {coding!r:.40}")
    limit = request.client_max_size
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
    if not body.strip():
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"expected JSON, found something else: {exc}") from None


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty object."""
    value = await read_json(request)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"expected a JSON object, found {type(value).__name__}")
    return value


def header_length(request: web.Request) -> int | None:
    """`Inference-Header-Content-Length`, where there is one."""
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"expected {HEADER_LENGTH} to be a number of bytes, found {text!r:.40}")
    return int(text)
