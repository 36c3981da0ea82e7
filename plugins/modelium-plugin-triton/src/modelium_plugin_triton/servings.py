"""The ways in which Triton can serve each kind of model, what each takes, and the files that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelium.api import Analysis, Layout, Offer, Plan
from modelium.api.estimates import READ_BYTES_PER_S, transformers_bytes
from modelium.api.templates import batching, huggingface_values, render, tensor_value
from modelium.errors import ModelError

RUNTIME = "triton"
AS_IS = "as-is"

MIB = 2**20

STANDARD_FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torchscript": "model.pt"}
"""What Triton's backends call a model's file unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One way of serving, which is one template."""

    name: str
    backend: str
    """Triton's backend that it needs."""
    packs: tuple[str, ...]
    """What Triton's private environment needs on top of numpy."""
    overhead_bytes: int
    """Of one instance without weights."""
    load_s: float
    """Of a load without weights."""
    settings: Mapping[str, Any]
    """What can be set, with its defaults."""
    decoupled: bool = False
    """Answers one request with many responses."""
    cpu_only: bool = False
    """It knows no GPU of the kind that Triton does."""

    @property
    def native(self) -> bool:
        return self.backend != "python"


_COMMON: Mapping[str, Any] = {"instances": 1, "threads": 0}
_BATCHED: Mapping[str, Any] = {**_COMMON, "max_batch_size": 32}
_TRANSFORMERS: Mapping[str, Any] = {**_COMMON, "dtype": "auto"}
_LABELS: Mapping[str, Any] = {**_BATCHED, "dtype": "auto", "top_k": 5}

# Overheads are the USS of the stub of a small model that was asked once while no other process shares the libraries
# (with others torch's take 110 MiB less), and times what its load took on two cores: Triton 2.51 of the wheel, CPython
# 3.11, onnxruntime 1.31, torch 2.13 for CPUs, transformers 5.23. A stub with numpy alone has 20 MiB; what a library
# adds to that stands for the native backend, which runs in the server's own process. On a GPU the same figure stands
# for the CUDA context until a load was measured.
_ONNX, _ONNX_NATIVE = 56 * MIB, 36 * MIB
_OPENVINO, _OPENVINO_NATIVE = 80 * MIB, 60 * MIB
_TORCH, _TORCH_NATIVE = 225 * MIB, 205 * MIB
_TORCH_AND_TRANSFORMERS = 345 * MIB

SERVINGS: Mapping[str, Serving] = {
    serving.name: serving
    for serving in (
        Serving("onnx", "onnxruntime", (), _ONNX_NATIVE, 0.5, {**_BATCHED, "accelerator": ""}),
        Serving("onnx-python", "python", ("onnx",), _ONNX, 1.6, _BATCHED),
        # Not batched: what the backend then does with fewer requests than the most depends on its version.
        Serving("openvino", "openvino", (), _OPENVINO_NATIVE, 0.5, _COMMON, cpu_only=True),
        Serving("openvino-python", "python", ("openvino",), _OPENVINO, 1.6, _BATCHED, cpu_only=True),
        Serving("torchscript", "pytorch", (), _TORCH_NATIVE, 0.5, _BATCHED),
        Serving("torchscript-python", "python", ("torch",), _TORCH, 5, _COMMON),
        Serving(
            "transformers-text-generation", "python", ("torch",), _TORCH_AND_TRANSFORMERS, 6,
            {**_TRANSFORMERS, "max_tokens": 256, "concurrent": 8}, decoupled=True,
        ),
        Serving("transformers-text-classification", "python", ("torch",), _TORCH_AND_TRANSFORMERS, 6, _LABELS),
        Serving(
            "transformers-feature-extraction", "python", ("torch",), _TORCH_AND_TRANSFORMERS, 6,
            {**_TRANSFORMERS, "max_batch_size": 32},
        ),
        Serving("transformers-image-classification", "python", ("torch",), _TORCH_AND_TRANSFORMERS, 6, _LABELS),
    )
}  # fmt: skip


def servings_for(analysis: Analysis) -> tuple[Serving, ...]:
    """The templates for a model, native ones first. Raises `ModelError` when it is one that none can serve."""
    if analysis.format == "onnx":
        return _onnx(analysis)
    if analysis.format == "openvino":
        return _openvino(analysis)
    if analysis.format == "torchscript":
        return _torchscript(analysis)
    if analysis.format == "huggingface":
        return _huggingface(analysis)
    return ()


def _onnx(analysis: Analysis) -> tuple[Serving, ...]:
    # numpy has no bfloat16, and Python-backend models get their tensors as numpy arrays.
    if any(tensor.datatype == "BF16" for tensor in (*analysis.inputs, *analysis.outputs)):
        return (SERVINGS["onnx"],)
    return SERVINGS["onnx"], SERVINGS["onnx-python"]


def _openvino(analysis: Analysis) -> tuple[Serving, ...]:
    if analysis.facts.get("unsupported"):
        raise ModelError(str(analysis.facts["unsupported"]))
    if any(tensor.datatype == "BF16" for tensor in (*analysis.inputs, *analysis.outputs)):
        return (SERVINGS["openvino"],)
    # The native backend knows tensors by names of their own, and takes no scalars.
    if analysis.facts.get("unnamed") or any(not tensor.shape for tensor in analysis.inputs):
        return (SERVINGS["openvino-python"],)
    return SERVINGS["openvino"], SERVINGS["openvino-python"]


def _torchscript(analysis: Analysis) -> tuple[Serving, ...]:
    # The native backend can't find out what a program takes; the template reads it from the program.
    if analysis.inputs and analysis.outputs:
        return SERVINGS["torchscript"], SERVINGS["torchscript-python"]
    return (SERVINGS["torchscript-python"],)


def _huggingface(analysis: Analysis) -> tuple[Serving, ...]:
    facts = analysis.facts
    if facts.get("unsupported"):
        raise ModelError(str(facts["unsupported"]))
    if facts.get("quantization"):
        raise ModelError(
            f"the weights are quantised with {facts['quantization']}, and Triton's transformers templates serve plain "
            "ones: drop the model it was made from, or serve it with a runtime that knows the method, such as vLLM"
        )
    serving = SERVINGS.get(f"transformers-{analysis.task}")
    if serving is None:
        raise ModelError(f"no template serves the task {analysis.task!r}: expected one of {sorted(SERVINGS)}")
    return (serving,)


# --------------------------------------------------------------------------- what they take


def memory_bytes(serving: Serving, analysis: Analysis, device_kind: str) -> int:
    """A first estimate for all instances; measured memory replaces it after the first load."""
    weights = analysis.weights_bytes
    if analysis.format == "openvino":
        weights += int(analysis.facts.get("packed_bytes") or 0)
    if analysis.format == "huggingface":
        weights = transformers_bytes(analysis, device_kind)
    return (serving.overhead_bytes + weights) * int(serving.settings["instances"])


def offer(serving: Serving, analysis: Analysis, device_kinds: Sequence[str], requires: tuple[str, ...] = ()) -> Offer:
    """`requires` are the packs that are not installed yet."""
    if serving.cpu_only:
        device_kinds = ("cpu",)
    return Offer(
        runtime=RUNTIME,
        serving=serving.name,
        native=serving.native,
        device_kinds=tuple(device_kinds),
        memory_bytes=memory_bytes(serving, analysis, device_kinds[0]),
        load_s=serving.load_s + analysis.weights_bytes / READ_BYTES_PER_S,
        requires=requires,
        settings={
            **serving.settings,
            **batching(serving.settings, analysis),
            "packs": list(serving.packs),
            "decoupled": serving.decoupled,
        },
        note=f"Triton's {serving.backend} backend",
    )


# --------------------------------------------------------------------------- the files that they are made of


def layout(name: str, analysis: Analysis, plan: Plan) -> Layout:
    """The model's folder. Raises `ModelError` for a serving that is not one of these."""
    serving = SERVINGS.get(plan.serving)
    if serving is None:
        raise ModelError(f"Triton has no way of serving called {plan.serving!r}: expected one of {sorted(SERVINGS)}")
    settings = {**serving.settings, **batching(serving.settings, analysis), **plan.settings}
    values = {**settings, "name": name, "device_kind": plan.device_kind}
    if analysis.format == "huggingface":
        values |= huggingface_values(analysis)
        return Layout(files={"1/model": "."}, texts=render(serving.name, values))
    standard = STANDARD_FILES[analysis.format]
    if not analysis.entry:
        files, model_file = {f"1/{standard}": "."}, standard
    elif serving.native:
        files, model_file = {"1": "."}, analysis.entry
    else:
        # In a folder of its own, so that no file of the drop can meet one of the template's.
        files, model_file = {"1/model": "."}, f"model/{analysis.entry}"
    tensors = (*analysis.inputs, *analysis.outputs)
    # onnxruntime completes a configuration that says nothing of tensors; one with a wrong rank it would refuse.
    untold = serving.native and (analysis.facts.get("unknown_rank") or any(not tensor.shape for tensor in tensors))
    batched = settings.get("max_batch_size", 0) > 0
    values |= {
        "model_file": model_file,
        "max_batch_size": settings.get("max_batch_size", 0),
        "inputs": [] if untold else [tensor_value(tensor, batched) for tensor in analysis.inputs],
        "outputs": [] if untold else [tensor_value(tensor, batched) for tensor in analysis.outputs],
        "accelerator": _accelerator(settings.get("accelerator"), plan.device_kind),
    }
    return Layout(files=files, texts=render(serving.name, values))


def _accelerator(setting: object, device_kind: str) -> dict[str, Any] | None:
    """What onnxruntime uses on a GPU in place of its own kernels: `tensorrt`, or `{name: tensorrt, parameters: {...}}`
    with parameters as https://github.com/triton-inference-server/onnxruntime_backend lists them. Raises `ModelError`.
    """
    if not setting or device_kind != "cuda":
        return None
    given = {"name": setting} if isinstance(setting, str) else setting
    parameters = given.get("parameters", {}) if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str) or not isinstance(parameters, Mapping):
        raise ModelError(
            f"the plan's setting accelerator is {setting!r:.200}: expected a name, such as tensorrt, or a name with "
            "parameters, such as {name: tensorrt, parameters: {precision_mode: FP16}}"
        )
    return {"name": given["name"], "parameters": {str(key): str(value) for key, value in parameters.items()}}
