"""The default eviction policy: what was used longest ago goes first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from modelium.api import Candidate, EvictionPolicy, hookimpl
from modelium.api.types import Frozen
from modelium.builtin.settings import check_settings


class LruSettings(Frozen):
    """`lru` has nothing to set."""


class LeastRecentlyUsed:
    name = "lru"

    def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
        """By last use; of those used at the same moment, the one that frees most first, then by name."""
        return [c.name for c in sorted(candidates, key=lambda c: (c.last_used, -c.memory_bytes, c.name))]


@hookimpl
def modelium_eviction_policies(settings: dict[str, Any]) -> Iterable[EvictionPolicy]:
    """The policy `lru`."""
    check_settings(LruSettings, settings, "eviction")
    return [LeastRecentlyUsed()]
