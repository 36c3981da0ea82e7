"""What is called of TensorRT is there, in version 10 and in 11: held against the stubs of its own bindings.

Their packages bring no stubs, and can't be imported without TensorRT's libraries, which PyPI has not. Libraries that
export the few functions by name, and do nothing, are enough to import them, and for mypy's stubgen to write stubs.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import modelium_plugin_tensorrt
import pytest

from modelium.api.templates import template_root

FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")

PROGRAMS = (
    Path(modelium_plugin_tensorrt.__file__).parent / "programs/build.py",
    template_root() / "_shared/on_tensorrt.py",
)

CONFIG = """\
[mypy]
strict = true
explicit_package_bases = true
disallow_untyped_calls = false
[mypy-tensorrt.*]
ignore_errors = true
[mypy-torch.*]
ignore_missing_imports = true
"""

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is needed to import TensorRT's bindings"),
]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], check=False, capture_output=True, text=True, env={**os.environ, **env}, timeout=240
    )


def stubs(folder: Path, version: str) -> Path:
    """A folder with the stubs of `tensorrt`."""
    major = version.partition(".")[0]
    tag = f"{sys.version_info.major}{sys.version_info.minor}"
    done = run(
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--python-version", tag,
        "--platform", "manylinux_2_28_x86_64", "--dest", folder, f"tensorrt-cu12-bindings=={version}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "package")
    (folder / "nothing.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        library = f"lib{name}.so.{major}"
        done = run("cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, folder / "nothing.c")
        assert done.returncode == 0, done.stderr
    done = run(
        sys.executable, "-c", "from mypy.stubgen import main; main()",
        "--inspect-mode", "-m", "tensorrt_bindings.tensorrt", "-o", folder / "stubs",
        PYTHONPATH=str(folder / "package"), LD_LIBRARY_PATH=str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = readable((folder / "stubs/tensorrt_bindings/tensorrt.pyi").read_text())
    (folder / "stubs/tensorrt").mkdir()
    (folder / "stubs/tensorrt/__init__.pyi").write_text(text)
    return folder / "stubs"


def readable(text: str) -> str:
    """Without a type called `bool`, and functions that Python's grammar does not have."""
    lines = [line for line in text.splitlines() if not line.startswith("bool:")]
    while True:
        try:
            ast.parse("\n".join(lines))
            return "\n".join(lines)
        except SyntaxError as error:
            assert error.lineno is not None
            line = lines[error.lineno - 1]
            assert "def " in line, line
            lines[error.lineno - 1] = f"{line.partition('(')[0]}(self, *args: object, **kwargs: object) -> object: ..."


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_what_is_called_of_tensorrt_is_there(tmp_path: Path, version: str) -> None:
    found = stubs(tmp_path, version)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "checked").mkdir()
    for program in PROGRAMS:
        shutil.copy(program, tmp_path / "checked")

    def check() -> subprocess.CompletedProcess[str]:
        checked = sorted((tmp_path / "checked").iterdir())
        return run(
            sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache",
            *checked, MYPYPATH=str(found),
        )  # fmt: skip

    done = check()
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "checked/build.py"
    wrong.write_text(wrong.read_text().replace("set_memory_pool_limit", "set_memory_limit"))
    done = check()
    assert '"IBuilderConfig" has no attribute "set_memory_limit"' in done.stdout
