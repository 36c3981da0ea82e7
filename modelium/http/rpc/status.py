"""Errors as gRPC tells them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

import grpc
import grpc.aio

from modelium.errors import ModeliumError, ModelLoading
from modelium.http.answers import retry_after, status_of
from modelium.http.streams import InferenceFailed

CODES: Mapping[int, grpc.StatusCode] = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    HTTPStatus.BAD_GATEWAY: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.INSUFFICIENT_STORAGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""By the status that the same error has over HTTP; INTERNAL for any other. The meanings of the codes:
https://grpc.io/docs/guides/status-codes/"""


def code_of(error: ModeliumError) -> grpc.StatusCode:
    status = error.status if isinstance(error, InferenceFailed) else status_of(error)
    return CODES.get(status, grpc.StatusCode.INTERNAL)


async def refuse(context: Any, error: ModeliumError) -> NoReturn:
    """End the call with the error; `retry-after` in the trailing metadata says when to ask again, in seconds, and
    `x-modelium-loading` how far a model is, as JSON."""
    trailing = [("x-modelium-code", error.code)]
    if isinstance(error, ModelLoading):
        trailing.append(("x-modelium-loading", json.dumps(error.fields)))
    if (again := retry_after(error)) is not None:
        trailing.append(("retry-after", again))
    await end(context, code_of(error), error.message, tuple(trailing))


async def end(context: Any, code: grpc.StatusCode, message: str, trailing: tuple[Any, ...] = ()) -> NoReturn:
    """End the call with a status that is not OK. For a client that has left it just ends."""
    try:
        await context.abort(code, message, trailing)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None  # nobody hears it
    raise AssertionError("unreachable")
