"""The repository on disk: what lies there, and how a model gets into it in one step and out of it without loss."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from modelium.api.types import Layout, Manifest
from modelium.engine.files import Moved, check_space, explained, free_name, hash_of, look_of, move, move_aside
from modelium.engine.store import replace_file
from modelium.errors import ConfigError, ModelConflict, ModelError

log = logging.getLogger(__name__)

MANIFEST = "modelium.json"
JOURNAL = "journal.json"
_IGNORED = frozenset({MANIFEST, "__pycache__"})


class Changed(ModelConflict):
    """A drop is no longer what was looked at."""


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
    """A hash over the names, sizes and modification times of all files: changes when any of them does.

    Links are followed, each folder once. Raises `OSError` when `path` can't be read.
    """
    rows: list[tuple[str, int, int]] = []
    _walk(path, "", rows, set())
    return hash_of(rows)


def _walk(path: Path, prefix: str, rows: list[tuple[str, int, int]], seen: set[tuple[int, int]]) -> None:
    found = os.stat(path)
    if (found.st_dev, found.st_ino) in seen:
        return
    seen.add((found.st_dev, found.st_ino))
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name in _IGNORED:
                continue
            try:
                if entry.is_dir():
                    _walk(Path(entry.path), f"{prefix}{entry.name}/", rows, seen)
                else:
                    found = entry.stat()
                    rows.append((prefix + entry.name, found.st_size, found.st_mtime_ns))
            except OSError as exc:  # gone meanwhile, a link to nowhere, unreadable
                rows.append((prefix + entry.name, -(exc.errno or 1), 0))


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
        """The folders that may be models; hidden ones and loose files are not. Raises `OSError`."""
        with os.scandir(self.path) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())

    def entry(self, name: str) -> Entry | None:
        """What lies under a name; None when there is no such folder.

        Raises `ModelError` for a manifest that is broken or another model's, `OSError` when the folder can't be read.
        """
        path = self.path / name
        try:
            revision = revision_of(path)
        except (FileNotFoundError, NotADirectoryError):
            if path.is_dir():
                raise
            return None
        for managed in (True, False):
            manifest = self.manifest(name, managed=managed)
            if manifest is None:
                continue
            if managed and manifest.name != name:
                raise ModelError(
                    f"its {MANIFEST} is that of {manifest.name}: call the folder so again, or drop the model anew"
                )
            if managed or manifest.revision == revision:
                return Entry(name, path, revision, manifest, managed)
        return Entry(name, path, revision, None, False)

    def manifest(self, name: str, *, managed: bool) -> Manifest | None:
        """Modelium's own beside the model (`managed`), or the one kept elsewhere for somebody else's folder.

        Raises `ModelError` when its own can't be read; the other can be made anew.
        """
        path = self.path / name / MANIFEST if managed else self._manifests / f"{name}.json"
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as exc:
            if not managed:
                return None
            raise ModelError(f"{path} is not a manifest that this version can read: {exc}") from exc

    def keep_manifest(self, manifest: Manifest) -> None:
        """Remember what was found out about somebody else's folder, outside of it."""
        replace_file(self._manifests / f"{manifest.name}.json", manifest.model_dump_json().encode())

    def forget(self, name: str) -> None:
        (self._manifests / f"{name}.json").unlink(missing_ok=True)

    # ------------------------------------------------------------------ writing

    def install(
        self,
        drop: Path,
        layout: Layout,
        manifest: Manifest,
        *,
        managed: bool = True,
        looked: str | None = None,
        moved: Moved | None = None,
    ) -> Path:
        """Make a model's folder out of a drop and let it appear in the repository by one rename.

        Files are moved, and copied only from another file system; what the layout does not name goes to the trash.
        When anything fails the drop lies where it lay. Raises `ModelConflict` when the name is taken, `ConfigError`
        for a full disk or an unwritable folder, `Changed` when the drop is no longer what it was at `looked`.
        """
        target = self.path / manifest.name
        if os.path.lexists(target):
            raise ModelConflict(
                f"{manifest.name} is in the repository already: choose another name, or remove it first"
            )
        folder = self._staging()
        check_space(drop, folder)
        kept = False
        try:
            staging = Path(tempfile.mkdtemp(prefix=f"{manifest.name}-", dir=folder))
            written = [*layout.texts, *([MANIFEST] if managed else [])]
            journal = {"drop": str(drop), "files": dict(layout.files), "target": str(target), "written": written}
            replace_file(staging / JOURNAL, json.dumps(journal).encode())
            move(drop, staging / "drop", moved)
            try:
                if looked is not None and look_of(staging / "drop")[0] != looked:
                    raise Changed(f"{drop.name} changed while it was being taken in")
                self._arrange(staging, layout, manifest, managed)
                os.rename(staging / "model", target)
            except BaseException:
                kept = True
                _undo(staging)
                kept = False
                raise
        except OSError as exc:
            where = f"; it lies in {staging} and is put back at the next start" if kept else ""
            raise explained(exc, f"could not be moved into the repository{where}") from exc
        finally:
            if not kept:
                self._discard(staging, manifest.name)
        return target

    def _discard(self, staging: Path, name: str) -> None:
        """Take away what an installation needed; what was dropped and not used goes to the trash."""
        rest = staging / "drop"
        if rest.is_dir() and not rest.is_symlink() and not any(rest.iterdir()):
            rest.rmdir()
        if os.path.lexists(rest):
            os.rename(rest, staging / f"{name}.rest")
            self.set_aside(staging / f"{name}.rest")
        shutil.rmtree(staging, ignore_errors=True)

    def _arrange(self, staging: Path, layout: Layout, manifest: Manifest, managed: bool) -> None:
        model = staging / "model"
        if layout.files.get(".") == ".":
            os.rename(staging / "drop", model)
        else:
            model.mkdir()
            # the drop as a whole goes last: what is taken out of it must be out by then
            for target, source in sorted(layout.files.items(), key=lambda item: item[1] == "."):
                place = inside(model, target)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.rename(inside(staging / "drop", source), place)
        for target, text in layout.texts.items():
            place = inside(model, target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(place):
                raise ModelError(f"{target} would be written over one of the drop's own files: remove that file")
            place.write_text(text, encoding="utf-8")
        if managed:
            manifest = manifest.model_copy(update={"revision": revision_of(model)})
            (model / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")

    def recover(self) -> list[Path]:
        """Put back what an installation that was cut off had taken; returns the drops that lie where they lay."""
        back = []
        for staging in [p for s in self._stagings() if s.is_dir() for p in s.iterdir()]:
            try:
                if (staging / JOURNAL).exists() and not _finished(staging):
                    place = _undo(staging)
                    back += [place] if place is not None else []
                self._discard(staging, staging.name)
            except (OSError, ValueError, ConfigError) as exc:
                log.error("what an installation left in %s could not be put back: %s", staging, exc)
        return back

    def quarantine(self, drop: Path) -> Path:
        """Take a refused drop out of the way, whole; returns its new place, or the old one if it can't be moved."""
        return move_aside(drop, self._quarantine)

    def remove(self, name: str) -> Path:
        """Take a model's folder out of the repository; returns where it lies now."""
        place = self.set_aside(self.path / name)
        self.forget(name)
        return place

    def set_aside(self, path: Path) -> Path:
        """Move to the trash; nothing is ever deleted. Returns where it lies now."""
        try:
            self._trash.mkdir(parents=True, exist_ok=True)
            place = free_name(self._trash, path.name)
            move(path, place)
        except OSError as exc:
            raise explained(exc, f"{path} could not be moved to {self._trash}") from exc
        return place

    def _stagings(self) -> Iterator[Path]:
        yield self._state / "staging"
        yield self.path.parent / ".modelium-staging"
        yield self.path / ".modelium-staging"

    def beside(self, name: str) -> Path:
        """An empty folder of its own on the repository's file system, for what is to take a model's place. Left behind,
        it is removed at the next start."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._staging()))

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


def inside(base: Path, relative: str) -> Path:
    """A path that a plugin named, which must not lead out of the folder."""
    path = base if relative == "." else base / relative
    if relative.startswith("/") or ".." in Path(relative).parts:
        raise ModelError(f"a layout may not name {relative!r}: paths stay inside the model's folder")
    return path


def _finished(staging: Path) -> bool:
    """Whether the model is in its place, so that what is left in staging is what the layout does not name."""
    journal = json.loads((staging / JOURNAL).read_bytes())
    target = Path(journal["target"])
    named = [t for t in journal["files"] if t != "."]
    return bool(named) and not (staging / "model").exists() and all((target / t).exists() for t in named)


def _undo(staging: Path) -> Path | None:
    """Bring a drop back from its staging folder; None when it never left its place."""
    journal = json.loads((staging / JOURNAL).read_bytes())
    drop, model = staging / "drop", staging / "model"
    origin = Path(journal["drop"])
    files: dict[str, str] = journal["files"]
    if files.get(".") == "." and model.exists() and not drop.exists():
        for written in journal["written"]:
            (model / written).unlink(missing_ok=True)
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
    place = origin if not os.path.lexists(origin) else free_name(origin.parent, origin.name)
    move(drop, place)
    return place
