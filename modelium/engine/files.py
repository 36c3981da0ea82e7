"""Files of people's: looked at without following links, moved without loss."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from modelium.errors import ConfigError, ModelError

MAX_FILES = 100_000
"""Of one drop."""

Moved = Callable[[int, int], None]
"""Told bytes done and bytes in all while files are copied; from another thread."""


def look_of(drop: Path) -> tuple[str, float]:
    """A hash over a drop's names, sizes and times, and when anything in it last changed; no link is followed.

    The drop's own name and, of a folder, its own times don't count: a rename changes nothing in it. Raises
    `FileNotFoundError` when it is gone, `ModelError` when it can't be read or has too many files.
    """
    try:
        top = os.lstat(drop)
        if not stat.S_ISDIR(top.st_mode):
            return hash_of([("", top.st_size, top.st_mtime_ns)]), top.st_ctime
        rows: list[tuple[str, int, int]] = []
        newest = 0.0
        todo = [(str(drop), "")]
        while todo:
            folder, prefix = todo.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    newest = max(newest, found.st_ctime)
                    rows.append((prefix + entry.name, found.st_size, found.st_mtime_ns))
                    if stat.S_ISDIR(found.st_mode):
                        rows[-1] = (prefix + entry.name + "/", 0, 0)
                        todo.append((entry.path, f"{prefix}{entry.name}/"))
                    if len(rows) > MAX_FILES:
                        raise ModelError(f"{drop.name} holds more than {MAX_FILES} files, which no model does")
        return hash_of(rows), newest
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ModelError(f"{drop.name} can't be read: {exc.strerror}: {exc.filename}", code="unreadable") from exc


def hash_of(rows: list[tuple[str, int, int]]) -> str:
    return sha256(repr(sorted(rows)).encode()).hexdigest()[:16]


def move(source: Path, target: Path, moved: Moved | None = None) -> None:
    """Rename, or copy to another file system and then remove the source."""
    try:
        os.rename(source, target)
        return
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
    total = size_of(source)
    done = 0

    def copy(src: str, dst: str) -> str:
        nonlocal done
        shutil.copy2(src, dst, follow_symlinks=False)
        done += os.lstat(dst).st_size
        if moved is not None:
            moved(done, total)
        return dst

    partial = target.with_name(f".{target.name}.partial")
    try:
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, partial, symlinks=True, copy_function=copy)
        else:
            copy(str(source), str(partial))
        os.rename(partial, target)
    except BaseException:
        _delete(partial)
        raise
    _delete(source)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def shown(name: str) -> str:
    """A file's name as text that can be stored and sent, also where it is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def move_aside(path: Path, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = free_name(folder, shown(path.name))
        move(path, place)
    except OSError:
        return path
    return place


def free_name(folder: Path, name: str) -> Path:
    place, number = folder / name, 1
    while os.path.lexists(place):
        number += 1
        place = folder / f"{name}.{number}"
    return place


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size
    return sum(os.lstat(os.path.join(root, f)).st_size for root, _, files in os.walk(path) for f in files)


def check_space(drop: Path, folder: Path) -> None:
    """A copy that can't end is not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.lstat(drop).st_dev == os.stat(folder).st_dev:
        return
    need, free = size_of(drop), shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(f"{drop.name} needs {need} bytes on the disk of {folder}, which has {free} free: make room")


def explained(exc: OSError, what: str) -> ConfigError:
    advice = {
        errno.ENOSPC: "the disk is full: make room and drop it again",
        errno.EDQUOT: "the quota is used up: make room and drop it again",
        errno.EACCES: "permission denied: let the user that runs Modelium write there",
        errno.EPERM: "permission denied: let the user that runs Modelium write there",
        errno.EROFS: "the file system is read-only",
    }.get(exc.errno or 0, exc.strerror or str(exc))
    return ConfigError(f"{what}: {advice} ({exc.filename or ''})")
