"""A real tritonserver for the tests of the templates, and model folders made from layouts as the engine makes them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tritonclient.http
from modelium_plugin_triton import analyzer
from modelium_plugin_triton.backend import TritonBackend

from modelium.api import Analysis, Plan, RuntimeInfo
from modelium.builtin import huggingface, onnx, torchscript

LAB = Path("/tmp/lab/servings")
PYTHON = Path("/tmp/lab/tenv/bin/python")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def analyse(path: Path) -> Analysis:
    found = [a for a in (m.modelium_analyze(path) for m in (analyzer, huggingface, onnx, torchscript)) if a]
    return max(found, key=lambda a: a.confidence)


class Triton:
    def __init__(self, root: Path):
        self.python = PYTHON
        self.repository = root / "repository"
        self.repository.mkdir()
        self.log = root / "triton.log"
        self.port = free_port()
        libdir = subprocess.run(
            [PYTHON, "-c", "import sysconfig;print(sysconfig.get_config_var('LIBDIR'))"], capture_output=True, text=True
        ).stdout.strip()
        env = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libdir}:{LAB}/wheel/nvidia_pytriton.libs",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(LAB / "wheel/pytriton/tritonserver/bin/tritonserver"),
                    "--model-repository",
                    str(self.repository),
                    "--backend-directory",
                    str(LAB / "backends"),
                    "--model-control-mode=explicit",
                    "--http-address=127.0.0.1",
                    "--grpc-address=127.0.0.1",
                    "--metrics-address=127.0.0.1",
                    f"--http-port={self.port}",
                    f"--grpc-port={free_port()}",
                    f"--metrics-port={free_port()}",
                ],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = f"127.0.0.1:{self.port}"
        self.client = tritonclient.http.InferenceServerClient(
            self.url, concurrency=8, network_timeout=120, connection_timeout=120
        )
        self.info = RuntimeInfo(name="triton", version="2.51.0", instance="1", adopted=False, backends=("python",))
        end = time.monotonic() + 30
        while True:
            try:
                if self.client.is_server_live():
                    break
            except Exception:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
            time.sleep(0.1)

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(60)

    def install(self, name: str, drop: Path, **settings: Any) -> None:
        """Make the model's folder as the engine would, from a copy of the drop."""
        analysis = analyse(drop)
        backend = TritonBackend()
        offer = backend.offers(analysis, self.info, ())[0]
        plan = Plan(
            brain="test",
            runtime="triton",
            serving=offer.serving,
            device_kind="cpu",
            settings={**offer.settings, **settings},
            memory_bytes=offer.memory_bytes,
            load_s=offer.load_s,
            reason="a test wants it",
            confidence=1,
        )
        layout = backend.layout(name, analysis, plan)
        for to, source in layout.files.items():
            place = self.repository / name / to
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(drop / source, place) if (drop / source).is_dir() else shutil.copy(
                drop if source == "." else drop / source, place
            )
        for to, text in layout.texts.items():
            place = self.repository / name / to
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")

    def load(self, name: str, config: dict[str, Any] | None = None) -> None:
        self.client.load_model(name, config=json.dumps(config) if config else None)

    @contextmanager
    def serving(self, name: str, drop: Path, **settings: Any) -> Iterator[str]:
        self.install(name, drop, **settings)
        self.load(name)
        try:
            yield name
        finally:
            self.client.unload_model(name)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"http://{self.url}/v2/models/{path}", data=json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
