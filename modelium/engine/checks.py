"""`/check`: whether all that the service stands on is as it should be, with advice where it is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from modelium.api.units import human
from modelium.engine.orchestrator import Orchestrator
from modelium.engine.views import CheckView, StatusView

LOW_DISK_BYTES = 2 * 10**9


def check(engine: Orchestrator, status: StatusView) -> list[CheckView]:
    """Runs in a thread."""
    paths = engine.paths
    rows = [_folder("repository", paths.repository), _folder("state", paths.state)]
    if paths.incoming is not None:
        rows.append(_folder("incoming", paths.incoming))
    rows.append(_disk(paths.repository))
    for device in status.devices:
        found = f"{device.name}: {human(device.booked_bytes)} booked of {human(device.budget_bytes)}"
        rows.append(CheckView(name=f"device {device.id}", ok=device.booked_bytes <= device.budget_bytes, found=found))
    for doubt in engine.doubts():
        rows.append(CheckView(name="budget", ok=False, found=doubt, advice="correct its name, or remove it"))
    if not status.devices:
        rows.append(
            CheckView(name="devices", ok=False, found="none is reported", advice="see `modelium plugins` for errors")
        )
    for runtime in status.runtimes:
        ok = runtime.state == "UP"
        version = f", version {runtime.info.version}" if runtime.info else ""
        absent = ok and runtime.info is not None and "install" in runtime.info.facts
        advice = "" if ok else f"`modelium logs {runtime.name}` shows what it wrote"
        rows.append(
            CheckView(
                name=f"runtime {runtime.name}",
                ok=ok,
                found=runtime.reason if absent else f"{runtime.state}{version}: {runtime.reason}",
                advice=advice,
            )
        )
    if not status.runtimes:
        advice = "pip install modelium-plugin-triton"
        rows.append(CheckView(name="runtimes", ok=False, found="none is installed", advice=advice))
    disabled = engine.config.plugins.disable
    for plugin in status.plugins:
        # What a person left out is as it should be.
        ok = plugin.error is None or plugin.name in disabled or plugin.distribution in disabled
        rows.append(
            CheckView(
                name=f"plugin {plugin.name}",
                ok=ok,
                found=plugin.error or f"{plugin.distribution} {plugin.version}",
                advice="" if ok else "mend or uninstall it, or name it in plugins: {disable: [...]}",
            )
        )
    bad = status.models.get("INVALID", 0) + status.models.get("FAILED", 0)
    total = sum(status.models.values())
    advice = "`modelium ps` names them and says why" if bad else ""
    rows.append(CheckView(name="models", ok=not bad, found=f"{total}, {bad} of them not usable", advice=advice))
    return rows


def _folder(name: str, path: Path) -> CheckView:
    ok = os.access(path, os.R_OK | os.W_OK | os.X_OK)
    advice = "" if ok else "let the user that runs Modelium read and write it"
    return CheckView(name=f"folder {name}", ok=ok, found=str(path), advice=advice)


def _disk(path: Path) -> CheckView:
    free = shutil.disk_usage(path).free
    ok = free >= LOW_DISK_BYTES
    return CheckView(
        name="disk",
        ok=ok,
        found=f"{human(free)} free at {path}",
        advice="" if ok else "make room before dropping models",
    )
