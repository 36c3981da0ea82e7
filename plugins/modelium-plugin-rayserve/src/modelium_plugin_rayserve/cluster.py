"""The cluster, as its controller keeps it: a process of Ray's own Python (`onray.controller`), which outlives Modelium.

Our own cluster lives as long as that process; somebody else's is only connected to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from modelium.api import ProcessRecord, Progress, Report, RuntimeContext
from modelium.errors import RuntimeUnavailable
from modelium_plugin_rayserve import launch, packs
from modelium_plugin_rayserve.client import Client
from modelium_plugin_rayserve.orders import GRACE_S
from modelium_plugin_rayserve.settings import RayServeSettings

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How often what comes or goes is looked at."""
ANSWERS_WITHIN_S = 30.0
"""A living controller that has been silent for this long is ended and started anew."""


class Cluster:
    """Our own, or somebody else's; a new start of it is another `instance`."""

    def __init__(self, context: RuntimeContext):
        assert isinstance(context.settings, RayServeSettings)
        self._context = context
        self._settings = context.settings
        self.own = context.settings.address is None
        self.client: Client | None = None
        """Of the controller that is there; None while our own cluster has not been needed yet."""
        self.record: ProcessRecord | None = None
        self.instance = ""
        """Empty until one was wanted."""

    # ------------------------------------------------------------------ coming to be

    async def adopt(self, record: ProcessRecord) -> bool:
        """Whether the controller is of the cluster that is configured, and answers, perhaps after it has started."""
        facts = record.facts
        if facts.get("address") != self._settings.address or "socket" not in facts:
            log.warning("the controller that runs (process %d) is of another cluster: it is ended", record.pid)
            return False
        if self.record is not None and self.record.pid != record.pid:
            self.let_go()
        client = self.client or Client(Path(facts["socket"]))
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                while self.alive(record):
                    with contextlib.suppress(RuntimeUnavailable):
                        await client.status()
                        self.client, self.record = client, record
                        self.instance = facts["instance"]
                        return True
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            log.warning("Ray's controller (process %d) has been silent: it is ended", record.pid)
        client.close()
        return False

    async def launch(self, report: Report) -> None:
        """Start the controller, and with it our own cluster. Raises `RuntimeUnavailable` with its last words."""
        context, settings = self._context, self._settings
        python = await packs.install(context.cache_dir, settings, (), report)
        if self.own:
            await asyncio.to_thread(launch.sweep, context.state_dir)
        command = await asyncio.to_thread(launch.command, settings, python, context.state_dir, self.instance)
        report(Progress(stage="starting Ray" if self.own else f"connecting to Ray at {settings.address}"))
        record = await context.processes.spawn(context.name, command.argv, env=command.env, facts=command.facts)
        client = Client(Path(command.facts["socket"]))
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                while True:
                    with contextlib.suppress(RuntimeUnavailable):
                        await client.status()
                        break
                    if not self.alive(record):
                        raise RuntimeUnavailable(f"Ray did not start: {self._last_words()}")
                    await asyncio.sleep(POLL_S)
        except BaseException as error:
            client.close()
            await self.end()
            if isinstance(error, TimeoutError):
                raise RuntimeUnavailable(
                    f"Ray was not up within {settings.start_timeout_s:.0f} s (ray_serve.start_timeout_s): "
                    + self._last_words()
                ) from error
            raise
        self.client, self.record = client, record

    # ------------------------------------------------------------------ asking

    async def status(self, within_s: float = 0.0) -> dict[str, Any]:
        """Raises `RuntimeUnavailable` when the cluster is gone."""
        if self.client is None or self.record is None:
            raise RuntimeUnavailable("Ray was not started")
        if not self.alive(self.record):
            raise RuntimeUnavailable(f"Ray's controller (process {self.record.pid}) has ended")
        return await self.client.status(within_s)

    def alive(self, record: ProcessRecord) -> bool:
        found = self._context.processes.find(self._context.name)
        return found is not None and (found.pid, found.created_at) == (record.pid, record.created_at)

    def _last_words(self) -> str:
        """What the controller said of an error, else what it said last."""
        lines = self._context.processes.tail(self._context.name, 200, this_run=True)
        said = [line for line in lines if "Error" in line] or lines
        return said[-1] if said else "it said nothing"

    # ------------------------------------------------------------------ ending

    async def end(self) -> None:
        """The controller, and with it our own cluster."""
        self.let_go()
        self.record = None
        await self._context.processes.stop(self._context.name, grace_s=GRACE_S)
        await asyncio.to_thread(launch.sweep, self._context.state_dir)

    def let_go(self) -> None:
        """Of the controller, which stays."""
        client, self.client = self.client, None
        if client is not None:
            client.close()
