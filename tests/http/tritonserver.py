"""A real tritonserver with a few small models, for the tests of this folder."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelium_plugin_triton.install import Wheel, prepare
from modelium_plugin_triton.locate import find_interpreter
from modelium_plugin_triton.settings import TritonSettings

from modelium.paths import cache_dir

IDENTITY = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb.InferenceResponse([pb.Tensor("OUTPUT0", pb.get_input_tensor_by_name(r, "INPUT0").as_numpy())])
            for r in requests
        ]
"""

PIECES = """
import time

import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            text = pb.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0]
            if text == b"raise":
                raise ValueError("it broke")
            count = pb.get_input_tensor_by_name(request, "count")
            count = 3 if count is None else int(count.as_numpy().reshape(-1)[0])
            if count < 0:
                error = pb.TritonError("count is negative", pb.TritonError.INVALID_ARG)
                sender.send(pb.InferenceResponse(error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            for number in range(count):
                if text == b"slow":
                    time.sleep(0.05)
                if sender.is_cancelled():
                    break
                piece = np.array([text + b" %d." % number], dtype=object)
                numbers = [pb.Tensor("number", np.array([number], dtype=np.int32))] if text == b"numbers" else []
                sender.send(pb.InferenceResponse([pb.Tensor("text_output", piece), *numbers]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

MODELS = {
    "identity": (
        IDENTITY,
        """
max_batch_size: 8
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
""",
    ),
    "echo": (
        IDENTITY,
        """
input [ { name: "INPUT0" data_type: TYPE_STRING dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_STRING dims: [ -1 ] } ]
""",
    ),
    "pieces": (
        PIECES,
        """
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "count" data_type: TYPE_INT32 dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "number" data_type: TYPE_INT32 dims: [ 1 ] }
]
""",
    ),
}
"""model.py and the rest of config.pbtxt, by name."""


@dataclass
class Triton:
    url: str
    grpc: str
    process: subprocess.Popen[bytes]


def write_models(repository: Path) -> None:
    for name, (code, config) in MODELS.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(code)
        head = f'name: "{name}"\nbackend: "python"\ninstance_group [ {{ kind: KIND_CPU }} ]'
        (repository / name / "config.pbtxt").write_text(head + config)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


async def _prepared() -> Wheel:
    return await prepare(cache_dir(), await find_interpreter(TritonSettings()), (), lambda progress: None)


@contextmanager
def running(folder: Path) -> Iterator[Triton]:
    """tritonserver from the wheel in the user's cache, made at the first use, with all models loaded."""
    wheel = asyncio.run(_prepared())
    repository = folder / "repository"
    write_models(repository)
    http, grpc, metrics = free_ports(3)
    libraries = (wheel.libraries, wheel.executable.parents[3] / "nvidia_pytriton.libs")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": f"{wheel.environment.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        str(wheel.executable), f"--model-repository={repository}", f"--backend-directory={wheel.backends}",
        "--model-control-mode=explicit", *(f"--load-model={name}" for name in MODELS),
        "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}",
    ]  # fmt: skip
    log = folder / "triton.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{http}"
        _until_ready(url, process, log)
        yield Triton(url, f"127.0.0.1:{grpc}", process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"tritonserver did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.05)
