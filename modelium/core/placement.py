"""Where a waiting model goes, and the arithmetic that is told with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modelium.api.units import human
from modelium.core.states import State
from modelium.core.turn import Turn, bytes_on
from modelium.core.world import Account, Model


@dataclass(frozen=True, slots=True)
class Spot:
    """One device as a place for one model."""

    account: Account
    need: int
    promised_to_others: int

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
        parts = [f"needs {human(self.need)} on {account.id}: limit {human(account.limit_bytes)}"]
        if account.limit_bytes < account.budget_bytes:
            parts.append(f"(budget {human(account.budget_bytes)}, {human(account.foreign_bytes)} used by others)")
        parts.append(f"less {human(account.booked_bytes)} booked")
        if self.promised_to_others:
            parts.append(f"less {human(self.promised_to_others)} promised")
        if account.reclaiming_bytes:
            parts.append(f"plus {human(account.reclaiming_bytes)} being freed")
        return " ".join(parts)


def spots(turn: Turn, model: Model, ahead: Mapping[str, int] | None = None) -> list[Spot]:
    """The devices of the right kind, in the order in which they should be tried.

    `ahead` is the room, by device, that is kept for those whose turn comes before; without it, all that is promised
    to others is.
    """
    if model.spec is None:
        return []
    need, where = model.estimate.memory_bytes, _where(turn, model)
    found = [
        Spot(
            account,
            max(0, need - bytes_on(model.booking, account.id)) if where else need,
            account.promised_bytes - bytes_on(model.promise, account.id) if ahead is None else ahead.get(account.id, 0),
        )
        for account in turn.devices.values()
        if account.kind == model.spec.device_kind and (not where or account.id in where)
    ]
    if len(found) > 1:
        found.sort(key=lambda s: (-s.free_now, s.account.id))
    return found


def _where(turn: Turn, model: Model) -> set[str]:
    """The devices that a parked model wakes on: where it was, and holds something perhaps. Empty: any."""
    if model.parked is None or model.spec is None:
        return set()
    held = model.parked.before or model.booking
    return {d for d, _ in held if d in turn.devices and turn.devices[d].kind == model.spec.device_kind}


def never_fits(model: Model, found: Iterable[Spot]) -> str | None:
    """Why the model can't fit even when all else is unloaded; None when it can."""
    found = list(found)
    kind = model.spec.device_kind if model.spec else "?"
    if not found:
        return f"needs a device of kind {kind}, and there is none"
    if any(s.need <= s.account.budget_bytes for s in found):
        return None
    budgets = ", ".join(
        f"{s.account.id} has a budget of {human(s.account.budget_bytes)} (of {human(s.account.total_bytes)})"
        for s in sorted(found, key=lambda s: s.account.id)
    )
    how = "measured at its last load" if model.estimate.measured else "estimated"
    return f"can never fit: needs {human(found[0].need)} ({how}); {budgets}"


def never_beside(turn: Turn, model: Model, found: Iterable[Spot]) -> str | None:
    """Why the model can't fit beside what the configuration keeps loaded; None when it can. A pin may go any time."""
    live = (turn.models[n] for n in sorted(turn.live) if n != model.name)
    always = [
        m for m in live if m.always_loaded and m.state is State.READY and m.measured
    ]  # what others take is a guess
    rooms: list[str] = []
    for spot in found:
        device, budget = spot.account.id, spot.account.budget_bytes
        holding = [m for m in always if bytes_on(m.booking, device)]
        held = sum(bytes_on(m.booking, device) for m in holding)
        if spot.need <= budget - held:
            return None
        names = ", ".join(m.name for m in holding)
        rooms.append(f"{device} has a budget of {human(budget)} less {human(held)} of {names}")
    if not rooms:
        return None
    need = human(model.estimate.memory_bytes)
    return f"can never fit beside what is always loaded: needs {need}; {'; '.join(rooms)}"
