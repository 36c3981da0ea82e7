"""One small model for each runtime, and the configuration by which each is served by its own, under one budget.

For end-to-end tests and benchmarks that have several runtimes at once. What a runtime needs is installed into the cache
by its plugin's own code, as `modelium runtimes install` does it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelium.api import Progress
from tests.models import onnx_linear
from tests.service import Served

if TYPE_CHECKING:
    from modelium_plugin_triton.install import Wheel

sys.path += [str(Path(__file__).parents[1] / f"plugins/modelium-plugin-{n}/tests") for n in ("llamacpp", "vllm")]
"""Their tests know how to make small models."""

Ask = Callable[[Served], bool]

SMALL_VLLM = {"max_model_len": 256, "kv_cache_memory_bytes": 16 * 2**20, "threads": 1}


@dataclass(frozen=True)
class Member:
    """A model, the runtime that it is for, and a question whose answer is known."""

    name: str
    runtime: str
    make: Callable[[Path], Path]
    """Writes it into a folder; returns what is to be dropped."""
    ask: Ask


def _infer(name: str) -> Ask:
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 0, 0, 0]}]}

    def ask(service: Served) -> bool:
        answer = service.post(f"/v2/models/{name}/infer", body)
        return bool(answer["outputs"][0]["data"] == [1.5, 3.0, 4.5])

    return ask


def _complete(name: str, prompt: str, told: str) -> Ask:
    def ask(service: Served) -> bool:
        body = {"model": name, "prompt": prompt, "max_tokens": 3, "temperature": 0}
        text = str(service.post("/v1/completions", body)["choices"][0]["text"])
        return told in text

    return ask


def _onnx(name: str) -> Callable[[Path], Path]:
    return lambda folder: onnx_linear(folder / f"{name}.onnx")


def _letters(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tiny_hf import alphabet

        path: Path = alphabet(folder / name)
        return path

    return make


def _gguf(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tiny_gguf import llama

        path: Path = llama(folder / f"{name}.gguf", alphabet=True)
        return path

    return make


MEMBERS: Mapping[str, Member] = {
    member.runtime: member
    for member in (
        Member("triton-linear", "triton", _onnx("triton-linear"), _infer("triton-linear")),
        Member("vllm-letters", "vllm", _letters("vllm-letters"), _complete("vllm-letters", "abc", "def")),
        Member("ray-linear", "ray_serve", _onnx("ray-linear"), _infer("ray-linear")),
        Member("gguf-letters", "llamacpp", _gguf("gguf-letters"), _complete("gguf-letters", "abc", "def")),
    )
}


def install(runtimes: Iterable[str]) -> None:
    """Have what these runtimes need in the cache, as a person would who wants to use them."""
    from modelium.api.driver import Installable
    from modelium.host import PluginHost
    from modelium.paths import cache_dir

    for backend in PluginHost.load(()).runtime_backends():
        if backend.name in runtimes and isinstance(backend, Installable):
            asyncio.run(backend.install(cache_dir(), backend.settings_model(), _say))


def triton_wheel() -> Wheel:
    """The tritonserver that services here run, set up by its plugin's own code."""
    from modelium_plugin_triton.install import prepare
    from modelium_plugin_triton.locate import find_interpreter
    from modelium_plugin_triton.settings import TritonSettings

    from modelium.paths import cache_dir

    async def make() -> Wheel:
        return await prepare(cache_dir(), await find_interpreter(TritonSettings()), (), _say)

    return asyncio.run(make())


def torch_python(wheel: Wheel) -> Path:
    """A Python with torch and transformers to make models with: $MODELIUM_TEST_PYTHON, else Triton's environment."""
    from modelium_plugin_triton.install import install_pack

    named = os.environ.get("MODELIUM_TEST_PYTHON")
    if named:
        return Path(named)
    asyncio.run(install_pack(wheel.environment, "torch", (), _say))
    return Path(wheel.environment.python)


def _say(progress: Progress) -> None:
    print(progress.stage, file=sys.stderr)


def configuration(runtimes: Iterable[str], budget_bytes: int | None = None, **policies: Any) -> dict[str, Any]:
    """Each member goes to its own runtime; models may have `budget_bytes` of the host's memory together."""
    wanted = [MEMBERS[runtime] for runtime in runtimes]
    budget = {} if budget_bytes is None else {"device_budget_bytes": {"cpu:0": budget_bytes}}
    return {
        "orchestration": {"settle_s": 0.5, "policies": {"min_resident_seconds": 0, **budget, **policies}},
        "brain": {
            "rules": [
                {"name": f"to-{m.runtime}", "when": {"name": f"{m.name}*"}, "prefer": {"runtime": m.runtime}}
                for m in wanted
            ]
        },
        "vllm": {"base_port": 0, "default_settings": SMALL_VLLM},
        "plugins": {"disable": ["tensorrt"]},
    }


def fill(service: Served, runtimes: Iterable[str], folder: Path) -> dict[str, int]:
    """Drop the members and have each asked once; returns what each really holds, in bytes."""
    wanted = [MEMBERS[runtime] for runtime in runtimes]
    for member in wanted:
        place = folder / member.name
        place.mkdir(parents=True)
        service.drop(member.make(place))
    sizes = {}
    for member in wanted:
        service.until_state(member.name, "READY", "COLD", within_s=600)
        assert member.ask(service), member.name
        shown = service.model(member.name)
        assert shown["runtime"] == member.runtime, shown["plan"]
        assert shown["memory_source"] == "measured", shown
        sizes[member.name] = int(shown["memory_bytes"])
    return sizes


def host(service: Served) -> dict[str, Any]:
    """The host's memory as the ledger has it."""
    found: dict[str, Any] = next(d for d in service.get("/status")["devices"] if d["id"] == "cpu:0")
    return found
