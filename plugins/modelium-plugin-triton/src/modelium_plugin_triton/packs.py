"""What Triton's private Python environment holds, by named packs, installed when the first model needs them.

Versions are pinned so that a model loads tomorrow as it did today, and tested together.
"""

from __future__ import annotations

SERVER = "nvidia-pytriton==0.7.0"
"""The wheel that carries tritonserver 2.51 with its Python backend."""

CONSTRAINTS = ("numpy==1.26.4",)
"""For every installation: under numpy 2 this server's stub fails with any output made from an array."""

BASE = "base"
PACKS: dict[str, tuple[str, ...]] = {
    BASE: ("numpy==1.26.4",),
    "onnx": ("onnxruntime==1.31.1",),
    "openvino": ("openvino==2026.4.1",),
    "torch": ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "pillow==13.0.0"),
}

SITE_MODULE = "modelium_triton_site"
SITE_FILES = {
    # A .pth file, since distributions bring a sitecustomize of their own that would hide ours.
    f"{SITE_MODULE}.pth": f"import {SITE_MODULE}\n",
    f"{SITE_MODULE}.py": '''"""Mends what Triton's stub does to its interpreter, which reads no environment."""

import locale
import sys

# A __pycache__ in a model's folder would make its next load a full reload.
sys.dont_write_bytecode = True

# The stub leaves the C locale, in which open() without an encoding reads ASCII.
for name in ("C.UTF-8", "en_US.UTF-8"):
    try:
        locale.setlocale(locale.LC_ALL, name)
        break
    except locale.Error:
        pass
''',
}
