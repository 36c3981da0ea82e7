"""Models that Triton is not done with: loads that were given up, and what it waits for without end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from modelium.errors import DriverError, RuntimeStuck
from modelium_plugin_triton.folders import newest

RESTART = "it can be loaded after a new start of Triton (for Modelium's own: `modelium down`, then `modelium serve`)"


@dataclass
class Unfinished:
    """Of one instance of a server."""

    culprits: dict[str, int] = field(default_factory=dict)
    """Models for whose sake a server was started anew, with what told their files; outlives the instance."""
    stuck: dict[str, str] = field(default_factory=dict)
    """Models that Triton never gets done with, and why."""
    _given_up: dict[str, float] = field(default_factory=dict)
    """Models with a load that was given up and that Triton was not done with, and since when (monotonic)."""

    @property
    def names(self) -> set[str]:
        return {*self.stuck, *self._given_up}

    def give_up(self, name: str) -> None:
        self._given_up[name] = time.monotonic()

    def forget_done(self, listed: Set[str], flux: Set[str], alive: Set[str]) -> None:
        """Forget what Triton is done with after all: by what is in its index, what of that it works on, and what has a
        process.

        A model whose folder is gone is not listed: one that it waits for without end stays so, another is done when it
        has no process any more.
        """
        for name in self.names - flux:
            if name in listed or (name not in self.stuck and name not in alive):
                self.stuck.pop(name, None)
                self._given_up.pop(name, None)

    async def check(self, name: str, folder: Path, load_timeout_s: float, *, own: bool) -> None:
        """Raise what is to be said of a model that is unfinished.

        One that Triton never gets done with, a new start of our `own` mends, which is worth it once for the files in
        `folder`: not for such as did it before.
        """
        if name not in self.names:
            return
        if name not in self.stuck and time.monotonic() - self._given_up[name] < load_timeout_s:
            raise DriverError(f"{name}: Triton is not done yet with a load that was given up", code="runtime_busy")
        why = self.stuck.get(name) or f"{name}: Triton goes on without end with a load that was given up"
        if own:
            files = await asyncio.to_thread(newest, folder)
            if self.culprits.get(name) != files:
                self.culprits[name] = files
                raise RuntimeStuck(why)
        raise DriverError(f"{why}; {RESTART}", code="model_stuck")
