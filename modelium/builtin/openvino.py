"""OpenVINO models, `NAME.xml` with its weights in `NAME.bin`: what they take and give, read from the XML alone.

The format is OpenVINO's intermediate representation, versions 10 and 11 (docs.openvino.ai, "OpenVINO IR format"). The
XML comes from anybody: it is read as a stream, with bounds, and without a document type, so that nothing in it is ever
expanded or fetched.

`Analysis.entry` is the XML file; `facts` holds `ir_version`, `weights` (the file of weights relative to the drop, null
where there are none), `packed_bytes` (what the CPU's own copy of the weights takes beside them), `batch_dim` (every
input and output has a free first dimension), `unknown_rank` (names of outputs that have no dimensions, since they are
scalars or of any rank; their shape is told as `(-1,)`), `unnamed` (names of layers by which inputs and outputs go that
have no names of their own) and, for a model that keeps a state between requests, `unsupported`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.parsers import expat

from modelium.api import Analysis, Completeness, Tensor, hookimpl
from modelium.api.units import human
from modelium.builtin.files import Entry, Truncated, files, head
from modelium.errors import ModelError

IN_FOLDER = 0.88
"""More than an ONNX model beside it, from which it was converted."""
IN_VERSION_FOLDER = 0.5
"""`1/model.xml` is Triton's layout: whoever knows Triton knows better."""

MAX_XML_BYTES = 128 << 20
MAX_ELEMENTS = 3_000_000
"""Of the XML: a network of a hundred thousand layers has no more."""
MAX_DEPTH = 64
"""Bodies of loops lie in one another, hardly ever more than two deep."""
MAX_TEXT = 1 << 16
"""Of one attribute, or one dimension."""

VERSIONS = (10, 11)

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
_TRUNCATED = {
    expat.errors.codes[getattr(expat.errors, f"XML_ERROR_{name}")]
    for name in ("NO_ELEMENTS", "UNCLOSED_TOKEN", "PARTIAL_CHAR", "UNCLOSED_CDATA_SECTION")
}


class NotOpenVino(ModelError):
    """It is no such model, or damaged."""


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
    return not entry.problem and entry.base.lower().endswith(".xml") and _is_network(entry)


class _First(Exception):
    """The name of a document's first element, or of its type."""


def _is_network(entry: Entry) -> bool:
    """Whether the document's first element is `net`, as far as its first bytes tell."""

    def seen(name: str, *_: object) -> None:
        raise _First(name)

    parser = expat.ParserCreate()
    parser.StartElementHandler = parser.StartDoctypeDeclHandler = seen
    try:
        parser.Parse(head(entry.path, 4096))
    except _First as first:
        return first.args == ("net",)
    except (expat.ExpatError, LookupError, ValueError):
        pass
    return False


# --------------------------------------------------------------------------- reading it


@dataclass(slots=True)
class _Layer:
    """One that takes or gives a tensor of the network."""

    name: str
    names: str
    """Of the tensor, separated by commas."""
    element_type: str = ""
    dims: list[int] = field(default_factory=list)
    ranked: bool = False
    """Without dimensions it is a scalar rather than of any rank."""
    any_rank: bool = False
    """The model says so."""


@dataclass(frozen=True, slots=True)
class _Network:
    version: int
    parameters: Sequence[_Layer]
    results: Sequence[_Layer]
    weights_bytes: int
    """How far into the file of weights the constants reach."""
    bytes_by_type: Mapping[str, int]
    stateful: bool


def _read(entry: Entry) -> _Network:
    found = entry.path.stat()
    return _read_once(str(entry.path), entry.name, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _read_once(path: str, name: str, mtime_ns: int, size: int) -> _Network:
    del mtime_ns  # part of the cache's key
    if size > MAX_XML_BYTES:
        raise NotOpenVino(f"{name} has {human(size)}, more than a description of any network")
    reader = _Reader(name)
    try:
        with open(path, "rb") as file:
            reader.parser.ParseFile(file)
    except expat.ExpatError as exc:
        if exc.code in _TRUNCATED:
            raise Truncated(f"{name} stops in the middle of its XML", size) from exc
        raise NotOpenVino(f"{name} is no OpenVINO model, or damaged: {exc}") from exc
    except (LookupError, ValueError) as exc:  # of its encoding
        raise NotOpenVino(f"{name} is no OpenVINO model, or damaged: {exc}") from exc
    return reader.network()


class _Reader:
    """Follows the elements of one document."""

    def __init__(self, name: str):
        self._name = name
        self.parser = parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartDoctypeDeclHandler = self._doctype
        self._open: list[str] = []
        self._kinds: list[str] = []
        """Types of the layers that are open: bodies of loops have layers of their own."""
        self._elements = 0
        self._parameters: dict[str, _Layer] = {}
        self._results: dict[str, _Layer] = {}
        """Of the network itself, by id."""
        self._id = ""
        """Of its layer that is open."""
        self._names: dict[tuple[str, str], str] = {}
        """Of the tensors that its layers make, by layer and port."""
        self._made_by: dict[str, tuple[str, str]] = {}
        """Layer and port of what each Result gives."""
        self._number: str | None = None
        self._version = 0
        self._weights_bytes = 0
        self._bytes: Counter[str] = Counter()
        self._stateful = False

    def network(self) -> _Network:
        if self._version not in VERSIONS:
            raise NotOpenVino(
                f"{self._name} is of version {self._version} of OpenVINO's format, and 10 and 11 are read: convert the "
                "model again (`ovc`, or openvino.convert_model)"
            )
        if not self._results:
            raise NotOpenVino(f"{self._name} is no OpenVINO model: it gives nothing")
        for id, result in self._results.items():
            result.names = result.names or self._names.get(self._made_by.get(id, ("", "")), "")
        return _Network(
            self._version,
            list(self._parameters.values()),
            list(self._results.values()),
            self._weights_bytes,
            dict(self._bytes),
            self._stateful,
        )

    def _doctype(self, *_: object) -> None:
        raise NotOpenVino(f"{self._name} has a document type, which no OpenVINO model has: convert the model again")

    def _start(self, element: str, attributes: dict[str, str]) -> None:
        self._open.append(element)
        self._elements += 1
        if self._elements > MAX_ELEMENTS or len(self._open) > MAX_DEPTH:
            raise NotOpenVino(f"{self._name} is no OpenVINO model: its XML has too many or too deep elements")
        own = self._open[:3] == ["net", "layers", "layer"] and len(self._kinds) < 2
        if self._open == ["net"]:
            self._version = self._whole(attributes.get("version", ""))
        elif element == "layer":
            kind = attributes.get("type", "")
            self._kinds.append(kind)
            self._stateful |= kind == "ReadValue"
            if len(self._open) == 3 and own:
                self._id = attributes.get("id", "")
                layers = {"Parameter": self._parameters, "Result": self._results}.get(kind)
                if layers is not None:
                    layers[self._id] = _Layer(attributes.get("name", ""), attributes.get("output_names", ""))
        elif element == "data" and self._kinds:
            self._data(attributes, own)
        elif element == "port" and own:
            self._port(attributes)
        elif element == "dim" and own and self._tensor is not None:
            self._number = ""
        elif element == "edge" and self._open[:2] == ["net", "edges"] and attributes.get("to-layer") in self._results:
            made_by = attributes.get("from-layer", ""), attributes.get("from-port", "")
            self._made_by[attributes["to-layer"]] = made_by

    @property
    def _tensor(self) -> _Layer | None:
        """The layer of the network that is open, if it takes or gives a tensor."""
        kind = self._kinds[0] if len(self._kinds) == 1 else ""
        layers = {"Parameter": self._parameters, "Result": self._results}.get(kind)
        return layers[self._id] if layers is not None else None

    def _data(self, attributes: Mapping[str, str], own: bool) -> None:
        kind = attributes.get("element_type", "")
        if self._kinds[-1] == "Const":
            offset, size = (self._whole(attributes.get(key, "")) for key in ("offset", "size"))
            self._weights_bytes = max(self._weights_bytes, offset + size)
            self._bytes[kind[:20]] += size
        elif own and self._kinds == ["Parameter"] and (tensor := self._tensor) is not None:
            tensor.element_type = kind
            tensor.any_rank = attributes.get("shape") == "..."
            tensor.ranked = not tensor.any_rank

    def _port(self, attributes: Mapping[str, str]) -> None:
        names = attributes.get("names", "")
        if self._open[3:4] == ["output"] and names:
            self._names[self._id, attributes.get("id", "")] = names
        if (tensor := self._tensor) is not None:
            tensor.names = tensor.names or names
            tensor.element_type = tensor.element_type or attributes.get("precision", "")

    def _text(self, text: str) -> None:
        if self._number is not None:
            self._number += text[:64]

    def _end(self, element: str) -> None:
        self._open.pop()
        if element == "layer":
            self._kinds.pop()
        elif element == "dim" and self._number is not None:
            number, self._number = self._number.strip(), None
            if (tensor := self._tensor) is not None and len(tensor.dims) < 64:
                tensor.ranked = True
                tensor.dims.append(-1 if number.startswith("-") or ".." in number else self._whole(number))

    def _whole(self, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
            raise NotOpenVino(f"{self._name} is damaged: expected a whole number, found {text!r:.80}")
        return int(text)


# --------------------------------------------------------------------------- the hooks


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Complete when the XML ends, and the weights reach as far as its constants."""
    try:
        found = _find(path)
        if found is None:
            return None
        network = _read(found.xml)
    except Truncated as exc:
        return Completeness(complete=False, reason=exc.message, have_bytes=exc.have_bytes)
    except OSError:  # gone
        return None
    have = found.xml.size + (found.weights.size if found.weights else 0)
    missing = "" if found.alone else _missing(found, network)
    want = max(found.xml.size + network.weights_bytes, have)
    return Completeness(complete=not missing, reason=missing, have_bytes=have, want_bytes=want)


def _missing(found: _Found, network: _Network) -> str:
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
        network = _read(found.xml)
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


def _told(layer: _Layer, file: str) -> _Told:
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
