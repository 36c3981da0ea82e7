"""The Python that exports models: PyTorch and transformers as they serve them, and onnx beside these.

Where Triton has a Python environment of Modelium's, ours lies on top of it, so that a model is exported by the very
libraries that serve it, and PyTorch is not installed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelium.api import Report
from modelium.api.environments import Environment, find_interpreter, hash_of, install_pack, make_environment, probe
from modelium.errors import ConfigError

PYTHONS = ("3.12", "3.11", "3.13", "3.14")

EXPORT = ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.31.1")
TORCH = ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "pillow==13.0.0")
"""Where there is no environment of Triton's to lie on."""
CONSTRAINTS = ("numpy==1.26.4",)
"""What Triton's environment has, which nothing is to be put over."""


def versions(base: Path | None) -> str:
    """Of all that exports, for a key."""
    return hash_of(EXPORT, base.name if base is not None else TORCH)


async def prepare(cache: Path, base: Path | None, torch: bool, pip_args: Sequence[str], report: Report) -> Path:
    """The interpreter of an environment that can export; `base` is Triton's, `torch` whether PyTorch is needed.

    Raises `InstallError`, `ConfigError`.
    """
    if base is not None:
        interpreter = await probe(base / "bin" / "python")
        if interpreter is None:
            raise ConfigError(f"{base}/bin/python does not run")
        below = base / "lib" / f"python{interpreter.version}" / "site-packages"
        site_files = {"below.pth": f"{below}\n"}
    else:
        interpreter = await find_interpreter(None, PYTHONS, what="exporting models", key="tensorrt.python")
        site_files = {}
    name = f"export-{interpreter.version}-{hash_of(str(base), interpreter.full_version, EXPORT, TORCH)}"
    environment = Environment(cache / name)
    what = "the environment that exports models"
    await make_environment(environment, interpreter, report, what=what, site_files=site_files)
    if torch and base is None:
        await install_pack(
            environment, "torch", TORCH, report, what=f"installing PyTorch into {what}",
            pip_args=pip_args, torch=True,
        )  # fmt: skip
    await install_pack(
        environment, "export", EXPORT, report, what=f"installing onnx into {what}",
        constraints=CONSTRAINTS if base is not None else (), pip_args=pip_args,
    )  # fmt: skip
    return environment.python
