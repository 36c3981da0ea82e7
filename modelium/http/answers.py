"""How errors reach clients: each surface in its own protocol's shape, with one status for each code.

Nothing that a client sends or a plugin does makes a traceback on the wire: what nobody expected is logged once, under
a request id that the client is given.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from modelium.errors import ModeliumError, ModelLoading, RuntimeUnavailable

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

STATUS: Mapping[str, int] = {
    "bad_request": 400,
    "body_stalled": 408,
    "capacity": 503,
    "config": 500,
    "deadline_passed": 503,
    "driver": 502,
    "forbidden": 403,
    "internal": 500,
    "load_rejected": 503,
    "load_timeout": 503,
    "model_conflict": 409,
    "model_failed": 503,
    "model_invalid": 400,
    "model_loading": 503,
    "model_not_found": 404,
    "never_fits": 507,  # Insufficient Storage: unlike 503 it does not invite to try again
    "not_supported": 501,
    "plugin": 500,
    "queue_full": 429,
    "runtime_unavailable": 503,
    "too_large": 413,
    "upstream_failed": 502,
}
"""By `ModeliumError.code`; a code that is not here (drivers and plugins have their own) counts as its class's."""

RETRY_AFTER_S: Mapping[str, float] = {"queue_full": 1.0, "deadline_passed": 5.0, "runtime_unavailable": 1.0}
"""For codes after which asking again helps, where the error itself says no time."""


SPOKEN: web.AppKey[set[Any]] = web.AppKey("spoken", set)
"""Connections on which there was a request."""

REQUEST_ID = "X-Request-ID"
ID = web.RequestKey("id", str)
MAX_ID_BYTES = 200
TRACE = ("traceparent", "tracestate", "baggage")
"""https://www.w3.org/TR/trace-context/ and https://www.w3.org/TR/baggage/"""


_PRINTABLE = re.compile("[ -~]+")
"""What gRPC's metadata may hold, and no log is confused by."""


def request_id(found: str | None) -> str:
    """The id that the client gave its request, if it is printable ASCII of a sane length; else a new one."""
    sane = found is not None and len(found) <= MAX_ID_BYTES and _PRINTABLE.fullmatch(found)
    return found if found is not None and sane else secrets.token_hex(16)


def along(request: web.Request) -> dict[str, str]:
    """Headers that go along where what a runtime is asked is composed here: the request's id, and its trace context."""
    found = {name: request.headers.get(name, "") for name in TRACE}
    return {REQUEST_ID: request[ID], **{k: v for k, v in found.items() if _PRINTABLE.fullmatch(v)}}


async def name_request(request: web.Request, response: web.StreamResponse) -> None:
    """Tell the client the id of its request, under which log lines speak of it."""
    if ID in request:
        response.headers[REQUEST_ID] = request[ID]


class BadRequest(ModeliumError):
    """The request is not what it must be."""

    code = "bad_request"


class NotSupported(ModeliumError):
    """The request is right, and nothing here can answer it."""

    code = "not_supported"


class UpstreamFailed(ModeliumError):
    """The runtime took a request and did not answer it; it is not sent again, since it may have been worked on."""

    code = "upstream_failed"


def unreachable(model: str, address: str, why: str) -> RuntimeUnavailable:
    """Nothing was sent to a runtime."""
    return RuntimeUnavailable(
        f"the runtime of {model} at {address} can't be reached ({why}); nothing was sent to it", retry_after_s=1.0
    )


DEAD = "Stub process '[^']*' is not healthy|EngineDeadError"
"""What Triton answers for a Python model whose process has ended, and such a model whose engine of vLLM has: under 500,
or 400 to `generate` and `generate_stream` (2.51)."""
_DEAD = re.compile(DEAD.encode())


def check_process(answer: bytes, model: str) -> None:
    """Raise `UpstreamFailed` when a runtime's error says that the model's own process is gone."""
    if _DEAD.search(answer):
        raise UpstreamFailed(
            f"the process of {model} has ended; the request was not sent again, since it may have been worked on, and "
            "the next one loads the model anew"
        )


def json_answer(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, default: Callable[[Any], Any] = str
) -> web.Response:
    body = json.dumps(value, default=default, ensure_ascii=False).encode("utf-8", "replace")
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def status_of(error: ModeliumError) -> int:
    codes = [error.code, *(vars(kind)["code"] for kind in type(error).__mro__ if "code" in vars(kind))]
    return next(STATUS[code] for code in codes if code in STATUS)


def retry_after(error: ModeliumError) -> str | None:
    """Whole seconds after which asking again may help; None where nobody can tell."""
    seconds = error.retry_after_s if error.retry_after_s is not None else RETRY_AFTER_S.get(error.code)
    return None if seconds is None else str(max(1, math.ceil(seconds)))


def kserve_shape(error: ModeliumError, status: int) -> Any:
    """As Triton answers: `{"error": "..."}`; of a model that loads, beside it how far it is."""
    return {"error": error.message, **(error.fields if isinstance(error, ModelLoading) else {})}


def openai_shape(error: ModeliumError, status: int) -> Any:
    """As OpenAI answers (`Error` in https://github.com/openai/openai-openapi), with codes of our own."""
    kind = OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {"message": error.message, "type": kind, "param": error.fields.get("param"), "code": error.code}
        | (error.fields if isinstance(error, ModelLoading) else {}),
    }


def own_shape(error: ModeliumError, status: int) -> Any:
    return {"error": error.as_dict()}


OPENAI_TYPES: Mapping[int, str] = {403: "permission_error", 429: "rate_limit_error"}
"""What OpenAI calls the kind of an error by its status, where that is not plainly the client's or the server's."""

Shape = Callable[[ModeliumError, int], Any]

SHAPES: list[tuple[str, Shape]] = [("/v2", kserve_shape), ("/v1", openai_shape), ("/", own_shape)]
"""The shape of errors by the beginning of the path; the first that fits."""


def error_answer(request: web.Request, error: ModeliumError, status: int | None = None) -> web.Response:
    """`error` in the shape of the protocol that `request` speaks."""
    shape = next(shape for prefix, shape in SHAPES if request.path.startswith(prefix) or prefix == "/")
    again = retry_after(error)
    headers = {} if again is None else {"Retry-After": again}
    status = status or status_of(error)
    return json_answer(shape(error, status), status, headers)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer; the request gets its id first."""
    id = request[ID] = request_id(request.headers.get(REQUEST_ID))
    request.app[SPOKEN].add(request.protocol)
    try:
        return await handler(request)
    except ModeliumError as exc:
        failure, status = exc, None
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        failure, status = _http_error(request, exc), exc.status
    except Exception as exc:
        if isinstance(exc, ConnectionError) and (request.transport is None or request.transport.is_closing()):
            return web.Response(status=499)  # the client is gone, or was broken off: nobody reads this
        log.exception("request %s (%s %s) failed unexpectedly", id, request.method, request.path)
        failure = ModeliumError(
            f"something went wrong inside Modelium; its log tells more under request {id}", request_id=id
        )
        status = 500
    if request.writer.output_size:  # the answer was under way: only breaking it off is honest
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=499)
    answer = error_answer(request, failure, status)
    if status == 405 and isinstance(failure.fields.get("allowed"), list):
        answer.headers["Allow"] = ", ".join(failure.fields["allowed"])
    return answer


def _http_error(request: web.Request, exc: web.HTTPException) -> ModeliumError:
    """aiohttp's own refusals, in words of ours."""
    if isinstance(exc, web.HTTPNotFound):
        return ModeliumError(f"there is nothing at {request.path}; GET / lists what there is", code="not_found")
    if isinstance(exc, web.HTTPMethodNotAllowed):
        allowed = sorted(exc.allowed_methods)
        return ModeliumError(
            f"{request.path} takes {' or '.join(allowed)}, not {request.method}",
            code="method_not_allowed",
            allowed=allowed,
        )
    return ModeliumError(exc.text or HTTPStatus(exc.status).phrase, code="http")
