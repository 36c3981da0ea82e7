"""What the end-to-end tests are made of: Triton models that a test can hold and count, and looks at what runs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.service import ROOT_MARK, Answer, Served, free_port, processes_of

MODEL = '''\
import json
import os
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = factor * x. In the folder `control` it writes a line for each load and request, and waits while told to."""

    def initialize(self, args):
        told = json.loads(args["model_config"])["parameters"]
        told = {key: value["string_value"] for key, value in told.items()}
        self.factor = float(told["factor"]) * (int(args["model_version"]) if told.get("by_version") else 1)
        self.control = Path(told["control"])
        self.ballast = bytearray(b"1") * int(told.get("ballast_bytes", "0"))
        self.note("loads")
        self.held("hold-load")
        if (self.control / "fail-load").exists():
            raise RuntimeError("told to fail")

    def execute(self, requests):
        answers = []
        for request in requests:
            self.note("requests")
            self.held("hold-infer")
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", (x * self.factor).astype(np.float32))]))
        return answers

    def note(self, what):
        with open(self.control / what, "a") as file:
            file.write(f"{os.getpid()}\\n")

    def held(self, what):
        while (self.control / what).exists():
            time.sleep(0.01)
'''

TALKER = '''\
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Says the words of `text_input` again, each in a response of its own."""

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0].decode()
            for number, word in enumerate(text.split()):
                said = np.array([word if number == 0 else " " + word], dtype=object)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", said)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{version_policy}
{parameters}
"""

ENSEMBLE = """\
name: "{name}"
platform: "ensemble"
max_batch_size: 0
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }} ]
ensemble_scheduling {{
  step [
    {{ model_name: "{first}" model_version: -1
      input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "between" }} }},
    {{ model_name: "{second}" model_version: -1
      input_map {{ key: "x" value: "between" }} output_map {{ key: "y" value: "y" }} }}
  ]
}}
"""

TALKER_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [ {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


# --------------------------------------------------------------------------- Triton models


@dataclass(frozen=True)
class Toy:
    """A Triton model directory whose model multiplies, and the folder by which it is held and counted."""

    path: Path
    control: Path

    @property
    def name(self) -> str:
        return self.path.name

    def count(self, what: str) -> int:
        """How many `loads` or `requests` there were."""
        with suppress(FileNotFoundError):
            return len((self.control / what).read_text().splitlines())
        return 0

    @contextmanager
    def holding(self, what: str) -> Iterator[Callable[[], None]]:
        """Hold every load (`hold-load`) or request (`hold-infer`) until released, at the latest when the block ends."""
        flag = self.control / what
        flag.touch()
        try:
            yield lambda: flag.unlink(missing_ok=True)
        finally:
            flag.unlink(missing_ok=True)


def toy(
    path: Path,
    *,
    factor: float = 2,
    versions: Sequence[int] = (1,),
    ballast_bytes: int = 0,
    control: Path | None = None,
) -> Toy:
    """Write a model directory at `path`; with several versions each multiplies by `factor` times its number."""
    control = control or path.parent / f"{path.name}.control"
    control.mkdir(parents=True, exist_ok=True)
    path.mkdir(parents=True)
    write_toy_config(path, factor=factor, versions=versions, ballast_bytes=ballast_bytes, control=control)
    for version in versions:
        (path / str(version)).mkdir()
        (path / str(version) / "model.py").write_text(MODEL)
    return Toy(path, control)


def write_toy_config(
    path: Path, *, factor: float, control: Path, versions: Sequence[int] = (1,), ballast_bytes: int = 0
) -> None:
    """(Re)write its config.pbtxt in one step."""
    told = {"factor": factor, "control": control, "ballast_bytes": ballast_bytes}
    if len(versions) > 1:
        told["by_version"] = 1
    parameters = "\n".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in told.items())
    policy = "version_policy { all { } }" if len(versions) > 1 else ""
    new = path.parent / f".{path.name}.config"
    new.write_text(CONFIG.format(name=path.name, version_policy=policy, parameters=parameters))
    os.replace(new, path / "config.pbtxt")


def ensemble(path: Path, first: str, second: str) -> Path:
    """One model after the other; the version folder that Triton wants is there, and empty."""
    (path / "1").mkdir(parents=True)
    (path / "config.pbtxt").write_text(ENSEMBLE.format(name=path.name, first=first, second=second))
    return path


def talker(path: Path) -> Path:
    (path / "1").mkdir(parents=True)
    (path / "1" / "model.py").write_text(TALKER)
    (path / "config.pbtxt").write_text(TALKER_CONFIG.format(name=path.name))
    return path


def copied(source: Toy, path: Path) -> Toy:
    """The same model under another name, held and counted by a folder of its own."""
    control = path.parent / f"{path.name}.control"
    control.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source.path, path)
    text = (path / "config.pbtxt").read_text().replace(str(source.control), str(control))
    (path / "config.pbtxt").write_text(text.replace(f'name: "{source.name}"', f'name: "{path.name}"'))
    return Toy(path, control)


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of each file's content, or where a link leads."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# --------------------------------------------------------------------------- asking


class Straight(Served):
    """An address to talk to that is no service of ours."""

    def __init__(self, url: str):
        self.url = url


def x_body(x: Sequence[float] = (1, 2, 3)) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [len(x)], "datatype": "FP32", "data": list(x)}]}


def infer(service: Served, name: str, x: Sequence[float] = (1, 2, 3), **headers: str) -> list[float]:
    """`y` for `x`, by JSON."""
    return list(outputs(service.post(f"/v2/models/{name}/infer", x_body(x), **headers))["y"])


def outputs(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {one["name"]: one["data"] for one in answer["outputs"]}


def refused(service: Served, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """The error answer of a request that must be refused."""
    try:
        answer = service.request(method, path, body, headers)
    except Answer as exc:
        return exc
    raise AssertionError(f"{method} {path} was answered: {answer[:500]!r}")


@dataclass(frozen=True)
class Got:
    """One answer, or why there was none (then the status is 0)."""

    status: int
    body: str
    headers: Mapping[str, str]
    name: str = ""


@asynccontextmanager
async def web(service: Served) -> AsyncIterator[Callable[..., Any]]:
    """`await ask(path, body, headers)` gives a `Got`, as many at once as wanted."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def ask(path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Got:
            try:
                async with session.post(service.url + path, json=body, headers=headers) as answer:
                    return Got(answer.status, await answer.text(), dict(answer.headers), path)
            except aiohttp.ClientError as exc:
                return Got(0, f"{type(exc).__name__}: {exc}", {}, path)

        yield ask


async def eventually(true: Callable[[], Any], what: str, within_s: float = 60) -> Any:
    """Look again and again, off the event loop, until `true()` is; fail after `within_s`."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        found = await asyncio.to_thread(true)
        if found:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited {within_s} s for {what}")


def transitions(service: Served, name: str) -> list[tuple[str, str]]:
    """(state before, state after) of each step in a model's life that is still remembered."""
    return [(t["before"], t["after"]) for t in service.get(f"/models/{name}/explain")["transitions"]]


def triton(service: Served) -> dict[str, Any]:
    """The runtime as `/status` shows it."""
    (found,) = [r for r in service.get("/status")["runtimes"] if r["name"] == "triton"]
    return dict(found)


def triton_address(service: Served, protocol: str = "kserve-http") -> str:
    info = triton(service)["info"]
    return next(str(e["address"]) for e in info["endpoints"] if e["protocol"] == protocol)


# --------------------------------------------------------------------------- looking at processes


def stubs_of(root: Path, name: str = "") -> list[int]:
    """The processes that hold Python models, or the model `name`."""
    return [
        pid
        for pid, command in processes_of(root).items()
        if "triton_python_backend_stub" in command and (not name or f"/{name}/" in command)
    ]


def helpers_of(service: Served) -> list[psutil.Process]:
    """What the service itself runs beside runtimes: inspectors and the like."""
    assert service.process is not None
    found = []
    for child in psutil.Process(service.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if not child.environ().get(ROOT_MARK):
                found.append(child)
    return found


def alive(pids: Iterable[int]) -> list[int]:
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def cp(source: Path, target: Path) -> None:
    """Copy as a person does, file after file."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)


# --------------------------------------------------------------------------- somebody else's tritonserver


@dataclass(frozen=True)
class External:
    """A tritonserver that a person started."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str


@contextmanager
def tritonserver(wheel: Any, repository: Path, *arguments: str) -> Iterator[External]:
    """Run the wheel's server on `repository` with these arguments (`--model-control-mode=...`), and end it later."""
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [str(wheel.executable), f"--model-repository={repository}", f"--backend-directory={wheel.backends}"]
    for name, port in ports.items():
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(wheel.libraries),
        "PATH": f"{wheel.environment.folder}/bin:{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    log = repository.parent / f"{repository.name}-triton.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *arguments], env=env, stdout=out, stderr=out, start_new_session=True)
    external = External(process, f"http://127.0.0.1:{ports['http']}", f"127.0.0.1:{ports['grpc']}")
    try:
        end = time.monotonic() + 60
        while not _lives(external.http):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
        yield external
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its stubs too
        process.wait(30)


def _lives(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/live", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
