"""Of a runtime that speaks OpenAI, nothing but the listed routes can be reached from outside, over either data path.

A vLLM in development mode puts its models to sleep, runs methods by name and takes new weights for whoever asks: those
routes are for Modelium alone. Whatever a path looks like, what reaches the runtime must be a route that is meant.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from modelium.http.openai import PASSED_ON
from tests.bench import constant
from tests.service import Served, served

ALLOWED = {f"/v1/{route}" for route in ("chat/completions", "completions", "embeddings", *PASSED_ON)}

DANGEROUS = (
    "/abort_requests", "/collective_rpc", "/detokenize", "/generative_scoring", "/invocations", "/is_sleeping", "/load",
    "/metrics", "/openapi.json", "/pause", "/ping", "/release_kv_cache_memory", "/reset_mm_cache", "/resume",
    "/reset_prefix_cache", "/scale_elastic_ep", "/server_info", "/sleep", "/start_profile", "/tokenize", "/version",
    "/update_weights", "/v1/chat/completions/batch", "/v1/load_lora_adapter", "/v1/messages/count_tokens",
    "/v1/responses/1/cancel", "/v1/unload_lora_adapter", "/wake_up",
)  # fmt: skip
"""What vLLM 0.32 has besides, some of it only in development mode."""

DISGUISES = r"""
{route} {route}/ {route}. {route}?/v1/completions {route}%3f/v1/completions {route}%23/v1/completions
{route}/v1/completions {route};/v1/completions {bare} {upper} /{hidden} /{letters} /v1{route} /v1/{letters} /%2f{bare}
/{route} //{route} /.{route} /%2e{route} /\{bare} /%5c{bare} /v1/..{route} /v1/%2e%2e{route} /v1//../..{route}
/V1/..{route} /v1\..\{bare} /v1/x/..{route} /v1/..%2f{hidden} /v1/%2e%2e%2f{hidden} /v1/..%252f{hidden}
/%252e%252e%252f{hidden} /v1/..%c0%af{bare} /v1/.%00./{bare}
/v1/completions{route} /v1/completions/../..{route} /v1/completions/%2e%2e/%2E%2E{route} /v1/completions;/../..{route}
/v1/completions%3b/../..{route} /v1/completions%00/../..{route} /v1/completions%20{route} /v1/completions\..\..\{bare}
/v1/completions%5c..%5c..%5c{bare} /v1/completions%2f..%2f..%2f{hidden} /v1/completions/..%2f..%2f{hidden}
/v1/completions?/../..{route} /v1/completions#/../..{route} /v1/completions%3f/../..{route}
/v1/completions%23/../..{route} /v1/responses/../..{route} /v1/audio/..{route} /v1/audio/../..{route}
/v1/models/../..{route} /v1/models/..%2f..%2f{hidden} /v1/models/constant%2f..%2f..%2f..%2f{hidden}
/predict/..%2f{hidden} /predict/constant/../..{route} /predict/constant%2f..%2f..%2f{hidden}
/v2/models/..%2f..%2f{hidden} /v2/models/..%2f..%2f{hidden}/infer /v2/models/constant/../../..{route}
/v2/models/constant%2f..%2f..%2f..%2f{hidden} /v2/models/constant%2f..%2f..%2f..%2f{hidden}%3f/infer
/v2/models/constant/versions/..%2f..%2f..%2f..%2f{hidden}/infer /v2/models/constant/versions/1/../../../../..{route}
http://{front}{route} http://{front}//{runtime}{route} http://{front}/v1/completions/../..{route}
http://{runtime}{route} https://{runtime}{route} http://{runtime}/v1/completions/../..{route}
//{runtime}{route} @{runtime}{route} {runtime}{route} http://{front}@{runtime}{route}
"""
"""Request targets by which somebody may try to reach a `route` of the runtime."""


def disguises(route: str, front: str, runtime: str) -> list[str]:
    bare = route.removeprefix("/")
    parts = {
        "route": route, "bare": bare, "upper": route.upper(), "hidden": bare.replace("/", "%2f"), "front": front,
        "letters": "/".join(f"%{ord(part[0]):02x}{part[1:]}" for part in bare.split("/")), "runtime": runtime,
    }  # fmt: skip
    return [disguise.format(**parts) for disguise in DISGUISES.split()]


@dataclass
class Runtime:
    address: str = ""
    targets: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """It does whatever it is asked, and notes what that was."""
    seen = Runtime()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.targets.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b'{"choices": [{"text": "a", "finish_reason": "stop"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_DELETE = do_CONNECT = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    seen.address = f"127.0.0.1:{server.server_port}"
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=["service", "haproxy"])
def service(
    request: pytest.FixtureRequest, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    env = {**constant.installed(folder / "site"), "MODELIUM_BENCH_UPSTREAM": f"http://{runtime.address}"}
    config = {"server": {"data_path": request.param}, "plugins": {"disable": ["triton"]}}
    with served(folder / "root", config, env=env) as service:
        (folder / "constant").write_bytes(constant.MARK)
        service.drop(folder / "constant")
        service.until_state("constant", "READY", "COLD")
        service.post("/models/constant/load")
        service.until_state("constant", "READY")
        assert service.get("/status")["data_path"]["name"] == request.param
        yield service


async def asked(service: Served, method: str, targets: list[str]) -> list[int]:
    """The status of each; 0 where the connection just ends."""
    limit = asyncio.Semaphore(16)
    body = json.dumps({"model": "constant", "prompt": "a", "text": "a"}).encode()

    async def one(target: str) -> int:
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: {service.address}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        async with limit:
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            try:
                writer.write(head.encode() + body)
                answer = await reader.read()
            except ConnectionError:
                return 0
            finally:
                writer.close()
        return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/") else 0

    return await asyncio.gather(*map(one, targets))


def meant(target: str) -> str:
    """The path that a runtime may take a target for, however often it decodes it."""
    path = urlsplit(target).path if target.startswith("http") else target.partition("?")[0]
    while (decoded := unquote(path)) != path:
        path = decoded
    return posixpath.normpath(path.replace("\\", "/")).lower()


async def test_what_is_listed_is_reached(service: Served, runtime: Runtime) -> None:
    runtime.targets.clear()
    routes = sorted(ALLOWED)
    assert await asked(service, "POST", routes) == [200] * len(routes)
    assert sorted(runtime.targets) == routes


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_nothing_else_is(service: Served, runtime: Runtime, method: str) -> None:
    runtime.targets.clear()
    targets = [*DANGEROUS, *(f"http://{runtime.address}{route}" for route in DANGEROUS)]
    for route in ("/sleep", "/collective_rpc", "/v1/load_lora_adapter"):
        targets += disguises(route, service.address, runtime.address)
    assert len(targets) > 250
    assert 404 in await asked(service, method, targets)
    assert {meant(target) for target in runtime.targets} <= ALLOWED


async def test_no_other_method_reaches_it(service: Served, runtime: Runtime) -> None:
    runtime.targets.clear()
    targets = [*ALLOWED, *DANGEROUS, f"http://{runtime.address}/sleep", runtime.address, "*"]
    for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "post"):
        await asked(service, method, targets)
    assert runtime.targets == []
