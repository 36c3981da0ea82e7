"""Through the aiohttp path against straight to Triton, in one run. Needs `wrk` (Debian's package of that name)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.service import served

CONFIG = """name: "identity"
backend: "python"
max_batch_size: 0
input [{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }]
instance_group [{ kind: KIND_CPU }]
"""
MODEL = """import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb.InferenceResponse([pb.Tensor("OUTPUT0", pb.get_input_tensor_by_name(r, "INPUT0").as_numpy())])
            for r in requests
        ]
"""
ROUNDS = 5
SECONDS = 4


def identity(path: Path) -> Path:
    """A trivial Python-backend model directory."""
    (path / "1").mkdir(parents=True)
    (path / "config.pbtxt").write_text(CONFIG)
    (path / "1/model.py").write_text(MODEL)
    return path


def wrk(url: str, script: Path, seconds: int = SECONDS, connections: int = 8) -> float:
    """Requests per second; raises when any answer was not 2xx."""
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), url],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    if "Non-2xx" in done.stdout:
        raise AssertionError(done.stdout)
    found = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


def post_script(folder: Path, body: Any) -> Path:
    script = folder / "post.lua"
    script.write_text(
        f"wrk.method='POST'\nwrk.body=[==[{json.dumps(body)}]==]\nwrk.headers['Content-Type']='application/json'\n"
    )
    return script


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    if shutil.which("wrk") is None:
        yield ("aiohttp path against straight", "not measured: wrk is not installed", "")
        return
    body = {"inputs": [{"name": "INPUT0", "shape": [4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    script = post_script(folder, body)
    with served(folder / "root") as service:
        service.drop(identity(folder / "identity"))
        service.until_state("identity", "READY")
        straight_url = service.get("/status")["runtimes"][0]["info"]["endpoints"]
        straight_url = next(e["address"] for e in straight_url if e["protocol"] == "kserve-http")
        path = "/v2/models/identity/infer"
        straight, through = [], []
        for _ in range(ROUNDS):
            straight.append(wrk(straight_url + path, script))
            through.append(wrk(service.url + path, script))
    ratios = sorted(t / s for t, s in zip(through, straight, strict=True))
    yield ("straight to Triton, wrk -t1 -c8, JSON", f"{median(straight):,.0f} requests/s", "")
    yield ("through Modelium's aiohttp path", f"{median(through):,.0f} requests/s", "")
    yield ("ratio", f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", "")
