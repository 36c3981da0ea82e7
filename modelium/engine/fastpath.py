"""Keeps a data path in step with what is loaded: routes, use, and the end of what is in flight.

The core's instructions come in order and wait for nothing; here they become changes of the data path, made one at a
time, the latest one for each model. A data path that dies is started again with all routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from modelium.api.datapath import Carried, DataPath, DataPathDriver, DataPathInfo, DataRoute, Front
from modelium.engine.usage import UsageBook
from modelium.errors import ModeliumError, RuntimeUnavailable

log = logging.getLogger(__name__)

READ_EVERY_S = 1.0
"""How often use is read when nobody asks for it."""
DRAIN_EVERY_S = 0.05
FRESH_S = 0.02
"""Use that was read this recently is not read again for a judgement."""
RETRY_S = 1.0


class FastPath:
    def __init__(self, path: DataPath, driver: DataPathDriver, usage: UsageBook, clock: Callable[[], float]):
        self.name = path.name
        self.driver = driver
        self.info: DataPathInfo | None = None
        self.trouble = ""
        """Why it is down; empty while it is up."""
        self._usage = usage
        self._clock = clock
        self._front: Front | None = None
        self._wanted: dict[str, DataRoute] = {}
        self._changed: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._sync = False
        self._read_at = 0.0
        self._anew = True
        """It counts from nothing; one that was adopted does so only for what it has not counted before."""
        self.clean = True
        """Nothing is carried of an earlier life but what is known to be loaded still."""
        self._told: dict[tuple[str, str], tuple[int, int]] = {}
        """Answers and failures that are counted already, by model and organisation."""
        self._reading = asyncio.Lock()

    async def start(self, front: Front) -> DataPathInfo:
        """Raises `ConfigError` when it can't run, or an address can't be bound."""
        self.info = await self.driver.start(front)
        self._anew = self.clean = not self.info.adopted
        # Once chosen, the ports stay.
        self._front = front.model_copy(update={"port": self.info.port, "grpc_port": self.info.grpc_port})
        return self.info

    # ------------------------------------------------------------------ instructions

    def open(self, route: DataRoute) -> None:
        self._wanted[route.model] = route
        self._change(route.model)

    def close(self, name: str) -> None:
        self._wanted.pop(name, None)
        self._change(name)

    def when_idle(self, name: str, then: Callable[[], None]) -> None:
        """Call `then` once no new request for a closed model can come, and none is in flight."""
        former = self._drains.pop(name, None)
        if former is not None:
            former.cancel()
        task = asyncio.get_running_loop().create_task(self._until_idle(name, then), name=f"drain {name}")
        self._drains[name] = task
        task.add_done_callback(lambda done: self._drains.pop(name, None) if self._drains.get(name) is done else None)

    def settled(self) -> None:
        """What is loaded is known: the data path may let go of all else that it carries from an earlier life."""
        self._sync = True
        self._wake.set()

    def _change(self, name: str) -> None:
        self._changed[name] = None
        self._wake.set()

    # ------------------------------------------------------------------ carrying them out

    async def run(self) -> None:
        """Make changes as they come, for as long as the service lives."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                if self.trouble:
                    await self._again()
                if self._sync:
                    self._sync = False
                    names = list(self._changed)
                    await self.driver.sync(list(self._wanted.values()))
                    self.clean = True
                    for name in names:
                        self._changed.pop(name, None)
                while self._changed:
                    await self._apply(next(iter(self._changed)))
            except Exception as exc:
                self._down(exc)
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _apply(self, name: str) -> None:
        route = self._wanted.get(name)
        if route is not None:
            await self.driver.admit(route)
        else:
            await self.driver.divert(name)
        if self._wanted.get(name) is route:
            self._changed.pop(name, None)

    async def _again(self) -> None:
        assert self._front is not None
        self.info = await self.driver.start(self._front)
        self._anew = self._anew or not self.info.adopted
        log.warning("the data path %s is up again", self.name)
        self.trouble = ""
        self._sync = True

    def _down(self, exc: Exception) -> None:
        reason = exc.message if isinstance(exc, ModeliumError) else repr(exc)
        if not self.trouble:
            log.error("the data path %s is down, and is started again: %s", self.name, reason)
        if not isinstance(exc, ModeliumError):
            log.exception("the driver of the data path %s failed", self.name)
        self.trouble = reason

    async def _until_idle(self, name: str, then: Callable[[], None]) -> None:
        while name in self._changed and name not in self._wanted:
            await asyncio.sleep(DRAIN_EVERY_S / 10)
        while name not in self._wanted:
            async with self._reading:
                use = await self._carried()
            if use is not None and not use.get(name, Carried(0, 0)).in_flight:
                then()
                return
            await asyncio.sleep(DRAIN_EVERY_S)

    # ------------------------------------------------------------------ use

    async def read(self, *, within_s: float = 0.0) -> None:
        """Bring the book of use up to date, unless it was within the last `within_s` seconds."""
        async with self._reading:
            if within_s and time.monotonic() - self._read_at <= within_s:
                return
            await self._carried()

    async def _carried(self) -> Mapping[str, Carried] | None:
        """What it has carried; None while it is down. What was in flight in one that died is over.

        One at a time: a reading that is overtaken by a later one would look like a data path that began anew.
        """
        if self.trouble:
            return None
        try:
            use = await self.driver.read()
        except RuntimeUnavailable as exc:
            self._down(exc)
            self._usage.merge(self.name, {}, self._clock())
            self._wake.set()
            return None
        self._read_at = time.monotonic()
        known = {name: (c.requests, c.in_flight) for name, c in use.items() if self._usage.get(name) is not None}
        now = self._clock()
        used_at = {name: now - c.idle_s for name, c in use.items()}
        self._usage.merge(self.name, known, now, anew=self._anew, used_at=used_at)
        for name, carried in use.items():
            self._tally(name, carried, count=self._anew)
        self._anew = True
        return use

    def _tally(self, name: str, carried: Carried, *, count: bool) -> None:
        """Count answers by who asked, or only note from where counting starts."""
        usage = self._usage.get(name)
        if usage is None:
            return
        named = carried.organisations
        anonymous = Carried(
            carried.requests - sum(c.requests for c in named.values()),
            carried.in_flight - sum(c.in_flight for c in named.values()),
            failures=carried.failures - sum(c.failures for c in named.values()),
        )
        for organisation, c in (("", anonymous), *named.items()):
            done, failures = c.requests - c.in_flight, c.failures
            before_done, before_failures = self._told.get((name, organisation), (0, 0))
            if done < before_done or failures < before_failures:  # it began anew
                before_done = before_failures = 0
            self._told[name, organisation] = (done, failures)
            failed = failures - before_failures
            ok = max(0, done - before_done - failed)
            if count and (ok or failed):
                usage.tally(organisation, ok, failed)

    async def close_all(self, *, stop: bool) -> None:
        """Let go of it, or end it."""
        for task in list(self._drains.values()):
            task.cancel()
        if stop:
            await self.driver.stop()
