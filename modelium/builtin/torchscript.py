"""TorchScript archives, read by their list of entries and the text of their program, never loaded.

`torch.jit.load` reads the archive's pickles with a C++ reader that knows no Python names, so that a pickle in it can't
call Python. The program in it is another matter: PyTorch advises to treat it as code from the same source
(https://github.com/pytorch/pytorch/blob/main/SECURITY.md), and two of its operators write and read any file. A program
that uses these is refused; every other is served with a warning.

`facts` holds `module` (the class of the model), `inputs` (a list of `{"name", "type", "optional"}` of `forward`, in
order, without self), `returns` (the type that `forward` returns), and `files` (how many entries the archive has).
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modelium.api import Analysis, Completeness, Finding, Severity, hookimpl
from modelium.api.units import human
from modelium.builtin.files import Entry, Truncated, files, head
from modelium.builtin.pickles import Survey
from modelium.builtin.torch_file import ZIP_MAGIC, Kind, kind_of, open_zip, survey_archive, zip_entry
from modelium.errors import ModelError

SUFFIXES = (".pt", ".pth", ".ts", ".jit", ".torchscript", ".ptl", ".zip", ".bin")
ALONE = 0.9
IN_FOLDER = 0.85
IN_VERSION_FOLDER = 0.5
"""`1/model.pt` is Triton's layout: whoever knows Triton knows better."""

MAX_CODE_BYTES = 32 << 20

FILE_OPERATORS = re.compile(r"\.\s*(save|from_file)\s*\(|\b(getattr)\s*\(")
"""Calls of the operators of TorchScript that name a file (aten::save, aten::from_file) under whatever name they go, and
`getattr`, which could spell them."""
ODD_ATTRIBUTE = re.compile(r'\bgetattr\(\s*[\w.]+\s*,\s*"(?!save"|from_file")[^"\\]*"\s*\)')
"""How PyTorch writes a part whose name is no identifier (`getattr(self, "0")` in a Sequential): no such call."""

NAMES = ("torch.", "__torch__.", "collections.")
"""How the names in the pickles of every TorchScript archive begin."""


def _find(drop: Path) -> Entry | None:
    """The one TorchScript file of a drop. Raises `Truncated` when the file that may be it is cut short."""
    found = [e for e in files(drop) if e.base.lower().endswith(SUFFIXES)]
    if drop.is_dir() and ({"config.json", "config.pbtxt"} & {e.name for e in files(drop)}):
        return None
    scripts = [e for e in found if head(e.path, 4) in ZIP_MAGIC and kind_of(e.path) is Kind.TORCHSCRIPT]
    if len(scripts) > 1:
        if all(e.parent.isdecimal() for e in scripts):
            return None
        names = ", ".join(e.name for e in scripts[:4])
        raise ModelError(f"{drop.name} holds {len(scripts)} TorchScript models ({names}): drop each on its own")
    return scripts[0] if scripts else None


def _without_odd_attributes(text: str) -> str:
    """The program's text with such parts, and parts of parts, under a plain name."""
    while (shorter := ODD_ATTRIBUTE.sub("part", text)) != text:
        text = shorter
    return text


@hookimpl
def modelium_completeness(path: Path) -> Completeness | None:
    """Complete when the archive has its list of entries, which comes last, and the entries lie within the file."""
    if path.is_dir():
        return None  # other files of a folder say nothing of when it is whole
    try:
        entry = _find(path)
    except Truncated as exc:
        return Completeness(complete=False, reason=exc.message, have_bytes=exc.have_bytes)
    if entry is None:
        return None
    return Completeness(complete=True, have_bytes=entry.size, want_bytes=entry.size)


@hookimpl
def modelium_scan(path: Path) -> Iterable[Finding]:
    """Say that TorchScript is a program, and refuse one that reaches for files."""
    return list(_scan(path))


def _scan(path: Path) -> Iterator[Finding]:
    for entry in files(path):
        if not entry.base.lower().endswith(SUFFIXES) or head(entry.path, 4) not in ZIP_MAGIC:
            continue
        if kind_of(entry.path) is not Kind.TORCHSCRIPT:
            continue
        with open_zip(entry.path, entry.name) as archive:
            texts = [_without_odd_attributes(text) for text in _code(archive, entry.name).values()]
            used = sorted({m.group(1) or m.group(2) for text in texts for m in FILE_OPERATORS.finditer(text)})
            asked = Survey()
            survey_archive(archive, asked)
            foreign = sorted(name for name in asked.names if not name.startswith(NAMES))
        if foreign:
            yield Finding(
                severity=Severity.REFUSE,
                code="pickle_code",
                path=entry.name,
                message=f"{entry.name} looks like TorchScript, and holds a pickle that asks for "
                f"{', '.join(foreign[:4])}: no model needs that, and it was most likely made to harm",
            )
        elif used:
            yield Finding(
                severity=Severity.REFUSE,
                code="torchscript_files",
                path=entry.name,
                message=f"{entry.name} is a TorchScript program that reads or writes files of its own choice (it calls "
                f"{', '.join(used)}): export the model without that, or to ONNX",
            )
        else:
            yield Finding(
                severity=Severity.WARN,
                code="torchscript",
                path=entry.name,
                message=f"{entry.name} is a TorchScript program, which PyTorch runs with the runtime's rights: serve "
                "it only if you trust where it comes from; ONNX and safetensors carry no program",
            )


def _code(archive: zipfile.ZipFile, name: str) -> dict[str, str]:
    """The text of the program, by entry. Raises `ModelError` beyond `MAX_CODE_BYTES`."""
    texts: dict[str, str] = {}
    left = MAX_CODE_BYTES
    for info in archive.infolist():
        if "/code/" not in f"/{info.filename}" or not info.filename.endswith(".py"):
            continue
        data = zip_entry(archive, info.filename, left)
        left -= len(data)
        texts[info.filename] = data.decode("utf-8", "replace")
    if not texts:
        raise ModelError(f"{name} is a TorchScript archive without a program: it is damaged")
    return texts


@hookimpl
def modelium_analyze(path: Path) -> Analysis | None:
    """Size of the weights and the signature of `forward`."""
    entry = _find(path)
    if entry is None:
        return None
    with open_zip(entry.path, entry.name) as archive:
        infos = archive.infolist()
        _check_places(infos, entry)
        root = next(i.filename for i in infos if i.filename.endswith("constants.pkl")).removesuffix("constants.pkl")
        held = (f"{root}data/", f"{root}constants/", f"{root}tensors/")
        weights = sum(i.file_size for i in infos if i.filename.startswith(held))
        module = _module(archive, root)
        facts = _signature(_code(archive, entry.name), root, module)
    confidence = IN_VERSION_FOLDER if entry.parent.isdecimal() else IN_FOLDER if path.is_dir() else ALONE
    return Analysis(
        analyzer="torchscript",
        format="torchscript",
        summary=f"TorchScript, {module.rpartition('.')[2] or 'a module'}, {human(weights)} of weights",
        confidence=confidence,
        architecture=module.rpartition(".")[2] or None,
        entry=entry.name if path.is_dir() else "",
        weights_bytes=weights,
        facts={"module": module, "files": len(infos), **facts},
    )


def _check_places(infos: Iterable[zipfile.ZipInfo], entry: Entry) -> None:
    for info in infos:
        if info.header_offset + info.compress_size > entry.size:
            raise ModelError(f"{entry.name} is damaged: {info.filename:.80} would lie beyond its end")


def _module(archive: zipfile.ZipFile, root: str) -> str:
    """The qualified name of the model's class: the first name in data.pkl, which is the object's own."""
    try:
        data = zip_entry(archive, f"{root}data.pkl")
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".", 1)[:200]
    except (KeyError, ValueError):  # no such entry; bytes that are no pickle
        pass
    raise ModelError("the TorchScript archive's data.pkl names no module: it is damaged")


def _signature(code: dict[str, str], root: str, module: str) -> dict[str, Any]:
    """`forward` as the program declares it; empty where it can't be told."""
    place, _, name = module.rpartition(".")
    text = code.get(f"{root}code/{place.replace('.', '/')}.py", "")
    start = re.search(rf"^class {re.escape(name)}\(Module\):$", text, re.MULTILINE)
    body = text[start.end() :] if start else ""
    body = re.split(r"^class ", body, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(r"^  def forward\((.*?)\) -> (.*?):\n", body, re.MULTILINE | re.DOTALL)
    if not found:
        return {}
    inputs = []
    for argument in _split(found.group(1))[1:]:
        word, _, kind = argument.partition(":")
        kind, _, default = kind.partition("=")
        optional = bool(default.strip()) or kind.strip().startswith("Optional[")
        inputs.append({"name": word.strip(), "type": " ".join(kind.split()), "optional": optional})
    return {"inputs": inputs, "returns": " ".join(found.group(2).split())}


def _split(arguments: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(arguments):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(arguments[start:place])
            start = place + 1
    parts.append(arguments[start:])
    return [part for part in parts if part.strip()]
