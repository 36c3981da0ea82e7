"""Which loaded models may make room, and the smallest set of them that does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import IntEnum

from modelium.api.types import Candidate
from modelium.core.standby import parked_as, worth
from modelium.core.states import State, Want
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Model

Place = tuple[bool, float, float, str]
"""A waiting model's place in the queue: smaller comes first."""


class Tier(IntEnum):
    """How much is lost by evicting: a waiter takes from the lowest tiers that make room."""

    PARKED = 0
    """Asleep."""
    IDLE = 1
    """Idle past the threshold."""
    QUIET = 2
    """Not in use now, and less often than `keep_above_qps`."""
    HOT = 3
    """Not in use at this moment, but used often."""
    BUSY = 4
    """In use: drained first, so nothing that runs is lost."""


def tier_of(turn: Turn, model: Model) -> Tier:
    if model.state is State.STANDBY:
        return Tier.PARKED
    if model.use.in_flight:
        return Tier.BUSY
    if model.use.qps > turn.policy.keep_above_qps:
        return Tier.HOT
    if turn.now - model.busy_since >= turn.policy.idle_s:
        return Tier.IDLE
    return Tier.QUIET


def stays_until(turn: Turn, model: Model) -> float:
    """The end of its minimum stay; what nobody asked for and nobody used has none."""
    if not model.use.requests and not model.use.in_flight and model.loaded_for in _UNASKED:
        return model.loaded_at
    return model.loaded_at + turn.policy.min_resident_s


_UNASKED = frozenset({Want.NONE, Want.DROPPED, Want.PART})


class Victims:
    """What may be evicted, as it is until the next model moves.

    `awaited` are names of parts that waiting models need, with the first place in the queue among those: they go only
    for somebody who comes before.
    """

    def __init__(self, turn: Turn, awaited: Mapping[str, Place]):
        self._turn = turn
        self._awaited = awaited
        self._free: dict[str, Tier] = {}
        """Who may go at all, save for what is made of it."""
        self._staying: list[tuple[float, str]] = []
        self._kept: list[str] = []
        self._roots: dict[tuple[str, Tier], list[str]] = {}
        self._most: dict[tuple[str, Tier], int] = {}
        self._fixed: frozenset[str] | None = None
        for name in sorted(turn.live):
            model = turn.models[name]
            if model.state is State.STANDBY:
                self._free[name] = Tier.PARKED
            if model.state is not State.READY or model.op:
                continue
            if model.kept:
                self._kept.append(name)
                continue
            until = stays_until(turn, model)
            if turn.now < until:
                self._staying.append((until, name))
            else:
                self._free[name] = tier_of(turn, model)

    def tier(self, name: str) -> Tier:
        return self._free[name]

    def again_at(self) -> float | None:
        """The time at which one more model may go."""
        return min(self._staying)[0] if self._staying else None

    def choose(
        self, shortages: Mapping[str, int], worst: Tier, place: Place | None, movable: Collection[str] = ()
    ) -> tuple[Model, ...]:
        """The smallest set, from the lowest tiers in the policy's order, that frees what each device is short of.

        `place` is the place in the queue of the one who needs the room, None for nobody who waits; `movable` are
        names of awaited parts that may go nevertheless. Empty where nothing frees enough.
        """
        if any(self._total(device, worst) < shortage for device, shortage in shortages.items()):
            return ()
        spared = {n for n, first in self._awaited.items() if place is None or first <= place}.difference(movable)
        roots: list[str] = []
        gone: list[str] = []
        for device, shortage in shortages.items():
            for tier in Tier:
                if tier > worst or self._size(gone, device) >= shortage:
                    break
                for name in self._ranked(device, tier, gone):
                    if name in spared or name in gone:
                        continue
                    roots.append(name)
                    gone = self._with_parts(roots, tier, spared)
                    if self._size(gone, device) >= shortage:
                        break
            if self._size(gone, device) < shortage:
                return ()
        return tuple(self._turn.models[n] for n in self._needed(gone, roots, shortages))

    def _needed(self, gone: list[str], roots: list[str], shortages: Mapping[str, int]) -> list[str]:
        """Leave out what need not go after all: the largest parts first, then models from the end of the order."""
        sizes = {n: {device: self._size([n], device) for device in shortages} for n in gone}
        spare = {device: self._size(gone, device) - shortage for device, shortage in shortages.items()}
        parts = sorted((n for n in gone if n not in roots), key=lambda n: (-sum(sizes[n].values()), n))
        for name in (*parts, *parts, *reversed(roots)):
            if name in gone and all(sizes[name][device] <= spare[device] for device in shortages):
                fewer = [n for n in gone if n != name]
                if self._sound(fewer):
                    gone = fewer
                    spare = {device: size - sizes[name][device] for device, size in spare.items()}
        return gone

    def obstacles(self, worst: Tier) -> list[str]:
        """Why others can't go, for the reason that people read."""
        models, now = self._turn.models, self._turn.now
        told = [f"{n} is {'pinned' if models[n].pinned else 'always loaded'}" for n in self._kept]
        told += [f"{n} stays {until - now:.0f} s more" for until, n in self._staying]
        told += [f"{n} is in use" for n, tier in self._free.items() if tier > worst]
        return sorted(told)

    def claimable(self, device: str, place: Place) -> int:
        """Bytes of a device that somebody who waits long enough can get."""
        turn = self._turn
        if self._fixed is None:
            held = (turn.models[n] for n in turn.live)
            fixed = [m for m in held if m.held is not None and (m.kept or m.state is State.FAILED)]
            self._fixed = frozenset(self._down(fixed))
        awaited = [turn.models[n] for n, first in self._awaited.items() if first <= place and n in turn.models]
        names = self._fixed.union(self._down(awaited))
        return turn.devices[device].limit_bytes - self._size(names, device)

    def _down(self, models: Iterable[Model]) -> set[str]:
        """Their names and those of all that they are made of."""
        names: set[str] = set()
        todo = list(models)
        while todo:
            model = todo.pop()
            if model.name not in names:
                names.add(model.name)
                todo.extend(p for n in model.parts if (p := self._turn.models.get(n)) is not None)
        return names

    def _size(self, names: Iterable[str], device: str) -> int:
        models = self._turn.models
        return sum(bytes_on(models[n].booking, device) for n in names)

    def _total(self, device: str, worst: Tier) -> int:
        """What all that may go would free at the very most."""
        key = (device, worst)
        if key not in self._most:
            self._most[key] = self._size((n for n, tier in self._free.items() if tier <= worst), device)
        return self._most[key]

    def _sound(self, names: list[str]) -> bool:
        """Whether nothing that stays is made of what goes."""
        return all(d.name in names for n in names for d in self._turn.live_dependents(n))

    def _ranked(self, device: str, tier: Tier, gone: list[str]) -> list[str]:
        """Those of a tier that nothing else is made of, in the policy's order."""
        key = (device, tier)
        if key not in self._roots or gone:
            names = [
                n
                for n, t in self._free.items()
                if t is tier and n not in gone and all(d.name in gone for d in self._turn.live_dependents(n))
            ]
            found = [c for n in names if (c := self._candidate(n, device, tier))]
            if tier is Tier.PARKED:
                order: Sequence[str] = self._least_worth(c.name for c in found)
            else:
                order = self._turn.policy.rank(found, self._turn.now)
            known = set(names)
            ranked = [n for n in order if n in known]
            if gone:
                return ranked
            self._roots[key] = ranked
        return self._roots[key]

    def _least_worth(self, names: Iterable[str]) -> list[str]:
        models = self._turn.models
        return sorted(names, key=lambda n: (worth(self._turn, models[n], parked_as(models[n])), n))

    def _candidate(self, name: str, device: str, tier: Tier) -> Candidate | None:
        """None where it holds nothing of the device, nor do its parts."""
        model = self._turn.models[name]
        frees = bytes_on(model.booking, device)
        if model.parts:
            frees = self._size(self._with_parts([name], tier, set()), device)
            if not self._size(self._down([model]), device):
                return None
        elif not frees:
            return None
        return Candidate(
            name=name,
            memory_bytes=frees,
            loaded_at=model.loaded_at,
            last_used=model.busy_since,
            requests=model.use.requests,
            qps=model.use.qps,
            load_s=model.estimate.load_s,
        )

    def _with_parts(self, roots: list[str], tier: Tier, spared: set[str]) -> list[str]:
        """They, and the parts that nobody else would miss: they go together, a model before its parts."""
        names = list(roots)
        for name in names:
            for part in self._turn.models[name].parts:
                if part in names or part in spared or self._free.get(part, Tier.BUSY + 1) > tier:
                    continue
                if all(d.name in names for d in self._turn.live_dependents(part)):
                    names.append(part)
        return names
