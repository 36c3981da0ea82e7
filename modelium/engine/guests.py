"""Models that an external runtime serves of its own accord: usable by their names, and not ours to load or unload.

They have no folder in the repository. A name that a folder has is the folder's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from modelium.api.names import check_model_name
from modelium.api.types import Observation
from modelium.core import events as e
from modelium.core.world import Estimate, Spec
from modelium.engine.loop import Loop
from modelium.errors import ModelError

log = logging.getLogger(__name__)

REVISION = "external"
"""Of what has no files here."""


class Guests:
    def __init__(self, loop: Callable[[], Loop], ours: Callable[[str], bool]):
        self._loop = loop
        self._ours = ours
        """Whether a name is that of a folder in the repository."""
        self._at: dict[str, str] = {}
        """The runtime of each guest."""
        self._refused: set[str] = set()

    def see(self, runtime: str, observation: Observation) -> None:
        """Take in what an external runtime shows, before that is told to the core."""
        loop = self._loop()
        shown = {m.name for m in observation.models if m.ready and m.endpoints and self._usable(m.name)}
        for name in sorted(n for n, at in self._at.items() if at == runtime and (n not in shown or self._ours(n))):
            del self._at[name]
            if not self._ours(name):
                loop.post(e.ModelRemoved(loop.clock(), name))
        for name in sorted(shown - self._at.keys()):
            if self._ours(name) or name in loop.world.models:
                continue
            self._at[name] = runtime
            told = f"{runtime} has it of its own accord"
            spec = Spec(runtime, "cpu", REVISION, guest=True)
            loop.post(e.ModelAccepted(loop.clock(), name, spec, Estimate(0, 0.0), was_loaded=True, reason=told))

    def _usable(self, name: str) -> bool:
        try:
            check_model_name(name)
        except ModelError as exc:
            if name not in self._refused:
                self._refused.add(name)
                log.warning(
                    "a model of an external runtime can't be used: %s (for vLLM: --served-model-name)", exc.message
                )
            return False
        return True
