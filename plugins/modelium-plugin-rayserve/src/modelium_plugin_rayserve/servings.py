"""The ways in which Ray can serve each kind of model, and what each takes.

They are the templates of Triton's Python backend: a replica runs the same `model.py`, so plain Triton serves the same
folder, and a client finds the same inputs and outputs whichever runtime serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelium.api import Analysis, Layout, Offer, Plan
from modelium.api.estimates import READ_BYTES_PER_S, transformers_bytes
from modelium.api.templates import batching, huggingface_values, render, tensor_value
from modelium.errors import ModelError
from modelium_plugin_rayserve.packs import PACK_OF
from modelium_plugin_rayserve.settings import MIB, ReplicaSettings, replica_settings

RUNTIME = "ray_serve"
AS_IS = "as-is"
PYTHON = "python-model"
SPREAD = "-spread"
"""Behind the name of a way of serving: a replica on each of several nodes."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One way of serving, which is one template."""

    name: str
    packs: tuple[str, ...]
    overhead_bytes: int
    """Of one replica without weights."""
    load_s: float
    """Of a load without weights."""
    settings: Mapping[str, Any]
    """What can be set besides Ray's own settings, with its defaults."""
    decoupled: bool = False
    gpu: bool = True
    """Its libraries, as they are installed here, compute on a GPU."""


# Overheads are the PSS of a replica of a model of a few kilobytes while no other process shares its libraries, and
# times what its load took on two cores: Ray 2.60, CPython 3.11, onnxruntime 1.31, torch 2.13 for CPUs, transformers
# 5.23. On a GPU the same figure stands for the CUDA context until a load was measured.
_PYTHON, _ONNX, _TORCH, _TRANSFORMERS = 92 * MIB, 108 * MIB, 282 * MIB, 385 * MIB
_LIKE = {"onnxruntime": _ONNX, "torch": _TORCH, "transformers": _TRANSFORMERS}
"""What a person's own model takes by what it imports."""

_COMMON: Mapping[str, Any] = {"threads": 0}
_BATCHED: Mapping[str, Any] = {**_COMMON, "max_batch_size": 32}
_LABELS: Mapping[str, Any] = {**_BATCHED, "dtype": "auto", "top_k": 5}

SERVINGS: Mapping[str, Serving] = {
    serving.name: serving
    for serving in (
        Serving("onnx-python", ("onnx",), _ONNX, 3, _BATCHED, gpu=False),
        Serving("torchscript-python", ("torch",), _TORCH, 6, _COMMON),
        Serving(
            "transformers-text-generation", ("torch",), _TRANSFORMERS, 8,
            {**_COMMON, "dtype": "auto", "max_tokens": 256, "concurrent": 8}, decoupled=True,
        ),
        Serving("transformers-text-classification", ("torch",), _TRANSFORMERS, 8, _LABELS),
        Serving("transformers-feature-extraction", ("torch",), _TRANSFORMERS, 8, {**_BATCHED, "dtype": "auto"}),
        Serving("transformers-image-classification", ("torch",), _TRANSFORMERS, 8, _LABELS),
        Serving(PYTHON, (), _PYTHON, 3, {}),
    )
}  # fmt: skip


def servings_for(analysis: Analysis) -> Serving | None:
    """The template for a model; None when it is of a kind that none serves.

    Raises `ModelError` with the reason when it is of such a kind, and can't be served all the same.
    """
    facts = analysis.facts
    if unsupported := facts.get("unsupported"):
        raise ModelError(str(unsupported))
    if analysis.format == "onnx":
        # numpy has no bfloat16.
        if any(tensor.datatype == "BF16" for tensor in (*analysis.inputs, *analysis.outputs)):
            return None
        return SERVINGS["onnx-python"]
    if analysis.format == "torchscript":
        return SERVINGS["torchscript-python"]
    if analysis.format == PYTHON:
        return SERVINGS[PYTHON]
    if analysis.format == "huggingface":
        if facts.get("quantization"):
            raise ModelError(
                f"the weights are quantised with {facts['quantization']}, and Ray Serve's replicas serve plain ones: "
                "drop the model it was made from, or serve it with a runtime that knows the method, such as vLLM"
            )
        return SERVINGS.get(f"transformers-{analysis.task}")
    return None


def as_is(analysis: Analysis) -> Serving | None:
    """For a Triton model directory of somebody's own, which a replica runs where it is one Python model."""
    facts = analysis.facts
    plain = facts["backend"] == "python" and not facts["sequence"] and len(facts["served"]) == 1 and analysis.entry
    if not plain:
        return None
    return Serving(AS_IS, packs_of(facts["imports"]), _PYTHON, 3, {}, decoupled=bool(facts["decoupled"]))


def device_kinds(serving: Serving, analysis: Analysis, *, own: bool) -> tuple[str, ...]:
    """Kinds of device that it can use, best first; `own` when its libraries are those that are installed for it."""
    if analysis.format == PYTHON:
        return tuple(analysis.facts["device_kinds"])
    if analysis.format == "triton":
        kinds = {group["kind"] for group in analysis.facts["instances"]}
        if kinds == {"KIND_CPU"} or not kinds:
            return ("cpu",)
        return ("cuda",) if "KIND_GPU" in kinds else ("cuda", "cpu")
    return ("cuda", "cpu") if serving.gpu or not own else ("cpu",)


def packs_needed(serving: Serving, analysis: Analysis) -> tuple[str, ...]:
    return serving.packs or packs_of(analysis.facts.get("imports", ()))


def packs_of(imports: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({PACK_OF[module] for module in imports if module in PACK_OF}))


# --------------------------------------------------------------------------- what they take


def memory_bytes(serving: Serving, analysis: Analysis, device_kind: str) -> int:
    """A first estimate for one replica; measured memory replaces it after the first load."""
    weights, overhead = analysis.weights_bytes, serving.overhead_bytes
    if serving.name in (PYTHON, AS_IS):
        imports = analysis.facts.get("imports", ())
        overhead = max([overhead, *(size for module, size in _LIKE.items() if module in imports)])
    if analysis.format == "huggingface":
        weights = transformers_bytes(analysis, device_kind)
    return overhead + weights


def one_replica_bytes(plan: Plan, analysis: Analysis) -> int:
    """What one replica of a plan is estimated to take."""
    serving = SERVINGS.get(plan.serving.removesuffix(SPREAD)) or Serving(AS_IS, (), _PYTHON, 3, {})
    return memory_bytes(serving, analysis, plan.device_kind)


def offer(
    serving: Serving, analysis: Analysis, device_kinds: Sequence[str], defaults: ReplicaSettings, missing: Sequence[str]
) -> Offer:
    """`missing` are the packs that are not installed yet."""
    return Offer(
        runtime=RUNTIME,
        serving=serving.name,
        device_kinds=tuple(device_kinds),
        memory_bytes=memory_bytes(serving, analysis, device_kinds[0]) * defaults.most,
        load_s=serving.load_s + analysis.weights_bytes / READ_BYTES_PER_S,
        requires=tuple(missing),
        elastic=defaults.most > defaults.replicas,
        settings={
            **serving.settings,
            **batching(serving.settings, analysis),
            **defaults.model_dump(mode="json", exclude_none=True),
            "packs": list(packs_needed(serving, analysis)),
            "decoupled": serving.decoupled,
        },
        note="a Ray Serve application",
    )


def spread(offer: Offer, nodes: int) -> Offer:
    """The same with a replica on each of so many nodes."""
    each = offer.memory_bytes // max(offer.settings["replicas"], offer.settings.get("max_replicas") or 0)
    settings = {k: v for k, v in offer.settings.items() if k != "max_replicas"} | {"replicas": nodes}
    return offer.model_copy(
        update={
            "serving": offer.serving + SPREAD,
            "devices": nodes,
            "memory_bytes": each * nodes,
            "elastic": False,
            "settings": settings,
            "note": f"a Ray Serve application with a replica on each of {nodes} nodes",
        }
    )


# --------------------------------------------------------------------------- the files that they are made of


def layout(name: str, analysis: Analysis, plan: Plan) -> Layout:
    """The model's folder. Raises `ModelError` for a serving that is not one of these, and for wrong settings."""
    wanted = replica_settings(plan.settings)
    template = plan.serving.removesuffix(SPREAD)
    if template == AS_IS:
        return Layout(files={".": "."})
    serving = SERVINGS.get(template)
    if serving is None:
        raise ModelError(f"Ray Serve has no way of serving called {template!r}: expected one of {sorted(SERVINGS)}")
    settings = {**serving.settings, **batching(serving.settings, analysis), **plan.settings}
    # Ray's replicas are Triton's instances, should Triton serve the folder.
    values = {**settings, "name": name, "device_kind": plan.device_kind, "instances": wanted.replicas}
    if analysis.format == "huggingface":
        values |= huggingface_values(analysis)
        return Layout(files={"1/model": "."}, texts=render(template, values))
    batched = settings.get("max_batch_size", 0) > 0
    values |= {
        "max_batch_size": settings.get("max_batch_size", 0),
        "inputs": [tensor_value(tensor, batched) for tensor in analysis.inputs],
        "outputs": [tensor_value(tensor, batched) for tensor in analysis.outputs],
    }
    if not analysis.entry:  # the drop is the one file
        values["model_file"] = "model.onnx" if analysis.format == "onnx" else "model.pt"
        return Layout(files={f"1/{values['model_file']}": "."}, texts=render(template, values))
    # In a folder of its own, so that no file of the drop can meet one of the template's.
    values["model_file"] = f"model/{analysis.entry}"
    return Layout(files={"1/model": "."}, texts=render(template, values))
