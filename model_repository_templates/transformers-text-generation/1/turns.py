"""Turns: several generations compute in one process, one token each, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock that is granted in the order of asking.

    Two forward passes at once would fight for the same cores; a whole generation at once would make the next one wait
    for its first token. So each holds the turn for one token, and gives way.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            granted = threading.Event()
            self._waiting.append(granted)
        granted.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pass_on()

    def give_way(self) -> None:
        """Let everybody who waits go first. Only the holder may call it."""
        if self._waiting:
            self._pass_on()
            self.__enter__()

    def _pass_on(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
