"""The inspector against real processes, with plugins that hang, die, print and lie."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from modelium.api import Finding, Inspection, Severity
from modelium.engine.inspect_worker import content_key
from modelium.engine.inspector import Inspector
from modelium.errors import ModelError, PluginError
from modelium.host import Failure
from tests.builtin.making import evil_pickle, hugging_face, onnx_model, zip_checkpoint

DATA = Path(__file__).parents[1] / "builtin" / "data"

PLUGIN = '''
"""Does to the process what the name of the drop says."""

import os, resource, signal, socket, sys, time
from modelium.api import Analysis, Completeness, Finding, hookimpl

MODELIUM_HOOKSPEC_VERSION = (1, 0)


def facts():
    try:
        socket.create_connection(("127.0.0.1", int(os.environ.get("NO_SUCH", "9"))), timeout=1)
        network = "open"
    except OSError as exc:
        network = type(exc).__name__
    return {
        "secret": os.environ.get("MODELIUM_TEST_SECRET"),
        "memory": resource.getrlimit(resource.RLIMIT_AS)[0],
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "pid": os.getpid(),
        "nice": os.nice(0),
    }


@hookimpl
def modelium_completeness(path):
    if path.suffix == ".rude" and path.stem == "hang":
        time.sleep(3600)


@hookimpl
def modelium_analyze(path):
    if path.suffix != ".rude":
        return None
    match path.stem:
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "spin":
            while True:
                pass
        case "once":
            marker = path.with_suffix(".marker")
            if not marker.exists():
                marker.touch()
                time.sleep(3600)
        case "stubborn":
            path.with_suffix(".marker").touch()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        case "eat":
            bytearray(64 << 30)
        case "raise":
            raise RuntimeError("a mistake of the plugin")
        case "print":
            print('{"result": {"content_key": "forged"}}', flush=True)
            os.write(1, b"noise\\n")
    return Analysis(analyzer="rude", format="rude", summary="x", confidence=1, facts=facts())


class Converter:
    name = "rude"

    def accepts(self, path, codes):
        return path.suffix == ".rude" and "rude" in codes

    def convert(self, path, target):
        target.mkdir()
        (target / "half").write_text("written")
        if path.stem == "hang":
            time.sleep(3600)
        if path.stem == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"


@hookimpl
def modelium_converters():
    return [Converter()]
'''


@pytest.fixture
def rude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Install the plugin as pip would, and make drops for it."""
    site = tmp_path / "site"
    info = site / "rude_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "rude_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rude-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelium]\nrude = rude_plugin\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])

    def drop(name: str) -> Path:
        path = tmp_path / f"{name}.rude"
        path.write_text("x")
        return path

    return drop


@contextlib.asynccontextmanager
async def running(**more: float) -> AsyncIterator[Inspector]:
    inspector = Inspector(**more)  # type: ignore[arg-type]
    try:
        yield inspector
    finally:
        await inspector.close()
        assert children() == []


def children() -> list[psutil.Process]:
    """Those that live: one that has ended, of any test, may still have to be reaped."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("inspect_worker" in argument for argument in process.cmdline()):
                found.append(process)
    return found


async def pid_of(inspector: Inspector, drop: Callable[[str], Path]) -> int:
    found = (await inspector.inspect(drop("plain"))).analysis
    assert found is not None
    return int(found.facts["pid"])


# --------------------------------------------------------------------------- looking at drops


async def test_an_onnx_file(tmp_path: Path) -> None:
    path = onnx_model(tmp_path / "x.onnx")
    async with running() as inspector:
        told = await inspector.completeness(path)
        assert told is not None
        assert told.complete
        found = await inspector.inspect(path)
        assert found.analysis is not None
        assert (found.analysis.format, found.total_bytes) == ("onnx", path.stat().st_size)
        assert found.content_key == content_key(path)[0]
        path.write_bytes(path.read_bytes()[:-3])
        told = await inspector.completeness(path)
        assert told is not None
        assert not told.complete
        with pytest.raises(ModelError, match="copy it again, whole") as caught:
            await inspector.inspect(path)
        assert caught.value.code == "truncated"
        assert caught.value.fields["have_bytes"] == path.stat().st_size


async def test_what_is_refused_is_not_analysed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = zip_checkpoint(tmp_path / "x.pt", evil_pickle(marker))
    async with running() as inspector:
        found = await inspector.inspect(path)
        assert [f.severity for f in found.findings] == [Severity.REFUSE]
        assert found.analysis is None
        assert len(found.content_key) == 64
    assert not marker.exists()


async def test_many_at_once(tmp_path: Path) -> None:
    paths = [onnx_model(tmp_path / f"{i}.onnx", size=i + 1) for i in range(10)]
    async with running() as inspector:
        found = await asyncio.gather(*(inspector.inspect(path) for path in paths))
        assert [f.analysis.parameters for f in found if f.analysis] == [(i + 1) ** 2 for i in range(10)]
        assert len(children()) == 1


async def test_a_disabled_plugin_is_not_heard(tmp_path: Path) -> None:
    inspector = Inspector(disabled=["onnx"])
    with pytest.raises(ModelError, match="not a model that any analyzer knows"):
        await inspector.inspect(onnx_model(tmp_path / "x.onnx"))
    await inspector.close()


async def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    async with running() as inspector:
        with pytest.raises(ModelError, match="not UTF-8"):
            await inspector.inspect(tmp_path / os.fsdecode(b"\xff.onnx"))


# --------------------------------------------------------------------------- a process that can be lost


@pytest.mark.parametrize(
    ("name", "how"), [("die", "SIGSEGV"), ("exit", "exit status 3"), ("spin", "more than"), ("stubborn", "more than")]
)
async def test_a_death_costs_one_drop(rude: Callable[[str], Path], name: str, how: str) -> None:
    async with running(inspect_s=1.5) as inspector:
        before = await pid_of(inspector, rude)
        with pytest.raises(ModelError, match=how) as caught:
            await inspector.inspect(rude(name))
        assert caught.value.code in ("inspection_died", "inspection_timeout")
        assert f"{name}.rude" in caught.value.message
        assert not psutil.pid_exists(before)
        assert await pid_of(inspector, rude) != before


async def test_of_many_asked_at_once_each_has_its_own_answer(rude: Callable[[str], Path], tmp_path: Path) -> None:
    good = [onnx_model(tmp_path / f"{i}.onnx", size=i + 1) for i in range(4)]
    unknown = tmp_path / "x.txt"
    unknown.write_text("nothing")
    paths = [good[0], rude("die"), good[1], rude("spin"), unknown, good[2], rude("exit"), good[3]]
    async with running(inspect_s=5) as inspector:
        found = await inspector.inspect_all(paths)
        told = [f.analysis.parameters if isinstance(f, Inspection) and f.analysis else f for f in found]
        assert [told[i] for i in (0, 2, 5, 7)] == [1, 4, 9, 16]
        assert [getattr(told[i], "code", None) for i in (1, 3, 4, 6)] == [
            "inspection_died",
            "inspection_timeout",
            "unknown_format",
            "inspection_died",
        ]
        assert await inspector.inspect_all([]) == []


async def test_what_else_kills_the_process_costs_no_drop(rude: Callable[[str], Path]) -> None:
    async with running() as inspector:
        before = await pid_of(inspector, rude)
        call = asyncio.create_task(inspector.inspect(rude("once")))
        while not (rude("once").parent / "once.marker").exists():
            await asyncio.sleep(0.02)
        os.kill(before, signal.SIGKILL)
        assert (await call).analysis is not None


async def test_closing_blames_no_drop(rude: Callable[[str], Path]) -> None:
    async with running() as inspector:
        await inspector.start()
        call = asyncio.create_task(inspector.inspect(rude("stubborn")))
        while not (rude("stubborn").parent / "stubborn.marker").exists():
            await asyncio.sleep(0.02)
        await inspector.close()
        with pytest.raises(PluginError, match="the service is stopping"):
            await call
        with pytest.raises(PluginError, match="the service is stopping"):
            await inspector.inspect(rude("plain"))


async def test_completeness_has_a_limit_too(rude: Callable[[str], Path]) -> None:
    async with running(completeness_s=1) as inspector:
        with pytest.raises(ModelError, match="took more than 1 s"):
            await inspector.completeness(rude("hang"))
        assert await inspector.completeness(rude("plain")) is None


async def test_memory_has_a_limit(rude: Callable[[str], Path]) -> None:
    async with running() as inspector:
        with pytest.raises(ModelError, match="MemoryError"):
            await inspector.inspect(rude("eat"))
        assert await pid_of(inspector, rude)


async def test_a_cancelled_call_leaves_the_next_one_right(rude: Callable[[str], Path], tmp_path: Path) -> None:
    async with running() as inspector:
        before = await pid_of(inspector, rude)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inspector.inspect(rude("stubborn")), 0.3)
        assert not psutil.pid_exists(before)
        found = await inspector.inspect(onnx_model(tmp_path / "x.onnx"))
        assert found.analysis is not None
        assert found.analysis.format == "onnx"


async def test_what_a_plugin_prints_is_no_answer(rude: Callable[[str], Path]) -> None:
    async with running() as inspector:
        found = await inspector.inspect(rude("print"))
        assert found.analysis is not None
        assert found.content_key != "forged"


async def test_a_plugins_mistake_is_reported_once(rude: Callable[[str], Path]) -> None:
    noted: list[Failure] = []
    inspector = Inspector(note=noted.extend)
    for _ in range(2):
        with pytest.raises(ModelError, match="a mistake of the plugin"):
            await inspector.inspect(rude("raise"))
    await inspector.close()
    assert [(f.plugin, f.where, f.count) for f in noted] == [("rude", "modelium_analyze", 1)] * 2


async def test_a_process_that_can_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running(memory_bytes=1 << 20) as inspector:
        with pytest.raises(PluginError, match="did not start"):
            await inspector.inspect(onnx_model(tmp_path / "x.onnx"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    async with running() as inspector:
        with pytest.raises(PluginError, match="exit status 1"):
            await inspector.start()


async def test_limits_and_surroundings(rude: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELIUM_TEST_SECRET", "hunter2")
    async with running(memory_bytes=3 << 30) as inspector:
        found = (await inspector.inspect(rude("plain"))).analysis
        assert found is not None
        facts = found.facts
        assert (facts["secret"], facts["memory"], facts["core"]) == (None, 3 << 30, 0)
        assert facts["nice"] >= 5
        if os.geteuid() == 0:  # who may make a network namespace has left the network
            assert set(facts["interfaces"]) <= {"lo"} | {n for n in facts["interfaces"] if "tun" in n or "sit" in n}


async def test_it_ends_with_the_service(tmp_path: Path) -> None:
    """A service that is killed leaves no process behind."""
    code = (
        "import asyncio, os, signal\n"
        "from modelium.engine.inspector import Inspector\n"
        "async def main():\n"
        "    inspector = Inspector()\n"
        "    await inspector.start()\n"
        "    import psutil\n"
        "    print(psutil.Process().children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).parents[2])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    out, _ = await process.communicate()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(out)) and psutil.Process(int(out)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


# --------------------------------------------------------------------------- converting


async def test_pickled_weights_are_converted(tmp_path: Path) -> None:
    drop = Path(shutil.copytree(DATA / "bert", tmp_path / "bert"))
    async with running() as inspector:
        found = await inspector.inspect(drop)
        assert [f.code for f in found.findings] == ["pickle"]
        note = await inspector.convert(drop, tmp_path / "out", found.findings)
        assert "written as safetensors" in note
        again = await inspector.inspect(tmp_path / "out")
        assert again.findings == ()
        assert again.analysis is not None
        assert again.analysis.facts["weights"] == "safetensors"


async def test_what_no_converter_takes(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "state_dict.pt", tmp_path / "x.pt"))
    async with running() as inspector:
        found = await inspector.inspect(path)
        with pytest.raises(ModelError, match="no converter takes it") as caught:
            await inspector.convert(path, tmp_path / "out", found.findings)
        assert caught.value.code == "not_convertible"
        refused = Finding(severity=Severity.REFUSE, code="pickle_code", message="it asks for posix.system")
        with pytest.raises(ModelError, match=r"posix.system"):
            await inspector.convert(path, tmp_path / "out", [*found.findings, refused])


@pytest.mark.parametrize(("name", "how"), [("hang", "more than"), ("die", "SIGKILL")])
async def test_a_conversion_that_is_lost_leaves_nothing(
    rude: Callable[[str], Path], tmp_path: Path, name: str, how: str
) -> None:
    finding = Finding(severity=Severity.CONVERT, code="rude", message="x")
    async with running(convert_s=2) as inspector:
        with pytest.raises(ModelError, match=how):
            await inspector.convert(rude(name), tmp_path / "out", [finding])
        assert not (tmp_path / "out").exists()
        assert await inspector.convert(rude("fine"), tmp_path / "out", [finding]) == "done"
        assert (tmp_path / "out" / "half").exists()


async def test_a_conversion_keeps_nobody_waiting(rude: Callable[[str], Path], tmp_path: Path) -> None:
    finding = Finding(severity=Severity.CONVERT, code="rude", message="x")
    async with running() as inspector:
        conversion = asyncio.create_task(inspector.convert(rude("hang"), tmp_path / "out", [finding]))
        while not (tmp_path / "out").exists():
            await asyncio.sleep(0.02)
        assert (await inspector.inspect(onnx_model(tmp_path / "x.onnx"))).analysis is not None
        conversion.cancel()
        with pytest.raises(asyncio.CancelledError):
            await conversion
        assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- the content key


def test_the_key_is_of_contents_not_of_places(tmp_path: Path) -> None:
    one, two = hugging_face(tmp_path / "one"), hugging_face(tmp_path / "two")
    assert content_key(one) == content_key(two)
    assert content_key(one)[1] == sum(p.stat().st_size for p in one.iterdir())
    (two / "tokenizer.json").rename(two / "other.json")
    assert content_key(one)[0] != content_key(two)[0]
    file, other = onnx_model(tmp_path / "a.onnx"), onnx_model(tmp_path / "b.onnx")
    assert content_key(file) == content_key(other)


@pytest.mark.parametrize(("place", "seen"), [(0, True), (65_535, True), (100_000, False), (299_999, True)])
def test_the_edges_of_each_file_count(tmp_path: Path, place: int, seen: bool) -> None:
    data = bytearray(300_000)
    (tmp_path / "x").write_bytes(data)
    before = content_key(tmp_path / "x")[0]
    data[place] = 1
    (tmp_path / "x").write_bytes(data)
    assert (content_key(tmp_path / "x")[0] != before) is seen


def test_the_key_waits_for_no_pipe_and_follows_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "x").write_text("123")
    assert content_key(tmp_path)[1] == 3
