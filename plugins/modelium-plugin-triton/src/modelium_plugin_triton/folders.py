"""A model's folder, as it is before a load, and what the load adds to what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelium.api import LoadRequest
from modelium.errors import LoadRejected, ModelError
from modelium_plugin_triton import modelconfig

PYTHON = "python"
NO_BACKEND = ""
"""An ensemble's."""


def check(request: LoadRequest) -> str:
    """The model's backend, by its files. Raises `LoadRejected` for what Triton would wait for without end."""
    if any(key.startswith("file:") for key in request.parameters):
        return str(request.analysis.facts.get("backend") or PYTHON)  # the files come with the request
    path = request.path
    if not path.is_dir():
        raise LoadRejected(f"{request.name}: its folder {path} is not there")
    try:
        file = path / modelconfig.CONFIG
        config = modelconfig.read_config(file) if file.exists() else None
    except ModelError as error:
        raise LoadRejected(f"{request.name}: {error.message}") from error
    versions = {v: p for p in path.iterdir() if p.is_dir() and (v := modelconfig.version_of(p.name)) is not None}
    backend = modelconfig.backend_of(config, {f.name for p in versions.values() for f in p.iterdir()})
    if backend == PYTHON:
        needed = modelconfig.main_file(config, backend) or "model.py"
        for version in modelconfig.served_versions(config, list(versions)):
            if not (versions[version] / needed).is_file():
                raise LoadRejected(f"{request.name}: expected {version}/{needed}, and it is not there")
    return backend


def parameters(request: LoadRequest) -> Mapping[str, Any]:
    """What goes with the load, so that it comes to the devices that were booked."""
    here = [device.rpartition("/")[2] for device in request.devices]  # as that machine itself calls them
    gpus = [int(device.partition(":")[2]) for device in here if device.startswith("cuda:")]
    config = request.path / modelconfig.CONFIG
    # A folder of somebody's own says for itself where it runs.
    if not gpus or "config" in request.parameters or request.analysis.format == "triton" or not config.exists():
        return request.parameters
    placed = modelconfig.placed(config.read_text(encoding="utf-8"), gpus)
    return {**request.parameters, "config": placed}


def newest(folder: Path) -> int:
    """When a file of the model last changed, in nanoseconds."""
    latest = 0
    with contextlib.suppress(OSError):  # it is being changed
        for path in folder.rglob("*"):
            latest = max(latest, path.stat().st_mtime_ns)
    return latest
