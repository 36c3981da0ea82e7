"""Python models: a folder whose `model.py` defines a class `Model` that says what it takes and gives.

    class Model:
        inputs = {"x": ("FP32", [-1, 4])}       # KServe's datatypes and shapes, -1 where a size is free
        outputs = {"y": ("FP32", [-1])}
        device_kinds = ["cuda", "cpu"]          # best first; left out: the CPU alone

        def __init__(self, folder): ...         # the folder that model.py lies in, with all that was dropped
        def predict(self, inputs): ...          # a dict of numpy arrays by name in, and one out

Such a folder is a program: whoever drops it wants it run, as with a Triton model directory, and is told so. Here it is
only read: the declarations must be literals. `Analysis.facts` holds `device_kinds` and `imports` (top-level modules
that the code names).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelium.api import Analysis, Tensor, hookimpl
from modelium.api.units import human
from modelium.builtin.files import files
from modelium.errors import ModelError

FORMAT = "python-model"
CONFIDENCE = 0.93
"""A class of that name and shape in a file of that name is meant so; a config.pbtxt says more."""

FILE = "model.py"
CLASS = "Model"
MAX_CODE_BYTES = 4 << 20

DATATYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
             "BYTES")  # fmt: skip
"""Those of KServe's that numpy has."""
DEVICE_KINDS = ("cpu", "cuda")

EXAMPLE = '`inputs = {"x": ("FP32", [-1, 4])}`'


def find(path: Path) -> ast.ClassDef | None:
    """The class `Model` with a method `predict`, if the folder is a Python model's."""
    file = path / FILE
    if not file.is_file() or (path / "config.pbtxt").exists():
        return None
    tree = _parsed(file)
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == CLASS and _defines(node, "predict"):
            return node
    return None


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """What its declarations say."""
    found = find(path)
    if found is None:
        return None
    declared = _literals(found)
    listed = files(path)
    weights = sum(entry.size for entry in listed if not entry.base.endswith(".py"))
    inputs, outputs = (_tensors(declared, direction) for direction in ("inputs", "outputs"))
    return Analysis(
        analyzer="python_model",
        format=FORMAT,
        summary=f"Python model, {len(inputs)} in, {len(outputs)} out, {human(weights)} beside its code",
        confidence=CONFIDENCE,
        entry=FILE,
        weights_bytes=weights,
        inputs=inputs,
        outputs=outputs,
        facts={
            "device_kinds": _device_kinds(declared),
            "imports": sorted(_imports(entry.path for entry in listed if entry.base.endswith(".py"))),
        },
    )


def _parsed(file: Path) -> ast.Module | None:
    """None for what is no Python: whoever imports it is told why."""
    try:
        return ast.parse(file.read_bytes()) if file.stat().st_size <= MAX_CODE_BYTES else None
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _defines(node: ast.ClassDef, method: str) -> bool:
    return any(isinstance(one, ast.FunctionDef) and one.name == method for one in node.body)


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    """The class's attributes that are literals; others are not known before it runs."""
    found = {}
    for one in node.body:
        match one:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                try:
                    found[name] = ast.literal_eval(value)
                except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                    continue
    return found


def _tensors(declared: dict[str, Any], direction: str) -> tuple[Tensor, ...]:
    value = declared.get(direction)
    if not isinstance(value, dict) or not value:
        raise ModelError(
            f"{FILE}: expected the class {CLASS} to say its {direction} as a literal, as {EXAMPLE}, and found "
            + ("none" if value is None else repr(value)[:80])
        )
    return tuple(_tensor(direction, name, one) for name, one in value.items())


def _tensor(direction: str, name: Any, value: Any) -> Tensor:
    match value:
        case (str(datatype), [*shape]) if isinstance(name, str) and name and datatype in DATATYPES:
            if all(type(size) is int and size >= -1 for size in shape):
                return Tensor(name=name, datatype=datatype, shape=tuple(shape))
    raise ModelError(
        f"{FILE}: expected each of {direction} to be a name with a datatype ({', '.join(DATATYPES)}) and a shape, as "
        f"{EXAMPLE}, found {name!r}: {value!r:.80}"
    )


def _device_kinds(declared: dict[str, Any]) -> list[str]:
    value = declared.get("device_kinds", ["cpu"])
    if isinstance(value, list | tuple) and value and all(kind in DEVICE_KINDS for kind in value):
        return list(value)
    raise ModelError(f"{FILE}: expected device_kinds to be a list of {', '.join(DEVICE_KINDS)}, found {value!r:.80}")


def _imports(sources: Iterable[Path]) -> set[str]:
    found: set[str] = set()
    for source in sources:
        tree = _parsed(source)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found
