"""Brains and eviction policies as the rest of Modelium sees them: a plugin's mistake is reported and made harmless."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelium.api.driver import Brain, EvictionPolicy
from modelium.api.types import Analysis, Candidate, Offer, Plan, Situation
from modelium.core.world import least_recently_used
from modelium.errors import ModeliumError, PluginError

OnFailure = Callable[[Exception], None]
"""Told of what the plugin did wrong; never raises."""


class GuardedBrain:
    """A brain whose plans are among what was offered; raises `PluginError` where its plugin fails."""

    def __init__(self, brain: Brain, plugin: str, on_failure: OnFailure):
        self.name = brain.name
        self._brain = brain
        self._plugin = plugin
        self._on_failure = on_failure

    def plan(self, name: str, analysis: Analysis, offers: Sequence[Offer], situation: Situation) -> Plan:
        try:
            plan = self._brain.plan(name, analysis, offers, situation)
            if not isinstance(plan, Plan):
                raise TypeError(f"plan() returned {plan!r:.80}, not a Plan")
            if not any((o.runtime, o.serving) == (plan.runtime, plan.serving) for o in offers):
                raise ValueError(f"plan() chose {plan.runtime}/{plan.serving}, which was not on offer")
        except ModeliumError:
            raise
        except Exception as exc:
            self._on_failure(exc)
            raise PluginError(
                f"the brain {self.name!r} of plugin {self._plugin} could not plan {name}: {type(exc).__name__}: {exc}; "
                "report it to the plugin's author, or choose another brain in the configuration"
            ) from exc
        return plan


class GuardedPolicy:
    """An eviction policy that always ranks: where its plugin fails, the least recently used model goes first."""

    def __init__(self, policy: EvictionPolicy, on_failure: OnFailure):
        self.name = policy.name
        self._policy = policy
        self._on_failure = on_failure

    def rank(self, candidates: Sequence[Candidate], now: float) -> Sequence[str]:
        """Names of `candidates`, each at most once, the one to evict first at the front."""
        candidates = tuple(candidates)
        try:
            ranking = tuple(self._policy.rank(candidates, now))
            left = {c.name for c in candidates}
            for name in ranking:
                if name not in left:
                    raise ValueError(f"rank() named {name!r:.80} twice, or it is no candidate")
                left.remove(name)
        except Exception as exc:
            self._on_failure(exc)
            return least_recently_used(candidates, now)
        return ranking
