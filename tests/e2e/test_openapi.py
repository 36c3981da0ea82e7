"""The service's own routes against their description: hostile and ordinary requests, made from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from modelium.http.openapi import EXAMPLE, OPERATIONS
from tests import models
from tests.service import Served, served

CHECKS = [
    content_type_conformance, negative_data_rejection, not_a_server_error, response_schema_conformance,
    status_code_conformance, unsupported_method,
]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openapi")
    with served(folder / "root") as service:
        service.drop(models.onnx_linear(folder / f"{EXAMPLE}.onnx"))
        service.until_state(EXAMPLE, "READY")
        yield service


@pytest.fixture(scope="module")
def described(service: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


ROUTES = sorted(
    OPERATIONS.keys() - {"GET /events", "GET /openapi.json"}, key=lambda route: (route.startswith("D"), route)
)
"""What removes the model comes last."""


@pytest.mark.parametrize("route", ROUTES)
def test_own_routes_are_as_they_are_described(service: Served, described: schemathesis.BaseSchema, route: str) -> None:
    method, _, path = route.partition(" ")
    bodies: dict[str, Any] = {
        "POST /predict/{model}": {"inputs": [1, 2, 3, 4]},
        "POST /plan": {"path": str(service.root / "repository" / EXAMPLE)},
    }
    operation = described[path][method]
    named = {part[1:-1]: EXAMPLE for part in path.split("/") if part.startswith("{")}
    body: dict[str, Any] = {"body": bodies[route], "media_type": "application/json"} if route in bodies else {}
    service.post(f"/models/{EXAMPLE}/unpin")
    ordinary = operation.Case(path_parameters=named, **body)
    answer = ordinary.call(timeout=60)
    assert answer.status_code == 200, answer.text
    ordinary.validate_response(answer, checks=CHECKS)
    # headers about waiting are not read where the model is there
    checks = [check for check in CHECKS if route not in bodies or check is not negative_data_rejection]

    @given(
        case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    )
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=checks, timeout=60)

    ask()
