"""Requests' way to loaded models: the table of open routes, leases, and the tickets of those who wait.

For a loaded model `try_acquire` is a dictionary look-up and a count. Closing a route and counting what is in flight
happen in one thread, without waiting in between, so no request is let in after a route was closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from modelium.engine.usage import ModelUsage, UsageBook
from modelium.errors import ModeliumError


class Route:
    """Where one loaded model answers."""

    __slots__ = ("decoupled", "endpoints", "name", "runtime", "usage")

    def __init__(self, name: str, runtime: str, endpoints: Mapping[str, str], decoupled: bool, usage: ModelUsage):
        self.name = name
        self.runtime = runtime
        self.endpoints = endpoints
        self.decoupled = decoupled
        self.usage = usage


class Lease:
    """A request's hold on a loaded model: while it is held, the model is not unloaded."""

    __slots__ = ("_began", "_book", "_organisation", "_route")

    def __init__(self, route: Route, book: Admission, organisation: str):
        self._route = route
        self._book: Admission | None = book
        self._organisation = organisation
        self._began = time.monotonic()
        route.usage.begin(book.clock())

    @property
    def model(self) -> str:
        return self._route.name

    @property
    def runtime(self) -> str:
        return self._route.runtime

    @property
    def endpoints(self) -> Mapping[str, str]:
        """Address by protocol."""
        return self._route.endpoints

    @property
    def decoupled(self) -> bool:
        """The model may answer one request with many responses."""
        return self._route.decoupled

    def release(self, *, ok: bool = True) -> None:
        """The request is over; `ok` is False when the runtime failed it. More than once is once."""
        book, self._book = self._book, None
        if book is None:
            return
        usage = self._route.usage
        usage.end(book.clock(), time.monotonic() - self._began, ok, self._organisation)
        if not usage.leases and book.idle_wanted:
            book.idle(self._route)


class Admission:
    """The table of open routes and the tickets that wait."""

    def __init__(self, usage: UsageBook, clock: Callable[[], float] = time.time):
        self.usage = usage
        self.clock = clock
        self.routes: dict[str, Route] = {}
        self.idle_wanted = False
        """Somebody waits for a model to become idle: a drain, or the queue."""
        self.on_idle: Callable[[], None] | None = None
        """Called when a model became idle while the queue is not empty."""
        self.queue_waits = False
        self.closed: ModeliumError | None = None
        """Set when the service ends: the answer to whoever would have to wait."""
        self._draining: dict[str, Callable[[], None]] = {}
        self._tickets: dict[int, tuple[asyncio.Future[Lease | None], str | None]] = {}

    # ------------------------------------------------------------------ routes

    def try_acquire(self, name: str, organisation: str = "") -> Lease | None:
        route = self.routes.get(name)
        return None if route is None else Lease(route, self, organisation)

    def open(self, route: Route) -> None:
        self._draining.pop(route.name, None)
        self.routes[route.name] = route
        self._note()

    def close(self, name: str, drained: Callable[[], None] | None) -> None:
        """Let nobody in any more; `drained` is called once nothing is in flight, at once if nothing is."""
        route = self.routes.pop(name, None)
        if drained is None:
            self._draining.pop(name, None)
        elif route is None or not route.usage.leases:
            drained()
        else:
            self._draining[name] = drained
        self._note()

    def idle(self, route: Route) -> None:
        waiting = self._draining.get(route.name)
        if waiting is not None:
            del self._draining[route.name]
            self._note()
            waiting()
        if self.queue_waits and self.on_idle is not None:
            self.on_idle()

    def watch_queue(self, waits: bool) -> None:
        self.queue_waits = waits
        self._note()

    def _note(self) -> None:
        self.idle_wanted = self.queue_waits or bool(self._draining)

    # ------------------------------------------------------------------ tickets

    def wait(self, ticket: int, organisation: str | None) -> asyncio.Future[Lease | None]:
        """A ticket's future: a lease once it is granted, or None where `organisation` is (no lease is needed)."""
        future: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()
        if self.closed is not None:
            future.set_exception(self.closed)
            return future
        self._tickets[ticket] = (future, organisation)
        return future

    def grant(self, ticket: int, name: str) -> None:
        future, organisation = self._tickets.pop(ticket, (None, None))
        route = self.routes.get(name)
        if future is None or future.done() or organisation is None:
            self._correct(name)
            if future is not None and not future.done():
                future.set_result(None)
        elif route is None:
            future.set_exception(ModeliumError(f"{name} was granted without a route"))
        else:
            future.set_result(Lease(route, self, organisation))

    def _correct(self, name: str) -> None:
        """The core counts each grant as a request in flight: let it see that there is none."""
        self.usage.model(name)
        self.usage.touched.add(name)

    def refuse(self, ticket: int, error: ModeliumError) -> None:
        future, _ = self._tickets.pop(ticket, (None, None))
        if future is not None and not future.done():
            future.set_exception(error)

    def shut(self, error: ModeliumError) -> None:
        """Answer all who wait, and from now on everybody who would."""
        self.closed = error
        for ticket in list(self._tickets):
            self.refuse(ticket, error)

    def withdraw(self, ticket: int) -> None:
        """The caller left; a lease that was granted in the same moment is given back."""
        future, _ = self._tickets.pop(ticket, (None, None))
        if future is not None and not future.done():
            future.cancel()
