"""ONNX models, alone or in a folder with their external data: read by structure, never by running them.

`Analysis.entry` is the model's file; `facts` holds `opset`, `opsets` (by domain), `ir_version`, `producer`,
`external_data` (names of files, relative to the drop), `batch_dim` (every input and output has a free first dimension),
`domains` (of operators beyond ONNX's own that onnxruntime carries) and `unknown_rank` (names of inputs and outputs that
the model gives no shape for; their shape is told as `(-1,)`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from modelium.api import Analysis, Completeness, Tensor, hookimpl
from modelium.api.units import human
from modelium.builtin import hf_folder
from modelium.builtin.files import Entry, Truncated, files
from modelium.builtin.onnx_wire import NotOnnx, check_whole, read_skeleton
from modelium.errors import ModelError

ALONE = 0.9
IN_FOLDER = 0.85
IN_VERSION_FOLDER = 0.5
"""`1/model.onnx` is Triton's layout: whoever knows Triton knows better."""

MAX_FILE_BYTES = 2**31 - 1
"""What a protobuf message may have at most; onnxruntime refuses more."""

DATATYPES = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip
"""KServe v2's words for TensorProto.DataType."""

BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2, 27: 6, 28: 6,
}  # fmt: skip
"""Bits of one element by TensorProto.DataType; strings have no fixed size."""

DOMAINS = frozenset({
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft",
    "com.microsoft.nchwc", "com.microsoft.experimental", "com.ms.internal.nhwc", "org.pytorch.aten",
})  # fmt: skip
"""Domains of operators that onnxruntime carries (onnxruntime/core/graph/constants.h)."""

_DTYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16", 2: "uint8", 3: "int8"}
_EXTERNAL = 1  # TensorProto.DataLocation


# --------------------------------------------------------------------------- finding the model in a drop


@dataclass(frozen=True, slots=True)
class _Found:
    main: Entry
    beside: Mapping[str, Entry]
    """The drop's other files by their path from the model's folder; empty for a single file."""
    alone: bool
    confidence: float


def _find(drop: Path) -> _Found | None:
    """The one ONNX model of a drop. Raises `ModelError` when a folder holds several and none is the main one."""
    if not drop.is_dir():
        found = files(drop) if drop.suffix.lower() == ".onnx" else []
        return _Found(found[0], {}, True, ALONE) if found else None
    found = files(drop)
    models = [e for e in found if e.base.lower().endswith(".onnx")]
    if not models or any(e.name == "config.pbtxt" for e in found) or _is_hugging_face(drop):
        return None
    in_version = all(e.parent.isdecimal() for e in models)
    main = _main(drop, models)
    if main is None:
        if in_version:
            return None
        names = ", ".join(e.name for e in models[:4])
        raise ModelError(
            f"{drop.name} holds {len(models)} ONNX models ({names}): drop each in a folder of its own, "
            "or call the one to be served model.onnx"
        )
    prefix = f"{main.parent}/" if main.parent else ""
    beside = {e.name.removeprefix(prefix): e for e in found if e.name.startswith(prefix) and e is not main}
    return _Found(main, beside, False, IN_VERSION_FOLDER if in_version else IN_FOLDER)


def _main(drop: Path, models: Sequence[Entry]) -> Entry | None:
    highest = min(e.name.count("/") for e in models)
    top = [e for e in models if e.name.count("/") == highest]
    if len(top) == 1:
        return top[0]
    named = [e for e in top if e.base in ("model.onnx", f"{drop.name}.onnx")]
    return named[0] if len(named) == 1 else None


def _is_hugging_face(drop: Path) -> bool:
    try:
        return hf_folder.find(drop) is not None
    except ModelError:
        return False


# --------------------------------------------------------------------------- reading it


@dataclass(frozen=True, slots=True)
class _Model:
    proto: Any
    """The ModelProto without its weights."""
    tensors: Sequence[Any]
    """All TensorProtos, wherever they lie."""
    domains: frozenset[str]
    string_bytes: int


def _read(entry: Entry) -> _Model:
    found = entry.path.stat()
    return _read_once(str(entry.path), entry.name, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _read_once(path: str, name: str, mtime_ns: int, size: int) -> _Model:
    """The analysis follows completeness at once, so what was read for one is kept for the other."""
    del mtime_ns
    if size > MAX_FILE_BYTES:
        check_whole(Path(path), name)
        raise ModelError(
            f"{name} has {human(size)}, and no runtime reads an ONNX file of more than 2 GiB: save it with its weights "
            "as external data (onnx.save_model(..., save_as_external_data=True)) and drop the folder"
        )
    skeleton = read_skeleton(Path(path), name)
    import onnx

    try:
        proto = onnx.ModelProto.FromString(skeleton.message)
        tensors = list(_tensors(proto))
        defined = {(f.domain, f.name) for f in proto.functions}
        domains = {n.domain for n in _nodes(proto) if (n.domain, n.op_type) not in defined}
    except ModelError:
        raise
    except Exception as exc:  # protobuf's DecodeError, and whatever broken text in a field raises
        raise NotOnnx(f"{name} is no ONNX model, or damaged: {type(exc).__name__}: {exc}") from exc
    if not proto.ir_version or not proto.graph.output or not any(o.version > 0 for o in proto.opset_import):
        raise NotOnnx(f"{name} is no ONNX model: it lacks a version, an operator set or outputs")
    return _Model(proto, tensors, frozenset(domains - {""}), skeleton.dropped_bytes)


def _graphs(proto: Any) -> Iterator[tuple[Any, Iterable[Any]]]:
    """Every graph with its nodes, those inside control flow and local functions included."""
    waiting = [(proto.graph, proto.graph.node), *((None, f.node) for f in proto.functions)]
    while waiting:
        graph, nodes = waiting.pop()
        yield graph, nodes
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append((attribute.g, attribute.g.node))
                waiting += [(g, g.node) for g in attribute.graphs]


def _nodes(proto: Any) -> Iterator[Any]:
    for _, nodes in _graphs(proto):
        yield from nodes


def _tensors(proto: Any) -> Iterator[Any]:
    for graph, nodes in _graphs(proto):
        if graph is not None:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _size(tensor: Any, name: str) -> int:
    """Bytes of a tensor's numbers, by its shape."""
    dims = list(tensor.dims)
    if len(dims) > 64 or any(d < 0 for d in dims):
        raise NotOnnx(f"{name} is damaged: the tensor {tensor.name!r:.60} has an impossible shape")
    return int(math.prod(dims)) * BITS.get(tensor.data_type, 0) // 8


def _external(found: _Found, model: _Model) -> dict[str, int]:
    """How many bytes each external data file must have, by its path from the model's folder.

    Raises `ModelError` for a path that leads out of it.
    """
    wanted: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.data_location != _EXTERNAL:
            continue
        place = {e.key: e.value for e in tensor.external_data}
        location = place.get("location", "")
        parts = PurePosixPath(location).parts
        if (
            not parts
            or location.startswith("/")
            or ".." in parts
            or any(c in location for c in "\\\0")
            or "_ORT_MEM_ADDR_" in location  # onnxruntime takes it for an address in its own memory
        ):
            raise ModelError(
                f"{found.main.name} places weights in {location!r:.120}, and external data must lie in the model's own "
                "folder: save the model again with its data beside it",
                code="unsafe_path",
            )
        try:
            offset, length = int(place.get("offset") or 0), int(place.get("length") or _size(tensor, found.main.name))
        except ValueError as exc:
            raise NotOnnx(f"{found.main.name} gives no number for the place of {tensor.name!r:.60}") from exc
        if offset < 0 or length < 0:
            raise NotOnnx(f"{found.main.name} gives an impossible place for {tensor.name!r:.60}")
        key = "/".join(p for p in parts if p != ".")
        wanted[key] = max(wanted.get(key, 0), offset + length)
    return wanted


def _missing(found: _Found, wanted: Mapping[str, int]) -> str:
    """What of the external data is not there, for a person; empty when all is."""
    for name, size in wanted.items():
        entry = found.beside.get(name)
        if entry is None:
            where = "drop a folder that holds both" if found.alone else "copy it into the folder"
            return f"{found.main.name} keeps weights in {name}, which is not in the drop: {where}"
        if entry.size < size:
            return f"{entry.name} has {entry.size} of at least {size} bytes: copy it again, whole"
    return ""


# --------------------------------------------------------------------------- the hooks


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Complete when the model's fields are all there, and its external data as long as the model says."""
    found = _find(path)
    if found is None:
        return None
    try:
        check_whole(found.main.path, found.main.name)
        wanted = _external(found, _read(found.main))
    except Truncated as exc:
        return Completeness(
            complete=False, reason=exc.message, have_bytes=found.main.size, want_bytes=exc.want_bytes or None
        )
    except (OSError, ValueError):  # gone, or damaged: the analysis says which
        return None
    here = found.main.size + sum(found.beside[name].size for name in wanted if name in found.beside)
    missing = "" if found.alone else _missing(found, wanted)
    return Completeness(
        complete=not missing, reason=missing, have_bytes=here, want_bytes=found.main.size + sum(wanted.values())
    )


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """Inputs, outputs, operator sets and the size of the weights."""
    found = _find(path)
    if found is None:
        return None
    try:
        return _analyze(found)
    except OSError as exc:
        raise ModelError(f"{found.main.name} can't be read: {exc.strerror}", code="unreadable") from exc
    except ValueError as exc:  # text that is no UTF-8, numbers out of range
        raise NotOnnx(f"{found.main.name} is damaged: {exc}") from exc


def _analyze(found: _Found) -> Analysis:
    model = _read(found.main)
    wanted = _external(found, model)
    if missing := _missing(found, wanted):
        raise ModelError(missing)
    proto, name = model.proto, found.main.name
    if foreign := sorted(model.domains - DOMAINS):
        raise ModelError(
            f"{name} uses operators of {', '.join(foreign)}, which onnxruntime does not carry: export it without them, "
            "or drop a Triton model directory that names the library in its config.pbtxt",
            code="custom_operators",
            domains=foreign,
        )
    initial = {t.name for t in proto.graph.initializer}
    initial |= {s.values.name for s in proto.graph.sparse_initializer}
    inputs = [_tensor(v, name) for v in proto.graph.input if v.name not in initial]
    outputs = [_tensor(v, name) for v in proto.graph.output]
    weights = [(t.data_type, _size(t, name)) for t in model.tensors]
    weights_bytes = sum(size for _, size in weights)
    opsets = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    unknown = [t.name for t, ranked in (*inputs, *outputs) if not ranked]
    main_type = max(weights, key=lambda w: w[1], default=(0, 0))[0]
    prefix = f"{found.main.parent}/" if found.main.parent else ""
    return Analysis(
        analyzer="onnx",
        format="onnx",
        summary=f"ONNX, opset {opsets.get('ai.onnx', '?')}, {_number(inputs, 'input')}, {_number(outputs, 'output')}, "
        f"{human(weights_bytes)} of weights",
        confidence=found.confidence,
        entry="" if found.alone else name,
        weights_bytes=weights_bytes,
        parameters=sum(math.prod(t.dims) for t in model.tensors if t.data_type in _DTYPES and len(t.dims)),
        dtype=_DTYPES.get(main_type),
        inputs=tuple(t for t, _ in inputs),
        outputs=tuple(t for t, _ in outputs),
        facts={
            "opset": opsets.get("ai.onnx"),
            "opsets": opsets,
            "ir_version": proto.ir_version,
            "producer": f"{proto.producer_name} {proto.producer_version}".strip()[:80],
            "external_data": sorted(prefix + location for location in wanted),
            "batch_dim": bool(inputs) and all(t.shape[:1] == (-1,) and ranked for t, ranked in (*inputs, *outputs)),
            "domains": sorted(model.domains - {"ai.onnx"}),
            "unknown_rank": unknown,
        },
    )


def _tensor(value: Any, name: str) -> tuple[Tensor, bool]:
    """An input or output, and whether the model says how many dimensions it has."""
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "nothing"
        raise ModelError(
            f"{name}: {value.name!r:.60} is a {kind.removesuffix('_type')}, and KServe v2 carries tensors only: export "
            "the model with tensors (for scikit-learn: options={'zipmap': False})"
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in DATATYPES:
        raise ModelError(f"{name}: {value.name!r:.60} has element type {tensor.elem_type}, which KServe v2 lacks")
    if not tensor.HasField("shape"):
        return Tensor(name=value.name, datatype=DATATYPES[tensor.elem_type], shape=(-1,)), False
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in tensor.shape.dim)
    return Tensor(name=value.name, datatype=DATATYPES[tensor.elem_type], shape=shape), True


def _number(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
