"""A drop's files, listed once for all looks at it: bounded, and without following a link out of the drop."""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelium.errors import ModelError

MAX_FILES = 20_000
"""More than any model that is published; a folder beyond it is something else, and would slow down every look."""
MAX_DEPTH = 32
MAX_JSON_BYTES = 64 << 20
"""A safetensors index of a hundred thousand tensors has about 10 MB."""

HOUSEKEEPING = frozenset({".git", ".cache", ".svn", "__MACOSX", "__pycache__", ".ipynb_checkpoints"})
"""Folders that tools leave behind and no runtime reads."""

UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".filepart", ".aria2", ".opdownload")
"""What browsers and download tools call a file that they are still writing."""


class Truncated(ModelError):
    """A file that ends before its own format says; more bytes may still be on their way."""

    code = "truncated"

    def __init__(self, message: str, have_bytes: int, want_bytes: int | None = None):
        super().__init__(message, have_bytes=have_bytes, want_bytes=want_bytes)
        self.have_bytes = have_bytes
        self.want_bytes = want_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a drop that is not a folder."""

    name: str
    """Relative to the drop with `/` between its parts; the drop's own name when the drop is a file."""
    path: Path
    size: int
    mode: int
    """Of the file itself, or of what a link inside the drop leads to."""
    problem: str = ""
    """Why it can't be read as an ordinary file; empty when it can."""
    code: str = ""

    @property
    def parent(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def housekeeping(self) -> bool:
        return not HOUSEKEEPING.isdisjoint(self.name.split("/")[:-1])


_listed: dict[Path, tuple[Entry, ...]] | None = None
"""What was listed within `listed_once`."""


@contextmanager
def listed_once() -> Iterator[None]:
    """Within it each drop is listed once: all looks at it see the same files. For one thread."""
    global _listed  # noqa: PLW0603
    _listed = {}
    try:
        yield
    finally:
        _listed = None


def walk(drop: Path) -> tuple[Entry, ...]:
    """Everything in the drop, sorted by name; `drop` may be a file.

    Raises `ModelError` when there are too many files or too deep folders, or when it can't be read.
    """
    if _listed is None:
        return _walk(drop)
    if drop not in _listed:
        _listed[drop] = _walk(drop)
    return _listed[drop]


def _walk(drop: Path) -> tuple[Entry, ...]:
    try:
        top = os.lstat(drop)
        if not stat.S_ISDIR(top.st_mode):
            return (_entry(drop.name, drop, top, drop),)
        found = list(_below(drop, "", 0, drop, itertools.count()))
    except OSError as exc:
        raise ModelError(f"{drop.name} can't be read: {exc.strerror}: {exc.filename}", code="unreadable") from exc
    return tuple(sorted(found, key=lambda e: e.name))


def files(drop: Path) -> list[Entry]:
    """The ordinary files of a drop, without what tools leave behind."""
    return [e for e in walk(drop) if not e.problem and not e.housekeeping]


def read_json(path: Path, name: str | None = None) -> Any:
    """A JSON file of bounded size. Raises `Truncated` when it stops in the middle, `ModelError` when it is no JSON."""
    name = name or path.name
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{name} has {size} bytes, and {MAX_JSON_BYTES} is more than such a file ever needs")
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(text)
    except json.JSONDecodeError as exc:
        # A literal cut short (`tru`) is reported where it starts, an open string where it was opened.
        if exc.msg.startswith("Unterminated string") or exc.pos >= len(exc.doc.rstrip()) - len("false"):
            raise Truncated(f"{name} stops in the middle of its JSON", size) from exc
        raise ModelError(f"{name} is not JSON: {exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{name} is not JSON: {type(exc).__name__}: {exc}") from exc
    except OSError as exc:
        raise ModelError(f"{name} can't be read: {exc.strerror}", code="unreadable") from exc


def read_object(path: Path, name: str | None = None) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object."""
    value = read_json(path, name)
    if not isinstance(value, dict):
        raise ModelError(f"{name or path.name} should hold a JSON object, and holds a {type(value).__name__}")
    return value


def head(path: Path, count: int = 16) -> bytes:
    """The first bytes of a file; empty when it can't be read any more."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def _below(folder: Path, prefix: str, depth: int, drop: Path, seen: Iterator[int]) -> Iterator[Entry]:
    if depth > MAX_DEPTH:
        raise ModelError(f"{drop.name} has folders more than {MAX_DEPTH} deep, which no model has", code="too_deep")
    try:
        listing = os.scandir(folder)
    except FileNotFoundError:  # it went away between the listing and the look
        if depth == 0:
            raise
        return
    with listing:
        for item in listing:
            if next(seen) >= MAX_FILES:
                raise ModelError(
                    f"{drop.name} holds more than {MAX_FILES} files and folders, which no model does: "
                    "drop the model's own folder alone",
                    code="too_many_files",
                )
            name = prefix + item.name
            path = Path(item.path)
            try:
                if item.is_dir(follow_symlinks=False):
                    yield from _below(path, name + "/", depth + 1, drop, seen)
                else:
                    yield _entry(name, path, item.stat(follow_symlinks=False), drop)
            except FileNotFoundError:
                continue


def _entry(name: str, path: Path, found: os.stat_result, drop: Path) -> Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        return Entry(shown, path, 0, found.st_mode, "has a name that is not UTF-8: rename it", "bad_file_name")
    if stat.S_ISREG(found.st_mode):
        return Entry(name, path, found.st_size, found.st_mode)
    if not stat.S_ISLNK(found.st_mode):
        what = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(found.st_mode), "a device")
        problem = f"is {what}, which has no place in a model: remove it"
        return Entry(name, path, 0, found.st_mode, problem, "special_file")
    return _link(name, path, found, drop)


def _link(name: str, path: Path, found: os.stat_result, drop: Path) -> Entry:
    target = os.readlink(path)

    def bad(problem: str) -> Entry:
        return Entry(name, path, 0, found.st_mode, problem, "symlink")

    if path == drop:
        return bad(f"is a link to {target}: drop the model itself, or a copy made with `cp -rL`")
    if os.path.isabs(target):
        return bad(f"is a link to {target}, which would not follow the model to its place: copy it with `cp -rL`")
    real = os.path.realpath(path)
    root = os.path.realpath(drop)
    if os.path.commonpath([real, root]) != root:
        cache = "; this is a snapshot from Hugging Face's cache" if "blobs/" in target else ""
        return bad(f"is a link that leads out of the drop, to {target}{cache}: drop a copy made with `cp -rL`")
    try:
        led = os.stat(real)
    except OSError:
        return bad(f"is a link to {target}, which isn't there: copy the model again with `cp -rL`")
    if not stat.S_ISREG(led.st_mode):
        return bad(f"is a link to {target}, which is not a file: drop a copy made with `cp -rL`")
    return Entry(name, path, led.st_size, led.st_mode)
