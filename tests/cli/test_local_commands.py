"""Commands that need no service, and the command line itself."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from modelium import __version__
from modelium.cli import COMMANDS, run
from modelium.config import load_config
from modelium.hookdocs import described
from tests.cli.conftest import CHECKOUT, Modelium, finish, start
from tests.host.toys import install

PLUGIN = """
import click
from modelium.api import hookimpl

MODELIUM_HOOKSPEC_VERSION = (1, 0)

@hookimpl
def modelium_commands():
    return [click.Command("hello", callback=lambda: click.echo("hello there"), help="Say hello.")]
"""


class TestCommandLine:
    async def test_help_names_all_commands_and_exit_codes(self, alone: Modelium) -> None:
        ran = await alone("--help")
        assert ran.code == 0
        for name, (_, line) in COMMANDS.items():
            assert name in ran.out
            assert line in ran.out
        assert "3  no service answers" in ran.out
        assert (await alone("--version")).out == f"modelium, version {__version__}\n"

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_has_help_and_json(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out

    async def test_help_imports_nothing_heavy(self, tmp_path: Path) -> None:
        code = (
            "import sys; from modelium.cli import run; run(['--help']);"
            "print(sorted({'aiohttp', 'pydantic', 'rich', 'yaml', 'numpy', 'onnx', 'pluggy'} & set(sys.modules)))"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, cwd=CHECKOUT, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert out.decode().splitlines()[-1] == "[]"

    async def test_an_unknown_command(self, alone: Modelium) -> None:
        ran = await alone("explian")
        assert ran.code == 2
        assert "there is no command 'explian': did you mean `modelium explain`?" in ran.err

    async def test_a_wrong_flag(self, alone: Modelium) -> None:
        assert (await alone("ps", "--frob")).code == 2
        assert (await alone("ps", "--frob", "--json")).json["error"]["code"] == "usage"

    async def test_a_wrong_configuration(self, alone: Modelium, tmp_path: Path) -> None:
        (tmp_path / "modelium.yaml").write_text("server:\n  prot: 1\n")
        for command in ("ps", "check", "serve"):
            ran = await alone(command)
            assert ran.code == 2
            assert ran.err.startswith("error: modelium.yaml line 2: unknown key server.prot; did you mean 'port'?")

    async def test_a_wrong_section_of_a_plugin(self, alone: Modelium, tmp_path: Path) -> None:
        (tmp_path / "modelium.yaml").write_text("triton: {enabeld: true}\n")
        ran = await alone("serve", "--root", "root", "--port", "0")
        assert (ran.code, "unknown key triton.enabeld" in ran.err) == (2, True)

    async def test_plugins_add_commands(self, alone: Modelium, tmp_path: Path) -> None:
        site = install({"says-hello": ("greeter", PLUGIN)}, tmp_path / "work")
        ran = await alone("hello", PYTHONPATH=f"{CHECKOUT}:{site}")
        assert (ran.code, ran.out) == (0, "hello there\n")
        ran = await alone("plugins", "--url", "127.0.0.1:1", PYTHONPATH=f"{CHECKOUT}:{site}")
        assert "greeter" in ran.out
        assert "says-hello 0.3" in ran.out
        ran = await alone("hello", PYTHONPATH=f"{CHECKOUT}:{site}", MODELIUM_PLUGINS__DISABLE="[greeter]")
        assert ran.code == 2


RUNTIME = """
from modelium.api import Progress, hookimpl
from modelium.api.fakes import FakeBackend, FakeRuntime
from modelium.errors import DriverError

MODELIUM_HOOKSPEC_VERSION = (1, 1)


class Backend(FakeBackend):
    async def install(self, cache_dir, settings, report):
        report(Progress(stage="fetching", done=1, total=2, unit="bytes"))
        report(Progress(stage="fetching", done=2, total=2, unit="bytes"))
        report(Progress(stage="unpacking"))
        if (cache_dir / "full").exists():
            raise DriverError("the disk is full: make room", code="install_failed")
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / "toy").write_text("there")
        return "toy 1.0 is installed"


@hookimpl
def modelium_runtime_backends():
    return [Backend(FakeRuntime("toy")), FakeBackend(FakeRuntime("plain"))]
"""


class TestRuntimes:
    @pytest.fixture
    def site(self, tmp_path: Path) -> str:
        return f"{CHECKOUT}:{install({'toy-runtime': ('toy', RUNTIME)}, tmp_path / 'work')}"

    async def test_they_are_listed_without_a_service(self, alone: Modelium, site: str) -> None:
        ran = await alone("runtimes", "--url", "127.0.0.1:1", PYTHONPATH=site)
        assert ran.code == 0
        assert "modelium runtimes install toy" in ran.out
        assert "install plain" not in ran.out and "plain" in ran.out
        ran = await alone("runtimes", "--url", "127.0.0.1:1", "--json", PYTHONPATH=site)
        assert {"name": "toy", "installable": True} in ran.json

    async def test_one_is_installed_into_the_cache(self, alone: Modelium, site: str, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        ran = await alone("runtimes", "install", "toy", PYTHONPATH=site, MODELIUM_CACHE_DIR=str(cache))
        assert (ran.code, ran.out) == (0, "toy 1.0 is installed\n")
        assert ran.err.splitlines() == ["toy: fetching 1 B of 2 B", "toy: unpacking"]
        assert (cache / "toy").read_text() == "there"
        ran = await alone("runtimes", "install", "toy", "--json", PYTHONPATH=site, MODELIUM_CACHE_DIR=str(cache))
        assert ran.json == {"name": "toy", "installed": "toy 1.0 is installed"}
        assert not ran.err

    async def test_why_not(self, alone: Modelium, site: str, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache/full").touch()
        ran = await alone("runtimes", "install", "toy", PYTHONPATH=site, MODELIUM_CACHE_DIR=str(tmp_path / "cache"))
        assert (ran.code, "the disk is full: make room" in ran.err) == (1, True)
        ran = await alone("runtimes", "install", "plain", PYTHONPATH=site)
        assert (ran.code, "nothing to install" in ran.err) == (1, True)
        ran = await alone("runtimes", "install", "toi", PYTHONPATH=site)
        assert (ran.code, "did you mean 'toy'" in ran.err) == (1, True)


class TestInit:
    async def test_it_writes_a_file_that_changes_nothing(self, alone: Modelium, tmp_path: Path) -> None:
        ran = await alone("init")
        assert ran.code == 0
        assert yaml.safe_load((tmp_path / "modelium.yaml").read_text()) is None
        assert load_config(tmp_path / "modelium.yaml", environ={}).server.port == 8000
        schema = json.loads((tmp_path / "modelium.schema.json").read_text())
        assert "orchestration" in schema["properties"]
        assert "$schema=modelium.schema.json" in (tmp_path / "modelium.yaml").read_text()

    async def test_it_replaces_nothing_unasked(self, alone: Modelium, tmp_path: Path) -> None:
        (tmp_path / "modelium.yaml").write_text("server: {port: 9}")
        ran = await alone("init")
        assert (ran.code, "is there already" in ran.err) == (1, True)
        assert (tmp_path / "modelium.yaml").read_text() == "server: {port: 9}"
        assert (await alone("init", "--force", "--json")).code == 0
        assert "port: 9}" not in (tmp_path / "modelium.yaml").read_text()


class TestCheck:
    async def test_of_this_machine(self, alone: Modelium, tmp_path: Path) -> None:
        ran = await alone("check", "--json", "--root", str(tmp_path / "root"))
        found = {check["name"]: check for check in ran.json["checks"]}
        assert ran.json["service"] is False
        assert found["python"]["ok"]
        assert found["folder repository"]["found"] == f"{tmp_path / 'root' / 'repository'}, to be made"
        assert found["brain"]["found"] == "rules"
        assert "cpu:0" in found["devices"]["found"]
        assert not (tmp_path / "root").exists()

    async def test_it_tells_what_is_wrong(self, alone: Modelium, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            (tmp_path / "c.yaml").write_text(f"server: {{port: {port}}}\nbrain: {{name: ruels}}\ntirton: {{}}\n")
            ran = await alone("check", "--config", "c.yaml", "--root", "root")
        assert ran.code == 1
        assert f"127.0.0.1:{port}: Address already in use" in ran.out
        assert "did you mean 'rules'" in ran.out
        assert "c.yaml line 3: unknown key tirton" in ran.out

    async def test_the_schema(self, alone: Modelium) -> None:
        ran = await alone("check", "--schema")
        assert (ran.code, ran.json["title"]) == (0, "modelium.yaml")


class TestHookspecs:
    async def test_all_of_them(self, alone: Modelium) -> None:
        ran = await alone("hookspecs")
        assert ran.out == (CHECKOUT / "hookspecs.md").read_text()
        assert len((await alone("hookspecs", "--json")).json) == len(described())

    async def test_one(self, alone: Modelium) -> None:
        ran = await alone("hookspecs", "analyze")
        assert "def modelium_analyze(path: Path) -> Analysis | None" in ran.out
        ran = await alone("hookspecs", "modelium_analyse")
        assert (ran.code, "did you mean 'modelium_analyze'" in ran.err) == (1, True)


class TestServe:
    async def test_until_it_is_told_to_end(self, tmp_path: Path, unused_tcp_port: int, alone: Modelium) -> None:
        (tmp_path / "c.yaml").write_text(f"server: {{port: {unused_tcp_port}, grpc_port: 0}}")
        process = await start("serve", "--root", "root", "--config", "c.yaml", "--json", cwd=tmp_path)
        assert process.stderr is not None
        async with asyncio.timeout(60):
            while b"answers on" not in (line := await process.stderr.readline()):
                assert line, "the service ended"
        url = f"http://127.0.0.1:{unused_tcp_port}"
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/livez").read())
        assert answer == b"ok\n"
        assert json.loads(line)["level"] == "info"
        assert (await alone("ps", "--url", url)).code == 0
        again = await alone("serve", "--root", "root", "--port", "0")
        assert (again.code, "is served already" in again.err) == (1, True)
        assert "is served already" in (await alone("down", "--root", "root")).err
        process.send_signal(signal.SIGTERM)
        assert (await finish(process)).code == 0
        checked = await alone("check", "--config", "c.yaml", "--root", "root", "--json")
        left = {row["name"]: row for row in checked.json["checks"]}
        assert left["port"]["ok"] and "haproxy of an earlier service goes on" in left["port"]["found"]
        assert (await alone("down", "--root", "root", "--json")).json == {"ended": ["haproxy"]}
        assert (await alone("down", "--root", "root", "--json")).json == {"ended": []}
        assert (await alone("down", "--root", "typo")).code == 2 and not (tmp_path / "typo").exists()

    async def test_a_port_in_use_is_one_clear_line(self, alone: Modelium) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            ran = await alone("serve", "--root", "root", "--port", str(port))
        assert ran.code == 1
        assert f"port {port} on 127.0.0.1 is in use" in ran.err.splitlines()[-1]

    async def test_a_sample_needs_a_place_to_be_dropped(self, alone: Modelium, tmp_path: Path) -> None:
        (tmp_path / "repo").mkdir()
        ran = await alone("serve", "--repository", "repo", "--sample")
        assert (ran.code, "--sample needs an incoming folder" in ran.err) == (2, True)
