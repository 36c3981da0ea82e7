"""The queue as it stands in one look at it: who comes before whom, for whose sake, and what is kept for them."""

from __future__ import annotations

from modelium.core.eviction import Place, Victims
from modelium.core.states import BASE_PRIORITY, URGENT, State, Want
from modelium.core.turn import Turn
from modelium.core.world import Booking, Model, Spec, queued


class Line:
    """Places in the queue are total: of two who wait for the same room, it is always clear whose it is.

    First those who are wanted, then those that should be there if there is room to spare; then by priority, own or
    asked for, plus one for each `fairness_after_s` waited; then by time. A part takes the best place among its own
    and those of what waits for it.
    """

    def __init__(self, turn: Turn):
        self._turn = turn
        self._places: dict[str, Place] = {}
        self.awaited: dict[str, Place] = {}
        """Names of parts that waiting models need, with the first place among those, and of parked ones that wait."""
        self.ahead: dict[str, int] = {}
        """Bytes by device that are kept for those who came before in this look."""
        self.loading: dict[str, int] = {}
        """Loads under way, by runtime."""
        self._largest: dict[tuple[str, str], int] = {}
        self._several: set[tuple[str, str]] = set()
        self._in_vain: dict[tuple[tuple[str, str], bool], int] = {}
        self._victims: Victims | None = None
        wholes: list[str] = []
        for name in turn.queue:
            model = turn.models[name]
            if queued(model):
                self._places[name] = _own_place(turn, model)
                if model.parts:
                    wholes.append(name)
        for name in wholes:
            self._inherit(name)
        for name, place in self._places.items():
            if turn.models[name].state is State.STANDBY:
                self.awaited[name] = place  # it is nobody's victim behind it
        for account in turn.devices.values():
            key = (account.kind, account.runtime)
            if key in self._largest:
                self._several.add(key)
            self._largest[key] = max(self._largest.get(key, 0), account.budget_bytes)
        self._apart = {runtime for _, runtime in self._largest if runtime}
        for runtime in loads(turn):
            self.loading[runtime] = self.loading.get(runtime, 0) + 1

    def _inherit(self, whole: str) -> None:
        place = self._places[whole]
        for part in self._turn.models[whole].parts:
            if part not in self.awaited or place < self.awaited[part]:
                self.awaited[part] = place
            if part in self._places and place < self._places[part]:
                self._places[part] = place
                self._inherit(part)

    def order(self) -> list[str]:
        """Names, the first in the queue at the front.

        Of those in one place, what waits for its parts is looked at before them, since they are nothing without it;
        then the largest part, since it is the hardest to place.
        """
        models, places = self._turn.models, self._places

        def key(name: str) -> tuple[Place, bool, bool, int, str]:
            model, place = models[name], places[name]
            return (place, name != place[3], not model.parts, -model.estimate.memory_bytes, name)

        return sorted(places, key=key)

    def place(self, model: Model) -> Place:
        return self._places[model.name]

    def in_the_way(self, model: Model) -> set[str]:
        """Smaller parts of what it is a part of itself, which have room on another device: they may move for it."""
        place, size = self._places[model.name], model.estimate.memory_bytes
        found: set[str] = set()
        for name, first in self.awaited.items():
            part = self._turn.models.get(name)
            if first != place or part is None or name in model.parts or part.estimate.memory_bytes >= size:
                continue
            if any(
                account.kind == part.spec.device_kind
                and self._turn.reaches(part.spec.runtime, account)
                and account.budget_bytes >= part.estimate.memory_bytes
                and account.id not in (d for d, _ in part.booking)
                for account in self._turn.devices.values()
                if part.spec is not None
            ):
                found.add(name)
        return found

    def urgent(self, model: Model) -> bool:
        """Whether models that are not idle make room for it."""
        return not self._places[model.name][0]

    def aged(self, model: Model) -> bool:
        """Whether it has waited so long that it takes room from models in use."""
        return self._turn.now >= self.ages_at(model)

    def ages_at(self, model: Model) -> float:
        return self._places[model.name][2] + self._turn.policy.fairness_after_s

    @property
    def victims(self) -> Victims:
        if self._victims is None:
            self._victims = Victims(self._turn, self.awaited)
        return self._victims

    def moved(self) -> None:
        """A loaded model moved, or one began to load."""
        self._victims = None

    def largest(self, spec: Spec) -> int:
        """The largest budget of a device that a model may be placed on; -1 where there is none."""
        own = self._largest.get((spec.device_kind, spec.runtime), -1) if spec.runtime in self._apart else -1
        runtime = self._turn.runtimes.get(spec.runtime)
        shared = -1 if runtime is not None and runtime.elsewhere else self._largest.get((spec.device_kind, ""), -1)
        return max(own, shared)

    def _choice(self, model: Model) -> tuple[str, str]:
        """Models of one choice may be placed on the same devices: its kind, and its runtime where that has its own."""
        spec = model.spec
        assert spec is not None
        return spec.device_kind, spec.runtime if spec.runtime in self._apart else ""

    def in_vain(self, model: Model) -> bool:
        """Whether somebody before it, who needed no more and could take as much, found no room in this look.

        Where there are several devices, one who has waited long is looked at all the same: it may claim another one.
        """
        old, choice = self.aged(model), self._choice(model)
        least = self._in_vain.get((choice, old))
        several = choice in self._several or bool(choice[1])
        if least is None or model.promise or model.want is Want.PART or (old and several):
            return False
        return model.need >= least

    def found_none(self, model: Model) -> None:
        """There is no room for it, nor for one after it who needs as much."""
        spec = model.spec
        if model.want is not Want.PART and spec is not None and spec.devices == 1:
            key, size = (self._choice(model), self.aged(model)), model.need
            self._in_vain[key] = min(size, self._in_vain.get(key, size))

    def reserve(self, booking: Booking) -> None:
        for device, size in booking:
            self.ahead[device] = self.ahead.get(device, 0) + size


def _own_place(turn: Turn, model: Model) -> Place:
    waiting = turn.waiting(model)
    own = _PRIORITY[model.want]
    priority = max(own, *(t.priority for t in waiting)) if waiting else own
    urgent = bool(waiting) or (model.want in URGENT and model.want is not Want.PART)
    waited = max(0.0, turn.now - model.wanted_since) // max(turn.policy.fairness_after_s, 0.001)
    return (not urgent, -(priority + waited), model.wanted_since, model.name)


_PRIORITY = {**BASE_PRIORITY, Want.PART: BASE_PRIORITY[Want.NONE]}
"""A part has no priority of its own."""


def loads(turn: Turn) -> list[str]:
    """The runtime of each load under way."""
    under_way: list[str] = []
    for name in turn.moving:
        model = turn.models[name]
        if model.coming is not None:
            under_way.append(model.coming.spec.runtime)
        elif model.state is State.LOADING:
            under_way.append(model.home)
    return under_way
