"""`modelium add`, from the user's file to a model that serves, or to the reason why it does not."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from modelium.api import Progress
from modelium.commands.add import _drop
from modelium.commands.base import Failed
from modelium.commands.staging import Staged, move, share_or_copy, walk
from modelium.errors import LoadRejected
from tests.cli.conftest import Modelium, Served, finish, on_a_terminal

MB = 10**6


class TestAdding:
    async def test_a_file_ends_ready_and_stays_where_it_was(self, served: Served) -> None:
        path = served.toy("a.toy")
        ran = await served.modelium("add", str(path))
        assert (ran.code, ran.out) == (0, f"a.toy is READY: {served.url}/v2/models/a.toy\n")
        assert served.rig.state("a.toy") == "READY"
        assert path.exists()

    async def test_a_folder_under_another_name(self, served: Served) -> None:
        served.toy("x.toy")
        ran = await served.modelium("add", str(served.folder / "mine"), "--name", "other", "--json")
        assert ran.code == 0
        assert (ran.json["name"], ran.json["state"]) == ("other", "READY")
        assert (served.folder / "mine" / "x.toy").exists()

    async def test_moving_takes_the_users_file(self, served: Served) -> None:
        path = served.toy("a.toy")
        assert (await served.modelium("add", str(path), "--move")).code == 0
        assert not path.exists()

    async def test_a_link_is_followed_but_not_moved(self, served: Served) -> None:
        path = served.toy("a.toy")
        link = served.folder / "b.toy"
        link.symlink_to(path)
        ran = await served.modelium("add", str(link), "--move")
        assert (ran.code, "is a link: leave out --move" in ran.err) == (1, True)
        assert (await served.modelium("add", str(link))).code == 0
        assert served.rig.state("b.toy") == "READY"
        assert link.is_symlink()
        assert path.exists()

    async def test_one_that_is_refused_says_why(self, served: Served) -> None:
        path = served.toy("a.toy", bad="it has horns")
        ran = await served.modelium("add", str(path))
        assert ran.code == 1
        assert "it has horns" in ran.err
        assert path.exists()

    async def test_one_that_can_not_be_loaded_says_why(self, served: Served) -> None:
        served.rig.runtime.fail("load", LoadRejected("its shape is wrong"), "a.toy")
        served.rig.runtime.fail("load", LoadRejected("its shape is wrong"), "a.toy")
        ran = await served.modelium("add", str(served.toy("a.toy")), "--json")
        assert ran.code == 1
        assert "its shape is wrong" in ran.json["error"]["message"]

    async def test_others_make_room_for_what_is_waited_for(self, served: Served) -> None:
        assert (await served.modelium("add", str(served.toy("big.toy", size=8 * MB)))).code == 0
        assert (await served.modelium("add", str(served.toy("bigger.toy", size=9 * MB)))).code == 0
        assert (served.rig.state("big.toy"), served.rig.state("bigger.toy")) == ("COLD", "READY")

    async def test_one_that_never_fits_says_so(self, served: Served) -> None:
        ran = await served.modelium("add", str(served.toy("huge.toy", size=11 * MB)))
        assert ran.code == 1
        assert "11" in ran.err

    async def test_a_name_that_is_taken(self, served: Served) -> None:
        path = served.toy("a.toy")
        await served.modelium("add", str(path))
        ran = await served.modelium("add", str(path))
        assert ran.code == 1
        assert "a model named a.toy is there already" in ran.err

    @pytest.mark.parametrize("name", ["a b", "../x", ".hidden", "stats"])
    async def test_a_name_that_is_not_allowed(self, served: Served, name: str) -> None:
        ran = await served.modelium("add", str(served.toy("a.toy")), "--name", name)
        assert ran.code == 1
        assert "can't be a model's name" in ran.err

    async def test_without_waiting_it_is_only_dropped(self, served: Served) -> None:
        ran = await served.modelium("add", str(served.toy("a.toy")), "--no-wait", "--json")
        assert (ran.code, ran.json["state"]) == (0, "DROPPED")
        await served.rig.is_("a.toy", "READY")

    async def test_interrupted_while_it_waits_it_ends_and_the_drop_stays(self, served: Served) -> None:
        held = served.rig.runtime.hold("load", "a.toy")
        process = await served.start("add", str(served.toy("a.toy")))
        await asyncio.wait_for(held.arrived.wait(), 30)
        process.send_signal(signal.SIGINT)
        assert (await finish(process)).code == 130
        held.release()
        await served.rig.is_("a.toy", "READY")

    async def test_progress_is_shown_on_a_terminal(self, served: Served) -> None:
        held = served.rig.runtime.hold("load", "a.toy")
        path = served.toy("a.toy")
        adding = on_a_terminal("add", str(path), cwd=served.folder, MODELIUM_URL=served.url)
        async with adding as (process, read):
            await asyncio.wait_for(held.arrived.wait(), 30)
            held.report(Progress(stage="warming up", done=3, total=4, unit="layers"))
            await asyncio.to_thread(read, b"warming up 3 of 4 layers")
            held.release()
            await asyncio.to_thread(read, b"a.toy is READY")
            assert await process.wait() == 0

    async def test_a_path_that_is_not_there(self, served: Served) -> None:
        assert (await served.modelium("add", "nowhere.onnx")).code == 2

    async def test_without_a_service(self, alone: Modelium, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").touch()
        ran = await alone("add", "a.onnx", "--url", "127.0.0.1:1")
        assert ran.code == 3
        assert "start it with `modelium serve`" in ran.err


class TestStaging:
    @pytest.fixture
    def incoming(self, tmp_path: Path) -> Path:
        (tmp_path / "incoming").mkdir()
        return tmp_path / "incoming"

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """A model as a download cache keeps it: links to files that lie elsewhere, and an empty folder."""
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs/abc").write_bytes(b"w" * 100)
        model = tmp_path / "model"
        (model / "sub").mkdir(parents=True)
        (model / "1").mkdir()
        (model / "weights").symlink_to("../blobs/abc")
        (model / "sub/config").write_text("{}")
        return model

    def test_a_folder_comes_whole_with_links_followed(self, incoming: Path, model: Path) -> None:
        told: list[tuple[int, int]] = []
        staged = Staged(incoming, "m")
        staged.fill(model, lambda done, total: told.append((done, total)))
        assert [p.name[0] for p in incoming.iterdir()] == ["."]
        staged.appear()
        assert sorted(str(p.relative_to(incoming)) for p in incoming.rglob("*")) == [
            "m", "m/1", "m/sub", "m/sub/config", "m/weights",
        ]  # fmt: skip
        assert not (incoming / "m/weights").is_symlink()
        assert (incoming / "m/weights").read_bytes() == b"w" * 100
        assert told[-1] == (102, 102)

    def test_what_can_not_be_shared_is_copied(
        self, incoming: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr("fcntl.ioctl", refuse)
        copied: list[int] = []
        share_or_copy(model / "sub/config", incoming / "x", copied.append)
        assert copied == [2]
        assert (incoming / "x").stat().st_ino != (model / "sub/config").stat().st_ino

    def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
        self, incoming: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fcntl.ioctl", full)
        with pytest.raises(Failed, match="disk of the incoming folder is full: the model has 102 bytes"):
            Staged(incoming, "m").fill(model, lambda done, total: None)
        assert list(incoming.iterdir()) == []

    def test_stopped_on_the_way_it_leaves_nothing(self, incoming: Path, model: Path) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Staged(incoming, "m").fill(model, stop)
        assert list(incoming.iterdir()) == []
        assert (model / "sub/config").exists()

    @pytest.mark.parametrize("moved", [False, True])
    def test_from_another_file_system_the_original_goes_only_when_it_is_to_be_moved(
        self, incoming: Path, model: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
    ) -> None:
        monkeypatch.setattr("modelium.commands.add.move", lambda *args: False)
        _drop(model, incoming, "m", moved, lambda done, total: None)
        assert (incoming / "m/weights").read_bytes() == b"w" * 100
        assert model.exists() is not moved
        assert (model.parent / "blobs/abc").exists()

    def test_nothing_is_replaced(self, incoming: Path, model: Path) -> None:
        (incoming / "m").mkdir()
        staged = Staged(incoming, "m")
        staged.fill(model, lambda done, total: None)
        with pytest.raises(Failed, match="is there already"):
            staged.appear()
        with pytest.raises(Failed, match="is there already"):
            move(model, incoming, "m")
        assert [p.name for p in incoming.iterdir()] == ["m"]

    def test_what_is_no_model_is_refused(self, tmp_path: Path) -> None:
        loop = tmp_path / "loop"
        loop.mkdir()
        (loop / "again").symlink_to(".")
        with pytest.raises(Failed, match="leads back to a folder that it lies in"):
            walk(loop)
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "x").symlink_to("nowhere")
        with pytest.raises(Failed, match="can't be read: No such file"):
            walk(broken)
        special = tmp_path / "special"
        special.mkdir()
        os.mkfifo(special / "x")
        with pytest.raises(Failed, match="neither a file nor a folder"):
            walk(special)
