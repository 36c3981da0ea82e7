"""OpenVINO models, `NAME.xml` with its weights in `NAME.bin`: what they take and give, read from the XML alone.

`Analysis.entry` is the XML file; `facts` holds `ir_version`, `weights` (the file of weights relative to the drop, null
where there are none), `packed_bytes` (what the CPU's own copy of the weights takes beside them), `batch_dim` (every
input and output has a free first dimension), `unknown_rank` (names of outputs that have no dimensions, since they are
scalars or of any rank; their shape is told as `(-1,)`), `unnamed` (names of layers by which inputs and outputs go that
have no names of their own) and, for a model that keeps a state between requests, `unsupported`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelium.api import Analysis, Completeness, Tensor, hookimpl
from modelium.api.units import human
from modelium.builtin.files import Entry, Truncated, files
from modelium.builtin.openvino_xml import Layer, Network, is_network, read_network
from modelium.errors import ModelError

IN_FOLDER = 0.88
"""More than an ONNX model beside it, from which it was converted."""
IN_VERSION_FOLDER = 0.5
"""`1/model.xml` is Triton's layout: whoever knows Triton knows better."""

DATATYPES = {
    "f32": "FP32", "fp32": "FP32", "f16": "FP16", "fp16": "FP16", "bf16": "BF16", "f64": "FP64", "fp64": "FP64",
    "i8": "INT8", "i16": "INT16", "i32": "INT32", "i64": "INT64", "u8": "UINT8", "u16": "UINT16", "u32": "UINT32",
    "u64": "UINT64", "boolean": "BOOL", "bool": "BOOL",
}  # fmt: skip
"""KServe v2's words for element types, which layers and ports write differently."""

PACKED = {"f32": 1.0, "f16": 2.0, "bf16": 2.0, "i8": 1.0, "u8": 1.0, "i4": 1.0, "u4": 1.0, "nf4": 1.0}
"""Of each byte of weights, bytes in the CPU's own copy: it computes in float32, and keeps integers as they are
(measured with OpenVINO 2026.4 on matrices and convolutions)."""

_BITS = {"f32": 32, "f16": 16, "bf16": 16, "f64": 64, "i8": 8, "u8": 8, "i4": 4, "u4": 4, "nf4": 4}
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "i8": "int8", "u8": "uint8"}
# --------------------------------------------------------------------------- finding the model in a drop


@dataclass(frozen=True, slots=True)
class _Found:
    xml: Entry
    weights: Entry | None
    alone: bool
    confidence: float


def _find(drop: Path) -> _Found | None:
    """Raises `ModelError` when a folder holds several models and none is the main one."""
    found = files(drop) if drop.is_dir() or drop.suffix.lower() == ".xml" else []
    models = [e for e in found if _describes(e)]
    if not models or any(e.name == "config.pbtxt" for e in found):
        return None
    by_name = {e.name: e for e in found}
    highest = min(e.name.count("/") for e in models)
    top = [e for e in models if e.name.count("/") == highest]
    if len(top) > 1:
        named = [e for e in top if e.base in ("model.xml", "openvino_model.xml", f"{drop.name}.xml")]
        if len(named) != 1:
            names = ", ".join(e.name for e in top[:4])
            raise ModelError(
                f"{drop.name} holds {len(top)} OpenVINO models ({names}): drop each in a folder of its own, or call "
                "the one to be served model.xml"
            )
        top = named
    main = top[0]
    confidence = IN_VERSION_FOLDER if main.parent.isdecimal() else IN_FOLDER
    return _Found(main, by_name.get(_weights_of(main.name)), not drop.is_dir(), confidence)


def _weights_of(xml: str) -> str:
    return f"{xml[: -len('.xml')]}.bin"


def weights_in(entries: Iterable[Entry]) -> frozenset[str]:
    """The names that the weights of OpenVINO models among these files have."""
    return frozenset(_weights_of(e.name) for e in entries if _describes(e))


def _describes(entry: Entry) -> bool:
    return not entry.problem and entry.base.lower().endswith(".xml") and is_network(entry.path)


# --------------------------------------------------------------------------- the hooks


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Complete when the XML ends, and the weights reach as far as its constants."""
    try:
        found = _find(path)
        if found is None:
            return None
        network = read_network(found.xml.path, found.xml.name)
    except Truncated as exc:
        return Completeness(complete=False, reason=exc.message, have_bytes=exc.have_bytes)
    except OSError:  # gone
        return None
    have = found.xml.size + (found.weights.size if found.weights else 0)
    missing = "" if found.alone else _missing(found, network)
    want = max(found.xml.size + network.weights_bytes, have)
    return Completeness(complete=not missing, reason=missing, have_bytes=have, want_bytes=want)


def _missing(found: _Found, network: Network) -> str:
    """What of the weights is not there, for a person; empty when all is."""
    name, want = _weights_of(found.xml.name), network.weights_bytes
    if not want:
        return ""
    if found.weights is None:
        where = "drop a folder that holds both" if found.alone else "copy it into the folder"
        return f"{found.xml.name} keeps its weights in {name}, which is not there: {where}"
    if found.weights.size < want:
        return f"{name} has {found.weights.size} of at least {want} bytes: copy it again, whole"
    return ""


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """Inputs, outputs and the size of the weights."""
    found = _find(path)
    if found is None:
        return None
    try:
        network = read_network(found.xml.path, found.xml.name)
    except OSError as exc:
        raise ModelError(f"{found.xml.name} can't be read: {exc.strerror}", code="unreadable") from exc
    if missing := _missing(found, network):
        raise ModelError(missing)
    name = found.xml.name
    inputs, outputs = ([_told(layer, name) for layer in some] for some in (network.parameters, network.results))
    tensors = [*inputs, *outputs]
    weights = sum(network.bytes_by_type.values())
    main_type = max(network.bytes_by_type, key=lambda kind: network.bytes_by_type[kind], default="")
    facts: dict[str, Any] = {
        "ir_version": network.version,
        "weights": found.weights.name if found.weights and network.weights_bytes else None,
        "packed_bytes": int(sum(PACKED.get(kind, 0) * size for kind, size in network.bytes_by_type.items())),
        "batch_dim": bool(inputs) and all(t.ranked and t.tensor.shape[:1] == (-1,) for t in tensors),
        "unknown_rank": [t.tensor.name for t in tensors if not t.ranked],
        "unnamed": [t.tensor.name for t in tensors if not t.named],
    }
    if network.stateful:
        facts["unsupported"] = (
            f"{name} keeps a state between requests, as text models do that were exported with their cache, and it "
            "would be served without: drop the Hugging Face folder that it was made from"
        )
    return Analysis(
        analyzer="openvino",
        format="openvino",
        summary=f"OpenVINO, version {network.version}, {_number(inputs, 'input')}, {_number(outputs, 'output')}, "
        f"{human(weights)} of weights",
        confidence=found.confidence,
        entry="" if found.alone else name,
        weights_bytes=weights,
        parameters=sum(size * 8 // _BITS[kind] for kind, size in network.bytes_by_type.items() if kind in _BITS),
        dtype=_DTYPES.get(main_type),
        inputs=tuple(t.tensor for t in inputs),
        outputs=tuple(t.tensor for t in outputs),
        facts=facts,
    )


@dataclass(frozen=True, slots=True)
class _Told:
    tensor: Tensor
    ranked: bool
    named: bool


def _told(layer: Layer, file: str) -> _Told:
    kind = layer.element_type.lower()
    if kind not in DATATYPES:
        raise ModelError(f"{file}: {layer.name!r:.60} has the element type {kind!r:.40}, which is not served")
    if not layer.ranked and layer.any_rank:
        raise ModelError(
            f"{file}: the input {layer.name!r:.60} may have any number of dimensions, which OpenVINO does not compute "
            "on a CPU: convert the model again with the shapes of its inputs"
        )
    # A tensor with several names goes by the first, as OpenVINO's any_name does; a comma in a name is escaped.
    own = sorted(name.replace("\\,", ",") for name in re.split(r"(?<!\\),", layer.names) if name)
    shape = tuple(layer.dims) if layer.ranked else (-1,)
    tensor = Tensor(name=own[0] if own else layer.name, datatype=DATATYPES[kind], shape=shape)
    return _Told(tensor, layer.ranked, bool(own))


def _number(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
