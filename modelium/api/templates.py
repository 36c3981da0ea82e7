"""The templates of model folders, for the runtime backends that render them.

Templates are data: one folder for each way of serving, and `_shared` for what several of them include. In a checkout
they lie in the top-level `model_repository_templates`, in an installed package in `modelium/_templates`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from modelium.api.types import Analysis, Tensor
from modelium.errors import ConfigError, PluginError

SUFFIX = ".jinja"
"""Files with it are rendered and lose it; all others are taken as they are."""


@cache
def template_root() -> Path:
    """The folder that holds the templates. Raises `ConfigError` when the installation lacks it."""
    package = Path(__file__).parents[1]
    places = [package / "_templates", package.parent / "model_repository_templates"]
    for place in places:
        if place.is_dir():
            return place
    raise ConfigError(f"expected the model templates at {places[0]} or {places[1]}: install modelium again")


def template_names() -> list[str]:
    """The ways of serving that there is a template for."""
    return sorted(p.name for p in template_root().iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))


def render(template: str, values: dict[str, Any]) -> dict[str, str]:
    """All files of a template by their path inside the model's folder, with `/` between its parts.

    Raises `PluginError` when there is no such template, or when a value that it uses is missing.
    """
    folder = template_root() / template
    if not folder.is_dir():
        raise PluginError(f"there is no model template {template!r}: expected one of {template_names()}")
    texts = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        name = file.relative_to(folder).as_posix()
        if file.suffix != SUFFIX:
            texts[name] = file.read_text(encoding="utf-8")
            continue
        try:
            texts[name.removesuffix(SUFFIX)] = _environment().get_template(f"{template}/{name}").render(values)
        except jinja2.TemplateError as exc:
            raise PluginError(f"the model template {template}/{name} can't be rendered: {exc}") from exc
    return texts


@cache
def _environment() -> jinja2.Environment:
    # Nothing is escaped: what is rendered is configuration and code, and `quote` is there for names.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_root()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = _quote
    return environment


def _quote(value: object) -> str:
    """A string literal that JSON and protobuf's text format read alike."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\177")


# --------------------------------------------------------------------------- values that templates take


def batching(settings: Mapping[str, Any], analysis: Analysis) -> dict[str, int]:
    """No batching where the first dimension is not the batch, nor where it is the only one.

    Triton wants a dimension behind the batch's, and clients would have to send `[n, 1]` for the model's `[n]`.
    """
    if "max_batch_size" not in settings or analysis.format == "huggingface":
        return {}
    if analysis.facts.get("batch_dim") and all(len(t.shape) > 1 for t in (*analysis.inputs, *analysis.outputs)):
        return {}
    return {"max_batch_size": 0}


def tensor_value(tensor: Tensor, batched: bool) -> dict[str, Any]:
    """A tensor as the configuration has it: without the batch dimension, and a scalar as a tensor of one element."""
    return {
        "name": tensor.name,
        "data_type": "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}",
        "dims": list(tensor.shape[1:] if batched else tensor.shape) or [1],
        "optional": tensor.optional,
    }


def huggingface_values(analysis: Analysis) -> dict[str, Any]:
    return {
        "model_folder": str(model_folder(analysis)),
        "tokenizer": "true" if analysis.facts.get("tokenizer") else "false",
        "width": analysis.facts.get("hidden_size") or -1,
    }


def model_folder(analysis: Analysis) -> PurePosixPath:
    """Where a Hugging Face model lies in its version's folder."""
    return PurePosixPath("model") / PurePosixPath(analysis.entry).parent
