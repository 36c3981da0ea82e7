"""Finds the GGUF model in a drop: a file, or a folder with one model, its parts, and its projector for images.

llama.cpp finds the other parts of a split model by name, so their names are kept: `NAME-00001-of-00003.gguf`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelium.errors import ModelError
from modelium_plugin_llamacpp.gguf import MAGIC, Header, Truncated, read_header

SUFFIX = ".gguf"
MAX_ENTRIES = 20_000
"""Of a folder with all below it; more is no model."""
MAX_DEPTH = 8

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a model."""

    name: str
    """Relative to the drop, with `/` between its parts; the drop's own name when the drop is the file."""
    path: Path
    header: Header


@dataclass(frozen=True, slots=True)
class Drop:
    parts: Sequence[Part]
    """The model's files, the one to be loaded first."""
    projector: Part | None
    """What turns images or sounds into the model's tokens (llama.cpp's mmproj)."""
    alone: bool
    """The drop is the file."""

    @property
    def main(self) -> Part:
        return self.parts[0]

    @property
    def files(self) -> Sequence[Part]:
        return (*self.parts, self.projector) if self.projector else self.parts


def find(path: Path) -> Drop | None:
    """The model at `path`; None when it is none of ours.

    Raises `Truncated` when parts or bytes of it are missing that may still come, `ModelError` when it can't be used.
    """
    try:
        if not path.is_dir():
            return _file(path)
        names = _listed(path)
    except OSError as exc:
        raise ModelError(f"{path.name} can't be read: {exc.strerror}", code="unreadable") from exc
    found = {name: place for name, place in names.items() if name.lower().endswith(SUFFIX)}
    return _folder(path, found) if found and "config.pbtxt" not in names else None


def _file(path: Path) -> Drop | None:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return None
    if not path.name.lower().endswith(SUFFIX):
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                return None
    part = Part(path.name, path, read_header(path))
    kind = _kind(part.header)
    if kind:
        raise ModelError(f"{path.name} is {kind}: drop it in one folder with the model that it belongs to")
    if (count := part.header.integer("split.count") or 1) > 1:
        raise ModelError(
            f"{path.name} is one of {count} parts of a model: put all of them into a folder, and drop that"
        )
    return Drop([part], None, alone=True)


def _folder(drop: Path, found: Mapping[str, Path]) -> Drop:
    several = {name: Part(name, place, read_header(place, name)) for name, place in found.items()}
    projectors = [part for part in several.values() if _kind(part.header) == PROJECTOR]
    other = [part for part in several.values() if _kind(part.header) not in ("", PROJECTOR)]
    models = {part.name: part for part in several.values() if not _kind(part.header)}
    if other:
        raise ModelError(f"{other[0].name} is {_kind(other[0].header)}, which is not served: take it out of the folder")
    if not models:
        raise Truncated(f"{drop.name} holds {projectors[0].name} alone: the model itself is not there yet", 0)
    groups = _groups(models)
    if len(groups) > 1:
        names = ", ".join(sorted(groups)[:4])
        raise ModelError(
            f"{drop.name} holds {len(groups)} GGUF models ({names}): drop the file of the one that is to be served, or "
            "each in a folder of its own"
        )
    if len(projectors) > 1:
        raise ModelError(
            f"{drop.name} holds {len(projectors)} projectors ({', '.join(p.name for p in projectors[:4])}): keep one"
        )
    (parts,) = groups.values()
    return Drop(_in_order(parts), projectors[0] if projectors else None, alone=False)


PROJECTOR = "a projector of images or sounds (mmproj)"


def _kind(header: Header) -> str:
    """What a file is that is no model; empty when it is one (gguf-py's GGUFType)."""
    kind, architecture = header.text("general.type"), header.text("general.architecture")
    if kind == "mmproj" or architecture in ("clip", "mmproj"):
        return PROJECTOR
    return {"adapter": "an adapter (LoRA)", "imatrix": "an importance matrix"}.get(kind, "")


def _groups(models: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Parts by the model that they are of; how many belong together is in their names, as llama.cpp looks for them."""
    groups: dict[str, list[Part]] = {}
    for name, part in models.items():
        match = _PART.fullmatch(name)
        key = f"{match['stem']} in {int(match['count'])} parts" if match and int(match["count"]) > 1 else name
        groups.setdefault(key, []).append(part)
    return groups


def _in_order(parts: Sequence[Part]) -> list[Part]:
    first = parts[0]
    match = _PART.fullmatch(first.name)
    count = int(match["count"]) if match else 1
    said = first.header.integer("split.count") or 1
    if said != count:
        raise ModelError(
            f"{first.name} is one of {said} parts by its header: its name must end in -00001-of-{said:05}.gguf, and "
            "the others' alike, since llama.cpp finds them by name"
        )
    by_number = {int(m["number"]): part for part in parts if (m := _PART.fullmatch(part.name))} or {1: first}
    missing = [number for number in range(1, count + 1) if number not in by_number]
    if missing:
        raise Truncated(
            f"part {missing[0]} of {count} is not there yet",
            sum(part.header.size for part in parts),
        )
    return [by_number[number] for number in range(1, count + 1)]


def _listed(folder: Path) -> dict[str, Path]:
    """The ordinary files of a folder and of those in it, links to files among them, sorted by name."""
    names: dict[str, Path] = {}
    waiting = [(folder, "", 0)]
    seen = 0
    while waiting:
        at, prefix, depth = waiting.pop()
        with os.scandir(at) as listing:
            for entry in listing:
                seen += 1
                if seen > MAX_ENTRIES:
                    raise ModelError(f"{folder.name} holds more than {MAX_ENTRIES} files: drop the model's alone")
                if entry.is_dir(follow_symlinks=False):
                    if depth < MAX_DEPTH and not entry.name.startswith("."):
                        waiting.append((Path(entry.path), f"{prefix}{entry.name}/", depth + 1))
                elif entry.is_file():
                    names[prefix + entry.name] = Path(entry.path)
    return dict(sorted(names.items()))
