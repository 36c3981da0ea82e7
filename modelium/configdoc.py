"""The configuration described: a commented `modelium.yaml` and a JSON Schema, both made from the models themselves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import to_jsonable_python

from modelium.config import Config

SCHEMA_FILE = "modelium.schema.json"

DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""What pydantic writes."""

HEAD = f"""\
# yaml-language-server: $schema={SCHEMA_FILE}
# The configuration of Modelium. Everything is optional: what stands here behind a # is what holds anyway.
# Environment variables (MODELIUM_SERVER__PORT=9000) and flags (--port 9000) go over this file.
"""


def commented_yaml(sections: Mapping[str, type[BaseModel]]) -> str:
    """A configuration file in which each key is explained and commented out. `sections` are the plugins' own."""
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        if not _is_section(field.annotation):
            lines += [f"# {line}" for line in _wrap(field.description or "")]
            lines += [f"#{name}: {_flow(to_jsonable_python(field.get_default()))}", ""]
    for name, model in _all_sections(sections).items():
        lines += [f"# {line}" for line in _wrap(_summary(model))]
        lines += [f"#{name}:", *(f"#{line}" if line else "" for line in _keys(model, "  ")), ""]
    return "\n".join(lines)


def _all_sections(sections: Mapping[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    own = {name: info.annotation for name, info in Config.model_fields.items()}
    return {name: model for name, model in own.items() if isinstance(model, type) and _is_section(model)} | dict(
        sections
    )


def _keys(model: type[BaseModel], indent: str) -> Iterator[str]:
    """`  # why` and `  key: default` for each key, inner sections after the plain keys."""
    plain = {n: f for n, f in model.model_fields.items() if not _is_section(f.annotation)}
    for name, field in plain.items():
        yield from (f"{indent}# {line}" for line in _wrap(field.description or ""))
        if field.is_required():
            yield f"{indent}{name}:"
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            yield f"{indent}{name}: {_flow(to_jsonable_python(default))}"
    for name, field in model.model_fields.items():
        if name not in plain:
            yield from (f"{indent}# {line}" for line in _wrap(_summary(field.annotation)))
            yield f"{indent}{name}:"
            yield from _keys(field.annotation, f"{indent}  ")  # type: ignore[arg-type]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _summary(model: Any) -> str:
    return (model.__doc__ or "").strip().partition("\n\n")[0]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 110)


def schema(sections: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """A JSON Schema of the whole file, with the plugins' `sections`; other keys are refused."""
    owners: list[type[BaseModel]] = [Config, *sections.values()]
    models: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in owners]
    refs, whole = models_json_schema(models, ref_template="#/$defs/{model}")
    definitions = whole.get("$defs", {})
    top = definitions.pop(refs[Config, "validation"]["$ref"].rpartition("/")[2])
    for name, model in sections.items():
        top["properties"][name] = {"$ref": refs[model, "validation"]["$ref"], "default": {}}
    for section in (top, *definitions.values()):
        _drop_titles(section)
    return {
        "$schema": DIALECT,
        "title": "modelium.yaml",
        **top,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _drop_titles(section: dict[str, Any]) -> None:
    """pydantic's titles only repeat the keys."""
    for inner in (section, *section.get("properties", {}).values()):
        inner.pop("title", None)


def schema_text(sections: Mapping[str, type[BaseModel]]) -> str:
    return json.dumps(schema(sections), indent=2) + "\n"
