"""What the engine asks: which faster form a model could have, making it, and how it is served then."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modelium.api import Job, Optimization, Optimized, OptimizerContext, Served
from modelium.api.environments import hash_of
from modelium.api.measuring import Gpus
from modelium.errors import ConfigError, ModelError
from modelium_plugin_tensorrt import environment, forms, tools
from modelium_plugin_tensorrt.building import PLAN, Engine, build
from modelium_plugin_tensorrt.compare import TOLERANCE
from modelium_plugin_tensorrt.exporting import NETWORK, Exported, check_no_slower, export
from modelium_plugin_tensorrt.forms import Source
from modelium_plugin_tensorrt.profiles import SAMPLE_ROWS, largest_batch, profiles, sample_shapes
from modelium_plugin_tensorrt.settings import Profile, TensorRTSettings, Wanted, wanted
from modelium_plugin_tensorrt.tools import Tool

FORMAT = 2
"""Counted up when what is made of equal models by equal tools becomes another."""

OWN = {"float16": "fp16", "bfloat16": "bf16"}
"""The precision of a model by its weights' type; FP32 of all others."""


@dataclass(frozen=True, slots=True)
class Design:
    """What would be made of one model."""

    source: Source
    precision: str
    wanted: Wanted
    base: Path | None
    """Triton's Python environment, where it has one of Modelium's."""
    tool: Tool | None
    """None: ONNX, for the CPU."""
    capability: str = ""

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """Those that the plan gives: they are for engines alone."""
        return self.wanted.profiles if self.tool is not None else {}

    @property
    def python(self) -> bool:
        """It is served by Triton's Python backend."""
        return self.source.kind == "transformers"


class TensorRTOptimizer:
    name = "tensorrt"
    settings_model: type[BaseModel] = TensorRTSettings

    def __init__(self) -> None:
        self._settings = TensorRTSettings(enabled=False)
        self._cache = Path()
        self._gpus: Gpus | None = None
        self._tool: Tool | None = None
        self._wrong: ConfigError | None = None
        """What is wrong with the TensorRT that is configured."""

    async def start(self, context: OptimizerContext) -> None:
        """Look for TensorRT where there is a GPU for it."""
        assert isinstance(context.settings, TensorRTSettings)
        self._settings = context.settings
        self._cache = context.cache_dir / "tensorrt"
        if not self._settings.enabled:
            return
        self._gpus = await asyncio.to_thread(Gpus.open)
        if self._gpus is not None:
            try:
                self._tool = await tools.find(self._settings)
            except ConfigError as exc:
                self._wrong = exc

    # ------------------------------------------------------------------ judging

    def proposes(self, served: Served) -> Optimization | None:
        design = self._design(served)
        if design is None:
            return None
        batch = _max_batch_size(served)
        depends_on = {
            "precision": design.precision,
            "max_batch_size": str(batch),
            "exporter": environment.versions(design.base),
        }
        if design.tool is not None:
            own = design.wanted
            depends_on |= {
                "compute capability": design.capability,
                "TensorRT": design.tool.version,
                "workspace_bytes": str(own.workspace_bytes or self._settings.workspace_bytes),
                "profiles": hash_of({name: p.model_dump() for name, p in own.profiles.items()}) if own.profiles else "",
                "calibration": _look_of(own.calibration),
            }
            what = f"a TensorRT {design.tool.version} engine in {design.precision} for compute capability "
            what += design.capability
        else:
            what = "an ONNX export for ONNX Runtime"
        served_as = [served.plan.serving, served.plan.device_kind, self._is_native(served)]
        key = hash_of(FORMAT, served.inspection.content_key, served_as, design.source.kind, depends_on)
        return Optimization(
            key=f"{self.name}-{'plan' if design.tool else 'onnx'}-{key}",
            what=what,
            devices=tuple(device.id for device in served.devices),
            depends_on={name: value for name, value in depends_on.items() if value},
        )

    def _design(self, served: Served) -> Design | None:
        settings, plan = self._settings, served.plan
        if not settings.enabled or not any(fnmatchcase(served.name, pattern) for pattern in settings.models):
            return None
        on_gpu = plan.device_kind == "cuda"
        if not served.devices or not (on_gpu or (plan.device_kind == "cpu" and settings.onnx_on_cpu)):
            return None
        own = wanted(plan.settings)
        source = forms.source_of(served) if own is not None else None
        if own is None or source is None or (source.kind == "onnx" and not on_gpu):
            return None
        if not on_gpu and plan.settings.get("dtype", "auto") not in ("auto", "float32"):
            return None  # somebody wants it computed otherwise than ONNX Runtime would
        base = Path(folder) if served.runtime and (folder := served.runtime.facts.get("environment")) else None
        if not on_gpu:
            return Design(source, "fp32", own, base, None)
        tool = self._tool_for(served, source, base)
        return Design(source, self._precision(served, own), own, base, tool, self._capability())

    def _precision(self, served: Served, own: Wanted) -> str:
        precision: str = own.precision or self._settings.precision
        if precision == "auto":
            analysis = served.inspection.analysis
            own_type = served.plan.settings.get("dtype", "auto")
            if own_type == "auto":
                own_type = analysis.dtype if analysis is not None else None
            precision = OWN.get(str(own_type), "fp32")
        if precision == "int8" and own.calibration is None:
            raise ModelError(
                "int8 needs a calibration: `tensorrt: {precision: int8, calibration: FILE.npz}` in the plan's settings"
            )
        return precision

    def _tool_for(self, served: Served, source: Source, base: Path | None) -> Tool:
        """Raises `ConfigError`, or `ModelError` with what is missing."""
        if self._wrong is not None:
            raise self._wrong
        if source.kind == "transformers":
            # The engine is run by the Python that Triton's models run in, and read by that one's TensorRT alone.
            python = base / "bin" / "python" if base is not None else self._settings.python
            version = tools.package_version(python) if python is not None else None
            if python is None or version is None:
                where = f"`{python} -m pip install tensorrt`" if python else "set tensorrt.python to that Python"
                raise ModelError(f"TensorRT is not installed for the Python that Triton's models run in: {where}")
            return Tool(python, version, python=True)
        if self._tool is None:
            raise ModelError(tools.NONE)
        backends = served.runtime.backends if served.runtime else ()
        if "tensorrt" not in backends:
            raise ModelError(
                f"this Triton has no tensorrt backend (it has {', '.join(backends) or 'none'}): with an onnxruntime "
                "backend that has TensorRT in it, set `accelerator: tensorrt` in the plan's settings"
            )
        return self._tool

    def _capability(self) -> str:
        """Of the GPUs here: engines are for one only."""
        if self._gpus is None:
            raise ModelError("no GPU can be seen through NVML, so that nobody knows what to make an engine for")
        found = sorted({self._gpus.compute_capability(device) for device in self._gpus.handles})
        if len(found) != 1:
            raise ModelError(f"the GPUs here have different compute capabilities ({', '.join(found)})")
        return found[0]

    def _is_native(self, served: Served) -> bool:
        return bool(served.runtime and "onnxruntime" in served.runtime.backends)

    # ------------------------------------------------------------------ making

    async def optimize(self, served: Served, optimization: Optimization, target: Path, job: Job) -> Mapping[str, Any]:
        design = self._design(served)
        if design is None:
            raise ModelError("it is not to be converted any more")
        python = await environment.prepare(
            self._cache, design.base, design.source.kind != "onnx", self._settings.pip_args, job.report
        )
        batch = largest_batch(_max_batch_size(served), design.profiles)
        exported = await export(
            job,
            python,
            target,
            kind=design.source.kind,
            task=design.source.task,
            source=design.source.path,
            precision=design.precision,
            max_batch_size=batch or SAMPLE_ROWS,
            shapes=sample_shapes(design.profiles, batched=batch > 0),
            calibration=design.wanted.calibration if design.precision == "int8" else None,
            timed=design.tool is None,
        )
        engine = None
        if design.tool is None:
            check_no_slower(exported)
            files = await asyncio.to_thread(_keep, target, NETWORK)
        else:
            engine = await self._build(served, design, exported, batch, target, job)
            files = await asyncio.to_thread(_keep, target, PLAN)
        return {
            "inputs": exported.inputs,
            "outputs": exported.outputs,
            "longest": _longest(design, exported),
            "kept": forms.kept_files(served) if design.source.kind == "transformers" else [],
            "files": files,
            "memory_bytes": engine.bytes + engine.memory_bytes if engine is not None else exported.bytes,
            "difference": engine.difference if engine is not None else exported.difference,
            "speed": exported.speed,
            "precision": design.precision,
        }

    async def _build(
        self, served: Served, design: Design, exported: Exported, batch: int, target: Path, job: Job
    ) -> Engine:
        assert design.tool is not None and self._gpus is not None
        own = design.wanted
        return await build(
            job,
            design.tool,
            target,
            exported,
            precision=design.precision,
            profiles=profiles(
                exported.inputs,
                max_batch_size=batch,
                longest=exported.longest if design.source.task in forms.TASKS else None,
                given=design.profiles,
            ),
            workspace_bytes=own.workspace_bytes or self._settings.workspace_bytes,
            timing_cache=self._cache / "timing" / f"{design.capability}-{design.tool.version}.cache",
            gpu=self._gpus.uuid(served.devices[0].id),
        )

    def layout(self, served: Served, optimization: Optimization, facts: Mapping[str, Any]) -> Optimized:
        source = forms.source_of(served)
        if source is None:
            raise ModelError("it is not served in a way that can be converted")
        gpu, note = served.plan.device_kind == "cuda", _note(facts)
        own = wanted(served.plan.settings) if gpu else None
        if own is not None and own.profiles:
            batch = {"max_batch_size": largest_batch(_max_batch_size(served), own.profiles)}
            plan = served.plan.model_copy(update={"settings": {**served.plan.settings, **batch}})
            served = served.model_copy(update={"plan": plan})
        if source.kind == "transformers":
            assert source.task is not None
            return forms.exported(served, source.task, PLAN if gpu else NETWORK, facts, gpu=gpu, note=note)
        if gpu:
            return forms.as_plan(served, facts, note=note)
        return forms.as_onnx(served, facts, native=self._is_native(served), note=note)


def _max_batch_size(served: Served) -> int:
    return int(served.plan.settings.get("max_batch_size", 0))


def _longest(design: Design, exported: Exported) -> int:
    """The most tokens that what was made takes; 0 where nothing limits it."""
    given = [profile.max[1] for profile in design.profiles.values() if len(profile.max) == 2]
    if design.source.kind != "transformers" or not given:
        return exported.longest
    return min([*given, *([exported.longest] if exported.longest else [])])


def _note(facts: Mapping[str, Any]) -> str:
    parts = []
    if facts["difference"] is not None:
        allowed = TOLERANCE[facts["precision"]]
        parts.append(f"outputs differ by at most {facts['difference']:.1g} of their largest values, of {allowed:g}")
    if facts["speed"] is not None:
        parts.append(f"{facts['speed']:.1f} times as fast on one thread here")
    return ", ".join(parts)


def _keep(target: Path, name: str) -> Sequence[str]:
    """Remove all but a network with its weights; returns the names of those. Runs in a thread."""
    kept = []
    for path in sorted(target.iterdir()):
        if path.name == name or path.name.startswith(f"{name}."):
            kept.append(path.name)
        else:
            path.unlink()
    return kept


def _look_of(file: Path | None) -> str:
    """Changes when the file does; empty for none."""
    if file is None:
        return ""
    try:
        found = file.stat()
    except OSError as exc:
        raise ModelError(f"the calibration {file} can't be read: {exc.strerror}") from exc
    return hash_of(str(file), found.st_size, found.st_mtime_ns)
