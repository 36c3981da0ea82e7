"""Models get into the repository in one step, and nothing is lost on the way."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from modelium.api import Analysis, Inspection, Layout, Manifest, Plan
from modelium.engine import repository as module
from modelium.engine.files import look_of
from modelium.engine.repository import MANIFEST, Repository, revision_of
from modelium.errors import ConfigError, ModelConflict, ModelError


def manifest(name: str) -> Manifest:
    analysis = Analysis(analyzer="t", format="toy", summary="a toy", confidence=1)
    plan = Plan(
        brain="t", runtime="fake", serving="s", device_kind="cpu", memory_bytes=1, load_s=1, reason="r", confidence=1
    )  # fmt: skip
    inspection = Inspection(content_key="k", total_bytes=1, analysis=analysis)
    return Manifest(name=name, created_at=1.0, source=name, inspection=inspection, plan=plan)


@pytest.fixture
def place(tmp_path: Path) -> Repository:
    (tmp_path / "repository").mkdir()
    (tmp_path / "incoming").mkdir()
    return Repository(
        tmp_path / "repository", state=tmp_path / "state", quarantine=tmp_path / "quarantine", trash=tmp_path / "trash"
    )


def files(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def folder_drop(tmp_path: Path) -> Path:
    drop = tmp_path / "incoming/hf"
    (drop / "sub").mkdir(parents=True)
    (drop / "config.json").write_text("config")
    (drop / "sub/weights").write_text("weights")
    return drop


def drop_for(layout: Layout, tmp_path: Path) -> Path:
    if layout is not LAYOUTS["a file"]:
        return folder_drop(tmp_path)
    drop = tmp_path / "incoming/m.onnx"
    drop.write_text("onnx")
    return drop


LAYOUTS = {
    "a file": Layout(files={"1/model.onnx": "."}, texts={"config.pbtxt": "c"}),
    "a folder as a whole": Layout(files={"1/weights": "."}, texts={"config.pbtxt": "c", "1/model.py": "m"}),
    "parts of a folder": Layout(files={"1/w": "sub/weights", "1/rest": "."}, texts={"config.pbtxt": "c"}),
    "as it is": Layout(files={".": "."}),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("across", [False, True], ids=["one file system", "two file systems"])
def test_a_drop_moves_in_or_stays_whole(
    place: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, across: bool
) -> None:
    drop = drop_for(layout, tmp_path)
    before = files(tmp_path / "incoming")
    if across:
        monkeypatch.setattr("os.rename", refuse_across(tmp_path / "incoming"))
    told: list[tuple[int, int]] = []

    # first a disk that fails at the last moment, then one that does not
    real = module.Repository._arrange

    def arrange_then_fail(self: Repository, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with monkeypatch.context() as failing:
        failing.setattr(module.Repository, "_arrange", arrange_then_fail)
        with pytest.raises(ConfigError, match="disk is full"):
            place.install(drop, layout, manifest("m"), managed="." not in layout.files)
    assert files(tmp_path / "incoming") == before
    assert place.names() == []

    target = place.install(
        drop, layout, manifest("m"), managed="." not in layout.files, moved=lambda done, all: told.append((done, all))
    )
    assert not drop.exists() and target == tmp_path / "repository/m"
    got = files(target)
    assert got.pop(MANIFEST, None) is None if "." in layout.files else MANIFEST in got
    contents = {text for name, text in got.items() if name != MANIFEST}
    assert contents == set(before.values()) | set(layout.texts.values())
    assert bool(told) is across
    if across:
        assert told[-1][0] == told[-1][1] > 0
    assert not any((tmp_path / "state/staging").iterdir())
    entry = place.entry("m")
    assert entry is not None and (entry.manifest is not None) is ("." not in layout.files)
    if entry.manifest is not None:
        assert entry.manifest.revision == entry.revision


def refuse_across(folder: Path):  # type: ignore[no-untyped-def]
    real = os.rename

    def rename(source: str | Path, target: str | Path) -> None:
        if str(source).startswith(str(folder)) != str(target).startswith(str(folder)):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        real(source, target)

    return rename


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("step", range(4))
def test_an_installation_that_was_killed_is_undone_at_the_next_start(
    place: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, step: int
) -> None:
    drop = drop_for(layout, tmp_path)
    before = files(tmp_path / "incoming")
    real, count = os.rename, 0

    class Killed(BaseException):
        pass

    def die(staging: Path) -> None:
        raise Killed  # nothing is undone by a process that is gone

    def rename(source: object, target: object) -> None:
        nonlocal count
        if count == step:
            raise Killed
        count += 1
        real(source, target)  # type: ignore[arg-type]

    with monkeypatch.context() as dying, contextlib.suppress(Killed):
        dying.setattr("os.rename", rename)
        dying.setattr(module, "_undo", die)
        place.install(drop, layout, manifest("m"))
        assert place.names() == ["m"]
        return
    place.recover()
    assert files(tmp_path / "incoming") == before and place.names() == []


def test_a_taken_name_and_a_layout_that_leads_out_are_refused(place: Repository, tmp_path: Path) -> None:
    drop = folder_drop(tmp_path)
    (tmp_path / "repository/m").mkdir()
    with pytest.raises(ModelConflict, match="already"):
        place.install(drop, LAYOUTS["a folder as a whole"], manifest("m"))
    for bad in ("../out", "/etc/x", "1/../../x"):
        with pytest.raises(ModelError, match="inside"):
            place.install(drop, Layout(files={"1/w": "."}, texts={bad: "x"}), manifest("n"))
        with pytest.raises(ModelError, match="inside"):
            place.install(drop, Layout(files={bad: "config.json"}), manifest("n"))
    assert (drop / "config.json").exists() and not (tmp_path / "out").exists()


def test_a_revision_follows_the_files(tmp_path: Path) -> None:
    model = tmp_path / "m"
    (model / "1").mkdir(parents=True)
    (model / "1/w").write_text("x")
    seen = {revision_of(model)}
    (model / "1/w").write_text("xy")
    seen.add(revision_of(model))
    os.utime(model / "1/w", ns=(1, 1))
    seen.add(revision_of(model))
    (model / "2").mkdir()
    (model / "2/w").write_text("x")
    seen.add(revision_of(model))
    assert len(seen) == 4
    before = revision_of(model)
    (model / "1/__pycache__").mkdir()
    (model / "1/__pycache__/w.pyc").write_text("x")
    (model / MANIFEST).write_text("{}")
    assert revision_of(model) == before


def test_removed_and_quarantined_things_keep_apart(place: Repository, tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "repository/m").mkdir()
        place.remove("m")
        (tmp_path / "incoming/bad").write_text("x")
        place.quarantine(tmp_path / "incoming/bad")
    assert sorted(p.name for p in (tmp_path / "trash").iterdir()) == ["m", "m.2", "m.3"]
    assert sorted(p.name for p in (tmp_path / "quarantine").iterdir()) == ["bad", "bad.2", "bad.3"]


def test_a_broken_manifest_is_said_and_a_foreign_one_made_anew(place: Repository, tmp_path: Path) -> None:
    (tmp_path / "repository/m").mkdir()
    (tmp_path / "repository/m" / MANIFEST).write_text("{")
    with pytest.raises(ModelError, match="manifest"):
        place.entry("m")
    (tmp_path / "repository/n/1").mkdir(parents=True)
    place.keep_manifest(manifest("n").model_copy(update={"revision": revision_of(tmp_path / "repository/n")}))
    entry = place.entry("n")
    assert entry is not None and entry.manifest is not None and not entry.managed
    (tmp_path / "repository/n/1/w").write_text("changed")
    entry = place.entry("n")
    assert entry is not None and entry.manifest is None


def test_what_a_layout_does_not_name_is_kept(place: Repository, tmp_path: Path) -> None:
    drop = folder_drop(tmp_path)
    place.install(drop, Layout(files={"1/w": "sub/weights"}), manifest("m"))
    assert files(tmp_path / "trash/m.rest") == {"config.json": "config"}


def test_an_installation_that_cannot_be_undone_loses_nothing(
    place: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = folder_drop(tmp_path)
    before = files(tmp_path / "incoming")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with monkeypatch.context() as failing:
        failing.setattr(module.Repository, "_arrange", full)
        failing.setattr(module, "_undo", full)
        with pytest.raises(ConfigError, match="put back at the next start"):
            place.install(drop, LAYOUTS["a folder as a whole"], manifest("m"))
    again = tmp_path / "incoming/other"
    again.write_text("x")
    place.install(again, LAYOUTS["a file"], manifest("m"))
    assert place.recover() == [drop] and files(drop) == {n.removeprefix("hf/"): t for n, t in before.items()}


def test_a_drop_that_changed_since_it_was_looked_at_is_not_installed(place: Repository, tmp_path: Path) -> None:
    drop = folder_drop(tmp_path)
    looked, _ = look_of(drop)
    (drop / "sub/late.pkl").write_text("late")
    with pytest.raises(module.Changed):
        place.install(drop, LAYOUTS["a folder as a whole"], manifest("m"), looked=looked)
    assert (drop / "sub/late.pkl").exists() and place.names() == []


def test_links_in_circles_are_followed_once_and_in_drops_never(tmp_path: Path) -> None:
    for level in range(40):
        (tmp_path / f"d/{level}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / f"d/{level}/{name}").symlink_to(tmp_path / f"d/{level + 1}")
    (tmp_path / "d/up").symlink_to("..")
    (tmp_path / "d/self").symlink_to("self")
    assert revision_of(tmp_path / "d") == revision_of(tmp_path / "d")
    assert look_of(tmp_path / "d")[0] == look_of(tmp_path / "d")[0]
    (tmp_path / "link").symlink_to(tmp_path / "d")
    assert look_of(tmp_path / "link") is not None


def test_a_missing_repository_is_no_empty_one(place: Repository, tmp_path: Path) -> None:
    (tmp_path / "repository").rmdir()
    with pytest.raises(FileNotFoundError):
        place.names()


def test_another_models_manifest_is_not_believed(place: Repository, tmp_path: Path) -> None:
    place.install(folder_drop(tmp_path), LAYOUTS["a folder as a whole"], manifest("m"))
    (tmp_path / "repository/m").rename(tmp_path / "repository/n")
    with pytest.raises(ModelError, match="that of m"):
        place.entry("n")
