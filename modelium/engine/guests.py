"""Models that an external runtime serves of its own accord: usable by their names, and not ours to load or unload.

They have no folder in the repository. A name that a folder has is the folder's: the core takes it from a guest when the
folder is told of.
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
        """Whether a name is, or may turn out to be, that of a folder in the repository."""
        self._at: dict[str, set[str]] = {}
        """Names of what each runtime was last seen to have of its own accord."""
        self._last: dict[str, Observation] = {}
        self._refused: set[str] = set()

    def see(self, runtime: str, observation: Observation) -> None:
        """Take in what an external runtime shows, before that is told to the core."""
        loop = self._loop()
        self._last[runtime] = observation
        shown = {m.name for m in observation.models if m.ready and m.endpoints and self._usable(m.name)}
        guests = {n for n in self._at.get(runtime, ()) if self._is_guest(n, runtime)}
        for name in sorted(guests - shown):
            loop.post(e.ModelRemoved(loop.clock(), name))
        for name in sorted(shown - guests):
            if self._ours(name) or name in loop.world.models:
                continue
            guests.add(name)
            told = f"{runtime} has it of its own accord"
            spec = Spec(runtime, "cpu", REVISION, guest=True)
            loop.post(e.ModelAccepted(loop.clock(), name, spec, Estimate(0, 0.0), was_loaded=True, reason=told))
        self._at[runtime] = guests & shown

    def see_again(self) -> None:
        """Take in what was shown last: by now it is known which names are those of folders."""
        for runtime, observation in list(self._last.items()):
            self.see(runtime, observation)

    def _is_guest(self, name: str, runtime: str) -> bool:
        model = self._loop().world.models.get(name)
        return model is not None and model.spec is not None and model.spec.guest and model.spec.runtime == runtime

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
