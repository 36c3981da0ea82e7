"""`HYPOTHESIS_PROFILE=deep` looks for minutes, and elsewhere each time; without it, a quick look, always the same."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

settings.register_profile(
    "quick",
    max_examples=100,
    stateful_step_count=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=_SLOW,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
settings.register_profile(
    "deep",
    parent=settings.get_profile("quick"),
    max_examples=1500,
    stateful_step_count=120,
    derandomize=False,
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
