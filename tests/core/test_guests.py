"""What a runtime has of its own accord: used, never unloaded from here, and never in the place of a folder."""

from __future__ import annotations

import pytest

from modelium.api.types import Device, Observation, ObservedModel
from modelium.core import events as e
from modelium.core import instructions as i
from modelium.core.invariants import violations
from modelium.core.states import State
from modelium.core.step import steps
from modelium.core.world import Estimate, Policy, Spec, World

GUEST, FOLDER = Spec("box", "cpu", "external", guest=True), Spec("here", "cpu", "1")
SHOWN = Observation(instance="box-1", models=(ObservedModel(name="a", ready=True),))
EMPTY = Observation(instance="here-1")
DEVICE = Device(id="cpu:0", kind="cpu", name="host", total_bytes=100, used_bytes=0)

UP = (
    e.DevicesObserved(0.0, (DEVICE,)),
    e.RuntimeAdded(0.0, "box"),
    e.RuntimeAdded(0.0, "here"),
    e.RuntimeUp(1.0, "here", 1, "here-1", False, EMPTY),
)
GUEST_COMES = e.ModelAccepted(2.0, "a", GUEST, Estimate(0, 0.0), was_loaded=True)
FOLDER_COMES = e.ModelAccepted(4.0, "a", FOLDER, Estimate(10, 1.0))
BOX_UP = e.RuntimeUp(3.0, "box", 1, "box-1", True, SHOWN)
BOX_SEEN = tuple(e.RuntimeObserved(at, "box", 1, at - 0.1, SHOWN) for at in (5.0, 7.0, 9.0))


def told(*happened: e.Event) -> tuple[World, list[i.Instruction]]:
    return steps(World(), (*UP, *happened), Policy())


@pytest.mark.parametrize("came", ["before it was found", "after it was found"])
def test_a_folder_takes_its_name_from_a_guest(came: str) -> None:
    found = (FOLDER_COMES, BOX_UP) if came == "before it was found" else (BOX_UP, FOLDER_COMES)
    world, out = told(GUEST_COMES, *found)
    for order in [o for o in out if isinstance(o, i.CloseRoute)]:
        world, more = steps(world, [e.Drained(4.5, "a", order.op)], Policy())
        out += more
    world, more = steps(world, BOX_SEEN, Policy())
    out += more
    assert not violations(world, Policy(), 9.0)
    assert world.models["a"].state is State.LOADING and world.models["a"].home == "here"
    assert [o.runtime for o in out if isinstance(o, i.Load)] == ["here"]
    assert not [o for o in out if isinstance(o, i.Unload)]


def test_a_guest_that_goes_is_forgotten_without_an_unload() -> None:
    world, out = told(GUEST_COMES, BOX_UP, e.ModelRemoved(4.0, "a"))
    assert world.models["a"].state is State.DRAINING
    op = next(o.op for o in out if isinstance(o, i.CloseRoute))
    world, out = steps(world, [e.Drained(5.0, "a", op)], Policy())
    assert "a" not in world.models and not [o for o in out if isinstance(o, i.Unload)]
