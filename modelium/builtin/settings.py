"""Checks the section of the configuration that a built-in plugin owns, in the words of that section."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from modelium.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def check_settings(model: type[M], settings: Mapping[str, Any], section: str) -> M:
    """`settings` as `model`. Raises `ConfigError` naming each key that is wrong, with the nearest that is right."""
    given = {key: value for key, value in settings.items() if key != "name"}
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        problems = []
        for error in exc.errors():
            where = ".".join(str(part) for part in (section, *error["loc"]))
            if error["type"] == "extra_forbidden":
                known = _keys(model, error["loc"][:-1])
                near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
                advice = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
                problems.append(f"{where} is not a setting; {advice}")
            else:
                problems.append(f"{where}: {error['msg']} (found {error['input']!r:.60})")
        raise ConfigError("; ".join(problems)) from exc


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The settings at `path`, through lists and nested models."""
    for part in path:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation: Any = model.model_fields[part].annotation
        inner = [annotation, *get_args(annotation), *(a for g in get_args(annotation) for a in get_args(g))]
        model = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), model)
    return sorted(model.model_fields)
