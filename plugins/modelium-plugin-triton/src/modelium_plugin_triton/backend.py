"""Triton as Modelium's host sees it: what it can serve, and how a model's folder is made for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from modelium.api import Analysis, Device, Layout, Offer, Plan, RuntimeContext, RuntimeDriver, RuntimeInfo
from modelium.api.environments import Environment
from modelium.api.estimates import READ_BYTES_PER_S
from modelium.errors import ModelError
from modelium_plugin_triton import engines, servings, vllm
from modelium_plugin_triton.install import has_pack
from modelium_plugin_triton.servings import AS_IS, RUNTIME, SERVINGS
from modelium_plugin_triton.settings import TritonSettings

PACK_OF = {"onnxruntime": "onnx", "openvino": "openvino", "torch": "torch", "transformers": "torch"}
"""The pack that brings a module which a person's own Python model imports."""

ALWAYS = ("python",)
"""What is counted on while nobody knows what a Triton has: the wheel has it, and NVIDIA's containers."""


class TritonBackend:
    """Triton Inference Server, its own or somebody else's."""

    name = RUNTIME
    settings_model: type[BaseModel] = TritonSettings

    def create(self, context: RuntimeContext) -> RuntimeDriver:
        from modelium_plugin_triton.driver import TritonDriver

        return TritonDriver(context)

    def offers(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        """Native backends before templates. Raises `ModelError` with the reasons when it is a kind of model that Triton
        serves, and this Triton, this model, or what is set, is not such that it could."""
        if analysis.format == "triton":
            return [as_is(analysis, runtime, devices)]
        found: list[Offer] = []
        reasons: list[str] = []
        for offers in (vllm.offers, self._templates):
            try:
                found += offers(analysis, runtime, devices)
            except ModelError as error:
                reasons.append(error.message)
        if reasons and not found:
            raise ModelError("; ".join(reasons))
        return found

    def _templates(self, analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Sequence[Offer]:
        possible = servings.servings_for(analysis)
        if not possible:
            return []
        have = _backends(runtime) or ALWAYS
        usable = [serving for serving in possible if serving.backend in have]
        if not usable:
            wanted = " or ".join(serving.backend for serving in possible)
            raise ModelError(f"serving it takes Triton's {wanted} backend, and this Triton has {_listed(have)}")
        kinds = _device_kinds(runtime, devices)
        return [servings.offer(serving, analysis, kinds, _missing(serving.packs, runtime)) for serving in usable]

    def layout(self, name: str, analysis: Analysis, plan: Plan) -> Layout:
        if plan.serving == AS_IS:
            return Layout(files={".": "."})
        if plan.serving in vllm.SERVINGS:
            return vllm.layout(name, analysis, plan)
        return servings.layout(name, analysis, plan)


def as_is(analysis: Analysis, runtime: RuntimeInfo | None, devices: Sequence[Device]) -> Offer:
    """A directory of somebody's own, served by the backend that it names."""
    facts = analysis.facts
    backend = str(facts["backend"])
    have = _backends(runtime)
    if have is not None and not facts["ensemble"] and backend not in have:
        raise ModelError(
            f"the model wants Triton's {backend} backend, and this Triton has {_listed(have)}: point "
            "`triton.executable` or `triton.endpoint` to a Triton that has it"
            + (f", or drop {_alone(backend)} alone, which Modelium serves on any" if _alone(backend) else "")
        )
    takes = engines.Gpus(**facts["takes"]) if facts.get("takes") else None
    kinds = _device_kinds(runtime, devices)
    kinds = _wanted_kinds(facts["instances"], kinds) if takes is None else _gpus_alone(backend, kinds)
    packs = sorted({PACK_OF[module] for module in facts["imports"] if module in PACK_OF})
    like = _like(backend, packs)
    count = sum(group["count"] for group in facts["instances"]) or 1
    # A part of an ensemble is loaded, and counted, for itself.
    memory = 0 if facts["ensemble"] else (like.overhead_bytes + analysis.weights_bytes) * count
    if takes is not None:
        memory = takes.bytes([device for device in devices if device.kind == "cuda"], engines.OVERHEAD_BYTES)
    return Offer(
        runtime=RUNTIME,
        serving=AS_IS,
        native=True,
        device_kinds=kinds,
        devices=takes.devices if takes is not None else 1,
        memory_bytes=memory,
        load_s=like.load_s + analysis.weights_bytes / READ_BYTES_PER_S,
        requires=_missing(packs, runtime),
        settings={"packs": packs},
        note="a Triton ensemble" if facts["ensemble"] else f"Triton's {backend} backend, as its directory says",
    )


def _backends(runtime: RuntimeInfo | None) -> Sequence[str] | None:
    """Those that it has; None while nobody knows: it has never been up, or runs where its files can't be seen."""
    if runtime is None or not runtime.facts.get("backends_known", True):
        return None
    return runtime.backends


def _missing(packs: Iterable[str], runtime: RuntimeInfo | None) -> tuple[str, ...]:
    """Those that are still to be installed: none for another Triton than the wheel's, which has what it has."""
    if runtime is None:
        return tuple(packs)
    folder = runtime.facts.get("environment")
    return tuple(pack for pack in packs if not has_pack(Environment(Path(folder)), pack)) if folder else ()


def _alone(backend: str) -> str:
    return {"onnxruntime": "its .onnx file", "pytorch": "its .pt file"}.get(backend, "")


def _like(backend: str, packs: Collection[str]) -> servings.Serving:
    """The way of serving that takes most nearly as much."""
    if backend == "python":
        return SERVINGS["transformers-feature-extraction" if "torch" in packs else "onnx-python"]
    return SERVINGS[{"pytorch": "torchscript", "openvino": "openvino"}.get(backend, "onnx")]


def _device_kinds(runtime: RuntimeInfo | None, devices: Sequence[Device]) -> tuple[str, ...]:
    """A GPU first, where there is one and Triton doesn't say that it can't use it."""
    gpu = any(device.kind == "cuda" for device in devices) and (runtime is None or runtime.facts.get("gpu", True))
    return ("cuda", "cpu") if gpu else ("cpu",)


def _wanted_kinds(instances: Sequence[Mapping[str, object]], kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of device that a configuration's instance groups leave open."""
    named = {group["kind"] for group in instances}
    if named == {"KIND_CPU"}:
        return ("cpu",)
    if "KIND_GPU" in named:
        if "cuda" not in kinds:
            raise ModelError(
                "config.pbtxt asks for KIND_GPU, and there is no GPU that Triton can use: ask for KIND_CPU or KIND_AUTO"
            )
        return ("cuda",)
    return kinds


def _gpus_alone(backend: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    if "cuda" not in kinds:
        raise ModelError(f"Triton's {backend} backend computes on GPUs alone, and there is none that Triton can use")
    return ("cuda",)


def _listed(backends: Sequence[str]) -> str:
    return ", ".join(sorted(backends)) or "none"
