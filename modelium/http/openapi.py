"""What the service's own routes take and give: one table, shown short at `/` and as OpenAPI at `/openapi.json`.

The other routes are described by those who made their protocols: KServe v2 with Triton's extensions, and OpenAI.
Format: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

import modelium
from modelium.api.types import Frozen, Transition
from modelium.core.states import State
from modelium.engine.views import (
    ChecksView,
    Explanation,
    HealthView,
    ModelDetail,
    ModelView,
    PinView,
    PlanPreview,
    PluginView,
    RemovedView,
    StatusView,
)
from modelium.http import admission

Schema = Mapping[str, Any]

TEXT, EVENTS = "text/plain", "text/event-stream"
EXAMPLE = "my-model"

OTHERS = {
    "POST /v2/models/{model}/infer": "KServe v2 inference, as Triton answers it; all else under /v2 too",
    "POST /v1/chat/completions": "as OpenAI answers it; also /v1/completions, /v1/embeddings and GET /v1/models",
}
"""Routes of others' protocols."""

MAX_LISTED = 10_000
"""Lines of a log, or decisions, in one answer."""

STATES = (*State, *(state.lower() for state in State))

DEADLINE: Schema = {
    "name": str(admission.DEADLINE),
    "in": "header",
    "description": "Seconds that the request may wait for its model.",
    "schema": {"type": "number", "minimum": 0},
}


LOADING: tuple[Schema, ...] = (
    DEADLINE,
    {
        "name": str(admission.WAIT),
        "in": "header",
        "description": "`0`: do not wait for a load, be told how far it is; so does `?wait=0`.",
        "schema": {"enum": ["0", "1"]},
    },
    {
        "name": str(admission.PRIORITY),
        "in": "header",
        "description": "Who waits for room goes by this, the higher first.",
        "schema": {"type": "integer"},
    },
    {
        "name": str(admission.ORGANISATION),
        "in": "header",
        "description": "Whom the request is counted for.",
        "schema": {"type": "string", "maxLength": admission.MAX_ORGANISATION},
    },
)


class Error(BaseModel):
    model_config = ConfigDict(extra="allow")

    code: str
    """Stable, for programs."""
    message: str
    """What was expected, what was found and what to do."""
    retry_after_s: float | None = None


class ErrorAnswer(BaseModel):
    """Further members of `error` tell facts behind its message."""

    error: Error


class Prediction(Frozen):
    model: str
    version: str
    outputs: Mapping[str, Any]
    """Nested lists by the output's name."""
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    summary: str
    gives: Any = TEXT
    """A type that pydantic can describe, or a media type."""
    query: Mapping[str, Schema] = field(default_factory=dict)
    headers: tuple[Schema, ...] = ()
    takes: Schema | None = None
    """The schema of a JSON body."""
    unready: bool = False
    """503 is an answer like another."""


OPERATIONS: Mapping[str, Operation] = {
    "POST /predict/{model}": Operation(
        'inference in one simple form: {"inputs": ...} or {"text": "..."}',
        Prediction,
        headers=LOADING,
        takes={"description": "`inputs` or `text`, and `parameters`; or the value of the one input."},
    ),
    "GET /models": Operation(
        "all models; ?state=READY picks", list[ModelView], query={"state": {"enum": list(STATES)}}
    ),
    "GET /models/{name}": Operation("one model", ModelDetail),
    "GET /models/{name}/explain": Operation("why it is where it is", Explanation),
    "GET /models/{name}/logs": Operation(
        "what its runtime wrote about it; ?lines=200",
        query={"lines": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": 200}},
    ),
    "POST /models/{name}/load": Operation(
        "load it, and answer when it is READY; also unload, pin, unpin", ModelView, headers=(DEADLINE,)
    ),
    "POST /models/{name}/unload": Operation("unload it, when what it does is done", ModelView, headers=(DEADLINE,)),
    "POST /models/{name}/pin": Operation("keep it loaded", PinView),
    "POST /models/{name}/unpin": Operation("let it be unloaded again", PinView),
    "DELETE /models/{name}": Operation("unload it and move it to the trash folder", RemovedView),
    "POST /plan": Operation(
        'what would happen to a drop: {"path": "/absolute/path", "name": "as it would be called"}',
        PlanPreview,
        takes={
            "type": "object",
            "properties": {
                "path": {"type": "string", "pattern": "^/", "description": "On the service's machine."},
                "name": {"type": "string", "description": "What the model would be called; else as the path is."},
            },
            "required": ["path"],
        },
    ),
    "GET /status": Operation("devices, runtimes, queue, plugins", StatusView),
    "GET /health": Operation("in short: is anything wrong?", HealthView),
    "GET /livez": Operation("200 while the service runs"),
    "GET /readyz": Operation("200 when it can serve", unready=True),
    "GET /check": Operation("folders, runtimes, plugins and devices, each checked", ChecksView),
    "GET /decisions": Operation(
        "the last transitions with their reasons; ?subject=NAME&limit=100",
        list[Transition],
        query={
            "subject": {"type": "string"},
            "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": 100},
        },
    ),
    "GET /events": Operation("transitions and progress as they happen (server-sent events)", EVENTS),
    "GET /plugins": Operation("plugins, with those that are left out and why", list[PluginView]),
    "GET /metrics": Operation("for Prometheus"),
    "GET /openapi.json": Operation("these routes, described", dict[str, Any]),
}

ALIKE = ("unload", "pin", "unpin")
"""Orders that the index tells of in the line of `load`."""


METRICS = "GET /metrics"
"""A route that the configuration can leave out."""


def index(*, metrics: bool = True) -> dict[str, str]:
    """One line for each route."""
    own = {
        route: op.summary
        for route, op in OPERATIONS.items()
        if not route.endswith(ALIKE) and (metrics or route != METRICS)
    }
    return {**OTHERS, **own}


@cache
def description(*, metrics: bool = True) -> Mapping[str, Any]:
    """The whole description."""
    typed = {route: op.gives for route, op in OPERATIONS.items() if not isinstance(op.gives, str)}
    adapters = [(route, "serialization", TypeAdapter(kind)) for route, kind in typed.items()]
    schemas, shared = TypeAdapter.json_schemas(
        [*adapters, ("error", "serialization", TypeAdapter(ErrorAnswer))],  # type: ignore[list-item]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route, op in OPERATIONS.items():
        if route == METRICS and not metrics:
            continue
        method, _, path = route.partition(" ")
        schema = schemas.get((route, "serialization"))
        paths.setdefault(path, {})[method.lower()] = _operation(path, op, schema)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Modelium",
            "version": modelium.__version__,
            "description": "Modelium's own routes. It also answers KServe v2 with Triton's extensions under /v2, and "
            "OpenAI's clients under /v1.",
        },
        "paths": paths,
        "components": {
            "schemas": {**shared.get("$defs", {})},
            "responses": {
                "error": {
                    "description": "What went wrong.",
                    "content": {"application/json": {"schema": schemas["error", "serialization"]}},
                }
            },
        },
    }


def _operation(path: str, op: Operation, schema: Any) -> dict[str, Any]:
    named = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    found: dict[str, Any] = {
        "summary": op.summary,
        "parameters": [
            *({"name": n, "in": "path", "required": True, "example": EXAMPLE, "schema": _NAME} for n in named),
            *({"name": n, "in": "query", "schema": schema} for n, schema in op.query.items()),
            *op.headers,
        ],
        "responses": {
            "200": {"description": "Done.", "content": _content(op, schema)},
            "default": {"$ref": "#/components/responses/error"},
        },
    }
    if op.unready:
        found["responses"]["503"] = {"description": "Not now.", "content": _content(op, schema)}
    if op.takes is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": op.takes}}}
    return found


_NAME: Schema = {"type": "string", "minLength": 1}


def _content(op: Operation, schema: Any) -> dict[str, Any]:
    if isinstance(op.gives, str):
        return {op.gives: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": schema}}
