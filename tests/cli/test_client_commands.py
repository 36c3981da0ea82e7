"""Commands that ask a running service."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from modelium.api import Progress
from modelium.cli import run
from modelium.commands.base import UNREACHABLE
from tests.cli.conftest import Modelium, Served, on_a_terminal

MB = 10**6


class TestListing:
    async def test_nothing_yet(self, served: Served) -> None:
        ran = await served.modelium("ps")
        assert (ran.code, ran.out.strip()) == (0, "no models yet: `modelium add PATH` brings one in")

    async def test_models_in_a_table(self, served: Served) -> None:
        await served.rig.add("a.toy", 2 * MB)
        await served.rig.add("cold.toy", 9 * MB)
        served.rig.drop("bad.toy", bad="it has horns")
        await served.rig.is_("quarantine/bad.toy", "INVALID")
        await served.rig.is_("a.toy", "READY")
        ran = await served.modelium("ps")
        head, *rows = [line.split() for line in ran.out.splitlines()]
        assert head == ["NAME", "STATE", "RUNTIME", "DEVICE", "MEMORY", "QPS", "IDLE", "REASON"]
        assert [(row[0], row[1]) for row in rows] == [
            ("a.toy", "READY"), ("cold.toy", "COLD"), ("quarantine/bad.toy", "INVALID"),
        ]  # fmt: skip
        assert rows[0][2:6] == ["fake/as-is", "cpu:0", "2.0", "MB"]
        assert "(~9.0 MB)" in ran.out
        assert "it has horns" in ran.out

    async def test_models_as_json_by_state_and_name(self, served: Served) -> None:
        await served.rig.add("a.toy")
        await served.rig.add("b.toy")
        assert [m["name"] for m in (await served.modelium("ps", "--json")).json] == ["a.toy", "b.toy"]
        assert [m["name"] for m in (await served.modelium("ps", "b.toy", "--json")).json] == ["b.toy"]
        assert (await served.modelium("ps", "--json", "--state", "failed")).json == []
        assert (await served.modelium("ps", "c.toy")).code == 1
        wrong = await served.modelium("ps", "--state", "raedy")
        assert (wrong.code, "'ready'" in wrong.err.lower()) == (2, True)

    async def test_devices_and_runtimes(self, served: Served) -> None:
        await served.rig.add("a.toy", 2 * MB)
        await served.rig.is_("a.toy", "READY")
        ran = await served.modelium("ps", "--devices")
        assert ran.code == 0
        lines = [line.split() for line in ran.out.splitlines()]
        device, *foreign = [words for words in lines if words[:1] == ["cpu:0"]]
        assert device[:6] == ["cpu:0", "device", "10.0", "MB", "2.0", "MB"]
        assert device[-1] == "a.toy"
        assert "UNEXPLAINED" in ran.out and all(words[1].isdecimal() for words in foreign)
        assert ["fake", "UP"] in [words[:2] for words in lines]
        shown = (await served.modelium("ps", "--devices", "--json")).json
        assert [d["id"] for d in shown["devices"]] == ["cpu:0"]
        assert shown["devices"][0]["foreign_bytes"] >= sum(f["bytes"] for f in shown["devices"][0]["foreign"]) > 0

    async def test_watching_is_not_for_programs(self, served: Served) -> None:
        assert (await served.modelium("ps", "--watch", "--json")).code == 2

    async def test_watching_on_a_terminal(self, served: Served) -> None:
        await served.rig.add("a.toy")
        watching = on_a_terminal("ps", "--watch", cwd=served.folder, MODELIUM_URL=served.url)
        async with watching as (process, read):
            await asyncio.to_thread(read, b"a.toy")
            await served.rig.add("b.toy")
            await asyncio.to_thread(read, b"b.toy")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130

    async def test_reasons_and_progress_are_shown_as_they_are(self, served: Served) -> None:
        served.rig.drop("bad.toy", bad="expected [bold]one[/bold], found [two]")
        held = served.rig.runtime.hold("load", "a.toy")
        served.rig.drop("a.toy")
        await served.rig.is_("quarantine/bad.toy", "INVALID")
        await asyncio.wait_for(held.arrived.wait(), 30)
        held.report(Progress(stage="reading", done=2 * MB, total=4 * MB, unit="bytes"))
        ran = await served.modelium("ps")
        held.release()
        assert "expected [bold]one[/bold], found [two]" in ran.out
        assert "[reading 2.0 MB of 4.0 MB]" in ran.out
        assert all(line == line.rstrip() for line in ran.out.splitlines())

    async def test_one_model(self, served: Served) -> None:
        await served.rig.add("a.toy", 2 * MB)
        ran = await served.modelium("show", "a.toy")
        assert ran.code == 0
        assert "a toy" in ran.out
        assert (await served.modelium("show", "a.toy", "--json")).json["name"] == "a.toy"

    async def test_a_drop_is_shown_by_its_place(self, served: Served) -> None:
        served.rig.drop("bad.toy", bad="it has horns")
        await served.rig.is_("quarantine/bad.toy", "INVALID")
        ran = await served.modelium("show", "quarantine/bad.toy")
        assert (ran.code, "it has horns" in ran.out) == (0, True)


class TestOrders:
    async def test_unload_and_load(self, served: Served) -> None:
        await served.rig.add("a.toy")
        await served.rig.is_("a.toy", "READY")
        ran = await served.modelium("unload", "a.toy")
        assert (ran.code, ran.out) == (0, "a.toy is COLD\n")
        ran = await served.modelium("load", "a.toy", "--json")
        assert (ran.code, ran.json["state"]) == (0, "READY")

    async def test_pin_and_unpin(self, served: Served) -> None:
        await served.rig.add("a.toy")
        assert (await served.modelium("pin", "a.toy")).out == "a.toy is pinned\n"
        assert "a.toy pinned" in (await served.modelium("ps")).out
        assert (await served.modelium("unpin", "a.toy", "--json")).json == {"name": "a.toy", "pinned": False}

    async def test_rm_keeps_the_files(self, served: Served) -> None:
        await served.rig.add("a.toy")
        await served.rig.is_("a.toy", "READY")
        ran = await served.modelium("rm", "a.toy", "--json")
        assert ran.code == 0
        assert Path(ran.json["moved_to"]).exists()
        assert served.rig.state("a.toy") == "-"

    async def test_rm_of_a_refused_drop(self, served: Served) -> None:
        served.rig.drop("bad.toy", bad="it has horns")
        await served.rig.is_("quarantine/bad.toy", "INVALID")
        assert (await served.modelium("rm", "quarantine/bad.toy")).code == 0
        await served.rig.is_("quarantine/bad.toy", "-")

    async def test_a_load_that_never_fits(self, served: Served) -> None:
        await served.rig.add("huge.toy", 11 * MB)
        ran = await served.modelium("load", "huge.toy", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (1, "never_fits")

    @pytest.mark.parametrize("command", ["show", "load", "unload", "pin", "unpin", "rm", "explain", "logs"])
    async def test_a_model_that_is_not_there(self, served: Served, command: str) -> None:
        ran = await served.modelium(command, "nobody", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (1, "model_not_found")
        ran = await served.modelium(command, "nobody")
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("error: ")


class TestWhy:
    async def test_plan_does_nothing(self, served: Served) -> None:
        path = served.toy("a.toy", size=3 * MB)
        ran = await served.modelium("plan", str(path))
        assert ran.code == 0
        assert "a toy" in ran.out
        assert "fake/as-is on cpu" in ran.out
        assert (await served.modelium("plan", str(path), "--json")).json["would_load"] is True
        assert (await served.modelium("plan", str(path), "--name", "b", "--json")).json["name"] == "b"
        assert served.rig.state("a.toy") == "-"

    async def test_plan_tells_of_evictions_and_refusals(self, served: Served) -> None:
        await served.rig.add("old.toy", 8 * MB)
        await served.rig.is_("old.toy", "READY")
        ran = await served.modelium("plan", str(served.toy("new.toy", size=9 * MB)))
        assert "would evict old.toy" in ran.out
        ran = await served.modelium("plan", str(served.toy("bad.toy", bad="it has horns")))
        assert (ran.code, "refused: it has horns" in ran.out) == (1, True)

    async def test_explain(self, served: Served) -> None:
        await served.rig.add("a.toy")
        await served.rig.is_("a.toy", "READY")
        ran = await served.modelium("explain", "a.toy")
        assert ran.code == 0
        for said in ("it is the first on offer", "estimated", "LOADING -> READY"):
            assert said in ran.out
        found = (await served.modelium("explain", "a.toy", "--json")).json
        assert found["transitions"][-1]["after"] == "READY"

    async def test_logs(self, served: Served) -> None:
        await served.rig.add("a.toy")
        await served.rig.is_("a.toy", "READY")
        assert "load a.toy" in (await served.modelium("logs", "a.toy")).out
        lines = (await served.modelium("logs", "fake", "-n", "1", "--json")).json
        assert (lines["name"], len(lines["lines"])) == ("fake", 1)

    async def test_an_empty_log_is_told_of(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        await served.rig.add("a.toy")
        await served.rig.is_("a.toy", "READY")
        monkeypatch.setattr(served.rig.engine.running["fake"].driver, "logs", lambda model, lines: [])
        ran = await served.modelium("logs", "a.toy")
        assert (ran.code, ran.out, ran.err) == (0, "", "nothing is in a log about a.toy yet\n")


class TestService:
    async def test_check_and_plugins_ask_the_service(self, served: Served) -> None:
        await served.rig.is_("x", "-")
        ran = await served.modelium("check", "--json", "--url", served.url)
        assert ran.json["service"] is True
        assert {"name": "runtime fake"}.items() <= next(c for c in ran.json["checks"] if "runtime" in c["name"]).items()
        assert [p["name"] for p in (await served.modelium("plugins", "--json")).json] == ["toys"]

    @pytest.mark.parametrize(
        "args", [["ps"], ["show", "a"], ["load", "a"], ["rm", "a"], ["plan", "a"], ["explain", "a"], ["logs", "a"]]
    )
    def test_nobody_there(self, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        nowhere = ["--url", "http://127.0.0.1:1"]
        assert run([*args, *nowhere]) == UNREACHABLE
        said = capsys.readouterr().err
        assert "no Modelium answers at http://127.0.0.1:1" in said
        assert "`modelium serve`" in said
        assert run([*args, "--json", *nowhere]) == UNREACHABLE
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "unreachable"

    async def test_something_else_there(self, alone: Modelium, unused_tcp_port: int) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", unused_tcp_port):
            ran = await alone("ps", "--url", f"127.0.0.1:{unused_tcp_port}")
        assert ran.code == 1
        assert "answers, but not as Modelium does: /models gave 404 'nope'" in ran.err

    async def test_the_address_is_found_in_the_configuration(self, alone: Modelium, tmp_path: Path) -> None:
        (tmp_path / "modelium.yaml").write_text("server: {port: 2}")
        assert "http://127.0.0.1:2 " in (await alone("ps")).err
        assert "http://127.0.0.1:3 " in (await alone("ps", MODELIUM_SERVER__PORT="3")).err
        assert "http://127.0.0.1:4 " in (await alone("ps", MODELIUM_URL="127.0.0.1:4")).err
