"""The single writer: events in, one step each, instructions out.

Everything runs in the event loop's thread. An event that comes up while instructions are carried out waits its turn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from modelium.core import events as e
from modelium.core.instructions import Instruction, Refuse, WakeAt
from modelium.core.step import step
from modelium.core.world import Policy, Use, World
from modelium.engine.usage import UsageBook
from modelium.engine.usage import Use as Counted

log = logging.getLogger(__name__)

Clock = Callable[[], float]

_JUDGES_BY_USE = (
    e.ReadyAsked, e.Ticked, e.RuntimeDown, e.RuntimeObserved, e.DevicesObserved, e.Loaded, e.LoadFailed, e.Unloaded,
)  # fmt: skip
"""What may evict, or drain a runtime that is stuck, and what may have lost models, of which those in use come back."""


class Loop:
    """Holds the world. `execute` starts what an instruction asks for and never waits."""

    def __init__(
        self,
        world: World,
        policy: Policy,
        usage: UsageBook,
        execute: Callable[[Instruction], None],
        clock: Clock = time.time,
    ):
        self.world = world
        self.policy = policy
        self.clock = clock
        self._usage = usage
        self._execute = execute
        self._events: deque[e.Event] = deque()
        self._running = False
        self._wake_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def post(self, event: e.Event) -> None:
        """Let an event happen, after those that came before it."""
        self._events.append(event)
        if self._running or self._stopped:
            return
        self._running = True
        try:
            while self._events:
                self._happen(self._events.popleft())
        finally:
            self._running = False

    def _happen(self, event: e.Event) -> None:
        if isinstance(event, e.Ticked):
            self._wake_at = None
        if isinstance(event, _JUDGES_BY_USE) or self.world.queue:
            self._observe_use(event.at)
        self._step(event)

    def _step(self, event: e.Event) -> None:
        """A step that fails is a bug; the world stays as it was, and whoever asked is told."""
        try:
            self.world, instructions = step(self.world, event, self.policy)
        except Exception:
            log.exception("a bug in the judgement of %r: it is as if this had not happened", event)
            ticket = getattr(event, "ticket", None)
            name = getattr(event, "name", "")
            instructions = [] if ticket is None else [Refuse(ticket, name, "internal", "an error in Modelium itself")]
            if isinstance(event, e.Ticked):
                instructions.append(WakeAt(event.at + self.policy.sweep_s))  # time goes on
        for instruction in instructions:
            try:
                if isinstance(instruction, WakeAt):
                    self._wake(instruction.at)
                else:
                    self._execute(instruction)
            except Exception:
                log.exception("could not carry out %r; the others of this step go on", instruction)

    def _observe_use(self, now: float) -> None:
        """Before a judgement by use: make it exact."""
        use = _as_core(self._usage.drain(now))
        if use:
            self._step(e.UseObserved(now, use))

    def exact(self) -> World:
        """The world with use as it is now, which the real one learns before it judges."""
        now = self.clock()
        world, _ = step(self.world, e.UseObserved(now, _as_core(self._usage.peek(now))), self.policy)
        return world

    def decide(self) -> int:
        """The id of a decision that is made outside of the core, and changes no state."""
        self.world = replace(self.world, next_id=self.world.next_id + 1)
        return self.world.next_id - 1

    def tick(self) -> None:
        self.post(e.Ticked(self.clock()))

    def _wake(self, at: float) -> None:
        if self._wake_at is not None and self._wake_at <= at:
            return
        self._wake_at = at
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, at - self.clock())
        self._timer = asyncio.get_running_loop().call_later(delay + 0.001, self.tick)

    def stop(self) -> None:
        """Let nothing happen any more."""
        self._stopped = True
        self._events.clear()
        if self._timer is not None:
            self._timer.cancel()


def _as_core(used: list[Counted]) -> tuple[tuple[str, Use], ...]:
    return tuple((u.name, Use(u.in_flight, u.requests, u.last_used, round(u.qps, 4))) for u in used)
