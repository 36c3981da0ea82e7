"""Servers that can be put to sleep, by vLLM's own sleep mode: on GPUs alone, and where `sleep` is set.

Its routes are on loopback only, and Modelium passes no request on to them. vLLM tells whether it sleeps, and not how
deep: that is written down, for a Modelium that comes later.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from modelium.api import (
    LoadOutcome,
    LoadRequest,
    Observation,
    ParkOutcome,
    Progress,
    Report,
    RuntimeContext,
    RuntimeInfo,
)
from modelium.api.servers import ANSWERS_WITHIN_S, Server
from modelium.errors import DriverError
from modelium_plugin_vllm.kind import VllmKind
from modelium_plugin_vllm.servers import VllmServers
from modelium_plugin_vllm.settings import LEVELS

log = logging.getLogger(__name__)


class SleepingServers(VllmServers):
    """`modelium.api.Parks`."""

    def __init__(self, context: RuntimeContext, kind: VllmKind, *, base_port: int, load_timeout_s: float):
        super().__init__(context, kind, base_port=base_port, load_timeout_s=load_timeout_s)
        self._vllm = kind
        self._file = context.state_dir / "asleep.json"
        self._asleep: dict[str, int] = {}
        """Level by model."""
        self._sleeping: dict[str, int] = {}
        """Those that are being put to sleep, in the same way."""
        self._writing = asyncio.Lock()

    async def start(self) -> RuntimeInfo:
        info = await super().start()
        told = await asyncio.to_thread(self._read)
        names = [name for name in self._servers if name not in self._asleep]
        levels = await asyncio.gather(*(self._level(self._servers[name], told.get(name)) for name in names))
        self._asleep |= {name: level for name, level in zip(names, levels, strict=True) if level}
        return info

    async def _level(self, server: Server, told: int | None) -> int | None:
        """At which it sleeps; as it was written down where it does not answer, and else tells for itself."""
        try:
            asleep = await self._sleeps(server, ANSWERS_WITHIN_S)
        except DriverError as error:
            log.warning("%s", error)
            return told
        # Reading weights that are there does no harm.
        return (told or max(LEVELS)) if asleep else None

    async def observe(self) -> Observation:
        """Nobody is asked: what sleeps was told to here, on loopback, where nobody else has anything to tell it."""
        found = await super().observe()
        models = [
            model.model_copy(update={"ready": False, "parked": level, "reason": "asleep"})
            if (level := self._asleep.get(model.name)) and not model.broken
            else model
            for model in found.models
        ]
        return found.model_copy(update={"models": tuple(models)})

    async def load(self, request: LoadRequest, report: Report) -> LoadOutcome:
        """One that sleeps is woken, or started anew where it can't be."""
        if request.name in self._asleep and not request.replace:
            with contextlib.suppress(DriverError):
                return await self.wake(request.name, report)
            async with self._turns[request.name]:
                await self._end(request.name)
        outcome = await super().load(request, report)
        await self._awake(request.name)
        return outcome

    async def _end(self, name: str) -> None:
        await super()._end(name)
        await self._awake(name)

    # ------------------------------------------------------------------ to sleep and back

    async def park(self, name: str, level: int) -> ParkOutcome:
        async with self._turns[name]:
            server = self._servers.get(name)
            if server is None or name in self._broken or name in self._asleep or level not in LEVELS:
                raise DriverError(f"{name} can't be put to sleep at level {level}: it does not serve, or there is none")
            began = time.monotonic()
            self._sleeping[name] = level
            try:
                await self._keep()
                await self._ask(server, "/sleep", {"level": str(level), "mode": "wait"})
                if not await self._sleeps(server):
                    raise DriverError(
                        f"{name} was told to sleep, and does not: its vLLM has no sleep mode on this device"
                    )
                self._asleep[name] = level
            finally:
                del self._sleeping[name]
            memory = await self._measure([server])
            return ParkOutcome(memory=memory.get(server.record.name, {}), park_s=time.monotonic() - began)

    async def wake(self, name: str, report: Report) -> LoadOutcome:
        async with self._turns[name]:
            server, level = self._servers.get(name), self._asleep.get(name)
            if server is None or level is None:
                raise DriverError(f"{name} can't be woken: it does not sleep")
            began = time.monotonic()
            report(Progress(stage="waking"))
            if level == 1:
                await self._ask(server, "/wake_up")
            else:
                await self._ask(server, "/wake_up", {"tags": "weights"})
                report(Progress(stage="loading weights"))
                await self._ask(server, "/collective_rpc", body={"method": "reload_weights"})
                await self._ask(server, "/wake_up", {"tags": "kv_cache"})
            if await self._sleeps(server):
                raise DriverError(f"{name} was told to wake, and sleeps on")
            report(Progress(stage="asking for a first answer"))
            assert self._http is not None
            await self._vllm.first_answer(server, self._http)
            await self._awake(name)
            return await self._outcome(server, began)

    async def _sleeps(self, server: Server, within_s: float | None = None) -> bool:
        """A server without the route never sleeps. Raises `DriverError` when it does not answer."""
        answer = await self._ask(server, "/is_sleeping", method="GET", within_s=within_s)
        return bool(answer.get("is_sleeping"))

    async def _ask(
        self,
        server: Server,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        method: str = "POST",
        body: Mapping[str, Any] | None = None,
        within_s: float | None = None,
    ) -> dict[str, Any]:
        """Its answer; nothing where there is no such route. By default it may take as long as a load."""
        assert self._http is not None
        timeout = aiohttp.ClientTimeout(total=within_s or self._load_timeout_s)
        try:
            async with self._http.request(
                method, server.base + path, params=query, json=body, timeout=timeout
            ) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise DriverError(f"{server.model} does not answer {path}: {error or type(error).__name__}") from error
        if answer.status == 404:
            return {}
        if answer.status != 200:
            raise DriverError(f"{server.model} answers {path} with {answer.status}: {text:.300}")
        try:
            found = json.loads(text or "{}")
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    # ------------------------------------------------------------------ what is written down

    async def _awake(self, name: str) -> None:
        if self._asleep.pop(name, None) is not None:
            await self._keep()

    async def _keep(self) -> None:
        """For a Modelium that comes later, which can do without: it then reads weights that may be there."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._write, self._asleep | self._sleeping)
            except OSError as error:
                log.error("%s could not be written: %s", self._file, error)

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {str(name): int(level) for name, level in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, levels: Mapping[str, int]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(levels), encoding="utf-8")
        os.replace(fresh, self._file)
