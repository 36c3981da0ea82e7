"""A model's `config.pbtxt` as its Python code is given it: Triton's ModelConfig as JSON, defaults written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelium.errors import LoadRejected

CONFIG = "config.pbtxt"


def read_config(folder: Path, name: str, instead: str | None = None) -> dict[str, Any]:
    """The configuration of the model in `folder`, or `instead` of it another one, in JSON, as Triton's load request has
    it. Raises `LoadRejected`. Reads files."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = ModelConfig()
    try:
        if instead is not None:
            json_format.Parse(instead, config)
        else:
            text_format.Parse((folder / CONFIG).read_text(encoding="utf-8"), config)
    except json_format.ParseError as error:
        raise LoadRejected(f"{name}: the load's `config` is no configuration of Triton's: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LoadRejected(f"{name}: {CONFIG} can't be read: {error}") from error
    except text_format.ParseError as error:
        raise LoadRejected(f"{name}: {CONFIG} is no configuration of Triton's: {error}") from error
    if config.backend != "python":
        raise LoadRejected(
            f"{name}: {CONFIG} asks for the backend {config.backend!r}; Ray serves models of Triton's python backend"
        )
    config.name = name
    value: dict[str, Any] = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for tensor in (*value["input"], *value["output"]):
        tensor["dims"] = [int(size) for size in tensor["dims"]]  # 64 bits are texts in protobuf's JSON
    return value


def newest_version(folder: Path, name: str) -> str:
    """The version folder that Triton would serve. Raises `LoadRejected` when there is none."""
    numbers = [
        int(entry.name)
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name.isascii() and entry.name.isdecimal() and not entry.name.startswith("0")
    ]
    if not numbers:
        raise LoadRejected(f"{name}: there is no version folder such as 1 in {folder}")
    return str(max(numbers))
