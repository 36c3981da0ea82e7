"""Faster forms of models: made while nobody needs the device, taken up beside what serves, put back where they fail.

Service never waits for it. What is proposed for a loaded model is made when its devices are idle, and kept in the cache
by its key; then the model's folder is exchanged for one in the new form, and the core loads that as it loads any
changed files: beside the old one, which serves until then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from modelium.api.environments import locked
from modelium.api.optimizing import Optimization, Optimizer, OptimizerContext
from modelium.api.types import Manifest, OptimizationRecord, Progress, Transition
from modelium.core.placement import spots
from modelium.core.states import RuntimeState, State
from modelium.core.turn import Turn
from modelium.core.world import Estimate, queued
from modelium.engine import swapping
from modelium.engine.job import NAME, Job
from modelium.engine.judging import Judge, Judged, difference
from modelium.engine.repository import Changed
from modelium.engine.store import measurement_key, replace_file
from modelium.engine.swapping import Form
from modelium.errors import ModelError, ModeliumError

if TYPE_CHECKING:
    from modelium.engine.orchestrator import Orchestrator

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
WATCH_EVERY_S = 0.5
"""How often it is seen to that what is being made is in nobody's way."""
QUIET_S = 10.0
"""A device is idle once nothing on it was used for this long."""
REST_S = 2.0
"""What was paused goes on once nothing on its devices was used for this long."""
BUSY_UTILIZATION = 0.3
"""A GPU that others use more than this is not idle."""
AGAIN_AFTER_S = 600.0
"""What failed for a reason that may pass is tried again after this."""

_FAILED = TypeAdapter(dict[str, str])


class Optimizing:
    """At most one form is made at a time."""

    def __init__(self, engine: Orchestrator, sections: Mapping[str, BaseModel]):
        self._engine = engine
        self._sections = sections
        self._optimizers: dict[str, Optimizer] = {o.name: o for o in engine.host.optimizers()}
        self._judge = Judge(engine, self._optimizers)
        self._folder = engine.paths.cache / "optimized"
        self._file = engine.paths.state / "optimizing.json"
        self._failed: dict[str, str] = {}
        """Keys that are not tried again, and why."""
        self._later: dict[str, float] = {}
        """Keys that are not tried before a time."""
        self._said: dict[str, str] = {}
        self._making: asyncio.Task[None] | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anybody to make anything."""
        return bool(self._optimizers)

    def said(self, name: str) -> str:
        """What was last told of a model; empty when nothing was."""
        return self._said.get(name, "")

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """For as long as the engine lives."""
        engine = self._engine
        await engine.processes.stop(NAME, grace_s=0)  # of a Modelium that was killed
        await self._begin()
        if not self._optimizers:
            return
        await engine.runtimes_known()
        await engine.catalog.read_once.wait()
        try:
            while True:
                try:
                    await self._look()
                except Exception:
                    log.exception("looking for what could be served faster failed; it goes on")
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            if self._making is not None:
                self._making.cancel()
                await asyncio.wait([self._making])

    async def _begin(self) -> None:
        self._failed = await asyncio.to_thread(self._read_failed)
        for name, optimizer in list(self._optimizers.items()):
            context = OptimizerContext(cache_dir=self._engine.paths.cache, settings=self._sections[name])
            try:
                await optimizer.start(context)
                continue
            except ModeliumError as exc:
                log.warning("the optimizer %s can't work: %s", name, exc.message)
            except Exception:
                log.exception("the optimizer %s failed to start", name)
            del self._optimizers[name]
        problem = await asyncio.to_thread(swapping.problem, self._engine.repository) if self._optimizers else None
        if problem is not None:
            log.warning("models stay as they were dropped: %s", problem)
            self._optimizers.clear()

    async def _look(self) -> None:
        """One round: put back what does not serve, take up what is there, and make the next."""
        for name in self._said.keys() - self._engine.catalog.known.keys():
            del self._said[name]
        waiting: list[tuple[Judged, Optimization]] = []
        for known in self._judge.subjects():
            judged = await self._judge.judge(known)
            if judged is None or not judged.ours:
                continue
            wanted = judged.optimization
            if judged.manifest.optimization is not None:
                await self._review(judged, judged.manifest.optimization)
            elif wanted is None:
                if judged.reason:
                    self._say(judged.name, f"it stays as it was dropped: {judged.reason}")
            elif (why := self._failed.get(wanted.key)) is not None:
                self._say(judged.name, f"it stays as it was dropped, and not {wanted.what}: {why}")
            elif (facts := await asyncio.to_thread(self._made, wanted)) is not None:
                await self._take_up(judged, wanted, facts)
            else:
                waiting.append((judged, wanted))
        if self._making is not None and not self._making.done():
            return
        waiting.sort(key=lambda item: -self._requests(item[0].name))
        for judged, wanted in waiting:
            if wanted.key in self._failed or self._later.get(wanted.key, 0.0) > self._engine.clock():
                continue
            if not self._who_waits() and not self._in_use(wanted.devices, QUIET_S, others=True):
                self._making = asyncio.get_running_loop().create_task(self._make(judged, wanted), name="optimizing")
                return

    def _requests(self, name: str) -> int:
        usage = self._engine.usage.get(name)
        return usage.requests if usage is not None else 0

    # ------------------------------------------------------------------ making

    def _who_waits(self) -> str:
        """Models that wait for room, not for a retry or for their runtime; empty when none does."""
        world = self._engine.loop.world
        up = {name for name, r in world.runtimes.items() if r.state is RuntimeState.UP and not r.recycle}
        waiting = (world.models[name] for name in sorted(world.queue))
        return ", ".join([m.name for m in waiting if queued(m) and m.runtime in up][:3])

    def _in_use(self, devices: Iterable[str], within_s: float, *, others: bool = False) -> bool:
        """Whether anything on these devices was in use within so many seconds, or (`others`) is by somebody else."""
        engine, wanted = self._engine, set(devices)
        now = engine.clock()
        for name in engine.loop.world.live:
            model = engine.loop.world.models[name]
            if wanted.isdisjoint(device for device, _ in (*model.booking, *model.extra)):
                continue
            usage = engine.usage.get(name)
            last_used = max(model.loaded_at, usage.last_used if usage is not None else 0.0)
            if model.op or now - last_used < within_s or (usage is not None and usage.in_flight):
                return True
        return others and any((d.utilization or 0.0) > BUSY_UTILIZATION for d in engine.devices if d.id in wanted)

    async def _make(self, judged: Judged, optimization: Optimization) -> None:
        """Make it while nobody is hindered by that; the next round takes it up."""
        name, key, what = judged.name, optimization.key, optimization.what
        self._say(name, f"{what} is being made of it, while {' and '.join(optimization.devices)} is idle")
        job = Job(self._engine.processes.root_id, lambda progress: self._engine.tell_progress(name, progress))
        job.report(Progress(stage=f"making {what}"))
        task = asyncio.get_running_loop().create_task(self._produce(judged, optimization, job), name=f"optimize {name}")
        try:
            waiting = await self._guard(task, optimization, job)
            if waiting:
                self._say(name, f"making {what} was given up: {waiting} waits for room")
                return
            task.result()
        except ModelError as exc:
            if self._as_judged(judged):  # else it is no wonder
                self._fail(key, exc.message)
            return
        except ModeliumError as exc:
            self._later[key] = self._engine.clock() + AGAIN_AFTER_S
            self._say(name, f"{what} could not be made, which is tried again later: {exc.message}")
            return
        except Exception as exc:
            log.exception("the optimizer failed to make %s of %s", what, name)
            self._fail(key, f"an error in the optimizer itself: {type(exc).__name__}: {exc}")
            return
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._engine.progress.pop(name, None)

    async def _guard(self, task: asyncio.Task[Any], optimization: Optimization, job: Job) -> str:
        """Until it is made, or given up; then for whom."""
        while not task.done():
            await asyncio.wait([task], timeout=WATCH_EVERY_S)
            if not task.done() and (waiting := self._who_waits()):
                task.cancel()
                await asyncio.wait([task])
                return waiting
            job.pause(self._in_use(optimization.devices, REST_S))
        return ""

    async def _produce(self, judged: Judged, optimization: Optimization, job: Job) -> None:
        """Into the cache, whole or not at all."""
        assert judged.optimizer is not None
        folder = self._folder / optimization.key
        fresh = folder.with_name(f".{folder.name}.new")
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        async with locked(folder, job.report, f"making {optimization.what}"):
            if await asyncio.to_thread(self._made, optimization) is not None:
                return
            try:
                await asyncio.to_thread(shutil.rmtree, fresh, True)
                await asyncio.to_thread((fresh / "files").mkdir, parents=True)
                facts = await judged.optimizer.optimize(judged.served, optimization, fresh / "files", job)
                await asyncio.to_thread(_finish, fresh, facts, folder)
            finally:
                await asyncio.to_thread(shutil.rmtree, fresh, True)

    def _made(self, optimization: Optimization) -> Mapping[str, Any] | None:
        """What is known of it when it was made before. Runs in a thread."""
        try:
            facts = json.loads((self._folder / optimization.key / "facts.json").read_bytes())
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None

    # ------------------------------------------------------------------ taking up, putting back

    async def _take_up(self, judged: Judged, optimization: Optimization, facts: Mapping[str, Any]) -> None:
        """Exchange the model's folder for one in the new form; the core does the rest."""
        name, what, optimizer = judged.name, optimization.what, judged.optimizer
        engine = self._engine
        assert optimizer is not None
        try:
            form = optimizer.layout(judged.served, optimization, facts)
        except ModelError as exc:
            self._fail(optimization.key, exc.message)
            return
        except ModeliumError as exc:
            self._say(name, f"{what} can't be taken up: {exc.message}")
            return
        except Exception as exc:
            log.exception("the optimizer failed to lay out %s of %s", what, name)
            self._fail(optimization.key, f"an error in the optimizer itself: {type(exc).__name__}: {exc}")
            return
        try:
            record = OptimizationRecord(
                optimizer=optimizer.name,
                key=optimization.key,
                what=what,
                note=form.note,
                made_at=engine.clock(),
                unconverted=swapping.UNCONVERTED,
                depends_on=optimization.depends_on,
            )
            manifest = swapping.converted(judged.manifest, form, record)
            if not self._as_judged(judged):
                return
            if not self._room_beside(name, _estimate(engine, manifest)):
                self._say(name, f"{what} is made, and waits for room to load beside what serves")
                return
            files = self._folder / optimization.key / "files"
            staged = await asyncio.to_thread(
                swapping.optimized, engine.repository, judged.revision, manifest, form, files
            )
        except Changed:
            return
        except ModelError as exc:
            self._fail(optimization.key, exc.message)
            return
        except ModeliumError as exc:
            self._say(name, f"{what} can't be taken up: {exc.message}")
            return
        except Exception as exc:  # in our own work: it is no fault of the form, and the next round tries again
            told = f"{what} can't be taken up: {type(exc).__name__}: {exc}"
            if self.said(name) != told:
                log.exception("%s can't be taken up for %s", what, name)
            self._say(name, told)
            return
        note = f" ({form.note})" if form.note else ""
        await self._exchange(judged, staged, f"converted: it is served as {what} from now on{note}")

    def _room_beside(self, name: str, estimate: Estimate) -> bool:
        """Whether it could load on its devices while the old form serves."""
        loop = self._engine.loop
        world = loop.exact()
        model = replace(world.models[name], estimate=estimate)
        places = {device for device, _ in model.booking}
        found = spots(Turn(world, loop.policy, loop.clock()), model)
        return any(spot.seen and spot.fits_now for spot in found if {device for device, _ in spot.booking} == places)

    async def _review(self, judged: Judged, record: OptimizationRecord) -> None:
        """Put it back where it does not load, or would not be made now as it was."""
        now = judged.optimization
        if (why := self._why_it_does_not_load(judged.name)) is not None:
            self._fail(record.key, why)
            await self._put_back(judged, f"{record.what} failed: {why}")
        elif judged.optimizer is None or (now is None and judged.reason):
            return  # nobody can tell
        elif now is None:
            await self._put_back(judged, f"{record.optimizer} is not to convert it")
        elif now.key != record.key:
            await self._put_back(judged, f"{record.what} does not fit any more: {difference(record, now)}")

    def _why_it_does_not_load(self, name: str) -> str | None:
        model = self._engine.loop.world.models.get(name)
        if model is None:
            return None
        if model.rejected is not None and model.rejected == model.spec:
            return model.reason
        if model.state is State.FAILED and model.failure is not None and not model.blameless:
            return f"it does not load: {model.failure.message}"
        return None

    async def _put_back(self, judged: Judged, reason: str) -> None:
        try:
            staged = await asyncio.to_thread(
                swapping.unconverted, self._engine.repository, judged.revision, judged.name
            )
        except Changed:
            return
        except ModeliumError as exc:
            self._say(judged.name, f"{reason}, and it can't be put back as it was dropped: {exc.message}")
            return
        await self._exchange(judged, staged, f"put back as it was dropped: {reason}")

    async def _exchange(self, judged: Judged, staged: Form, reason: str) -> None:
        """Let a form take the model's place, unless something came between."""
        name, exchanged = judged.name, False
        try:
            if self._as_judged(judged):
                staged.exchange()  # one system call, so that no load or unload can begin in the midst of it
                exchanged = True
                self._say(name, reason)
        except OSError as exc:
            self._say(name, f"its folder can't be exchanged: {exc}")
        finally:
            await asyncio.to_thread(staged.tidy, self._engine.repository, exchanged)
        await self._engine.catalog.look(name, settled=True)

    def _as_judged(self, judged: Judged) -> bool:
        """Whether it is still there, as it was judged, and nothing is done with it just now."""
        known = self._engine.catalog.known.get(judged.name)
        model = self._engine.loop.world.models.get(judged.name)
        return known is not None and known.revision == judged.revision and model is not None and not model.op

    # ------------------------------------------------------------------ telling, remembering

    def _say(self, name: str, reason: str) -> None:
        """A decision of its own in the journal, once."""
        engine = self._engine
        model = engine.loop.world.models.get(name)
        if model is None or self._said.get(name) == reason:
            return
        self._said[name] = reason
        state = str(model.state)
        told = Transition(
            decision=engine.loop.decide(), at=engine.clock(), subject=name, before=state, after=state, reason=reason
        )
        engine.journal.add(told)
        engine.host.transition(told)

    def _fail(self, key: str, reason: str) -> None:
        """It is not tried again; the next round tells of it."""
        self._failed[key] = reason
        try:
            replace_file(self._file, json.dumps(self._failed, indent=0).encode())
        except OSError as exc:
            log.error("could not write %s: %s", self._file, exc)

    def _read_failed(self) -> dict[str, str]:
        try:
            return _FAILED.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as exc:
            log.warning("%s is not usable and starts anew: %s", self._file, exc)
            return {}


def _finish(fresh: Path, facts: Mapping[str, Any], folder: Path) -> None:
    (fresh / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    fresh.rename(folder)


def _estimate(engine: Orchestrator, manifest: Manifest) -> Estimate:
    inspection, plan = manifest.inspection, manifest.plan
    weights_bytes = inspection.analysis.weights_bytes if inspection.analysis is not None else 0
    return engine.planner.estimate(measurement_key(inspection.content_key, plan), plan, weights_bytes)
