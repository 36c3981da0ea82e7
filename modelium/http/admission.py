"""What a request says of itself in headers, and its way to a loaded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from multidict import istr

from modelium.engine.admission import Lease
from modelium.errors import ModeliumError
from modelium.http.answers import BadRequest
from modelium.http.settings import HttpSettings

if TYPE_CHECKING:
    from modelium.engine.service import Service

ORGANISATION = istr("x-modelium-organisation")
"""Who asks, for counts: up to 64 printable characters."""
DEADLINE = istr("x-modelium-deadline-s")
"""Seconds that the request may wait for its model; 0 refuses to wait."""
PRIORITY = istr("x-modelium-priority")
"""-10 to 10; who waits with a higher one is served first."""

WAIT = istr("x-modelium-wait")
"""0 has a request for a model that is not loaded answered at once, while the model is loaded for the next one."""

NOTHING: Mapping[str, str] = {}

HTTP = "kserve-http"
GRPC = "kserve-grpc"
OPENAI = "openai"
"""Protocols of endpoints, as `modelium.api.Endpoint` names them."""

MAX_ORGANISATION = 64
MAX_PRIORITY = 10


def organisation_of(headers: Mapping[str, str]) -> str:
    organisation = headers.get(ORGANISATION)
    if not organisation:
        return ""
    if len(organisation) > MAX_ORGANISATION or not organisation.isprintable():
        raise BadRequest(
            f"expected {ORGANISATION} to be at most {MAX_ORGANISATION} printable characters, found {organisation!r:.80}"
        )
    return organisation


def deadline_of(headers: Mapping[str, str], longest_s: float) -> float | None:
    """Seconds, `longest_s` at most; None where the request leaves it to the service."""
    text = headers.get(DEADLINE)
    if text is None:
        return None
    try:
        deadline_s = float(text)
    except ValueError:
        deadline_s = math.nan
    if not deadline_s >= 0:
        raise BadRequest(f"expected {DEADLINE} to be a number of seconds, 0 or more, found {text!r:.40}")
    return min(deadline_s, longest_s)


def priority_of(headers: Mapping[str, str]) -> int:
    text = headers.get(PRIORITY)
    if text is None:
        return 0
    try:
        priority = int(text)
    except ValueError:
        raise BadRequest(f"expected {PRIORITY} to be a whole number, found {text!r:.40}") from None
    return max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))


def waits(headers: Mapping[str, str], query: Mapping[str, str]) -> bool:
    """Whether the request waits for its model: `x-modelium-wait`, or `wait` in the query, is 1 unless it says 0."""
    text = headers.get(WAIT, query.get("wait", "1"))
    if text not in ("0", "1"):
        raise BadRequest(f"expected {WAIT} to be 0 or 1, found {text!r:.40}")
    return text == "1"


async def acquire(
    service: Service,
    settings: HttpSettings,
    headers: Mapping[str, str],
    name: str,
    query: Mapping[str, str] = NOTHING,
    before_waiting: Callable[[], None] | None = None,
) -> Lease:
    """A hold on `name`, loaded first when it is not ready. To be released.

    `before_waiting` may refuse, by raising, what no load could help.
    """
    organisation = organisation_of(headers)
    lease = service.try_acquire(name, organisation)
    if lease is not None:
        return lease
    if before_waiting is not None:
        before_waiting()
    deadline_s, priority = deadline_of(headers, settings.max_deadline_s), priority_of(headers)
    try:
        if not waits(headers, query):
            await service.load_soon(name, priority=priority, organisation=organisation)
        return await service.acquire(name, deadline_s=deadline_s, priority=priority, organisation=organisation)
    except ModeliumError:
        usage = service.usage.get(name)
        if usage is not None:
            usage.refuse(organisation)
        raise


def endpoint(lease: Lease, protocol: str) -> str:
    """The lease's address for `protocol`."""
    address = lease.endpoints.get(protocol)
    if address is None:
        spoken = ", ".join(sorted(lease.endpoints)) or "nothing"
        raise BadRequest(f"{lease.model} is served by {lease.runtime}, which speaks {spoken}, not {protocol}")
    return address


def openai_alone(endpoints: Mapping[str, str]) -> bool:
    """Whether a model's runtime speaks OpenAI, and no KServe: what is asked over KServe is then translated here."""
    return HTTP not in endpoints and GRPC not in endpoints and OPENAI in endpoints
