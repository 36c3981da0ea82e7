"""Small plugins for the host's tests: as objects, and as packages that pip installs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modelium.api import HOOKSPEC_VERSION, hookimpl
from modelium.discovery import Source
from modelium.host import PluginHost


def plugin(**hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plugin object that implements `hooks`."""
    return SimpleNamespace(
        MODELIUM_HOOKSPEC_VERSION=HOOKSPEC_VERSION, **{name: hookimpl(function) for name, function in hooks.items()}
    )


def source(name: str, loaded: object, *, distribution: str | None = None, builtin: bool = False) -> Source:
    return Source(name, distribution or f"{name}-dist", "1.2", lambda: loaded, builtin)


def host_with(**plugins: object) -> PluginHost:
    """A host of these plugins, by name."""
    return PluginHost.of([source(name, loaded) for name, loaded in plugins.items()])


def install(packages: Mapping[str, tuple[str, str]], workspace: Path) -> Path:
    """Install packages with pip, each made of an entry point's name and one module's code; returns where they are.

    The result is a folder with real `dist-info`, to be put on `sys.path`.
    """
    sources = []
    for distribution, (name, code) in packages.items():
        module = distribution.replace("-", "_")
        folder = workspace / "src" / distribution
        folder.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (folder / "pyproject.toml").write_text(
            f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{distribution}"
version = "0.3"
[project.entry-points.modelium]
{name} = "{module}"
[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""
        )
        sources.append(str(folder))
    target = workspace / "site"
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target
