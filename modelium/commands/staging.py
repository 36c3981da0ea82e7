"""Brings a model's files into the incoming folder, where they appear at once and whole.

They are put under a hidden name on the same file system and then renamed. What can share its blocks with the original
is not copied; an inode is never shared, since who writes to the original would change the model with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelium.commands.base import Failed

FICLONE = 0x40049409
"""`_IOW(0x94, 9, int)` of linux/fs.h: share the blocks of another file, where the file system can."""

CHUNK_BYTES = 8 * 2**20

Copied = Callable[[int, int], None]
"""Told bytes done and bytes in all; may raise to stop."""

NOT_SHARED = frozenset({
    errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS,
})  # fmt: skip
"""What the kernel says where two files can't share blocks."""


@dataclass(frozen=True, slots=True)
class File:
    source: Path
    """With links followed."""
    place: str
    """Below the drop; empty when the drop is this file."""
    size: int


class Staged:
    """Files under a hidden name in the incoming folder, until `appear` or `discard`."""

    def __init__(self, incoming: Path, entry: str):
        self._hidden = incoming / f".adding-{secrets.token_hex(6)}"
        self._final = incoming / entry

    def fill(self, source: Path, copied: Copied) -> None:
        """Clone or copy everything; links in `source` are followed. Raises `Failed` and leaves nothing."""
        folders, files = walk(source)
        total = sum(file.size for file in files)
        done = 0
        try:
            for place in folders:
                (self._hidden / place).mkdir()
            for file in files:
                target = self._hidden / file.place

                def progress(count: int, before: int = done) -> None:
                    copied(before + count, total)

                share_or_copy(file.source, target, progress)
                done += file.size
                copied(done, total)
        except BaseException as exc:
            self.discard()
            if isinstance(exc, OSError):
                raise Failed(_explained(exc, total)) from exc
            raise

    def appear(self) -> None:
        """Rename into place; refuses to replace anything."""
        if os.path.lexists(self._final):
            self.discard()
            raise Failed(f"{self._final} is there already: wait until it is taken in, or choose another --name")
        self._hidden.rename(self._final)

    def discard(self) -> None:
        if self._hidden.is_dir():
            shutil.rmtree(self._hidden, ignore_errors=True)
        else:
            self._hidden.unlink(missing_ok=True)


def move(source: Path, incoming: Path, entry: str) -> bool:
    """Rename the user's file or folder into place; False where it lies on another file system."""
    final = incoming / entry
    if os.path.lexists(final):
        raise Failed(f"{final} is there already: wait until it is taken in, or choose another --name")
    try:
        source.rename(final)
    except OSError as exc:
        if exc.errno == errno.EXDEV:
            return False
        raise Failed(f"{source} can't be moved to {final}: {exc.strerror}") from exc
    return True


def walk(source: Path) -> tuple[list[str], list[File]]:
    """All folders of a drop, outer ones first, and all its files, with links followed.

    Raises `Failed` for what is neither, for links that lead nowhere, and for folders within themselves.
    """
    if not source.is_dir():
        return [], [_file(source, "")]
    folders: list[str] = []
    files: list[File] = []
    pending = [(source, "", frozenset[tuple[int, int]]())]
    while pending:
        folder, place, above = pending.pop()
        found = folder.stat()
        if (found.st_dev, found.st_ino) in above:
            raise Failed(f"{folder} leads back to a folder that it lies in: remove that link")
        inside = above | {(found.st_dev, found.st_ino)}
        folders.append(place)
        for entry in sorted(folder.iterdir()):
            below = f"{place}/{entry.name}" if place else entry.name
            if entry.is_dir():
                pending.append((entry, below, inside))
            else:
                files.append(_file(entry, below))
    return folders, files


def _file(path: Path, place: str) -> File:
    try:
        source = path.resolve(strict=True)
        found = source.stat()
    except (OSError, RuntimeError) as exc:
        raise Failed(f"{path} can't be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if not stat.S_ISREG(found.st_mode):
        raise Failed(f"{path} is neither a file nor a folder: a model is made of these")
    return File(source, place, found.st_size)


def share_or_copy(source: Path, target: Path, progress: Callable[[int], None]) -> None:
    """Make `target`, by sharing blocks, else by copying with `progress` in bytes."""
    try:
        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            return
    except OSError as exc:
        if exc.errno not in NOT_SHARED:
            raise
    target.unlink(missing_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        while chunk := old.read(CHUNK_BYTES):
            new.write(chunk)
            progress(new.tell())


def _explained(exc: OSError, total: int) -> str:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the incoming folder is full: the model has {total} bytes; make room and try again"
    return f"{exc.filename or 'the incoming folder'}: {exc.strerror}"
