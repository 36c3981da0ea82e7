"""Reads `config.pbtxt` as Triton would, and says what is wrong with it in words of its own.

The schema is Triton's own ModelConfig, from tritonclient. Importing it takes a quarter of a second, so it happens when
the first configuration is read.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelium.api import Tensor
from modelium.errors import ModelError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG = "config.pbtxt"
MAX_CONFIG_BYTES = 8 << 20
"""An ensemble of a thousand steps has about 300 kB."""

PLATFORM_BACKENDS = {
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
}
"""Triton's older way of naming a backend (core/src/constants.h)."""

DEFAULT_FILES = {
    "model.py": "python",
    "model.onnx": "onnxruntime",
    "model.plan": "tensorrt",
    "model.pt": "pytorch",
    "model.savedmodel": "tensorflow",
    "model.graphdef": "tensorflow",
    "model.xml": "openvino",
}
"""The file, or folder, by which Triton knows a backend when the configuration names none (model_config_utils.cc)."""

_PLACEHOLDER = re.compile(r"\$\{\w+\}")
"""What templates of directories leave to be filled in."""
_QUOTED = re.compile(r'"[^"\n]*"|#[^\n]*')

_NO_FIELD = re.compile(r'Message type "([\w.]+)" has no field named "(\w+)"')


class Unfinished(ModelError):
    """The text of a configuration ends in the middle; the rest may still be on its way."""


def read_config(path: Path) -> ModelConfig:
    """The configuration at `path`. Raises `ModelError` with `line` and `column`, `Unfinished` where it just ends."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path.name} has {path.stat().st_size} bytes, more than {MAX_CONFIG_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ModelError(f"{path.name} can't be read: {exc.strerror}", code="unreadable") from exc
    except UnicodeDecodeError as exc:
        raise ModelError(f"{path.name} should be UTF-8 text: {exc}") from exc
    return parse_config(text, path.name)


@lru_cache(maxsize=4)
def parse_config(text: str, name: str = CONFIG) -> ModelConfig:
    """A configuration's text, read. The last ones are kept, since one model is looked at several times in a row."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as exc:
        raise _explain(exc, text, name) from exc
    return config


def _explain(exc: Any, text: str, name: str) -> ModelError:
    line, column = exc.GetLine() or 0, exc.GetColumn() or 0
    message = re.sub(r"^\d+:\d+ : ", "", str(exc)).strip()
    unknown = _NO_FIELD.search(message)
    if unknown:
        message = _unknown_field(*unknown.groups())
    lines = text.rstrip().splitlines()
    shown = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    fields: dict[str, Any] = {"line": line, "column": column}
    if _PLACEHOLDER.search(shown):
        left = sorted(set(_PLACEHOLDER.findall(_QUOTED.sub("", text))))
        return ModelError(
            f"{name} line {line} ({shown[:80]!r}) is still to be filled in, as are all of: {', '.join(left)}. For "
            "TensorRT-LLM's models the tensorrtllm backend's tools/fill_template.py does it",
            code="unfilled",
            **fields,
        )
    at_the_end = line > len(lines) or (line == len(lines) and not shown.endswith(("}", "]")))
    if at_the_end and not unknown:
        return Unfinished(f"{name} ends in the middle, at line {line}: {message}", **fields)
    return ModelError(
        f"{name} line {line} ({shown[:80]!r}): {message}. Expected Triton's ModelConfig in protobuf text format",
        **fields,
    )


def _unknown_field(kind: str, found: str) -> str:
    from tritonclient.grpc import model_config_pb2

    name = kind.rpartition(".")[2]
    descriptor: Any = getattr(model_config_pb2, name, None)
    known = list(descriptor.DESCRIPTOR.fields_by_name) if descriptor is not None else []
    near = difflib.get_close_matches(found, known, 1)
    meant = f": did you mean `{near[0]}`?" if near else f", which has {', '.join(known)}" if known else ""
    return f"there is no field `{found}` in {name}{meant}"


def version_of(name: str) -> int | None:
    """The version that a folder's name stands for; None for names that Triton ignores."""
    return int(name) if name.isascii() and name.isdecimal() and not name.startswith("0") else None


def served_versions(config: ModelConfig | None, versions: list[int]) -> list[int]:
    """Those of the versions that the configuration's policy loads: the newest, unless it says otherwise."""
    policy = config.version_policy if config is not None else None
    if policy is not None and policy.HasField("all"):
        return sorted(versions)
    if policy is not None and policy.HasField("specific"):
        return sorted(set(policy.specific.versions) & set(versions))
    count = policy.latest.num_versions if policy is not None and policy.HasField("latest") else 0
    return sorted(versions)[-(count or 1) :]


def backend_of(config: ModelConfig | None, files: set[str]) -> str:
    """The backend's name; empty for an ensemble, and when nothing tells. `files` are those of the versions."""
    if config is not None:
        if config.backend:
            return str(config.backend)
        if config.platform:
            return PLATFORM_BACKENDS.get(config.platform, "" if is_ensemble(config) else str(config.platform))
        if is_ensemble(config):
            return ""
        if config.default_model_filename in DEFAULT_FILES:
            return DEFAULT_FILES[config.default_model_filename]
    return next((backend for file, backend in DEFAULT_FILES.items() if file in files), "")


def is_ensemble(config: ModelConfig) -> bool:
    return bool(config.platform == "ensemble" or config.HasField("ensemble_scheduling"))


def main_file(config: ModelConfig | None, backend: str) -> str | None:
    """The file that each version must hold; None where the backend itself decides."""
    if config is not None and config.default_model_filename:
        return str(config.default_model_filename)
    # TensorFlow has two forms.
    return next((f for f, b in DEFAULT_FILES.items() if b == backend), None) if backend != "tensorflow" else None


def tensors(config: ModelConfig, direction: str) -> tuple[Tensor, ...]:
    """The configured inputs or outputs as clients see them, the batch dimension included."""
    from tritonclient.grpc.model_config_pb2 import DataType

    batch = (-1,) if config.max_batch_size > 0 else ()
    return tuple(
        Tensor(
            name=tensor.name,
            datatype=kserve_type(DataType.Name(tensor.data_type)),
            shape=(*batch, *tensor.dims),
            optional=direction == "input" and tensor.optional,
        )
        for tensor in getattr(config, direction)
    )


def kserve_type(name: str) -> str:
    """`TYPE_FP32` as KServe calls it."""
    return "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_")


def placed(config_text: str, gpus: Sequence[int]) -> str:
    """The configuration with its GPU instances on these GPUs, as JSON for the load request's `config` parameter.

    A configuration on disk names no GPU, since which one has room is known at the load.
    """
    config = copy(parse_config(config_text))
    place(config, gpus)
    return to_json(config)


def copy(config: ModelConfig) -> ModelConfig:
    """One that may be changed: those that were read are kept."""
    changed = type(config)()
    changed.CopyFrom(config)
    return changed


def place(config: ModelConfig, gpus: Sequence[int]) -> None:
    """Put its GPU instances on these GPUs."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    for group in config.instance_group:
        if group.kind == ModelInstanceGroup.KIND_GPU:
            group.gpus[:] = gpus


def to_json(config: ModelConfig) -> str:
    """As the load request's parameter `config` takes it."""
    from google.protobuf import json_format

    return str(json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None))


def from_json(given: Any) -> ModelConfig:
    """A client's `config`, JSON text or what it stands for. Raises `ModelError` when it is not one."""
    from google.protobuf import json_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        values = json.loads(given) if isinstance(given, str) else given
        return json_format.ParseDict(values, ModelConfig())
    except (ValueError, json_format.ParseError) as exc:
        raise ModelError(f"the load parameter `config` should be a Triton configuration in JSON: {exc}") from exc
