"""What a model may be called: names become folders, URL parts and metric labels, so one rule holds for all of them."""

from __future__ import annotations

import re
from pathlib import PurePath

from modelium.errors import ModelError

MAX_LENGTH = 200
"""Leaves room for suffixes below the 255 bytes that Linux file systems allow for one name."""

RESERVED = frozenset({"stats"})
"""Names that mean something else in KServe v2's and Triton's paths: `/v2/models/stats` is the statistics of all."""

SUFFIXES = (".onnx", ".pt", ".pth", ".bin", ".safetensors", ".gguf")
"""Endings that say what a dropped file is and are no part of the model's name."""

_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_model_name(name: str) -> None:
    """Raise `ModelError` (code `bad_name`) unless a model may be called `name`.

    Allowed are 1 to 200 ASCII letters, digits, `.`, `_` and `-`, starting with a letter or digit, without `..`.
    """
    problem = None
    if len(name) > MAX_LENGTH:
        problem = f"it has {len(name)} characters, and {MAX_LENGTH} are allowed"
    elif ".." in name:
        problem = "it contains '..'"
    elif name.lower() in RESERVED:
        problem = "that name has a meaning of its own in Triton's paths"
    elif not _ALLOWED.fullmatch(name):
        problem = "a name is made of letters, digits, '.', '_' and '-', and starts with a letter or a digit"
    if problem is None:
        return
    shown = name if len(name) <= 60 else name[:57] + "..."
    better = suggest_model_name(name)
    advice = f"rename it, to {better!r} for example" if better else "rename it"
    raise ModelError(f"{shown!r} can't be a model's name: {problem}; {advice}", code="bad_name", name=shown)


def suggest_model_name(name: str) -> str:
    """The nearest name that is allowed, or an empty string when nothing of `name` can be kept."""
    better = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    better = re.sub(r"\.{2,}", ".", better).lstrip("._-")[:MAX_LENGTH].rstrip("-.")
    return "" if better.lower() in RESERVED else better


def name_of_drop(path: PurePath | str) -> str:
    """The model's name that a dropped file or folder asks for; it may not be an allowed one."""
    name = PurePath(path).name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
