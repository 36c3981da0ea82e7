"""OpenVINO models written by hand: the format is XML with the numbers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

PRECISIONS = {"f32": "FP32", "i64": "I64", "f16": "FP16", "boolean": "BOOL"}


class Network:
    """A network on its way into two files."""

    def __init__(self) -> None:
        self._layers: list[str] = []
        self._edges: list[str] = []
        self._weights = b""

    def parameter(self, name: str, shape: Sequence[int] | None, kind: str = "f32", *, names: str | None = None) -> str:
        """An input; no shape is any rank. Returns the tensor: layer, port, type and shape."""
        said = "..." if shape is None else ",".join("?" if n < 0 else str(n) for n in shape)
        data = f'<data shape="{said}" element_type="{kind}"/>'
        return self._layer(name, "Parameter", data, (), kind, shape, name if names is None else names)

    def constant(self, values: np.ndarray) -> str:
        kind = {"float32": "f32", "int64": "i64", "float16": "f16"}[str(values.dtype)]
        shape = ", ".join(map(str, values.shape))
        place = f'offset="{len(self._weights)}" size="{values.nbytes}"'
        self._weights += values.tobytes()
        data = f'<data element_type="{kind}" shape="{shape}" {place}/>'
        return self._layer("constant", "Const", data, (), kind, values.shape, "")

    def layer(
        self, type: str, inputs: Sequence[str], shape: Sequence[int] | None, *, names: str = "", data: str = ""
    ) -> str:
        """Any layer of opset 1 with one output of its first input's type."""
        return self._layer(type, type, data, inputs, inputs[0].split("|")[2], shape, names)

    def result(self, tensor: str, name: str = "result", *, names: str = "") -> None:
        kind, shape = tensor.split("|")[2:]
        number = len(self._layers)
        more = f" output_names={quoteattr(names)}" if names else ""
        self._layers.append(
            f'<layer id="{number}" name={quoteattr(name)} type="Result" version="opset1"{more}>'
            f"<input>{self._port('0', kind, shape)}</input></layer>"
        )
        self._edge(tensor, number, 0)

    def _layer(
        self,
        name: str,
        type: str,
        data: str,
        inputs: Sequence[str],
        kind: str,
        shape: Sequence[int] | None,
        names: str,
    ) -> str:
        number = len(self._layers)
        dims = "..." if shape is None else ",".join(map(str, shape))
        takes = "".join(self._port(str(i), *tensor.split("|")[2:]) for i, tensor in enumerate(inputs))
        gives = self._port(str(len(inputs)), kind, dims, names)
        inner = (f"<input>{takes}</input>" if inputs else "") + f"<output>{gives}</output>"
        self._layers.append(
            f'<layer id="{number}" name={quoteattr(name)} type="{type}" version="opset1">{data}{inner}</layer>'
        )
        for index, tensor in enumerate(inputs):
            self._edge(tensor, number, index)
        return f"{number}|{len(inputs)}|{kind}|{dims}"

    def _edge(self, tensor: str, layer: int, port: int) -> None:
        made_by, at = tensor.split("|")[:2]
        self._edges.append(f'<edge from-layer="{made_by}" from-port="{at}" to-layer="{layer}" to-port="{port}"/>')

    @staticmethod
    def _port(id: str, kind: str, dims: str, names: str = "") -> str:
        inner = "" if dims in ("", "...") else "".join(f"<dim>{n}</dim>" for n in dims.split(","))
        more = f" names={quoteattr(names)}" if names else ""
        return f'<port id="{id}" precision="{PRECISIONS[kind]}"{more}>{inner}</port>'

    def text(self, version: int = 11) -> str:
        return (
            f'<?xml version="1.0"?>\n<net name="net" version="{version}"><layers>{"".join(self._layers)}</layers>'
            f"<edges>{''.join(self._edges)}</edges></net>\n"
        )

    def write(self, xml: Path) -> Path:
        """Write both files; returns the folder."""
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(self.text())
        xml.with_suffix(".bin").write_bytes(self._weights)
        return xml.parent


def linear(xml: Path, *, batch: int = -1) -> Path:
    """y = x W + b with W of 1 to 12 (4 by 3) and b of 0.5, 1 and 1.5; returns the folder."""
    net = Network()
    x = net.parameter("x", (batch, 4))
    w = net.constant(np.arange(1, 13, dtype=np.float32).reshape(4, 3))
    b = net.constant(np.array([0.5, 1.0, 1.5], np.float32))
    product = net.layer("MatMul", (x, w), (batch, 3), data='<data transpose_a="false" transpose_b="false"/>')
    y = net.layer("Add", (product, b), (batch, 3), names="y", data='<data auto_broadcast="numpy"/>')
    net.result(y)
    return net.write(xml)


def odd(xml: Path) -> Path:
    """Twice a scalar, under two names, and what is positive of a tensor that has no name."""
    net = Network()
    times = net.parameter("times", (), "i64")
    nameless = net.parameter("nameless", (2,), names="")
    two = net.constant(np.array(2, np.int64))
    net.result(net.layer("Multiply", (times, two), (), names="zz,twice", data='<data auto_broadcast="numpy"/>'))
    net.result(net.layer("ReLU", (nameless,), (2,)), name="last")
    return net.write(xml)
