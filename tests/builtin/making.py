"""Tiny drops, made on the spot: each with what is right, so that a test can break one thing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def safetensors(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "F32", item: int = 4) -> Path:
    """A whole safetensors file with zeros."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * item
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return raw_safetensors(path, table, position)


def raw_safetensors(path: Path, table: Any, data_bytes: int) -> Path:
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def onnx_model(path: Path, *, external: str | None = None, domain: str = "", opset: int = 17, size: int = 4) -> Path:
    """`y = x @ w` with a free batch dimension; `external` names the file for its weights."""
    weights = np.arange(size * size, dtype=np.float32).reshape(size, size)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], domain=domain)],
        "tiny",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [size, size]),  # as old exporters list initialisers
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size])],
        [numpy_helper.from_array(weights, "w")],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="tests")
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    return path


def set_external(path: Path, **entries: str) -> Path:
    """Change where a model with external data says that its weights are."""
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    kept = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "vocab_size": 16,
}


def hugging_face(
    folder: Path, config: Mapping[str, Any] | None = None, *, shards: int = 1, files: str = "text"
) -> Path:
    """A folder with safetensors weights; `files` is `text` (a tokenizer), `image` (a processor) or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN if config is None else dict(config)))
    if shards == 1:
        safetensors(folder / "model.safetensors", {"a": (2, 3), "b": (4,)}, "BF16", 2)
    else:
        where = {}
        for number in range(1, shards + 1):
            name = f"model-{number:05}-of-{shards:05}.safetensors"
            safetensors(folder / name, {f"t{number}": (2, 3)})
            where[f"t{number}"] = name
        index = {"metadata": {"total_size": 24 * shards}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if files == "text":
        (folder / "tokenizer.json").write_text("{}")
    if files == "image":
        (folder / "preprocessor_config.json").write_text("{}")
    return folder


class Touch:
    """Unpickled, it makes a file: what a test watches for."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def evil_pickle(marker: Path, protocol: int = 2) -> bytes:
    return pickle.dumps({"weights": Touch(marker)}, protocol)


def zip_checkpoint(path: Path, data_pkl: bytes, entries: Mapping[str, bytes] | None = None) -> Path:
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", b"little")
        for name, data in (entries or {}).items():
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/version", b"3\n")
    return path
