"""One generation: what its client asked for, the text so far, and when to stop. Knows tokens, and nothing of Triton."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serving import Refused


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens; `top_k` 0 and `top_p` 1 leave nothing out, `temperature` 0 takes the likeliest."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more (0 for all)"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise Refused(f"{name} must be {rule}, and is {getattr(self, name)}")


KINDS: dict[str, Callable[[Any], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": lambda value: max(int(value), 0),  # vLLM says -1 for all
    "repetition_penalty": float,
    "seed": int,
    "stop": lambda value: tuple(part for part in ([value] if isinstance(value, str) else map(str, value)) if part),
}


def decoding(defaults: Mapping[str, Any], sampling_parameters: str, others: Mapping[str, Any]) -> Decoding:
    """What a request asks for: `others` (its inputs and parameters), then its JSON, then the model's defaults."""
    try:
        asked = json.loads(sampling_parameters) if sampling_parameters else {}
    except ValueError as error:
        raise Refused(f"sampling_parameters must be a JSON object: {error}") from None
    if not isinstance(asked, dict):
        raise Refused(f"sampling_parameters must be a JSON object, and is {sampling_parameters!r}")
    unknown = sorted(set(asked) - set(KINDS))
    if unknown:
        raise Refused(f"sampling_parameters has {unknown}, which this model doesn't know; it knows {sorted(KINDS)}")
    asked |= {name: value for name, value in others.items() if name in KINDS}
    given: dict[str, Any] = {}
    for name, value in asked.items():
        if value is None:
            continue
        try:
            given[name] = KINDS[name](value)
        except (TypeError, ValueError):
            raise Refused(f"{name} can't be {value!r}") from None
    if "temperature" not in given and given.keys() & {"top_p", "top_k", "seed"}:
        # Whoever says how to draw wants to draw.
        given["temperature"] = defaults.get("temperature") or 1.0
    return Decoding(**{**defaults, **given})


class Text:
    """Makes text of tokens, piece by piece, and finds the strings to stop at.

    A piece is held back while its last character is incomplete, and while it may be the start of a stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]):
        self.decode = decode
        self.stop = stop
        self.held = max((len(word) for word in stop), default=1) - 1
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._start = self._read = self._sent = 0

    def add(self, token: int) -> str:
        """Take one more token; return the text that is certain now, which may be empty."""
        self.tokens.append(token)
        # Some tokenizers drop a space at the very start: the tokens before are decoded along and cut off again.
        before = self.decode(self.tokens[self._start : self._read])
        now = self.decode(self.tokens[self._start :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self._take(now[len(before) :])
            self._start, self._read = self._read, len(self.tokens)
        return self._certain(0 if self.stopped else self.held)

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        if not self.stopped:
            before = self.decode(self.tokens[self._start : self._read])
            self._take(self.decode(self.tokens[self._start :])[len(before) :])
        return self._certain(0)

    def _take(self, piece: str) -> None:
        known = max(0, len(self.text) - self.held)
        self.text += piece
        found = [at for word in self.stop if (at := self.text.find(word, known)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _certain(self, held: int) -> str:
        end = max(self._sent, len(self.text) - held)
        piece = self.text[self._sent : end]
        self._sent = end
        return piece
