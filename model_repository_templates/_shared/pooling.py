"""How a folder's own sentence-transformers files say that a text's tokens become one vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def how_to_pool(folder: Path) -> tuple[str, bool]:
    """The pooling (`mean`, `cls`, `max`, `lasttoken`) and whether to normalize, as sentence-transformers says it."""
    pooling, normalized = "mean", False
    modules = folder / "modules.json"
    if not modules.exists():
        return pooling, normalized
    for module in json.loads(modules.read_text(encoding="utf-8")):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = pooling_of(json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8")))
        elif kind == "Normalize":
            normalized = True
        elif kind != "Transformer":
            raise ValueError(
                f"the folder's modules.json names {module['type']}, which this way of serving doesn't know"
            )
    return pooling, normalized


def pooling_of(config: dict[str, Any]) -> str:
    """The one way of pooling that sentence-transformers' Pooling is configured for, in its older form or its newer."""
    chosen = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    chosen = [config["pooling_mode"]] if "pooling_mode" in config else chosen
    known = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
    names = [known.get(name, name) for name in chosen if name != "include_prompt"]
    if len(names) != 1 or names[0] not in ("mean", "cls", "max", "lasttoken"):
        raise ValueError(f"the folder asks for pooling by {chosen}: expected one of mean, cls, max and lasttoken")
    return str(names[0])
