"""Somebody else's server: is it one that can be managed, and is it still the same?

Each thing that can be wrong with it is told on its own, with what to do about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil

from modelium.api.urls import unanswered
from modelium.errors import DriverError
from modelium_plugin_triton.client import NOT_EXPLICIT, CallFailed, TritonClient
from modelium_plugin_triton.settings import TritonSettings

PROBE = ".modelium-probe-"
"""A folder by this name is made and removed at once: a server that lists it sees the same repository."""
SHARED_WITHIN_S = 3.0
"""Network file systems show new folders late."""


@dataclass(frozen=True, slots=True)
class External:
    """An attached server as far as it can be seen from here."""

    http: str
    grpc: str
    version: str
    process: psutil.Process | None
    """Its process, where that is on this machine and may be looked at."""


def grpc_address(settings: TritonSettings) -> str:
    """The configured one, else the endpoint's host at its port plus one."""
    if settings.grpc_endpoint:
        return settings.grpc_endpoint
    url = urlsplit(settings.endpoint or "")
    port = url.port or (443 if url.scheme == "https" else 80)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    return f"{host}:{port + 1}"


async def attach(settings: TritonSettings, repository: Path, client: TritonClient, name: str = "triton") -> External:
    """Look at the server that `settings`, those of the runtime `name`, lead to.

    Raises `DriverError` saying what is wrong with it and what to do.
    """
    endpoint = settings.endpoint or ""
    section = name if name == "triton" else f"runtimes.{name}"
    over_http = await _http_metadata(endpoint, section)
    if not await client.live(5):
        raise DriverError(
            f"Triton's HTTP answers at {endpoint}, its gRPC does not at {client.address}: set "
            f"`{section}.grpc_endpoint` to the address of its --grpc-port, and see that the port is open from here",
            code="attach_grpc",
        )
    name, version, extensions = await client.metadata()
    if (over_http.get("name"), over_http.get("version")) != (name, version):
        raise DriverError(
            f"{endpoint} and {client.address} are two different servers: {over_http.get('name')} "
            f"{over_http.get('version')} and {name} {version}. Give both addresses of one",
            code="attach_grpc",
        )
    if "model_repository" not in extensions:
        raise DriverError(
            f"the Triton at {endpoint} was built without the model repository extension, so it can't be told to load",
            code="attach_mode",
        )
    await _check_mode(endpoint, client)
    await _check_repository(endpoint, repository, client)
    process = await asyncio.to_thread(_process_of, endpoint, client.address)
    return External(http=endpoint, grpc=client.address, version=version, process=process)


async def _http_metadata(endpoint: str, section: str) -> Mapping[str, object]:
    wrong = f"no Triton answers at {section}.endpoint, {endpoint}: "
    advice = f". Start it, or set `{section}.endpoint` to the base URL of its --http-port, as http://127.0.0.1:8000"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10, connect=5)) as session,
            session.get(f"{endpoint}/v2") as response,
        ):
            found = json.loads(await response.read())
            status = response.status
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        said = "it took too long" if isinstance(error, TimeoutError) else unanswered(error)
        raise DriverError(f"{wrong}{said}{advice}", code="attach_http") from error
    except ValueError as error:
        raise DriverError(f"{wrong}something else does, in no JSON{advice}", code="attach_http") from error
    if status != 200 or not isinstance(found, dict) or "extensions" not in found:
        raise DriverError(f"{wrong}something else does, with status {status}{advice}", code="attach_http")
    return found


async def _check_mode(endpoint: str, client: TritonClient) -> None:
    # Unloading what is not there changes nothing, not even the server's readiness, and only explicit mode allows it.
    try:
        await client.unload(f"modelium-{secrets.token_hex(6)}")
    except CallFailed as error:
        if NOT_EXPLICIT in error.details:
            raise DriverError(
                f"the Triton at {endpoint} loads models by itself: start it with --model-control-mode=explicit, so "
                "that Modelium can",
                code="attach_mode",
            ) from error
        raise DriverError(
            f"the Triton at {endpoint} does not let models be loaded and unloaded: {error.details}", code="attach_mode"
        ) from error


# --------------------------------------------------------------------------- the shared folder


async def _check_repository(endpoint: str, repository: Path, client: TritonClient) -> None:
    """A folder that appears here must appear there; where none can be made, the names must agree."""
    probe = repository / f"{PROBE}{secrets.token_hex(6)}"
    try:
        await asyncio.to_thread(_make_probe, probe)
    except OSError:
        theirs = {m.name for m in await client.index()}
        if _models(repository) <= theirs:
            return
    else:
        try:
            async with asyncio.timeout(SHARED_WITHIN_S):
                while probe.name not in (theirs := {m.name for m in await client.index()}):
                    await asyncio.sleep(0.3)
                return
        except TimeoutError:
            theirs = {m.name for m in await client.index()}
        finally:
            with contextlib.suppress(OSError):
                probe.rmdir()
    ours = _models(repository)
    raise DriverError(
        f"the Triton at {endpoint} has another model repository than {repository}, which holds {_some(ours)}; it lists "
        f"{_some({n for n in theirs if not n.startswith('.')})}. Give both the same folder, by its --model-repository "
        "and `modelium serve --repository` (in containers, the same volume)",
        code="attach_repository",
        only_ours=sorted(ours - theirs),
        only_theirs=sorted(theirs - ours),
    )


def _make_probe(probe: Path) -> None:
    for left in probe.parent.glob(f"{PROBE}*"):
        with contextlib.suppress(OSError):
            left.rmdir()
    probe.mkdir()


def _models(repository: Path) -> set[str]:
    """Folders with a version: one without may be missing from the index after a failed load."""
    found = set()
    with contextlib.suppress(OSError):
        for folder in repository.iterdir():
            if (
                folder.is_dir()
                and not folder.name.startswith(".")
                and any(p.name.isdecimal() for p in folder.iterdir())
            ):
                found.add(folder.name)
    return found


def _some(names: set[str]) -> str:
    shown = sorted(names)
    if not shown:
        return "nothing"
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


# --------------------------------------------------------------------------- which one it is


def _process_of(endpoint: str, grpc: str) -> psutil.Process | None:
    """The tritonserver on this machine that listens at these addresses."""
    url = urlsplit(endpoint)
    if url.hostname not in ("localhost", "127.0.0.1", "::1"):
        return None
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    ports = {url.port, int(grpc.rpartition(":")[2])}
    for connection in connections:
        local = connection.laddr
        if connection.status == psutil.CONN_LISTEN and connection.pid and local and local.port in ports:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                if process.name().startswith("tritonserver"):
                    return process
    return None


class Epoch:
    """Tells restarts of a server whose process is out of sight, by what it no longer knows.

    A restart forgets the loaded models and sets their counts back. One that happens while it held nothing goes
    unnoticed, and does not matter.
    """

    def __init__(self, file: Path, address: str):
        self._file = file
        self._address = address
        self.number = 1
        self._counts: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(file.read_text())
            if saved["address"] == address:
                self.number, self._counts = int(saved["number"]), dict(saved["counts"])

    @property
    def instance(self) -> str:
        return f"{self._address}#{self.number}"

    def expect(self, name: str) -> None:
        """The model is about to be loaded anew or unloaded by us: what happens to its count tells nothing."""
        if self._counts.pop(name, None) is not None:
            self._save()

    def see(self, counts: Mapping[str, int]) -> bool:
        """Take in the requests that each ready model has finished; True when the server was started anew."""
        fell = [counts.get(name, -1) < before for name, before in self._counts.items()]
        anew = bool(fell) and all(fell)
        if anew:
            self.number += 1
        if anew or set(counts) != set(self._counts):
            self._counts = dict(counts)
            self._save()
        self._counts = dict(counts)
        return anew

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps({"address": self._address, "number": self.number, "counts": self._counts}))
