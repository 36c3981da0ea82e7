"""How a GGUF model lies in the repository, where its files keep their names: llama.cpp finds split ones by them."""

from __future__ import annotations

from pathlib import Path

from modelium.api import Analysis, Layout
from modelium.api.templates import render

TEMPLATE = "llamacpp"
FILE = "model.gguf"
"""What a file that was dropped alone is called in its folder."""


def layout(name: str, analysis: Analysis) -> Layout:
    place = "1" if analysis.entry else f"1/{FILE}"
    return Layout(files={place: "."}, texts=render(TEMPLATE, {"name": name, "model_file": analysis.entry or FILE}))


def model_file(folder: Path, analysis: Analysis) -> Path:
    """The file to load, in the model's folder of the repository."""
    return folder / "1" / (analysis.entry or FILE)
