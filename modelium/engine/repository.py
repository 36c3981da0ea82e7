"""The repository on disk: what lies there, and how a model gets into it in one step and out of it without loss."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from modelium.api.types import Layout, Manifest
from modelium.engine.store import replace_file
from modelium.errors import ConfigError, ModelConflict, ModelError

MANIFEST = "modelium.json"
_IGNORED = frozenset({MANIFEST, "__pycache__"})

Moved = Callable[[int, int], None]
"""Told bytes done and bytes in all while files are copied; from another thread."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder in the repository."""

    name: str
    path: Path
    revision: str
    manifest: Manifest | None
    """Modelium's own, or the one kept for somebody else's folder while it was last seen unchanged."""
    managed: bool
    """Modelium made this folder."""


def revision_of(path: Path) -> str:
    """A hash over the names, sizes and modification times of all files: changes when any of them does."""
    rows: list[tuple[str, int, int]] = []
    _walk(path, "", rows)
    return sha256(repr(sorted(rows)).encode()).hexdigest()[:16]


def _walk(path: Path, prefix: str, rows: list[tuple[str, int, int]]) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name in _IGNORED:
                continue
            if entry.is_dir():
                _walk(Path(entry.path), f"{prefix}{entry.name}/", rows)
            else:
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                rows.append((prefix + entry.name, found.st_size, found.st_mtime_ns))


class Repository:
    """A Triton model repository, and beside it the folders for staging, quarantine and what was removed."""

    def __init__(self, path: Path, *, state: Path, quarantine: Path, trash: Path):
        self.path = path
        self._manifests = state / "manifests"
        self._state = state
        self._quarantine = quarantine
        self._trash = trash

    # ------------------------------------------------------------------ reading

    def names(self) -> list[str]:
        """The folders that may be models; hidden ones and loose files are not."""
        try:
            with os.scandir(self.path) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        except FileNotFoundError:
            return []

    def entry(self, name: str) -> Entry | None:
        """What lies under a name; None when there is no such folder. Raises `ModelError` for a broken manifest."""
        path = self.path / name
        try:
            revision = revision_of(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        for manifest_path, managed in ((path / MANIFEST, True), (self._manifests / f"{name}.json", False)):
            try:
                manifest = Manifest.model_validate_json(manifest_path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValidationError) as exc:
                if not managed:
                    break  # it can be made anew
                raise ModelError(f"{manifest_path} is not a manifest that this version can read: {exc}") from exc
            if managed or manifest.revision == revision:
                return Entry(name, path, revision, manifest, managed)
        return Entry(name, path, revision, None, False)

    def keep_manifest(self, manifest: Manifest) -> None:
        """Remember what was found out about somebody else's folder, outside of it."""
        replace_file(self._manifests / f"{manifest.name}.json", manifest.model_dump_json().encode())

    def forget(self, name: str) -> None:
        (self._manifests / f"{name}.json").unlink(missing_ok=True)

    # ------------------------------------------------------------------ writing

    def install(
        self, drop: Path, layout: Layout, manifest: Manifest, *, managed: bool = True, moved: Moved | None = None
    ) -> Path:
        """Make a model's folder out of a drop and let it appear in the repository by one rename.

        Files are moved, and copied only from another file system. When anything fails the drop lies where it lay.
        Raises `ModelConflict` when the name is taken, `ConfigError` for a full disk or an unwritable folder.
        """
        target = self.path / manifest.name
        if os.path.lexists(target):
            raise ModelConflict(
                f"{manifest.name} is in the repository already: choose another name, or remove it first"
            )
        staging = self._staging() / manifest.name
        try:
            _check_space(drop, staging.parent)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            journal = {"drop": str(drop), "files": dict(layout.files)}
            replace_file(staging / "journal.json", json.dumps(journal).encode())
            _move(drop, staging / "drop", moved)
            try:
                self._arrange(staging, layout, manifest, managed)
                os.rename(staging / "model", target)
            except BaseException:
                _undo(staging)
                raise
        except OSError as exc:
            raise _explained(exc, "could not be moved into the repository") from exc
        shutil.rmtree(staging, ignore_errors=True)
        return target

    def _arrange(self, staging: Path, layout: Layout, manifest: Manifest, managed: bool) -> None:
        model = staging / "model"
        if layout.files.get(".") == ".":
            os.rename(staging / "drop", model)
        else:
            model.mkdir()
            # the drop as a whole goes last: what is taken out of it must be out by then
            for target, source in sorted(layout.files.items(), key=lambda item: item[1] == "."):
                place = _inside(model, target)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.rename(_inside(staging / "drop", source), place)
        for target, text in layout.texts.items():
            place = _inside(model, target)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        if managed:
            manifest = manifest.model_copy(update={"revision": revision_of(model)})
            (model / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")

    def recover(self) -> list[Path]:
        """Put back what an installation that was cut off had taken; returns the drops that lie where they lay."""
        back = []
        for staging in [p for s in self._stagings() if s.is_dir() for p in s.iterdir()]:
            if (staging / "journal.json").exists():
                place = _undo(staging)
                if place is not None:
                    back.append(place)
            if not any((staging / part).exists() for part in ("drop", "model")):
                shutil.rmtree(staging, ignore_errors=True)
        return back

    def quarantine(self, drop: Path) -> Path:
        """Take a refused drop out of the way, whole; returns its new place, or the old one if it can't be moved."""
        return _move_aside(drop, self._quarantine)

    def remove(self, name: str) -> Path:
        """Take a model's folder out of the repository; returns where it lies now."""
        place = self.set_aside(self.path / name)
        self.forget(name)
        return place

    def set_aside(self, path: Path) -> Path:
        """Move to the trash; nothing is ever deleted. Returns where it lies now."""
        try:
            self._trash.mkdir(parents=True, exist_ok=True)
            place = _free_name(self._trash, path.name)
            _move(path, place)
        except OSError as exc:
            raise _explained(exc, f"{path} could not be moved to {self._trash}") from exc
        return place

    def _stagings(self) -> Iterator[Path]:
        yield self._state / "staging"
        yield self.path.parent / ".modelium-staging"
        yield self.path / ".modelium-staging"

    def _staging(self) -> Path:
        """A folder on the repository's own file system, so that the last rename can be atomic."""
        device = self.path.stat().st_dev
        for folder in self._stagings():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if folder.stat().st_dev == device:
                return folder
        raise ConfigError(f"no folder beside {self.path} can be written: models can't be staged")


def _inside(base: Path, relative: str) -> Path:
    """A path that a plugin named, which must not lead out of the folder."""
    path = base if relative == "." else base / relative
    if relative.startswith("/") or ".." in Path(relative).parts:
        raise ModelError(f"a layout may not name {relative!r}: paths stay inside the model's folder")
    return path


def _undo(staging: Path) -> Path | None:
    """Bring a drop back from its staging folder; None when it never left its place."""
    journal = json.loads((staging / "journal.json").read_bytes())
    drop, model = staging / "drop", staging / "model"
    origin = Path(journal["drop"])
    files: dict[str, str] = journal["files"]
    if files.get(".") == "." and model.exists() and not drop.exists():
        os.rename(model, drop)
    else:
        for target, source in sorted(files.items(), key=lambda item: item[1] != "."):
            place = model / target
            if place.exists():
                back = drop if source == "." else drop / source
                back.parent.mkdir(parents=True, exist_ok=True)
                os.rename(place, back)
    if not os.path.lexists(drop):
        return None
    (drop / MANIFEST).unlink(missing_ok=True) if drop.is_dir() and files.get(".") == "." else None
    place = origin if not os.path.lexists(origin) else _free_name(origin.parent, origin.name)
    _move(drop, place)
    return place


def _move(source: Path, target: Path, moved: Moved | None = None) -> None:
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


def _move_aside(path: Path, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = _free_name(folder, path.name)
        _move(path, place)
    except OSError:
        return path
    return place


def _free_name(folder: Path, name: str) -> Path:
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


def _check_space(drop: Path, folder: Path) -> None:
    """A copy that can't end is not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.lstat(drop).st_dev == os.stat(folder).st_dev:
        return
    need, free = size_of(drop), shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(f"{drop.name} needs {need} bytes on the disk of {folder}, which has {free} free: make room")


def _explained(exc: OSError, what: str) -> ConfigError:
    advice = {
        errno.ENOSPC: "the disk is full: make room and drop it again",
        errno.EDQUOT: "the quota is used up: make room and drop it again",
        errno.EACCES: "permission denied: let the user that runs Modelium write there",
        errno.EPERM: "permission denied: let the user that runs Modelium write there",
        errno.EROFS: "the file system is read-only",
    }.get(exc.errno or 0, exc.strerror or str(exc))
    return ConfigError(f"{what}: {advice} ({exc.filename or ''})")
