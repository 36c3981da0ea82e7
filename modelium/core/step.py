"""The one judgement: what an event makes of the world, and what is to be done.

`step` is synchronous and deterministic. It reads no clock and touches nothing outside its arguments, so that it can
be tested by table, replayed, and asked what would happen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modelium.core import demand, disk, loading, parking, runtimes, ticking
from modelium.core import events as e
from modelium.core.instructions import Instruction
from modelium.core.schedule import schedule
from modelium.core.turn import Turn
from modelium.core.world import Policy, World

_HANDLERS: dict[type[e.Event], Callable[[Turn, Any], None]] = {
    e.DropSeen: disk.drop_seen,
    e.DropRefused: disk.drop_refused,
    e.DropGone: disk.drop_gone,
    e.ModelAccepted: disk.model_accepted,
    e.ModelInvalid: disk.model_invalid,
    e.ModelRemoved: disk.model_removed,
    e.ReadyAsked: demand.ready_asked,
    e.UnloadAsked: demand.unload_asked,
    e.TicketWithdrawn: demand.ticket_withdrawn,
    e.PinAsked: demand.pin_asked,
    e.Loaded: loading.loaded,
    e.LoadFailed: loading.load_failed,
    e.Parked: parking.parked,
    e.ParkFailed: parking.park_failed,
    e.Drained: loading.drained,
    e.Unloaded: loading.unloaded,
    e.UnloadFailed: loading.unload_failed,
    e.UseObserved: ticking.use_observed,
    e.DevicesObserved: ticking.devices_observed,
    e.Ticked: ticking.ticked,
    e.RuntimeAdded: runtimes.runtime_added,
    e.RuntimeUp: runtimes.runtime_up,
    e.RuntimeDown: runtimes.runtime_down,
    e.RuntimeStopped: runtimes.runtime_stopped,
    e.RuntimeObserved: runtimes.runtime_observed,
}


def step(world: World, event: e.Event, policy: Policy) -> tuple[World, list[Instruction]]:
    """The next world, and instructions in the order in which they should be started."""
    turn = Turn(world, policy, event.at)
    _HANDLERS[type(event)](turn, event)
    if turn.dirty:
        schedule(turn)
    return turn.finish()


def steps(world: World, happened: Sequence[e.Event], policy: Policy) -> tuple[World, list[Instruction]]:
    """Several events one after another."""
    out: list[Instruction] = []
    for event in happened:
        world, more = step(world, event, policy)
        out.extend(more)
    return world, out
