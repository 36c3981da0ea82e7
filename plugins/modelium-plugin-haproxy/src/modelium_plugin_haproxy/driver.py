"""Runs HAProxy: found again after a restart of Modelium, while it goes on carrying what it carries."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import socket
from collections.abc import Collection, Mapping
from pathlib import Path

from modelium.api import ProcessRecord
from modelium.api.datapath import Carried, DataPathContext, DataPathInfo, DataRoute, Front
from modelium.errors import ConfigError, RuntimeUnavailable
from modelium_plugin_haproxy import configuration
from modelium_plugin_haproxy.admin import Admin
from modelium_plugin_haproxy.configuration import Files, entries, keys_of
from modelium_plugin_haproxy.locate import find_executable, version_of
from modelium_plugin_haproxy.settings import HAProxySettings


class HAProxyDriver:
    """`modelium.api.datapath.DataPathDriver` for one HAProxy."""

    def __init__(self, context: DataPathContext):
        assert isinstance(context.settings, HAProxySettings)
        self._context = context
        self._settings = context.settings
        self._files = Files(folder=context.socket_dir, state=context.state_dir)
        self._admin = Admin(self._files.admin, self._files.map)
        self._entries: dict[str, str] = {}
        """What the map holds."""

    # ------------------------------------------------------------------ life

    async def start(self, front: Front) -> DataPathInfo:
        """Raises `ConfigError` when it can't run, or an address can't be bound."""
        executable = await asyncio.to_thread(find_executable, self._settings)
        version = await asyncio.to_thread(version_of, executable)
        former = self._find()
        if former is not None:
            ports = {key: getattr(front, key) or former.facts.get(key, 0) for key in ("port", "grpc_port")}
            front = front.model_copy(update=ports)
            if not await self._admin.answers():
                await self.stop()
                former = None
            elif former.facts.get("configuration") == self._hash(front):
                self._entries = await self._admin.routes()
                return self._info(former, version, adopted=True)
        chosen = await asyncio.to_thread(_with_ports, front)
        self._entries = await self._admin.routes() if former is not None else {}
        await asyncio.to_thread(self._write, chosen)
        await self._check(executable)
        record = await self._spawn(executable, chosen, former)
        return self._info(record, version, adopted=False)

    async def _spawn(self, executable: Path, front: Front, former: ProcessRecord | None) -> ProcessRecord:
        """Start one; it takes over the sockets of the former, which ends once it has served what it has."""
        first, second = self._names
        name = second if former is not None and former.name == first else first
        takeover = ["-x", str(self._files.admin), "-sf", str(former.pid)] if former is not None else []
        record = await self._context.processes.spawn(
            name,
            [str(executable), "-db", "-f", str(self._files.configuration), *takeover],
            facts={"configuration": self._hash(front), "port": front.port, "grpc_port": front.grpc_port},
        )
        try:
            await self._until_it_answers(record)
        except BaseException:
            await self._context.processes.stop(name, grace_s=0)
            raise
        return record

    @property
    def _names(self) -> tuple[str, str]:
        return self._context.name, f"{self._context.name}-2"

    def _find(self) -> ProcessRecord | None:
        """The one that runs, the newer while one takes over from the other."""
        found = [record for name in self._names if (record := self._context.processes.find(name)) is not None]
        return max(found, key=lambda record: record.created_at, default=None)

    def _info(self, record: ProcessRecord, version: str, *, adopted: bool) -> DataPathInfo:
        ports = {key: int(record.facts.get(key, 0)) for key in ("port", "grpc_port")}
        return DataPathInfo(name=self._context.name, version=version, pid=record.pid, adopted=adopted, **ports)

    def _hash(self, front: Front) -> str:
        return hashlib.sha256(configuration.render(front, self._settings, self._files).encode()).hexdigest()

    def _write(self, front: Front) -> None:
        try:
            self._files.state.mkdir(parents=True, exist_ok=True)
            self._files.map.write_text("".join(f"{key} {value}\n" for key, value in self._entries.items()))
            if front.certificate is not None and front.key is not None:
                _link(self._files.certificate, front.certificate)
                _link(self._files.certificate.with_suffix(".pem.key"), front.key)
            self._files.configuration.write_text(configuration.render(front, self._settings, self._files))
        except OSError as error:
            raise ConfigError(
                f"{self._files.state} can't be written: {error.strerror}; let this user write there", code="storage"
            ) from error

    async def _check(self, executable: Path) -> None:
        process = await asyncio.create_subprocess_exec(
            executable, "-c", "-f", self._files.configuration,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        if process.returncode != 0:
            words = [line for line in said.decode(errors="replace").splitlines() if "ALERT" in line]
            raise ConfigError(f"{executable} does not take Modelium's configuration: {' '.join(words[:2]) or said!r}")

    async def _until_it_answers(self, record: ProcessRecord) -> None:
        limit = self._settings.start_timeout_s
        try:
            async with asyncio.timeout(limit):
                while await self._admin.pid() != record.pid:
                    if self._context.processes.find(record.name) is None:
                        raise self._ended(record.name)
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            raise RuntimeUnavailable(
                f"HAProxy did not answer within {limit:.0f} s (haproxy.start_timeout_s)"
            ) from error

    def _ended(self, name: str) -> ConfigError | RuntimeUnavailable:
        words = [line for line in self._context.processes.tail(name, 20) if "ALERT" in line or "error" in line.lower()]
        told = " ".join(words[-3:]) or "it said nothing"
        if taken := re.search(r"cannot bind socket \((.*?)\) for \[(.*?):(\d+)\]", told):
            what = "is in use" if "in use" in taken[1] else f"can't be bound ({taken[1]})"
            return ConfigError(
                f"port {taken[3]} on {taken[2]} {what}: end what uses it, or choose another with --port or --grpc-port",
                code="address",
            )
        return RuntimeUnavailable(f"HAProxy ended while it started: {told}")

    async def stop(self) -> None:
        for name in self._names:
            await self._context.processes.stop(name, grace_s=5)
        self._entries = {}

    def logs(self, lines: int) -> list[str]:
        record = self._find()
        return self._context.processes.tail(record.name if record is not None else self._context.name, lines)

    # ------------------------------------------------------------------ routes

    async def sync(self, routes: Collection[DataRoute]) -> None:
        wanted: dict[str, str] = {}
        for route in routes:
            wanted |= entries(route)
        await self._change(wanted, set(self._entries))

    async def admit(self, route: DataRoute) -> None:
        await self._change(entries(route), self._of(route.model))

    async def divert(self, model: str) -> None:
        await self._change({}, self._of(model))

    def _of(self, model: str) -> set[str]:
        return self._entries.keys() & keys_of(model)

    async def _change(self, wanted: Mapping[str, str], there: set[str]) -> None:
        """Bring the entries `there` to what is wanted."""
        stale = [key for key in there if wanted.get(key) != self._entries[key]]
        new = {key: value for key, value in wanted.items() if self._entries.get(key) != value}
        if stale or new:
            await self._admin.change(stale, new)
        for key in stale:
            del self._entries[key]
        self._entries |= new

    # ------------------------------------------------------------------ use

    async def read(self) -> Mapping[str, Carried]:
        if self._find() is None:
            raise RuntimeUnavailable("HAProxy has ended")
        return await self._admin.use()


def _link(place: Path, target: Path) -> None:
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def _with_ports(front: Front) -> Front:
    """With a free port for each that is 0."""
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for key in ("port", "grpc_port"):
            if not getattr(front, key):
                holder = held.enter_context(socket.socket())
                holder.bind((front.host or "0.0.0.0", 0))
                chosen[key] = holder.getsockname()[1]
    return front.model_copy(update=chosen)
