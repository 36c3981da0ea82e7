"""Checks what a plan sets for one model, in words for whoever set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from modelium.errors import ModelError

M = TypeVar("M", bound=BaseModel)


def plan_settings(model: type[M], settings: Mapping[str, Any], runtime: str) -> M:
    """`settings` as `model`. Raises `ModelError` naming those that are wrong, and those that there are."""
    try:
        return model.model_validate(settings)
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r:.60})" for e in exc.errors()[:4]]
        raise ModelError(
            f"its settings for {runtime} are not right: {'; '.join(problems)}; there are: "
            + ", ".join(model.model_fields),
            code="bad_settings",
        ) from exc
