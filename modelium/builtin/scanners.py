"""Looks for what must not reach a runtime: links, devices, programs, pickles, archives made to fill the disk.

A pickle is a program. One that holds weights only is marked for conversion, and the converter reads it without running
it; one that asks for more is refused by the names it asks for. Beside safetensors weights a pickle is not needed, and
in a Triton model directory the model itself may be a program: there a pickle is told of, and refused only when it asks
for what no model has a use for.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelium.api import Completeness, Finding, Severity, hookimpl
from modelium.api.units import human
from modelium.builtin import hf_folder, openvino, python_model
from modelium.builtin.files import UNFINISHED, Entry, head, walk
from modelium.builtin.pickles import Survey
from modelium.builtin.torch_file import ZIP_MAGIC, Kind, kind_of, open_zip, survey_file
from modelium.errors import ModelError

MAX_FINDINGS = 50
"""Of one drop: a person reads the first few."""

MAX_RATIO, BOMB_BYTES = 50, 1 << 30
"""An archive that would unpack to more than a GiB, and to fifty times its size, holds no model."""

PROGRAMS = ((b"\x7fELF", "a Linux program or library"), (b"MZ", "a Windows program or library"),
            (b"\xcf\xfa\xed\xfe", "a macOS program or library"), (b"\xca\xfe\xba\xbe", "a macOS or Java program"),
            (b"#!", "a script"))  # fmt: skip
"""First bytes of what an operating system runs. `MZ` alone is two letters: it counts with the suffixes below only."""
WINDOWS = (".exe", ".dll", ".sys", ".scr", ".com", ".cpl", ".msi")

PICKLES = (".pkl", ".pickle", ".joblib", ".bin", ".pt", ".pth", ".ckpt", ".p", ".dill")
"""Suffixes of files that are read as pickles of the oldest kind too, which have no magic number."""

FAMILIAR = frozenset({
    "torch", "numpy", "transformers", "accelerate", "tokenizers", "datasets", "peft", "trl", "deepspeed", "lightning",
    "pytorch_lightning", "lightning_fabric", "omegaconf", "sklearn", "scipy", "joblib", "xgboost", "lightgbm",
    "catboost", "pandas", "collections", "_codecs", "argparse", "datetime", "enum", "random", "typing",
})  # fmt: skip
"""First parts of the names that trainers and estimators ask for in pickles of their own, `training_args.bin` say."""
FAMILIAR_NAMES = frozenset({
    "builtins.set", "builtins.dict", "builtins.list", "builtins.slice", "builtins.bytearray", "builtins.complex",
    "builtins.frozenset", "builtins.range", "builtins.object", "__builtin__.set", "__builtin__.list",
    "__builtin__.object", "copyreg._reconstructor", "functools.partial", "pathlib.PosixPath", "types.SimpleNamespace",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Surroundings:
    triton: bool
    """The drop is a Triton model directory."""
    program: bool
    """The model may be a program: that of a Triton model directory, or a Python model."""
    weights: frozenset[str]
    """Files that a Hugging Face folder would be loaded from, by their path in the drop."""
    numbers: frozenset[str]
    """Weights of OpenVINO models, which are numbers and nothing else: by chance some of them look like pickles."""
    safe_weights: bool
    """There are safetensors weights, so that no pickle is needed."""
    folder: bool


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Not complete while a download tool still has a file under another name."""
    for entry in walk(path):
        if entry.base.lower().endswith(UNFINISHED):
            reason = f"{entry.name} is still being written, by its name"
            return Completeness(complete=False, reason=reason, have_bytes=entry.size)
    return None


@hookimpl
def modelium_scan(path: Path) -> Iterable[Finding]:
    """Everything that must not be loaded, and what a person should know."""
    found = list(_scan(path))
    if len(found) <= MAX_FINDINGS:
        return found
    worst_first = sorted(found, key=lambda f: list(Severity).index(f.severity))
    rest = f"and {len(found) - MAX_FINDINGS} more findings, none worse than these"
    return [*worst_first[:MAX_FINDINGS], Finding(severity=Severity.WARN, code="more", message=rest)]


def _scan(path: Path) -> Iterator[Finding]:
    entries = walk(path)
    for entry in entries:
        if entry.problem:
            yield _finding(Severity.REFUSE, entry.code, entry, f"{entry.name} {entry.problem}")
        elif entry.mode & (stat.S_ISUID | stat.S_ISGID):
            message = f"{entry.name} runs with its owner's rights (setuid): `chmod ug-s` it and drop it again"
            yield _finding(Severity.REFUSE, "setuid", entry, message)
    around = _look_around(path)
    for entry in entries:
        if not entry.problem and not entry.housekeeping:
            yield from _file(entry, around)


def _look_around(path: Path) -> _Surroundings:
    triton = path.is_dir() and (path / "config.pbtxt").is_file()
    weights: frozenset[str] = frozenset()
    safe = False
    try:
        folder = None if triton else hf_folder.find(path)
        if folder is not None:
            found = hf_folder.find_weights(folder)
            weights = frozenset(entry.name for entry in found.shards.values() if entry)
            safe = found.kind == "safetensors"
    except ModelError:  # the analyzer says what is wrong; until then every pickle counts as weights
        pass
    numbers = openvino.weights_in(walk(path)) - weights
    return _Surroundings(triton, triton or python_model.find(path) is not None, weights, numbers, safe, path.is_dir())


def _file(entry: Entry, around: _Surroundings) -> Iterator[Finding]:
    start = head(entry.path, 64)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        message = f"{entry.name} is a pointer of Git LFS, not the file itself: run `git lfs pull`, then drop it again"
        yield _finding(Severity.REFUSE, "lfs_pointer", entry, message)
        return
    program = next((what for magic, what in PROGRAMS if start.startswith(magic)), None)
    if program and start.startswith(b"MZ") and not entry.base.lower().endswith(WINDOWS):
        program = None
    if program or entry.base.endswith(".py"):
        if not (around.triton and (entry.base.endswith(".py") or ".so" in entry.base)):  # Triton's own scanner tells
            yield _program(entry, program or "Python code", around)
        return
    try:
        if start[:4] in ZIP_MAGIC:
            with open_zip(entry.path, entry.name) as archive:
                bomb = _bomb(archive, entry)
                objects = [] if bomb else _object_arrays(archive)
            if bomb:
                yield bomb
                return
            if objects:
                yield _objects(entry, f"its arrays {', '.join(objects[:4])} hold", around)
        elif start.startswith(b"\x93NUMPY") and b"O'" in head(entry.path, 256):
            yield _objects(entry, "it holds", around)
        if entry.name not in around.numbers or start[:4] in ZIP_MAGIC:
            yield from _pickle(entry, start, around)
    except ModelError as exc:
        severity = Severity.WARN if around.program else Severity.REFUSE
        yield _finding(severity, exc.code, entry, exc.message)


def _program(entry: Entry, what: str, around: _Surroundings) -> Finding:
    if around.program:
        message = (
            f"{entry.name} is {what}, which its runtime may run with its own rights: serve it only if you trust it"
        )
        return _finding(Severity.WARN, "python_code" if what == "Python code" else "program", entry, message)
    if what == "Python code" and around.folder:
        message = f"{entry.name} is Python code: Modelium never runs it, and the model must do without"
        return _finding(Severity.WARN, "python_code", entry, message)
    return _finding(Severity.REFUSE, "program", entry, f"{entry.name} is {what}: remove it and drop the model again")


def _bomb(archive: zipfile.ZipFile, entry: Entry) -> Finding | None:
    total = sum(info.file_size for info in archive.infolist())
    if total <= BOMB_BYTES or total <= MAX_RATIO * entry.size:
        return None
    message = f"{entry.name} has {human(entry.size)} and would unpack to {human(total)}, which no model does"
    return _finding(Severity.REFUSE, "zip_bomb", entry, message)


def _object_arrays(archive: zipfile.ZipFile) -> list[str]:
    """Arrays in an .npz that are pickles: numpy writes the element type `O` into their header."""
    found = []
    for info in archive.infolist():
        if info.filename.endswith(".npy"):
            with archive.open(info) as file:
                if b"O'" in file.read(256):
                    found.append(info.filename)
    return found


def _objects(entry: Entry, holds: str, around: _Surroundings) -> Finding:
    severity = Severity.WARN if around.program or around.safe_weights else Severity.REFUSE
    message = f"{entry.name}: {holds} Python objects, kept as a pickle, which is a program: save plain numbers"
    return _finding(severity, "pickle_code", entry, message)


# --------------------------------------------------------------------------- pickles


def _pickle(entry: Entry, start: bytes, around: _Surroundings) -> Iterator[Finding]:
    kind = kind_of(entry.path)
    suspect = entry.base.lower().endswith(PICKLES)
    if kind in (Kind.TORCHSCRIPT, Kind.EXPORTED) or (kind is Kind.OTHER and not suspect):
        return
    result = survey_file(entry.path, kind)
    if not _is_pickle(kind, result, start, suspect):
        return
    foreign = result.foreign
    needed = entry.name in around.weights if around.weights else not around.safe_weights
    if (bad := [name for name in foreign if _strange(name)]) or (foreign and needed and not around.program):
        names = ", ".join((bad or foreign)[:6]) + (", ..." if len(bad or foreign) > 6 else "")
        message = f"{entry.name} is a pickle that asks for {names}, and would run it when loaded; {_advice(foreign)}"
        yield _finding(Severity.REFUSE, "pickle_code", entry, message)
    elif around.program or not needed:
        asks = f", which asks for {', '.join(foreign[:4])}" if foreign else ""
        message = f"{entry.name} is a pickle{asks}; it is not needed, and Modelium never loads it"
        if around.program:
            message = f"{entry.name} is a pickle{asks}; if this model loads it, that runs whatever it names"
        yield _finding(Severity.WARN, "pickle_unused", entry, message)
    elif result.problem:
        message = f"{entry.name} is a pickle that can't be read to its end: {result.problem}; save the weights again"
        yield _finding(Severity.REFUSE, "pickle_damaged", entry, message)
    else:
        message = (
            f"{entry.name} is a pickle that holds tensors only: beside a Hugging Face config.json it can be converted "
            "to safetensors; alone it has no model that goes with it"
        )
        yield _finding(Severity.CONVERT, "pickle", entry, message)


def _is_pickle(kind: Kind, result: Survey, start: bytes, suspect: bool) -> bool:
    """Whether what was read as a pickle is one: any bytes can be tried, few get far."""
    if kind in (Kind.CHECKPOINT, Kind.LEGACY):
        return True
    if kind is Kind.ZIP:
        return result.opcodes > 0
    if result.names or (suspect and kind is Kind.PICKLE):
        return True
    return not result.problem and (kind is Kind.PICKLE or result.opcodes > 1 or start.endswith(b"."))


def _strange(name: str) -> bool:
    """Whether no trainer or estimator asks for it: then it was made to harm, and is refused where nobody loads it."""
    return name.partition(".")[0] not in FAMILIAR and name not in FAMILIAR_NAMES


def _advice(foreign: list[str]) -> str:
    roots = {name.partition(".")[0] for name in foreign}
    if roots & {"sklearn", "joblib", "xgboost", "lightgbm", "catboost"}:
        return "export the estimator to ONNX (skl2onnx, onnxmltools) and drop that"
    if "torch" in roots or "transformers" in roots:
        return "save the model's state_dict() as safetensors, or export it to ONNX, and drop that"
    return "save the weights as safetensors, or the model as ONNX, and drop that"


def _finding(severity: Severity, code: str, entry: Entry, message: str) -> Finding:
    return Finding(severity=severity, code=code, path=entry.name, message=message)
