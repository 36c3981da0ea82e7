"""The processes of one load while it is under way, and whether Triton waits for one that is dead."""

from __future__ import annotations

from modelium_plugin_triton.measure import Family, Stub

UNNOTICED_S = 5.0
"""Triton notices a stub's end within two seconds, save before the stub's first message and while the stub completes the
configuration: then it never does."""


class LoadWatch:
    """Told what the server's processes are again and again, from just before the load.

    `behind`: Triton is at work on the model already, and this load waits for that; then a process that had ended before
    may be what Triton waits for.
    """

    def __init__(self, name: str, before: Family, *, behind: bool = False):
        self._name = name
        self._old = {stub.key for stub in before.stubs}
        self._zombies = set() if behind else set(before.zombies)
        self._others = {stub.key[0] for stub in before.stubs}
        self._pids: set[int] = set()
        self._since: dict[int, float] = {}

    def mine(self, family: Family) -> list[Stub]:
        """Without those of a revision that is being replaced."""
        return [stub for stub in family.of(self._name) if stub.key not in self._old]

    def is_in_vain(self, family: Family, now: float, *, alone: bool) -> bool:
        """Whether a process of the load died and Triton has not noticed for long.

        A process that ended too soon to be seen was this load's when no other model is being worked on (`alone`), and
        counts as such while the load has no process that lives: hardly a load is without one for long.
        """
        mine = {stub.key[0] for stub in self.mine(family)}
        self._pids |= mine
        self._others |= {stub.key[0] for stub in family.stubs} - self._pids
        unseen = {z for z in family.zombies if z not in self._zombies and z not in self._others}
        dead = {z for z in family.zombies if z in self._pids} | (unseen if alone or not mine else set())
        self._since = {pid: self._since.get(pid, now) for pid in dead}
        return any(now - since > UNNOTICED_S for since in self._since.values())
