"""Files that only PyTorch writes: the committed ones, or new ones made by the interpreter in MODELIUM_TEST_PYTHON."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    interpreter = os.environ.get("MODELIUM_TEST_PYTHON")
    if not interpreter:
        return HERE / "data"
    folder = tmp_path_factory.mktemp("torch")
    subprocess.run([interpreter, str(HERE / "make_data.py"), str(folder)], check=True, timeout=300)
    return folder
