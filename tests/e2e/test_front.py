"""The front door with HAProxy: clients of loaded models notice no restart of Modelium, nor models that come and go."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc as grpc_client

from tests.e2e.kit import Straight, Toy, eventually, infer, toy, triton_address, x_body
from tests.service import MODELIUM, Served, free_port

MIB = 2**20


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path / "root", {"orchestration": {"policies": {"min_resident_seconds": 0}}})
    try:
        service.start()
        assert service.get("/status")["data_path"]["name"] == "haproxy"
        yield service
    finally:
        service.down()


def dropped(service: Served, folder: Path, name: str, **told: int) -> Toy:
    made = toy(folder / name, **told)  # type: ignore[arg-type]
    service.drop(made.path)
    service.until_state(name, "READY")
    return Toy(service.root / "repository" / name, made.control)


@dataclass
class Load:
    """Clients that ask again and again, each on a connection that it keeps."""

    answered: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return self.answered.total()


@asynccontextmanager
async def load(service: Served, *names: str, clients: int = 4) -> AsyncIterator[Load]:
    over, found = asyncio.Event(), Load()

    async def client(name: str) -> None:
        async with aiohttp.ClientSession() as web:
            while not over.is_set():
                try:
                    async with web.post(f"{service.url}/v2/models/{name}/infer", json=x_body([3])) as answer:
                        right = answer.status == 200 and (await answer.json())["outputs"][0]["data"] == [6]
                        found.answered["right" if right else f"{answer.status} {await answer.text()}"] += 1
                except aiohttp.ClientError as exc:
                    found.answered[repr(exc)] += 1

    tasks = [asyncio.create_task(client(name)) for name in names for _ in range(clients)]
    try:
        yield found
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def more(found: Load, count: int) -> None:
    before = found.done
    await eventually(lambda: found.done >= before + count, f"{count} more answers")


async def test_modelium_killed_is_not_noticed(service: Served, tmp_path: Path) -> None:
    model = dropped(service, tmp_path, "steady")
    pid = service.get("/status")["data_path"]["info"]["pid"]
    async with load(service, "steady") as found:
        for _ in range(2):
            await more(found, 200)
            service.kill()
            await more(found, 500)  # nobody is there but HAProxy and Triton
            await asyncio.to_thread(service.start)
            await more(found, 200)
    assert set(found.answered) == {"right"}, found.answered
    assert model.count("loads") == 1
    path = service.get("/status")["data_path"]
    assert (path["state"], path["info"]["pid"], path["info"]["adopted"]) == ("UP", pid, True)


async def test_another_configuration_is_not_noticed(service: Served, tmp_path: Path) -> None:
    dropped(service, tmp_path, "steady")
    pid = service.get("/status")["data_path"]["info"]["pid"]
    async with load(service, "steady") as found:
        await more(found, 200)
        await asyncio.to_thread(service.stop)
        service.configure({"server": {"allowed_hosts": ["models.example"]}, "haproxy": {"threads": 2}})
        await asyncio.to_thread(service.start)
        await more(found, 200)
    assert set(found.answered) == {"right"}, found.answered
    assert service.get("/status")["data_path"]["info"]["pid"] != pid
    assert infer(service, "steady", [1], Host="models.example") == [2]


async def test_models_that_make_room_lose_no_request(tmp_path: Path) -> None:
    """Two models take turns on room for one, with clients of both all the time."""
    policies = {
        "device_budget_bytes": {"cpu:0": 130 * MIB}, "min_resident_seconds": 0, "fairness_after_s": 0.5,
        "keep_above_qps": 10_000,
    }  # fmt: skip
    service = Served(tmp_path / "root", {"orchestration": {"policies": policies}})
    try:
        service.start()
        models = [toy(tmp_path / name, ballast_bytes=60 * MIB) for name in ("left", "right")]
        for model in models:
            service.drop(model.path)
            service.until(lambda name=model.name: name in service.ps(), what="it to be accepted")  # type: ignore[misc]
        async with load(service, "left", "right", clients=2) as found:
            await eventually(lambda: min(model.count("loads") for model in models) >= 3, "turns", 120)
        assert set(found.answered) == {"right"}, found.answered
    finally:
        service.down()


def test_use_is_counted_however_it_comes(service: Served, tmp_path: Path) -> None:
    dropped(service, tmp_path, "counted")
    before = service.model("counted")["requests"]
    for _ in range(3):
        infer(service, "counted", [1], **{"x-modelium-organisation": "team"})
    with grpc_client.InferenceServerClient(service.grpc_address()) as client:
        given = grpc_client.InferInput("x", [1], "FP32")
        given.set_data_from_numpy(np.ones(1, np.float32))
        assert client.infer("counted", [given]).as_numpy("y").tolist() == [2]
        service.post("/models/counted/unload")
        assert client.infer("counted", [given]).as_numpy("y").tolist() == [2]  # loaded by a call over gRPC
    assert service.model("counted")["requests"] == before + 5
    metrics = service.request("GET", "/metrics").decode()
    assert 'modelium_requests_total{model="counted",organisation="team",result="ok"} 3' in metrics


def test_a_model_that_is_used_past_every_door_is_in_use(service: Served, tmp_path: Path) -> None:
    dropped(service, tmp_path, "straight")
    before = service.model("straight")
    for _ in range(5):
        infer(Straight(triton_address(service)), "straight", [1])
    service.until(lambda: service.model("straight")["requests"] == before["requests"] + 5, 30, "five to be counted")
    assert service.model("straight")["idle_s"] < 10


def test_haproxy_killed_comes_back_with_its_routes(service: Served, tmp_path: Path) -> None:
    dropped(service, tmp_path, "routed")
    pid = service.get("/status")["data_path"]["info"]["pid"]
    subprocess.run(["kill", "-9", str(pid)], check=True)
    service.until(lambda: service.answers("/livez"), 30, "it to be back")
    service.until(lambda: service.get("/status")["data_path"]["state"] == "UP", 30, "it to be up")
    assert service.get("/status")["data_path"]["info"]["pid"] != pid
    routes = service.root / ".modelium" / "paths" / "haproxy" / "routes.map"
    assert routes.exists() and infer(service, "routed", [1]) == [2]


def test_without_it_the_service_carries_requests_itself(tmp_path: Path) -> None:
    service = Served(tmp_path / "root", {"server": {"data_path": "service"}})
    try:
        service.start()
        dropped(service, tmp_path, "plain")
        assert service.get("/status")["data_path"]["name"] == "service"
        assert infer(service, "plain", [1]) == [2]
        with grpc_client.InferenceServerClient(service.grpc_address()) as client:
            assert client.is_model_ready("plain")
    finally:
        service.down()


def test_another_data_path_takes_the_addresses_over(tmp_path: Path) -> None:
    service = Served(tmp_path / "root", {"server": {"data_path": "haproxy"}})
    try:
        for path in ("haproxy", "service", "haproxy"):
            service.configure({"server": {"data_path": path}})
            service.start()
            assert service.get("/status")["data_path"]["name"] == path
            service.stop()
    finally:
        service.down()


@pytest.mark.parametrize("path", ["haproxy", "service"])
async def test_tls_and_unix_sockets(tmp_path: Path, path: str) -> None:
    certificate, key, sockets, port = tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "s", free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", certificate,
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = {
        "data_path": path, "port": port, "socket_directory": str(sockets),
        "tls": {"certificate": str(certificate), "key": str(key)},
    }  # fmt: skip
    service = Served(tmp_path / "root", {"server": server})
    service.port = port
    trusting = ssl.create_default_context(cafile=certificate)
    try:
        await asyncio.to_thread(service.start, wait=False)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(sockets / "http.sock"))) as beside:
            await _until(lambda: _status(beside, "http://localhost/readyz"), 200)
            service.drop(toy(tmp_path / "private").path)
            infer_at = "/v2/models/private/infer"
            await _until(lambda: _status(beside, f"http://localhost{infer_at}", x_body([2])), 200)
        async with aiohttp.ClientSession() as web:
            url = f"https://localhost:{port}{infer_at}"
            async with web.post(url, json=x_body([2]), ssl=trusting) as answer:
                assert (await answer.json())["outputs"][0]["data"] == [4]
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await web.post(url, json=x_body([2]))
            async with web.get(f"https://localhost:{port}/status", ssl=trusting) as answer:
                address = (await answer.json())["listening"]["grpc"]
        given = grpc_client.InferInput("x", [1], "FP32")
        given.set_data_from_numpy(np.ones(1, np.float32))
        for target, tls in ((address.replace("127.0.0.1", "localhost"), True), (f"unix:{sockets}/grpc.sock", False)):
            with grpc_client.InferenceServerClient(
                target, ssl=tls, root_certificates=str(certificate) if tls else None
            ) as client:
                assert client.infer("private", [given]).as_numpy("y").tolist() == [2]
        env = {**service.env, "MODELIUM_CONFIG": str(service.config)}
        command = [*MODELIUM, "ps", "--json"]
        shown = await asyncio.to_thread(subprocess.run, command, check=True, env=env, capture_output=True)
        assert [m["name"] for m in json.loads(shown.stdout)] == ["private"]
    finally:
        await asyncio.to_thread(service.down)


async def _status(web: aiohttp.ClientSession, url: str, body: Any = None) -> int:
    try:
        async with web.request("GET" if body is None else "POST", url, json=body) as answer:
            return answer.status
    except aiohttp.ClientError:
        return 0


async def _until(status: Callable[[], Awaitable[int]], wanted: int) -> None:
    async with asyncio.timeout(90):
        while await status() != wanted:
            await asyncio.sleep(0.05)
