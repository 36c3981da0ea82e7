"""Where a waiting model goes, and the arithmetic that is told with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from modelium.api.units import human
from modelium.core.states import State
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Account, Booking, Model

MOST_SPOTS = 256
"""So many choices of several devices are looked at, those with the most room first."""


@dataclass(frozen=True, slots=True)
class Place:
    """One device as a place for one model, or for an equal part of it."""

    account: Account
    need: int
    promised_to_others: int
    held: int = 0
    """What it keeps there while it sleeps, beside what it needs."""

    spare: int = 0
    """What a load books besides where it is free, so that others leave it that room until it is measured."""

    @property
    def whole(self) -> int:
        """What it will hold there in all."""
        return self.need + self.held

    @property
    def taken(self) -> int:
        return self.need + max(0, min(self.spare, self.free_now - self.need))

    @property
    def free_now(self) -> int:
        """Room that nobody holds and nobody was promised."""
        return min(
            self.account.limit_bytes - self.account.booked_bytes,
            self.account.limit_bytes
            - self.account.booked_bytes
            + self.account.reclaiming_bytes
            - self.promised_to_others,
        )

    @property
    def shortage(self) -> int:
        """What must still be set free beyond all that is on its way back."""
        account = self.account
        return (
            account.booked_bytes - account.reclaiming_bytes + self.promised_to_others + self.need - account.limit_bytes
        )

    @property
    def arithmetic(self) -> str:
        account = self.account
        if account.missed:
            return f"{account.id} is not seen at present"
        parts = [f"needs {human(self.need)} on {account.id}: limit {human(account.limit_bytes)}"]
        if account.limit_bytes < account.budget_bytes:
            parts.append(
                f"(budget {human(account.budget_bytes)}, {human(account.unbooked_bytes)} used beyond what is booked)"
            )
        parts.append(f"less {human(account.booked_bytes)} booked")
        if self.promised_to_others:
            parts.append(f"less {human(self.promised_to_others)} promised")
        if account.reclaiming_bytes:
            parts.append(f"plus {human(account.reclaiming_bytes)} being freed")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Spot:
    """As many devices as a model spreads over, most often one."""

    places: tuple[Place, ...]

    @property
    def id(self) -> str:
        """Names the devices."""
        return " ".join(place.account.id for place in self.places)

    @property
    def need(self) -> int:
        """On each of them."""
        return self.places[0].need

    @property
    def booking(self) -> Booking:
        return tuple((place.account.id, place.need) for place in self.places)

    @property
    def taken(self) -> Booking:
        """What a load that begins now books."""
        return tuple((place.account.id, place.taken) for place in self.places)

    @property
    def fits_ever(self) -> bool:
        """Whether there would be room if all else were unloaded."""
        return all(place.whole <= place.account.budget_bytes for place in self.places)

    @property
    def seen(self) -> bool:
        """Whether the last look was with all of them."""
        return not any(place.account.missed for place in self.places)

    @property
    def free_now(self) -> int:
        return min(place.free_now for place in self.places)

    @property
    def fits_now(self) -> bool:
        return all(place.need <= min(max(0, place.free_now), place.account.budget_bytes) for place in self.places)

    @property
    def shortage(self) -> int:
        """The largest of any of them."""
        return max(place.shortage for place in self.places)

    @property
    def arithmetic(self) -> str:
        return "; ".join(place.arithmetic for place in self.places)


def spots(turn: Turn, model: Model, ahead: Mapping[str, int] | None = None) -> list[Spot]:
    """The devices of the right kind, in the order in which they should be tried.

    `ahead` is the room, by device, that is kept for those whose turn comes before; without it, all that is promised
    to others is.
    """
    spec = model.spec
    if spec is None:
        return []
    need, where = model.need, _where(turn, model)
    found = [
        Place(
            account,
            max(0, need - bytes_on(model.booking, account.id)) if where else need,
            account.promised_bytes - bytes_on(model.promise, account.id) if ahead is None else ahead.get(account.id, 0),
            bytes_on(model.booking, account.id) if where else 0,
            0 if where else model.spare,
        )
        for account in turn.devices.values()
        if account.kind == spec.device_kind
        and turn.reaches(spec.runtime, account)
        and (not where or account.id in where)
    ]
    if len(found) > 1:
        found.sort(key=lambda p: (-p.free_now, p.account.id))
    if spec.devices == 1:
        return [Spot((place,)) for place in found]
    together: list[Spot] = []
    for chosen in combinations(found, spec.devices):
        together.append(Spot(tuple(sorted(chosen, key=lambda p: p.account.id))))
        if len(together) == MOST_SPOTS:
            break
    return together


def _where(turn: Turn, model: Model) -> set[str]:
    """The devices that a parked model wakes on: where it was. Empty: any, or nobody knows."""
    return {d for d in model.placed if d in turn.devices} if model.parked is not None else set()


def spots_anew(turn: Turn, model: Model, ahead: Mapping[str, int] | None = None) -> list[Spot]:
    """Those that there are for it if what sleeps is loaded anew."""
    return spots(turn, model if model.parked is None else replace(model, parked=None), ahead)


def never_fits(turn: Turn, model: Model, found: Iterable[Spot]) -> str | None:
    """Why the model can't fit even when all else is unloaded; None when it can."""
    if any(s.fits_ever for s in found):
        return None
    spec = model.spec
    kind, several = (spec.device_kind, spec.devices) if spec else ("?", 1)
    there = sorted(
        (a for a in turn.devices.values() if a.kind == kind and spec is not None and turn.reaches(spec.runtime, a)),
        key=lambda a: a.id,
    )
    if not there:
        return f"needs a device of kind {kind}, and there is none"
    budgets = ", ".join(f"{a.id} has a budget of {human(a.budget_bytes)} (of {human(a.total_bytes)})" for a in there)
    how = "measured at its last load" if model.estimate.measured else "estimated"
    if several > 1:
        return f"can never fit: needs {several} devices of kind {kind} with {human(model.need)} each ({how}); {budgets}"
    return f"can never fit: needs {human(model.need)} ({how}); {budgets}"


def never_beside(turn: Turn, model: Model, found: Iterable[Spot]) -> str | None:
    """Why the model can't fit beside what the configuration keeps loaded; None when it can. A pin may go any time."""
    live = (turn.models[n] for n in sorted(turn.live) if n != model.name)
    always = [
        m for m in live if m.always_loaded and m.state is State.READY and m.measured
    ]  # what others take is a guess
    rooms: dict[str, str] = {}
    for spot in found:
        fits = True
        for place in spot.places:
            device, budget = place.account.id, place.account.budget_bytes
            holding = [m for m in always if bytes_on(m.booking, device)]
            held = sum(bytes_on(m.booking, device) for m in holding)
            if place.whole > budget - held:
                fits = False
                names = ", ".join(m.name for m in holding)
                rooms[device] = f"{device} has a budget of {human(budget)} less {human(held)} of {names}"
        if fits:
            return None
    if not rooms:
        return None
    each = " on each device" if model.spec is not None and model.spec.devices > 1 else ""
    return f"can never fit beside what is always loaded: needs {human(model.need)}{each}; {'; '.join(rooms.values())}"
