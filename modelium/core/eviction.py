"""Which loaded models may make room, and the smallest set of them that does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

from modelium.api.types import Candidate
from modelium.core.states import State
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Model


class Tier(IntEnum):
    """How much is lost by evicting: a waiter takes from the lowest tier that makes room."""

    IDLE = 0
    """Idle past the threshold."""
    QUIET = 1
    """Not in use now, and less often than `keep_above_qps`."""
    HOT = 2
    """Not in use at this moment, but used often."""
    BUSY = 3
    """In use: drained first, so nothing that runs is lost."""


@dataclass(frozen=True, slots=True)
class Group:
    """A model with the parts that only it holds: they go together, the model before its parts."""

    root: Model
    members: tuple[Model, ...]
    memory_bytes: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Choice:
    groups: tuple[Group, ...]
    again_at: float | None
    """When none was found: the time at which one more model may become a candidate."""
    obstacles: tuple[str, ...]
    """Why the others can't go, for the reason that people read."""


def tier_of(turn: Turn, model: Model) -> Tier:
    if model.use.in_flight:
        return Tier.BUSY
    if model.use.qps > turn.policy.keep_above_qps:
        return Tier.HOT
    if turn.now - model.busy_since >= turn.policy.idle_s:
        return Tier.IDLE
    return Tier.QUIET


def group_of(turn: Turn, model: Model, device: str) -> Group:
    """The model and the parts that nobody else would miss, with what they hold on the device."""
    members = [model]
    names = {model.name}
    for member in members:
        for part_name in member.spec.depends_on if member.spec else ():
            part = turn.models.get(part_name)
            if part is None or part.name in names or part.state is not State.READY or _kept(part):
                continue
            if all(d.name in names for d in turn.live_dependents(part_name)):
                members.append(part)
                names.add(part_name)
    size = sum(bytes_on(m.booking, device) for m in members)
    return Group(model, tuple(members), size, max(tier_of(turn, m) for m in members))


def _awaited(turn: Turn, name: str) -> bool:
    """A model that is made of it is about to load."""
    found = (turn.models.get(n) for n in turn.dependents.get(name, ()))
    return any(m is not None and m.state is State.QUEUED for m in found)


def _kept(model: Model) -> bool:
    return model.pinned or model.always_loaded


def choose(turn: Turn, device: str, shortage: int, *, worst: Tier, spare: Collection[str] = ()) -> Choice:
    """The smallest set of groups, from the lowest tiers in the policy's order, that frees `shortage` on the device.

    `spare` are names that must not go (the parts of the model that needs the room).
    """
    policy = turn.policy
    groups: list[Group] = []
    again_at: float | None = None
    obstacles: list[str] = []
    for name in turn.live:
        model = turn.models[name]
        if model.state is not State.READY or name in spare or model.op:
            continue
        if turn.live_dependents(name) or (worst < Tier.BUSY and _awaited(turn, name)):
            continue
        group = group_of(turn, model, device)
        if not group.memory_bytes or any(m.name in spare for m in group.members):
            continue
        if _kept(model):
            obstacles.append(f"{name} is {'always loaded' if model.always_loaded else 'pinned'}")
            continue
        unused = not model.use.requests and not model.use.in_flight
        free_at = model.loaded_at + policy.min_resident_s
        if turn.now < free_at and not unused:
            obstacles.append(f"{name} stays {free_at - turn.now:.0f} s more")
            again_at = free_at if again_at is None else min(again_at, free_at)
            continue
        if group.tier > worst:
            obstacles.append(f"{name} is in use")
            continue
        groups.append(group)
    picked = _smallest(turn, groups, shortage)
    return Choice(tuple(picked), again_at, tuple(sorted(obstacles)))


def _smallest(turn: Turn, groups: list[Group], shortage: int) -> list[Group]:
    taken: list[Group] = []
    freed = 0
    for tier in Tier:
        by_name = {g.root.name: g for g in groups if g.tier is tier}
        if not by_name:
            continue
        for name in turn.policy.rank([_candidate(g) for g in by_name.values()], turn.now):
            if freed >= shortage:
                break
            group = by_name.pop(name, None)
            if group is not None:
                taken.append(group)
                freed += group.memory_bytes
    if freed < shortage:
        return []
    for group in list(reversed(taken)):
        if freed - group.memory_bytes >= shortage:
            taken.remove(group)
            freed -= group.memory_bytes
    return taken


def _candidate(group: Group) -> Candidate:
    model = group.root
    return Candidate(
        name=model.name,
        memory_bytes=group.memory_bytes,
        loaded_at=model.loaded_at,
        last_used=model.busy_since,
        requests=model.use.requests,
        qps=model.use.qps,
        load_s=model.estimate.load_s,
    )
