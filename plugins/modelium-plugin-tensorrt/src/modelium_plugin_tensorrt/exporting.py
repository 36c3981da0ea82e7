"""A model as ONNX, in the wanted precision, found to answer like the original."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelium.api import Job
from modelium.api.templates import template_root
from modelium.errors import DriverError, ModelError
from modelium_plugin_tensorrt.compare import largest_difference, read
from modelium_plugin_tensorrt.running import run_program

NETWORK = "network.onnx"
SAMPLES = "samples.npz"


@dataclass(frozen=True, slots=True)
class Exported:
    file: Path
    """The ONNX; the original's own where that is ONNX in this precision already."""
    inputs: Sequence[dict[str, Any]]
    """`name`, `datatype`, and `shape` with -1 where any size will do."""
    outputs: Sequence[dict[str, Any]]
    longest: int
    """The most tokens that it takes; 0 where nothing limits it."""
    bytes: int
    """Of its weights."""
    difference: float | None
    """The largest, as a share of an output's largest value; None where ONNX Runtime could not compute it."""
    speed: float | None
    """How many times as fast as the original on the CPU, both on one thread; None where that was not measured."""


async def export(
    job: Job,
    python: Path,
    target: Path,
    *,
    kind: str,
    task: str | None,
    source: Path,
    precision: str,
    max_batch_size: int,
    shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    calibration: Path | None = None,
    timed: bool = False,
) -> Exported:
    """Into `target`, with the samples that both were run on: of these shapes by input, where there are any.

    Raises `ModelError` when it can't be exported, or does not answer like the original.
    """
    templates = template_root() / ("_shared" if kind == "transformers" else "torchscript-python/1")
    request = target / "request.json"
    asked = {
        "kind": kind,
        "task": task,
        "source": str(source),
        "target": str(target),
        "precision": precision,
        "max_batch": max_batch_size,
        "shapes": shapes,
        "calibration": str(calibration or ""),
        "templates": str(templates),
        "timed": timed,
    }
    await asyncio.to_thread(request.write_text, json.dumps(asked), encoding="utf-8")
    await run_program(job, python, "export", request)
    return await asyncio.to_thread(_exported, target, source, precision)


def _exported(target: Path, source: Path, precision: str) -> Exported:
    try:
        report = json.loads((target / "report.json").read_bytes())
    except (OSError, ValueError) as exc:
        raise DriverError(f"the export left no report: {exc}") from exc
    made = read(target / SAMPLES, "x")
    difference = None
    if made:
        difference = largest_difference(read(target / SAMPLES, "o"), made, precision, "its ONNX export")
    before, after = sum(report["before_s"]), sum(report["after_s"])
    file = target / NETWORK
    return Exported(
        file=file if file.exists() else source,
        inputs=report["inputs"],
        outputs=report["outputs"],
        longest=report["longest"],
        bytes=report["bytes"],
        difference=difference,
        speed=before / after if after else None,
    )


def check_no_slower(exported: Exported) -> None:
    """Raises `ModelError` for what would not be worth it."""
    if exported.speed is not None and exported.speed < 1:
        slower = f"{1 / exported.speed:.2f} times as long as the original on this CPU, with one thread each"
        raise ModelError(f"ONNX Runtime takes {slower}")
