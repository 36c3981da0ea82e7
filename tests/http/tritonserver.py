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
from typing import Any

from modelium_plugin_triton.install import Wheel, prepare
from modelium_plugin_triton.locate import find_interpreter
from modelium_plugin_triton.settings import TritonSettings

from modelium.api.templates import render
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

WRITER = """
import itertools
import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb
from decoding import decoding
from serving import Refused, failure, strings, text

class TritonPythonModel:
    '''Says the words of its prompt again and again, a word a token, until it has said enough.

    Prompts: `end` ends it, `fail` fails there, `slow` takes a while, `running?` is answered with how many others are
    under way.
    '''

    def initialize(self, args):
        self.running = 0

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request, request.get_response_sender())).start()

    def answer(self, request, sender):
        self.running += 1
        try:
            last = self.write(request, sender)
        except Exception as error:
            last = failure(error)
        self.running -= 1
        sender.send(last, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def write(self, request, sender):
        given = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        sampling = text(given.pop("sampling_parameters", [""])[0], "sampling_parameters")
        others = json.loads(request.parameters() or "{}")
        if "stop" in given:
            others["stop"] = [text(one, "stop") for one in given.pop("stop")]
        prompts = {name: given.pop(name) for name in list(given) if name in ("text_input", "messages", "input_ids")}
        others |= {name: array[0].item() for name, array in given.items()}
        stream = bool(others.pop("stream", False))
        wanted = decoding({"max_tokens": 4}, sampling, others)
        if len(prompts) != 1:
            raise Refused(f"send one of text_input, messages and input_ids; the request has {sorted(prompts)}")
        (name, value), = prompts.items()
        if name == "messages":
            words = [f"{m['role']}:{word}" for m in json.loads(value[0]) for word in m["content"].split()]
        else:
            words = [f"#{i}" for i in value] if name == "input_ids" else text(value[0], name).split()
        if not words:
            raise Refused("the prompt is empty")
        if words == ["running?"]:
            words = [str(self.running - 1)]
        made, reason, shown = [], "length", ""
        for word in itertools.islice(itertools.cycle(words), wanted.max_tokens):
            if word == "fail":
                raise Refused("told to fail")
            if word == "slow":
                time.sleep(0.02)
            if sender.is_cancelled():
                break
            made.append(word)
            if word == "end" or word in wanted.stop:
                reason = "stop"
                break
            piece = " " + word
            shown += piece
            if stream:
                sender.send(pb.InferenceResponse([pb.Tensor("text_output", strings([piece]))]))
        return pb.InferenceResponse([
            pb.Tensor("text_output", strings(["" if stream else shown])),
            pb.Tensor("finish_reason", strings([reason])),
            pb.Tensor("num_input_tokens", np.array([len(words)], np.int32)),
            pb.Tensor("num_output_tokens", np.array([len(made)], np.int32)),
        ])
"""

EMBEDDER = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    '''A text's vector: its length, its words, a third, and how many texts its request had.'''

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        given = pb.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)
        texts = [one.decode() for one in given]
        words = [len(one.split()) for one in texts]
        made = {
            "sentence_embedding": np.array([[len(t), w, 1 / 3, len(texts)] for t, w in zip(texts, words)], np.float32),
            "attention_mask": np.array([[i < w for i in range(max(words))] for w in words], np.int64),
        }
        if set(request.requested_output_names()) != set(made):
            error = pb.TritonError(f"asked for {request.requested_output_names()}", pb.TritonError.INVALID_ARG)
            return pb.InferenceResponse(error=error)
        return pb.InferenceResponse([pb.Tensor(name, value) for name, value in made.items()])
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

TEMPLATED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "writer": ("transformers-text-generation", WRITER, {"tokenizer": "true", "max_tokens": 4, "concurrent": 8}),
    "embedder": ("transformers-feature-extraction", EMBEDDER, {"width": 4, "max_batch_size": 3}),
}
"""Templates whose model.py is another one, which needs no weights; and values for them."""

NAMES = (*MODELS, *TEMPLATED)
DECOUPLED = ("pieces", "writer")


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
    for name, (template, code, values) in TEMPLATED.items():
        common = {"name": name, "device_kind": "cpu", "instances": 1, "model_folder": "", "dtype": "auto", "threads": 0}
        for path, text in {**render(template, {**common, **values}), "1/model.py": code}.items():
            (repository / name / path).parent.mkdir(parents=True, exist_ok=True)
            (repository / name / path).write_text(text)


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
        "--model-control-mode=explicit", *(f"--load-model={name}" for name in NAMES),
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
