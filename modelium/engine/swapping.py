"""A model's folder in another form: built beside it, mostly of links, and exchanged for it in one step.

Files are linked before the folders are exchanged, and never moved: at any moment each of them is in its old place or
its new one, and what a crash leaves beside the repository holds nothing of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelium.api.optimizing import Optimized
from modelium.api.types import Manifest, OptimizationRecord
from modelium.engine.files import explained
from modelium.engine.repository import MANIFEST, Changed, Repository, inside, revision_of
from modelium.errors import ConfigError

UNCONVERTED = "unconverted"
"""The folder inside a model's that holds all of it as it was, its manifest included. Triton takes only numbers for
versions."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""fcntl.h and linux/fs.h: renameat2(2)."""
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


@dataclass(frozen=True, slots=True)
class Form:
    """A folder that is ready to take a model's place."""

    target: Path
    staging: Path
    former: str
    """The revision of what it is to replace."""

    def exchange(self) -> None:
        """Take its place: one system call. The former folder lies in `staging` then."""
        exchange(self.staging / "model", self.target)

    def tidy(self, repository: Repository, exchanged: bool) -> None:
        """Remove what has not, or not any more, the model's place: all of it is there, or was made, elsewhere too. What
        somebody changed in the last moment goes to the trash."""
        rest = self.staging / "model"
        if exchanged and revision_of(rest) != self.former:
            os.rename(rest, rest.with_name(self.target.name))
            repository.set_aside(rest.with_name(self.target.name))
        shutil.rmtree(self.staging, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders of one file system. Raises `OSError`."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "this system's C library has no renameat2")
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def problem(repository: Repository) -> str | None:
    """Why no folder of this repository can be exchanged for another; None where it can."""
    try:
        staging = repository.beside("probe")
        try:
            one, other = staging / "one", staging / "other"
            one.mkdir()
            other.mkdir()
            exchange(one, other)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, ConfigError) as exc:
        return f"the file system of {repository.path} can't exchange two folders in one step ({exc})"
    return None


def converted(manifest: Manifest, form: Optimized, record: OptimizationRecord) -> Manifest:
    """The manifest of a model in its faster form, by the one that it has."""
    old = manifest.plan
    note = f", which answers like it ({form.note})" if form.note else ""
    plan = old.model_copy(
        update={
            "serving": form.serving,
            "settings": dict(form.settings),
            "memory_bytes": form.memory_bytes,
            "load_s": form.load_s,
            "reason": f"{record.optimizer} made {record.what} of it{note}; before that: {old.reason}",
            "alternatives": (
                f"{old.runtime}/{old.serving} on {old.device_kind}: as it was dropped, kept in {record.unconverted}/",
                *old.alternatives,
            ),
        }
    )
    return manifest.model_copy(update={"plan": plan, "optimization": record})


def optimized(repository: Repository, former: str, manifest: Manifest, form: Optimized, made: Path) -> Form:
    """The model in its faster form, with all that it holds now, of the revision `former`, under `UNCONVERTED`.

    `manifest` is the new one. Raises `Changed` when it is of another revision by now, `ModelError` for paths that lead
    out of the folder, `ConfigError` where the disk is full or read-only.
    """
    target = repository.path / manifest.name
    with _staged(repository, manifest.name, former) as staging:
        model = staging / "model"
        link(target, model / UNCONVERTED)
        for place, source in form.kept.items():
            link(inside(target, source), inside(model, place))
        for place, source in form.made.items():
            link(inside(made, source), inside(model, place))
        for place, text in form.texts.items():
            path = inside(model, place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        written = manifest.model_copy(update={"revision": revision_of(model)})
        (model / MANIFEST).write_text(written.model_dump_json(indent=1), encoding="utf-8")
    return Form(target, staging, former)


def unconverted(repository: Repository, former: str, name: str) -> Form:
    """The model as it was before. Raises `Changed` and `ConfigError` as above."""
    target = repository.path / name
    with _staged(repository, name, former) as staging:
        link(target / UNCONVERTED, staging / "model")
    return Form(target, staging, former)


@contextmanager
def _staged(repository: Repository, name: str, former: str) -> Iterator[Path]:
    try:
        if revision_of(repository.path / name) != former:
            raise Changed(f"{name} has changed meanwhile")
        staging = repository.beside(name)
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as exc:
        raise explained(exc, f"{name} could not be written in another form") from exc


def link(source: Path, place: Path) -> None:
    """Give a file, or all files of a folder, a second place; where that can't be, copy. Links are followed."""
    if source.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(source):
            link(Path(entry.path), place / entry.name)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), place)
    except OSError as exc:
        if exc.errno not in _NO_LINK:
            raise
        shutil.copy2(source, place)
