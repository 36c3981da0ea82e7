"""How near estimates are to what models really take, before their first load and after it: of many kinds, one by one.

A model alone, since what several processes share counts as each one's part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests import fleet, models, openvino_models
from tests.service import Served

RUNTIMES = ("triton", "vllm", "ray_serve", "llamacpp")
BODY = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
"""About 25 million weights: 100 MB in 32 bits."""
WIDE = 2048

Make = Callable[[Path], Path]


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    fleet.install(RUNTIMES)
    kinds = _kinds()
    rules = [
        {"name": f"to-{name}", "when": {"name": name}, "prefer": {"runtime": [where]}}
        for name, (where, _) in kinds.items()
    ]
    config = fleet.configuration(RUNTIMES)
    first: dict[str, float] = {}
    later: dict[str, float] = {}
    service = Served(folder / "root", config | {"brain": {"rules": rules}})
    try:
        service.start()
        drops = {}
        for name, (_, make) in kinds.items():
            place = folder / name
            place.mkdir()
            drops[name] = make(place)
        models.done()  # it has PyTorch's libraries, which models would be found to share with it
        for name, (where, _) in kinds.items():
            service.drop(drops[name])
            service.until_state(name, "READY", "COLD", within_s=600)
            told = []
            for errors in (first, later):
                if service.state(name) == "READY":
                    service.post(f"/models/{name}/unload")
                estimate = service.model(name)["memory_bytes"] if errors is later else _estimate(service, name)
                service.post(f"/models/{name}/load")
                service.until_state(name, "READY", within_s=600)
                _ask(service, name)
                measured = _measured(service, name)
                errors[name] = estimate / measured - 1
                told.append(f"{estimate / 2**20:.0f} of {measured / 2**20:.0f} MiB, {errors[name]:+.1%}")
            used = service.model(name)["plan"]
            assert where in (used["runtime"], f"{used['runtime']}/{used['serving']}"), used
            yield f"{name} by {used['runtime']}/{used['serving']}: booked of measured", "; later ".join(told), ""
            service.post(f"/models/{name}/unload")
    finally:
        service.down()
    yield (
        f"{len(first)} models, before their first load",
        f"median error {median(map(abs, first.values())):.1%}, lowest {min(first.values()):+.1%}",
        "median at most 15%",
    )
    yield (
        f"{len(later)} models, after their first load",
        f"median error {median(map(abs, later.values())):.1%}, lowest {min(later.values()):+.1%}",
        "none under by more than 10%",
    )


def _estimate(service: Served, name: str) -> int:
    return int(service.get(f"/models/{name}/explain")["estimate_bytes"])


def _ask(service: Served, name: str) -> None:
    """Something that it can answer, so that it has worked once."""
    inputs = service.get(f"/v2/models/{name}")["inputs"]
    if name == "pictures":
        inputs = [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32]}]
    elif any(tensor["datatype"] == "BYTES" for tensor in inputs):
        service.post(f"/predict/{name}", {"text": "hello"})
        return
    for tensor in inputs:
        tensor["shape"] = [max(1, n) for n in tensor["shape"]]
        tensor["data"] = [0] * prod(tensor["shape"])
    service.post(f"/v2/models/{name}/infer", {"inputs": inputs})


def _measured(service: Served, name: str) -> int:
    """What it holds, when it grows no more: its runtime is looked at every other second."""
    known = -1
    while True:
        time.sleep(5)
        found = int(service.get(f"/models/{name}/explain")["measured"]["memory_bytes"])
        if found <= known * 1.001:
            return found
        known = found


def _kinds() -> dict[str, tuple[str, Make]]:
    """By name: the runtime, or the runtime and its way of serving, and what makes the model."""
    python = fleet.torch_python(fleet.triton_wheel())

    def huggingface(task: str, name: str, **options: Any) -> Make:
        return lambda place: models.make(python, task, place / name, **options)

    def bert(name: str) -> Make:
        from tiny_hf import bert

        return lambda place: Path(bert(place / name, hidden=256, layers=4, heads=4))

    def letters(name: str, **sizes: int) -> Make:
        from tiny_hf import alphabet

        return lambda place: Path(alphabet(place / name, **sizes))

    def gguf(name: str, **sizes: Any) -> Make:
        from tiny_gguf import llama

        return lambda place: Path(llama(place / f"{name}.gguf", **sizes))

    def small_onnx(name: str) -> Make:
        return lambda place: models.onnx_linear(place / f"{name}.onnx")

    large = {"width": 512, "layers": 8, "feed_forward": 1536, "heads": 8, "kv_heads": 4}
    return {
        "small-onnx": ("triton", small_onnx("small-onnx")),
        "wide-onnx": ("triton", partial(_wide_onnx, "wide-onnx")),
        "wide-openvino": ("triton", partial(_wide_openvino, "wide-openvino")),
        "script": ("triton", lambda place: models.make(python, "torchscript", place / "script.pt")),
        "classes": ("triton", huggingface("text-classification", "classes", sizes=BODY)),
        "features": ("triton", huggingface("feature-extraction", "features", sizes=BODY)),
        "pictures": ("triton", huggingface("image-classification", "pictures", sizes=BODY)),
        "words": ("triton/transformers-text-generation", huggingface("text-generation", "words", sizes=BODY)),
        "letters-in-triton": ("triton/vllm-python", letters("letters-in-triton", hidden=512, inner=1536, layers=8)),
        "letters": ("vllm", letters("letters")),
        "larger-letters": ("vllm", letters("larger-letters", hidden=512, inner=1536, layers=8)),
        "bert": ("vllm", bert("bert")),
        "ray-onnx": ("ray_serve", partial(_wide_onnx, "ray-onnx")),
        "ray-classes": ("ray_serve", huggingface("text-classification", "ray-classes", sizes=BODY)),
        "gguf": ("llamacpp", gguf("gguf")),
        "larger-gguf": ("llamacpp", gguf("larger-gguf", **large)),
    }


def _wide_onnx(name: str, place: Path) -> Path:
    """Four layers of 16 MiB each."""
    from onnx import TensorProto, helper, numpy_helper, save

    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((WIDE, WIDE)).astype(np.float32), f"W{i}") for i in range(4)
    ]
    ends = ["x", "h1", "h2", "h3", "y"]
    nodes = [helper.make_node("MatMul", [ends[i], f"W{i}"], [ends[i + 1]]) for i in range(4)]
    ports = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", WIDE]) for end in ("x", "y")]
    graph = helper.make_graph(nodes, "wide", ports[:1], ports[1:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), place / f"{name}.onnx")
    return place / f"{name}.onnx"


def _wide_openvino(name: str, place: Path) -> Path:
    """The like."""
    random = np.random.default_rng(0)
    net = openvino_models.Network()
    end = net.parameter("x", (-1, WIDE))
    for _ in range(4):
        weight = net.constant(random.standard_normal((WIDE, WIDE)).astype(np.float32))
        end = net.layer("MatMul", (end, weight), (-1, WIDE), data='<data transpose_a="false" transpose_b="false"/>')
    net.result(end)
    return net.write(place / name / f"{name}.xml")
