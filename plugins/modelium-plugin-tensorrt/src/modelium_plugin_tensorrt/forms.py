"""Which models can be made faster, what of, and how their folders look then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelium.api import Analysis, Optimized, Served
from modelium.api.templates import render
from modelium.errors import ModelError
from modelium_plugin_tensorrt.building import PLAN
from modelium_plugin_tensorrt.exporting import NETWORK

RUNTIME = "triton"

TASKS = ("text-classification", "feature-extraction", "image-classification")

GENERATION = (
    "a model that generates text is not converted: its keys and values grow with every token, which one exported "
    "network does not do; vLLM or TensorRT-LLM serve such models faster"
)

MIB = 2**20
# Measured on a CPU as the Triton plugin measures its own: the USS of the stub of a model of a few kilobytes.
OVERHEAD_ONNX = 50 * MIB
OVERHEAD_EXPORTED = 80 * MIB
# Not measured: the CUDA context with TensorRT's libraries, and PyTorch beside it where Python runs the engine.
OVERHEAD_PLAN = 500 * MIB
OVERHEAD_PLAN_PYTHON = 900 * MIB

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".index.json")
"""Ends of names of what the exported network has in it, and the model's folder can do without."""

LOAD_S = 3.0

_COMMON: Mapping[str, Any] = {"instances": 1, "threads": 0}
"""What every template needs, where a plan leaves it out."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a form is made of."""

    kind: str
    """`transformers`, `torchscript` or `onnx`."""
    path: Path
    task: str | None = None


def source_of(served: Served) -> Source | None:
    """None for models of other kinds, and ways of serving that are not known here. Raises `ModelError` for generation,
    and where the files do not lie as expected."""
    plan, analysis = served.plan, served.inspection.analysis
    if analysis is None or plan.runtime != RUNTIME or plan.devices != 1:
        return None
    version = served.path / "1"
    if plan.serving == "transformers-text-generation":
        raise ModelError(GENERATION)
    if plan.serving in {f"transformers-{task}" for task in TASKS}:
        folder = version / "model" / PurePosixPath(analysis.entry).parent
        return Source("transformers", folder, analysis.task)
    if plan.serving in ("torchscript", "torchscript-python"):
        return Source("torchscript", _file(version, analysis, "model.pt"))
    if plan.serving in ("onnx", "onnx-python"):
        return Source("onnx", _file(version, analysis, "model.onnx"))
    return None


def _file(version: Path, analysis: Analysis, standard: str) -> Path:
    """Where the runtime's layout has put the model's file."""
    entry = analysis.entry
    places = [version / standard] if not entry else [version / entry, version / "model" / entry]
    return next((place for place in places if place.is_file()), places[-1])


# --------------------------------------------------------------------------- the folders


def exported(served: Served, task: str, network: str, facts: Mapping[str, Any], *, gpu: bool, note: str) -> Optimized:
    """A model of transformers whose network is computed by ONNX Runtime or TensorRT."""
    plan, analysis = served.plan, served.inspection.analysis
    assert analysis is not None
    model_folder = str(PurePosixPath("model") / PurePosixPath(analysis.entry).parent)
    packs = ["torch"] if gpu else ["torch", "onnx"]
    settings = {**plan.settings, "packs": packs, "network": network}
    values = {
        **_COMMON,
        **settings,
        "name": served.name,
        "device_kind": plan.device_kind,
        "task": task,
        "network": network,
        "longest": facts["longest"],
        "model_folder": model_folder,
        "tokenizer": "true",
        "width": analysis.facts.get("hidden_size") or -1,
    }
    kept = [path for path in facts["kept"] if (served.path / path).is_file()]
    return Optimized(
        serving="transformers-exported",
        settings=settings,
        memory_bytes=(OVERHEAD_PLAN_PYTHON if gpu else OVERHEAD_EXPORTED) + facts["memory_bytes"],
        load_s=LOAD_S,
        note=note,
        texts=render("transformers-exported", values),
        made={f"1/{name}": name for name in _network_files(facts, network)},
        kept={path: path for path in kept},
    )


def kept_files(served: Served) -> list[str]:
    """Those of the drop that tokenizers and configurations are read from."""
    folder = served.path / "1" / "model"
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(WEIGHTS))
    return sorted(path.relative_to(served.path).as_posix() for path in files)


def as_onnx(served: Served, facts: Mapping[str, Any], *, native: bool, note: str) -> Optimized:
    """A program of TorchScript as ONNX, with the same names."""
    serving = "onnx" if native else "onnx-python"
    plan = served.plan
    settings = {**plan.settings, "packs": [] if native else ["onnx"], "decoupled": False}
    values = {
        **_COMMON,
        **settings,
        **_tensors(facts, settings.get("max_batch_size", 0)),
        "name": served.name,
        "device_kind": plan.device_kind,
        "model_file": NETWORK,
    }
    return Optimized(
        serving=serving,
        settings=settings,
        memory_bytes=OVERHEAD_ONNX + facts["memory_bytes"],
        load_s=LOAD_S,
        note=note,
        texts=render(serving, values),
        made={f"1/{name}": name for name in _network_files(facts, NETWORK)},
    )


def as_plan(served: Served, facts: Mapping[str, Any], *, note: str) -> Optimized:
    """A model served by Triton's own TensorRT backend, with the same names."""
    plan = served.plan
    settings = {**plan.settings, "packs": [], "decoupled": False}
    values = {
        **_COMMON,
        **settings,
        **_tensors(facts, settings.get("max_batch_size", 0)),
        "name": served.name,
        "device_kind": plan.device_kind,
        "model_file": PLAN,
    }
    return Optimized(
        serving="tensorrt",
        settings=settings,
        memory_bytes=OVERHEAD_PLAN + facts["memory_bytes"],
        load_s=LOAD_S,
        note=note,
        texts=render("tensorrt", values),
        made={f"1/{PLAN}": PLAN},
    )


def _network_files(facts: Mapping[str, Any], network: str) -> Iterable[str]:
    return facts.get("files") or [network]


def _tensors(facts: Mapping[str, Any], max_batch_size: int) -> dict[str, Any]:
    def described(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "name": tensor["name"],
                "data_type": f"TYPE_{tensor['datatype']}",
                "dims": list(tensor["shape"][1:] if max_batch_size > 0 else tensor["shape"]) or [1],
                "optional": False,
            }
            for tensor in tensors
        ]

    return {
        "max_batch_size": max_batch_size,
        "inputs": described(facts["inputs"]),
        "outputs": described(facts["outputs"]),
    }
