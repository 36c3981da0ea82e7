"""Reads the XML of an OpenVINO model as a stream: what the network takes and gives, and how far its weights reach.

The format is OpenVINO's intermediate representation, versions 10 and 11 (docs.openvino.ai, "OpenVINO IR format"). The
XML comes from anybody: there are bounds, and no document type is taken, so that nothing is ever expanded or fetched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from xml.parsers import expat

from modelium.api.units import human
from modelium.builtin.files import Truncated, head
from modelium.errors import ModelError

MAX_XML_BYTES = 128 << 20
MAX_ELEMENTS = 3_000_000
"""Of the XML: a network of a hundred thousand layers has no more."""
MAX_DEPTH = 64
"""Bodies of loops lie in one another, hardly ever more than two deep."""

VERSIONS = (10, 11)

_TRUNCATED = {
    expat.errors.codes[getattr(expat.errors, f"XML_ERROR_{name}")]
    for name in ("NO_ELEMENTS", "UNCLOSED_TOKEN", "PARTIAL_CHAR", "UNCLOSED_CDATA_SECTION")
}


class NotOpenVino(ModelError):
    """It is no such model, or damaged."""


class _First(Exception):
    """The name of a document's first element, or of its type."""


def is_network(path: Path) -> bool:
    """Whether the document's first element is `net`, as far as its first bytes tell."""

    def seen(name: str, *_: object) -> None:
        raise _First(name)

    parser = expat.ParserCreate()
    parser.StartElementHandler = parser.StartDoctypeDeclHandler = seen
    try:
        parser.Parse(head(path, 4096))
    except _First as first:
        return first.args == ("net",)
    except (expat.ExpatError, LookupError, ValueError):
        pass
    return False


@dataclass(slots=True)
class Layer:
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
class Network:
    version: int
    parameters: Sequence[Layer]
    results: Sequence[Layer]
    weights_bytes: int
    """How far into the file of weights the constants reach."""
    bytes_by_type: Mapping[str, int]
    stateful: bool


def read_network(path: Path, name: str) -> Network:
    """Raises `Truncated` when the XML stops before its end, `NotOpenVino` when it is no such model; `OSError`."""
    found = path.stat()
    return _read_once(str(path), name, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _read_once(path: str, name: str, mtime_ns: int, size: int) -> Network:
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
        self._parameters: dict[str, Layer] = {}
        self._results: dict[str, Layer] = {}
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

    def network(self) -> Network:
        if self._version not in VERSIONS:
            raise NotOpenVino(
                f"{self._name} is of version {self._version} of OpenVINO's format, and 10 and 11 are read: convert the "
                "model again (`ovc`, or openvino.convert_model)"
            )
        if not self._results:
            raise NotOpenVino(f"{self._name} is no OpenVINO model: it gives nothing")
        for id, result in self._results.items():
            result.names = result.names or self._names.get(self._made_by.get(id, ("", "")), "")
        return Network(
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
                    layers[self._id] = Layer(attributes.get("name", ""), attributes.get("output_names", ""))
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
    def _tensor(self) -> Layer | None:
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
