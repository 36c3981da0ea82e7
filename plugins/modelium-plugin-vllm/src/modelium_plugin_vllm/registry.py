"""What a vLLM knows: read from its source, since importing it takes as long as it takes to start."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

MODELS = "model_executor/models/registry.py"
GENERATE = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
EMBED = ("_EMBEDDING_MODELS",)
QUANTIZATION = "model_executor/layers/quantization/__init__.py"


class Known(NamedTuple):
    generate: frozenset[str]
    """Architectures that write text."""
    embed: frozenset[str]
    """Those that are made for embeddings."""
    quantization: frozenset[str]
    """Names of methods."""


@lru_cache(maxsize=4)
def known(package: Path) -> Known:
    """By the folder of the package `vllm`; empty where its source is not as it was in any version from 0.10 to 0.33."""
    models = _assigned(package / MODELS)
    methods = _assigned(package / QUANTIZATION).get("QuantizationMethods")
    return Known(
        generate=_keys(models, GENERATE),
        embed=_keys(models, EMBED),
        quantization=frozenset(_strings(methods)) if methods is not None else frozenset(),
    )


def _assigned(file: Path) -> dict[str, ast.expr]:
    """The values of a module's variables, unread."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _keys(values: dict[str, ast.expr], names: tuple[str, ...]) -> frozenset[str]:
    dicts = (values[name] for name in names if isinstance(values.get(name), ast.Dict))
    keys = (key for value in dicts if isinstance(value, ast.Dict) for key in value.keys)
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _strings(node: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
