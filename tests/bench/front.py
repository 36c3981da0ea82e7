"""What it costs to reach a loaded model, all ways side by side in one run: straight, by plain proxies, by Modelium.

Needs `wrk` (Debian's package of that name); `nginx` is measured where it is installed.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import aiohttp
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.e2e.kit import talker
from tests.service import Served, free_port, served

CONFIG = """backend: "python"
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
T = TypeVar("T")

ROUNDS = 5
SECONDS = 4
PATH = "/v2/models/identity/infer"
BODY = {"inputs": [{"name": "INPUT0", "shape": [4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}

HAPROXY = """\
global
    nbthread 1
defaults
    mode http
    http-reuse always
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    server one {address}
"""

NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
{inside}
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
}}
"""

PROXY = """\
upstream back {{ server {address}; keepalive 32; }}
server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://back; proxy_http_version 1.1; proxy_set_header Connection ""; }}
}}
"""


def identity(path: Path) -> Path:
    """A trivial Python-backend model directory."""
    (path / "1").mkdir(parents=True)
    (path / "config.pbtxt").write_text(CONFIG)
    (path / "1/model.py").write_text(MODEL)
    return path


def post_script(folder: Path, body: Any) -> Path:
    script = folder / "post.lua"
    script.write_text(
        f"wrk.method='POST'\nwrk.body=[==[{json.dumps(body)}]==]\nwrk.headers['Content-Type']='application/json'\n"
    )
    return script


@contextmanager
def running(*command: str | Path) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        assert process.poll() is None, f"{command} ended"
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def nginx(folder: Path, inside: str) -> Iterator[None]:
    """One worker with this in its `http` block; its files lie in `folder`, which is its own."""
    folder.mkdir()
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, inside=inside))
    with running("nginx", "-c", folder / "nginx.conf"):
        yield


def wrk(url: str, script: Path, connections: int = 8) -> tuple[float, float, float]:
    """Requests per second, and median and 99th percentile of the latency in ms. Raises when an answer was not 2xx."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency", "-s", str(script), url]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise AssertionError(said)
    (rate,) = re.findall(r"Requests/sec:\s+([\d.]+)", said)
    took = dict(re.findall(r"\s(50|99)%\s+([\d.]+(?:us|ms|s))", said))
    return float(rate), _ms(took["50"]), _ms(took["99"])


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def side_by_side(targets: Mapping[str, str], measure: Callable[[str], T]) -> dict[str, list[T]]:
    """Each target measured once in each round, since a machine's speed drifts."""
    found: dict[str, list[T]] = {name: [] for name in targets}
    for _ in range(ROUNDS):
        for name, target in targets.items():
            found[name].append(measure(target))
    return found


def ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds."""
    return median(rate / other for rate, other in zip(rates, base, strict=True))


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    if shutil.which("wrk") is None:
        yield ("the front door", "not measured: wrk is not installed", "")
        return
    from modelium_plugin_haproxy.locate import find_executable
    from modelium_plugin_haproxy.settings import HAProxySettings

    haproxy = find_executable(HAProxySettings())
    script = post_script(folder, BODY)
    by_service = {"server": {"data_path": "service"}}
    with served(folder / "fast") as fast, served(folder / "slow", by_service) as slow, ExitStack() as stack:
        for service in (fast, slow):
            service.drop(identity(folder / service.root.name / "identity"))
            service.until_state("identity", "READY")
        address = _address(fast, "kserve-http").removeprefix("http://")
        plain, web = free_port(), free_port()
        (folder / "plain.cfg").write_text(HAPROXY.format(port=plain, address=address))
        stack.enter_context(running(haproxy, "-db", "-f", folder / "plain.cfg"))
        urls = {
            "straight to Triton": f"http://{address}",
            "plain HAProxy, one thread": f"http://127.0.0.1:{plain}",
            "Modelium over HAProxy": fast.url,
            "Modelium over aiohttp": slow.url,
        }
        if shutil.which("nginx"):
            stack.enter_context(nginx(folder / "nginx", PROXY.format(port=web, address=address)))
            urls["nginx, one worker"] = f"http://127.0.0.1:{web}"
        found = side_by_side(urls, lambda url: wrk(url + PATH, script))
        bars = {"Modelium over HAProxy": "0.85 of plain HAProxy", "Modelium over aiohttp": "0.35 of plain HAProxy"}
        for name, runs in found.items():
            rates, base = ([rate for rate, _, _ in each] for each in (runs, found["plain HAProxy, one thread"]))
            told = f"{median(rates):,.0f} requests/s, {ratio(rates, base):.2f} of plain HAProxy"
            yield (f"{name}, wrk -t1 -c8", told, bars.get(name, ""))
        for name, url in urls.items():
            _, middle, tail = wrk(url + PATH, script, connections=1)
            yield (f"{name}, one connection", f"median {middle:.2f} ms, p99 {tail:.2f} ms", "")
        yield from _grpc(fast, slow)
        yield from _large(fast, slow, address)
        yield from _streams(fast, slow, folder, address)


def _address(service: Served, protocol: str) -> str:
    triton = next(r for r in service.get("/status")["runtimes"] if r["name"] == "triton")
    endpoints = triton["info"]["endpoints"]
    return next(str(e["address"]) for e in endpoints if e["protocol"] == protocol)


def _grpc(fast: Served, slow: Served) -> Iterator[tuple[str, str, str]]:
    targets = {
        "straight": _address(fast, "kserve-grpc"),
        "over HAProxy": fast.grpc_address(),
        "over Python": slow.grpc_address(),
    }
    for callers in (1, 8):
        rates = side_by_side(targets, lambda target, callers=callers: asyncio.run(_infer(target, callers)))  # type: ignore[misc]
        base = rates["straight"]
        for name, found in rates.items():
            bar = "0.6 of straight" if name == "over HAProxy" else ""
            told = f"{median(found):,.0f} calls/s, {ratio(found, base):.2f} of straight"
            yield (f"gRPC ModelInfer {name}, {callers} caller(s)", told, bar)


async def _infer(target: str, callers: int, seconds: float = 2.0) -> float:
    request = pb.ModelInferRequest(model_name="identity")
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    async with grpc.aio.insecure_channel(target) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        await stub.ModelInfer(request)
        end, done = time.perf_counter() + seconds, 0

        async def call() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await stub.ModelInfer(request)
                done += 1

        await asyncio.gather(*(call() for _ in range(callers)))
    return done / seconds


def _large(fast: Served, slow: Served, straight: str) -> Iterator[tuple[str, str, str]]:
    urls = {"straight": f"http://{straight}", "over HAProxy": fast.url, "over aiohttp": slow.url}
    for mega in (1, 16):
        rates = side_by_side(urls, lambda url, mega=mega: asyncio.run(_megabytes(url, mega)))  # type: ignore[misc]
        base = rates["straight"]
        for name, found in rates.items():
            yield (
                f"{mega} MB binary there and back, {name}",
                f"{median(found):,.0f} MB/s, {ratio(found, base):.2f} of straight",
                "",
            )


async def _megabytes(url: str, mega: int) -> float:
    count = mega * 250_000
    wanted: dict[str, Any] = {
        "inputs": [
            {"name": "INPUT0", "datatype": "FP32", "shape": [count], "parameters": {"binary_data_size": count * 4}}
        ],
        "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(wanted).encode()
    body = head + bytes(count * 4)
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    times = max(3, 32 // mega)
    async with aiohttp.ClientSession() as session:
        start = time.perf_counter()
        for _ in range(times):
            async with session.post(url + PATH, data=body, headers=headers) as answer:
                assert answer.status == 200 and len(await answer.read()) > count * 4
    return 2 * times * mega / (time.perf_counter() - start)


def _streams(fast: Served, slow: Served, folder: Path, straight: str) -> Iterator[tuple[str, str, str]]:
    """From the request until the first of a stream's answers is there."""
    for service in (fast, slow):
        service.drop(talker(folder / f"{service.root.name}-talker" / "talker"))
        service.until_state("talker", "READY")
    urls = {"straight": f"http://{straight}", "over HAProxy": fast.url, "over aiohttp": slow.url}
    took = side_by_side(urls, lambda url: asyncio.run(_first_token_ms(url)))
    base = median(took["straight"])
    for name, found in took.items():
        added = f", {median(found) - base:+.2f} ms" if name != "straight" else ""
        yield (f"first token of a stream, {name}", f"median {median(found):.2f} ms{added}", "")


async def _first_token_ms(url: str, times: int = 200) -> float:
    body = {"text_input": "one two three", "stream": True}
    took = []
    async with aiohttp.ClientSession() as session:
        for _ in range(times):
            start = time.perf_counter()
            async with session.post(f"{url}/v2/models/talker/generate_stream", json=body) as answer:
                assert b"one" in await answer.content.readline()
                took.append(time.perf_counter() - start)
                await answer.read()
    return 1000 * median(took)
