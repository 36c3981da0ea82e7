"""Servers of one model each that can put their model to sleep: they live on, and give their device's memory back."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Protocol

import aiohttp

from modelium.api.driver import RuntimeContext
from modelium.api.servers import ModelServers, Server, ServerKind
from modelium.api.types import (
    LoadOutcome,
    LoadRequest,
    Observation,
    ObservedModel,
    ParkOutcome,
    Progress,
    Report,
    RuntimeInfo,
)
from modelium.errors import DriverError

DEEPEST = 2
"""What is assumed of a sleeper whose level nobody knows: its weights have to be read anew."""


class ParkingKind(ServerKind, Protocol):
    """A kind of server that can sleep. Asleep it answers its health route still.

    `http` gives up after seconds: requests that take longer bring their own timeout.
    """

    async def park(self, server: Server, level: int, http: aiohttp.ClientSession) -> None:
        """Return when it sleeps and its device's memory is back. Raises `DriverError`."""

    async def wake(self, server: Server, level: int, http: aiohttp.ClientSession) -> None:
        """Have it serve as it did before it was parked at that level. Raises `DriverError`."""

    async def asleep(self, server: Server, http: aiohttp.ClientSession) -> bool:
        """Whether it sleeps, by its own word. Raises `DriverError` or what `http` raises where it does not say."""


class ParkingServers(ModelServers):
    """`ModelServers` that are `modelium.api.Parks`.

    Servers know whether they sleep, and not how deep: the levels are kept in the state folder.
    """

    def __init__(self, context: RuntimeContext, kind: ParkingKind, *, base_port: int = 0, load_timeout_s: float = 900):
        super().__init__(context, kind, base_port=base_port, load_timeout_s=load_timeout_s)
        self._parking = kind
        self._levels: dict[str, int] = {}
        self._file = context.state_dir / "asleep.json"

    async def start(self) -> RuntimeInfo:
        self._levels = await asyncio.to_thread(self._read)
        return await super().start()

    async def observe(self) -> Observation:
        observation = await super().observe()
        models = await asyncio.gather(*(self._seen(m) for m in observation.models))
        return observation.model_copy(update={"models": tuple(models)})

    async def _seen(self, model: ObservedModel) -> ObservedModel:
        server = self._servers.get(model.name)
        if not model.ready or server is None or not await self._asleep(server):
            return model
        level = self._levels.get(model.name, DEEPEST)
        return model.model_copy(update={"ready": False, "parked": level, "reason": f"asleep at level {level}"})

    async def _asleep(self, server: Server) -> bool:
        """One that does not say is what it was last known to be."""
        assert self._http is not None
        try:
            return await self._parking.asleep(server, self._http)
        except (DriverError, aiohttp.ClientError, OSError, TimeoutError):
            return server.model in self._levels

    async def park(self, name: str, level: int) -> ParkOutcome:
        async with self._turns[name]:
            began, server = time.monotonic(), self._serving(name)
            assert self._http is not None
            await self._note_level(name, level)
            await self._parking.park(server, level, self._http)
            memory = await self._measure([server])
            return ParkOutcome(memory=memory.get(server.record.name, {}), park_s=time.monotonic() - began)

    async def wake(self, name: str, report: Report) -> LoadOutcome:
        async with self._turns[name]:
            return await self._wake(self._serving(name), report)

    async def _wake(self, server: Server, report: Report) -> LoadOutcome:
        began = time.monotonic()
        assert self._http is not None
        report(Progress(stage="waking"))
        await self._parking.wake(server, self._levels.get(server.model, DEEPEST), self._http)
        await self._note_level(server.model, 0)
        return await self._outcome(server, began)

    def _serving(self, name: str) -> Server:
        server = self._servers.get(name)
        if server is None or name in self._broken or not self._lives(server):
            raise DriverError(f"{name} is not loaded: {self._broken.get(name, 'there is no server of it')}")
        return server

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """One that sleeps is woken, or ended where it does not wake."""
        name = request.name
        async with self._turns[name]:
            server = self._servers.get(name)
            if server is not None and name not in self._broken and self._lives(server) and await self._asleep(server):
                try:
                    await self._wake(server, report)
                except DriverError:
                    await self._end(name)
        return await super().load(request, report)

    async def _end(self, name: str) -> None:
        await super()._end(name)
        await self._note_level(name, 0)

    async def _note_level(self, name: str, level: int) -> None:
        """Kept before it holds: a sleeper that was taken for one of another level would serve nonsense."""
        if self._levels.get(name, 0) != level:
            self._levels = {n: known for n, known in self._levels.items() if n != name} | (
                {name: level} if level else {}
            )
            await asyncio.to_thread(self._write, json.dumps(self._levels))

    def _read(self) -> dict[str, int]:
        try:
            return {str(name): int(level) for name, level in json.loads(self._file.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self, text: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self._file)
