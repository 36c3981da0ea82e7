"""The effects: what waits. Each turns one instruction into one later event, whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelium.api.driver import Parks, RuntimeBackend, RuntimeDriver
from modelium.api.measuring import added
from modelium.api.types import Device, Endpoint, LoadRequest, Observation, Progress, Report, RuntimeInfo
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.states import RuntimeState
from modelium.core.world import Failure
from modelium.engine.loop import Loop
from modelium.errors import DriverError, ModeliumError, RuntimeStuck, RuntimeUnavailable

log = logging.getLogger(__name__)

OBSERVE_TIMEOUT_S = 10.0
"""A runtime that does not answer within this is unwell; twice in a row, and it is taken for lost."""
MISSES = 2
GIVE_UP_S = 60.0
"""A driver that is told to give up an operation gets this long before the next one on that model begins."""


@dataclass
class Running:
    """A runtime as the engine holds it."""

    backend: RuntimeBackend
    driver: RuntimeDriver
    info: RuntimeInfo | None = None
    loaded: bool = False
    """A load succeeded since `info` was told: what was missing then is there."""
    epoch: int = 0
    misses: int = 0
    progress: Progress | None = None
    overhead: dict[str, int] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()
    """Those that only this runtime reaches, as it last showed them."""
    known: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it was up, or could not be started: what it can do is known as far as it will be."""
    poke: asyncio.Event = field(default_factory=asyncio.Event)
    """Look now."""


RequestFor = Callable[[i.Load], LoadRequest]
"""Reads files: called in a thread."""
Counted = Callable[[Mapping[str, int]], Awaitable[None]]
"""Told how many requests each loaded model of a runtime has finished, by the runtime's own count."""
Measured = Callable[[str, Mapping[str, int], float | None], None]
"""Told a model's measured bytes by device, after a load with its seconds, later without."""

Residue = Callable[[str, str, int], None]
"""Told a model, its runtime, and the bytes that its unload did not give back."""


def _parks(driver: RuntimeDriver, runtime: str) -> Parks:
    if not isinstance(driver, Parks):
        raise DriverError(f"{runtime} can't put models to sleep")
    return driver


class Runtimes:
    """Carries out loads, unloads and starts, and watches what the runtimes hold."""

    def __init__(
        self,
        running: dict[str, Running],
        loop: Callable[[], Loop],
        request_for: RequestFor,
        report_for: Callable[[str], Report],
        measured: Measured,
        counted: Counted,
        residue: Residue,
        *,
        observe_every_s: float = 2.0,
    ):
        self.running = running
        self._loop = loop
        self._request_for = request_for
        self._report_for = report_for
        self._tell_measured = measured
        self._counted = counted
        self._tell_residue = residue
        self._observe_every_s = observe_every_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._ops: dict[str, asyncio.Task[None]] = {}
        self.measured: dict[str, dict[str, dict[str, int]]] = {}
        """Bytes by runtime, model and device, as last observed."""
        self._ended: dict[str, dict[str, float]] = {}
        """When an operation last ended, by runtime and model: an older look says nothing about it."""
        self.endpoints: dict[tuple[str, str], dict[str, str]] = {}
        """By runtime and model, the address by protocol of each that does not answer where its runtime does."""
        self.moved: Callable[[str, str], None] = lambda name, runtime: None
        """Told when a model's endpoints in a runtime are others than before."""
        self.shown: Callable[[str, Observation], None] = lambda name, observation: None
        """Told what an external runtime shows, before the core is."""
        self.devices_changed: Callable[[], None] = lambda: None
        """Told when a runtime reaches other devices than before."""
        self.parked: Callable[[str, int, Mapping[str, int]], None] = lambda name, level, memory: None
        """Told what a model holds that was parked at a level."""
        self.woken: Callable[[str, int, float], None] = lambda name, level, wake_s: None
        """Told how long a model took to wake from a level."""

    # ------------------------------------------------------------------ instructions

    def load(self, order: i.Load) -> None:
        self._operate(order.name, self._load(order))

    def park(self, order: i.Park) -> None:
        self._operate(order.name, self._park(order))

    def wake(self, order: i.Wake) -> None:
        self._operate(order.name, self._load(order))

    def unload(self, order: i.Unload) -> None:
        self._operate(order.name, self._unload(order))

    def give_up(self, name: str) -> None:
        if (operation := self._ops.get(name)) is not None:
            operation.cancel()

    def start(self, order: i.StartRuntime) -> None:
        self._start(self._bring_up(order), f"start {order.name}")

    def stop(self, order: i.StopRuntime) -> None:
        self._start(self._bring_down(order), f"stop {order.name}")

    def poke(self, name: str) -> None:
        """Something went wrong with it: look soon."""
        if name in self.running:
            self.running[name].poke.set()

    def _operate(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """A driver never has two operations on one model: the former one is given up first."""
        former = self._ops.get(name)

        async def operate() -> None:
            try:
                if former is not None and not former.done():
                    former.cancel()
                    await asyncio.wait([former], timeout=GIVE_UP_S)
                await work
            finally:
                work.close()
                if self._ops.get(name) is asyncio.current_task():
                    del self._ops[name]

        self._ops[name] = self._start(operate(), f"operate {name}")

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, order: i.Load | i.Wake) -> None:
        loop = self._loop()
        failure: Failure
        lost = stuck = False
        try:
            driver, report = self.running[order.runtime].driver, self._report_for(order.name)

            def tell(progress: Progress) -> None:
                if progress.endpoints:
                    self._note_endpoints(order.runtime, order.name, progress.endpoints)
                    progress = progress.model_copy(update={"endpoints": ()})
                report(progress)

            if isinstance(order, i.Wake):
                outcome = await _parks(driver, order.runtime).wake(order.name, tell)
            else:
                request = await asyncio.to_thread(self._request_for, order)
                outcome = await driver.load(request, tell)
            self.running[order.runtime].loaded = True
            memory = tuple(sorted(outcome.memory.items()))
            self._holds(order.runtime, order.name, outcome.memory)
            self._note_endpoints(order.runtime, order.name, outcome.endpoints)
            if isinstance(order, i.Wake):
                self.woken(order.name, order.level, outcome.load_s)
            if not outcome.note:
                loads = outcome.load_s if isinstance(order, i.Load) else None
                self._tell_measured(order.name, outcome.memory, loads)
            loop.post(e.Loaded(loop.clock(), order.name, order.op, memory, outcome.load_s, outcome.note))
            return
        except asyncio.CancelledError:
            raise  # what follows tells the outcome
        except RuntimeUnavailable as exc:
            failure, lost, stuck = Failure(exc.code, exc.message), True, isinstance(exc, RuntimeStuck)
            self.poke(order.runtime)
        except ModeliumError as exc:
            failure = Failure(exc.code, exc.message)
        except Exception as exc:
            failure = self._blame(exc, order.runtime, f"loaded {order.name}")
        loop.post(e.LoadFailed(loop.clock(), order.name, order.op, failure, lost, stuck))

    async def _park(self, order: i.Park) -> None:
        loop = self._loop()
        try:
            outcome = await _parks(self.running[order.runtime].driver, order.runtime).park(order.name, order.level)
            self._holds(order.runtime, order.name, outcome.memory)
            self.parked(order.name, order.level, outcome.memory)
            memory = tuple(sorted(outcome.memory.items()))
            loop.post(e.Parked(loop.clock(), order.name, order.op, memory, outcome.park_s))
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            failure = self._blame(exc, order.runtime, f"parked {order.name}")
            self.poke(order.runtime)
            loop.post(e.ParkFailed(loop.clock(), order.name, order.op, failure))

    def _blame(self, exc: Exception, runtime: str, what: str) -> Failure:
        if isinstance(exc, ModeliumError):
            return Failure(exc.code, exc.message)
        log.error("the driver of %s failed while it %s", runtime, what, exc_info=exc)
        return Failure("driver", f"the driver of {runtime} failed: {type(exc).__name__}: {exc}")

    async def _unload(self, order: i.Unload) -> None:
        loop = self._loop()
        try:
            outcome = await self.running[order.runtime].driver.unload(order.name)
            residue = tuple(sorted((device, size) for device, size in outcome.residue.items() if size))
            if residue:
                log.warning("%s: %s did not come back after its unload", order.name, dict(residue))
                self._tell_residue(order.name, order.runtime, sum(size for _, size in residue))
            self._holds(order.runtime, order.name, None)
            self.endpoints.pop((order.runtime, order.name), None)
            loop.post(e.Unloaded(loop.clock(), order.name, order.op, residue))
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            failure = self._blame(exc, order.runtime, f"unloaded {order.name}")
            self.poke(order.runtime)
            stuck = isinstance(exc, RuntimeStuck)
            loop.post(e.UnloadFailed(loop.clock(), order.name, order.op, failure, stuck))

    def _holds(self, runtime: str, name: str, memory: Mapping[str, int] | None) -> None:
        """As an operation found it that has just ended; None where the model is gone."""
        self._ended.setdefault(runtime, {})[name] = self._loop().clock()
        models = self.measured.setdefault(runtime, {})
        if memory is None:
            models.pop(name, None)
        else:
            models[name] = dict(memory)

    async def _bring_up(self, order: i.StartRuntime) -> None:
        loop = self._loop()
        running = self.running[order.name]
        running.epoch = order.epoch
        running.misses = 0
        try:
            running.info, running.loaded = await running.driver.start(), False
            taken_at = loop.clock()
            observation = await running.driver.observe()
            self._note(order.name, observation, taken_at)
            running.progress = None
            running.known.set()
            info = running.info
            loop.post(
                e.RuntimeUp(
                    loop.clock(),
                    order.name,
                    order.epoch,
                    info.instance,
                    info.external,
                    observation,
                    info.adopted,
                    info.elsewhere,
                )
            )
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            running.known.set()
            if isinstance(exc, ModeliumError):
                failure = Failure(exc.code, exc.message)
            else:
                log.exception("the driver of %s failed to start it", order.name)
                failure = Failure("driver", f"its driver failed: {type(exc).__name__}: {exc}")
            loop.post(e.RuntimeDown(loop.clock(), order.name, order.epoch, failure))

    async def _bring_down(self, order: i.StopRuntime) -> None:
        loop = self._loop()
        try:
            await self.running[order.name].driver.stop()
            self.measured.pop(order.name, None)
            loop.post(e.RuntimeStopped(loop.clock(), order.name, order.epoch))
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            log.exception("%s could not be stopped", order.name)
            failure = Failure("driver", f"it could not be stopped: {exc}")
            loop.post(e.RuntimeDown(loop.clock(), order.name, order.epoch, failure))

    # ------------------------------------------------------------------ watching

    async def watch(self, name: str) -> None:
        """Look at a runtime again and again while it is UP."""
        running = self.running[name]
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._observe_every_s):
                    await running.poke.wait()
            running.poke.clear()
            state = self._loop().world.runtimes.get(name)
            if state is not None and state.state is RuntimeState.UP and state.epoch == running.epoch:
                await self.observe(name)

    async def observe(self, name: str) -> None:
        """Look once."""
        loop = self._loop()
        running = self.running[name]
        epoch, taken_at = running.epoch, loop.clock()
        try:
            async with asyncio.timeout(OBSERVE_TIMEOUT_S):
                observation = await running.driver.observe()
        except Exception as exc:
            running.misses += 1
            gone = isinstance(exc, RuntimeUnavailable)
            if not gone and not isinstance(exc, TimeoutError):
                log.exception("the driver of %s failed to look at it", name)
            if running.misses < MISSES:
                running.poke.set()
                return
            running.misses = 0
            known = loop.world.runtimes.get(name)
            if known is None or known.state is not RuntimeState.UP:
                return  # it is being ended, or was told of already
            message = exc.message if isinstance(exc, ModeliumError) else f"it did not answer: {exc!r}"
            self.measured.pop(name, None)
            loop.post(e.RuntimeDown(loop.clock(), name, epoch, Failure("runtime_unavailable", message)))
            return
        running.misses = 0
        self._note(name, observation, taken_at)
        shown = [m for m in observation.models if m.ready and self._at_home(m.name, name)]
        await self._counted({m.name: m.requests for m in shown if m.requests is not None})
        loop.post(e.RuntimeObserved(loop.clock(), name, epoch, taken_at, observation))

    def _note(self, name: str, observation: Observation, taken_at: float) -> None:
        """What changed after the look is left alone."""
        newer = {model: ended for model, ended in self._ended.get(name, {}).items() if ended >= taken_at}
        self._ended[name] = newer
        models = [model for model in observation.models if model.name not in newer]
        kept = {model: memory for model, memory in self.measured.get(name, {}).items() if model in newer}
        self.measured[name] = {model.name: dict(model.memory) for model in models} | kept
        for model in models:
            if model.ready:
                self._note_endpoints(name, model.name, model.endpoints)
            if model.ready and model.memory and self._at_home(model.name, name):
                self._tell_measured(model.name, model.memory, None)
        running = self.running[name]
        if running.info is not None and running.info.external:
            self.shown(name, observation)
        running.overhead = dict(observation.overhead)
        others = {d.id for d in running.devices} != {d.id for d in observation.devices}
        running.devices = observation.devices
        if others:
            self.devices_changed()

    def _at_home(self, name: str, runtime: str) -> bool:
        """Whether a model is this runtime's: what another shows by the same name is not that model."""
        model = self._loop().world.models.get(name)
        return model is not None and model.home == runtime

    def _note_endpoints(self, runtime: str, name: str, endpoints: Iterable[Endpoint]) -> None:
        now = {endpoint.protocol: endpoint.address for endpoint in endpoints}
        if self.endpoints.get((runtime, name), {}) == now:
            return
        if now:
            self.endpoints[runtime, name] = now
        else:
            del self.endpoints[runtime, name]
        self.moved(name, runtime)

    def held(self) -> dict[str, int]:
        """Measured bytes of all models, by device."""
        return added(memory for models in self.measured.values() for memory in models.values())

    async def close(self, *, stop: bool) -> None:
        """Give up what is under way and let go of the runtimes, or end them."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=10)
        for name, running in self.running.items():
            try:
                if stop:
                    await running.driver.stop()
                await running.driver.close()
            except Exception as exc:
                log.error("%s could not be %s: %s", name, "stopped" if stop else "let go", exc)
