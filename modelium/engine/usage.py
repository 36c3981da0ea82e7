"""Counts of use: what the core decides by, and what metrics show.

Everything here is synchronous, does no I/O and takes the time as an argument. `begin` and `end` are on the path of
every request: they take constant time and allocate nothing once a model and its caller are known. All calls are to be
made from the event loop's thread.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from modelium.api import Transition
from modelium.core.states import State, Want

WINDOW_S = 60
"""Length of the window that requests per second are counted over."""

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the latency histogram; one more bucket takes what is slower."""

LOAD_BUCKETS_S = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
"""Upper bounds of the histogram of load times; one more bucket takes what is slower."""

OTHER = "other"
"""The label that stands for all values past a bound."""

NEVER: Mapping[str, float] = {}

RESULTS = ("ok", "failed", "refused")
"""`ok` and `failed` as the runtime answered; `refused` when the request never reached a runtime."""


class Use(NamedTuple):
    """What the core is told of a model."""

    name: str
    in_flight: int
    requests: int
    last_used: float
    qps: float


class Histogram:
    """Counts by fixed upper bounds, as Prometheus wants them."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Labels:
    """A bounded set of label values: the first `limit` distinct ones, those of `known` always; the rest are `other`."""

    def __init__(self, limit: int, known: Iterable[str] = ()):
        self._room = limit
        self._labels = {"", OTHER, *known}

    def __call__(self, value: str) -> str:
        if value in self._labels:
            return value
        if self._room <= 0:
            return OTHER
        self._room -= 1
        self._labels.add(value)
        return value


class ModelUsage:
    """One model's use since the service started."""

    __slots__ = (
        "_book", "_buckets", "_bypassed", "_counted_from", "_external", "_results", "_second", "_told", "_window",
        "failures", "in_flight", "last_used", "latency", "leases", "name", "requests",
    )  # fmt: skip

    def __init__(self, book: UsageBook, name: str):
        self.name = name
        self.in_flight = 0
        """By whatever way."""
        self.leases = 0
        """In flight through the service itself."""
        self.requests = 0
        """Begun so far."""
        self.failures = 0
        self.last_used = 0.0
        """The last begin or end; 0 when never used."""
        self.latency = Histogram(LATENCY_BUCKETS_S)
        self._book: UsageBook | None = book
        self._results: dict[str, list[int]] = {}  # organisation -> counts in the order of RESULTS
        self._buckets: list[int] | None = None  # made at the first use: most of many models are idle
        self._second = 0  # the newest second that the buckets know
        self._window = 0  # the buckets' sum
        self._told = 0  # the sum that the core was last told
        self._bypassed = 0  # of `requests`, those that only the runtime saw
        self._counted_from: tuple[int, int] | None = None  # the runtime's total, and what had come our way by then
        self._external: dict[str, tuple[int, int]] | None = None  # source -> (requests, in flight) as last read

    def begin(self, now: float) -> None:
        """A request starts."""
        self.in_flight += 1
        self.leases += 1
        self._count(1, now)

    def end(self, now: float, seconds: float, ok: bool, organisation: str = "") -> None:
        """A begun request is over after `seconds`; `ok` is False when the runtime answered with an error of its own."""
        self.in_flight -= 1
        self.leases -= 1
        self.last_used = now
        self.latency.add(seconds)
        row = self._results.get(organisation)
        if row is None:
            row = self._row(organisation)
        if ok:
            row[0] += 1
        else:
            row[1] += 1
            self.failures += 1
        if self._book is not None:
            self._book.touched.add(self.name)

    def tally(self, organisation: str, ok: int, failed: int) -> None:
        """Count answers that did not pass through the service."""
        row = self._row(organisation)
        row[0] += ok
        row[1] += failed
        self.failures += failed

    def refuse(self, organisation: str = "") -> None:
        """A request was turned away before it reached a runtime (queue full, deadline passed, load failed)."""
        self._row(organisation)[2] += 1

    def merge(
        self,
        source: str,
        requests: int,
        in_flight: int,
        now: float,
        *,
        anew: bool = False,
        used_at: float | None = None,
    ) -> None:
        """Take in what `source` has counted so far besides the service.

        The first reading only sets where counting starts, unless the source is known to have begun `anew`; a total
        that went down means that it did. `used_at` is when it last saw the model used, where it can tell.
        """
        if self._external is None:
            self._external = {}
        before = self._external.get(source, (0, 0) if anew else None)
        self._external[source] = (requests, in_flight)
        was_in_flight = 0 if before is None else before[1]
        new = 0 if before is None else requests - before[0] if requests >= before[0] else requests
        self.in_flight += in_flight - was_in_flight
        if new or in_flight or was_in_flight:
            before_at = self.last_used
            self._count(new, now)
            if used_at is not None and not in_flight:
                self.last_used = max(before_at, min(used_at, now))

    def loads(self) -> None:
        """It is not loaded, and about to be: its runtime will count from nothing."""
        self._counted_from = (0, self.requests - self._bypassed)

    def see(self, total: int, now: float) -> None:
        """Take in what the runtime itself has counted: what is more than came our way went straight to it.

        `total` is of requests that it has finished, read before this call, so that what came our way is never taken
        for others'. Calls that it does not count (metadata) are set off once nothing is in flight.
        """
        ours = self.requests - self._bypassed
        if self._counted_from is None or total < self._counted_from[0]:  # it was loaded anew
            self._counted_from = (total, ours)
            return
        new = (total - self._counted_from[0]) - (ours - self._counted_from[1])
        if new > 0:
            self._count(new, now)
            self._bypassed += new
        if new > 0 or not self.in_flight:
            self._counted_from = (total, ours)

    def qps(self, now: float) -> float:
        """Requests per second over the last minute, in whole seconds: those begun 60 s ago or more don't count."""
        if not self._window:
            return 0.0
        self._advance(int(now))
        return self._window / WINDOW_S

    def rate_changed(self, now: float) -> bool:
        """Whether `qps` is another than the core was last told."""
        self.qps(now)
        return self._window != self._told

    def results(self) -> list[tuple[str, tuple[int, ...]]]:
        """(organisation, counts in the order of `RESULTS`), for each organisation that was counted."""
        return [(organisation, tuple(row)) for organisation, row in self._results.items()]

    def _count(self, requests: int, now: float) -> None:
        self.requests += requests
        self.last_used = now
        second = int(now)
        if second > self._second:
            self._advance(second)
        if self._buckets is None:
            self._buckets = [0] * WINDOW_S
        # a clock that went back counts into the newest second
        self._buckets[self._second % WINDOW_S] += requests
        self._window += requests
        if self._book is not None:
            self._book.touched.add(self.name)

    def _advance(self, second: int) -> None:
        """Make `second` the newest, dropping what is a window older: a step for each second passed, 60 at most."""
        gap = second - self._second
        if gap <= 0:
            return
        buckets = self._buckets
        if buckets is not None and self._window:
            for passed in range(second - min(gap, WINDOW_S) + 1, second + 1):
                self._window -= buckets[passed % WINDOW_S]
                buckets[passed % WINDOW_S] = 0
        self._second = second

    def _row(self, organisation: str) -> list[int]:
        label = organisation if self._book is None else self._book.organisations(organisation)
        return self._results.setdefault(label, [0] * len(RESULTS))


LOAD_REASONS = frozenset(want.value for want in Want)
"""The first word of a LOADING transition's reason says for whom the model is loaded."""

UNLOAD_REASONS = (
    ("asked", re.compile("unload asked for")),
    ("evicted", re.compile("evicted for ")),
    ("idle", re.compile("idle for ")),
    ("displaced", re.compile(".* is parked instead")),
    ("recycled", re.compile("its runtime is to be started anew")),
    ("removed", re.compile("removed from ")),
    ("changed", re.compile("its (files|plan) changed")),
    ("pressure", re.compile(".* over its limit")),
)
"""Label and beginning of the reason for which a model becomes DRAINING, or is unloaded from STANDBY; `lost` when the
runtime was, `other` for all else."""


class TransitionCounter:
    """Counts of loads and unloads, taken from transitions as they happen.

    A transition's reason is a sentence; labels are few, so each is found by how the sentence begins.
    """

    def __init__(self) -> None:
        self.load_seconds = Histogram(LOAD_BUCKETS_S)
        self.loads: dict[str, dict[str, int]] = {}
        """Model -> reason -> completed loads."""
        self.unloads: dict[str, dict[str, int]] = {}
        """Model -> reason -> completed unloads, losses of the runtime included."""
        self.failed_loads: dict[str, int] = {}
        self.last_load_s: dict[str, float] = {}
        self.parks: dict[str, dict[str, int]] = {}
        """Model -> reason -> how often it was put to sleep instead of being unloaded."""
        self.wakes: dict[str, int] = {}
        self.last_wake_s: dict[str, float] = {}
        self._waking: dict[str, float] = {}  # model -> since when
        self._loading: dict[str, tuple[str, float]] = {}  # model -> why and since when
        self._leaving: dict[str, str] = {}  # model -> why

    def observe(self, transition: Transition) -> None:
        """Take in one transition; those of runtimes tell nothing here."""
        name, before, after, reason = transition.subject, transition.before, transition.after, transition.reason
        if name.startswith("runtime:"):
            return
        if before == after and before != State.READY:  # only its reason is another
            return
        load, woken_at = self._loading.pop(name, None), self._waking.pop(name, None)
        if after == State.LOADING and before == State.STANDBY:
            self._waking[name] = transition.at
        elif woken_at is not None and after == State.READY:
            self.wakes[name] = self.wakes.get(name, 0) + 1
            self.last_wake_s[name] = max(0.0, transition.at - woken_at)
        elif after == State.LOADING:
            first = re.split(r"\W", reason, maxsplit=1)[0]
            self._loading[name] = (first if first in LOAD_REASONS else OTHER, transition.at)
        elif before == State.LOADING and load is not None:
            if after == State.READY:
                _count(self.loads, name, load[0])
                self.last_load_s[name] = max(0.0, transition.at - load[1])
                self.load_seconds.add(self.last_load_s[name])
            elif after == State.FAILED:
                self.failed_loads[name] = self.failed_loads.get(name, 0) + 1
        elif before == State.READY and after == State.READY:  # its files changed while it served
            if reason.startswith("reloaded"):
                _count(self.loads, name, "changed")
            else:
                self.failed_loads[name] = self.failed_loads.get(name, 0) + 1
        elif after == State.DRAINING or (before == State.STANDBY and after == State.UNLOADING):
            self._leaving[name] = next((label for label, begins in UNLOAD_REASONS if begins.match(reason)), OTHER)
        elif after == State.STANDBY and before == State.PARKING:
            _count(self.parks, name, self._leaving.pop(name, OTHER))
        elif after == State.READY:
            self._leaving.pop(name, None)
        elif after == State.COLD and name in self._leaving:
            _count(self.unloads, name, self._leaving.pop(name))
        elif before == State.STANDBY and after == State.COLD:
            _count(self.unloads, name, "lost")
        elif after == State.FAILED and (name in self._leaving or before == State.READY):
            self._leaving.pop(name, None)
            _count(self.unloads, name, "lost")

    def forget(self, name: str) -> None:
        for table in (
            self.loads, self.unloads, self.failed_loads, self.last_load_s, self.parks, self.wakes, self.last_wake_s,
            self._loading, self._waking, self._leaving,
        ):  # fmt: skip
            table.pop(name, None)


def _count(table: dict[str, dict[str, int]], name: str, label: str) -> None:
    row = table.setdefault(name, {})
    row[label] = row.get(label, 0) + 1


class UsageBook:
    """The use of all models.

    `organisations` is the number of distinct organisations that get a label of their own, those of `known` besides.
    """

    def __init__(self, organisations: int = 64, known: Iterable[str] = ()):
        self.organisations = Labels(organisations, known)
        self.transitions = TransitionCounter()
        self.touched: set[str] = set()
        """Models with something to tell since the last `drain`."""
        self._models: dict[str, ModelUsage] = {}
        self._falling: set[str] = set()  # models whose rate is not zero, and so falls by itself
        self._second = 0  # of the last drain

    def model(self, name: str) -> ModelUsage:
        """The model's record, made when there is none: to be asked only for models that exist."""
        usage = self._models.get(name)
        if usage is None:
            usage = self._models[name] = ModelUsage(self, name)
        return usage

    def get(self, name: str) -> ModelUsage | None:
        return self._models.get(name)

    def __iter__(self) -> Iterator[ModelUsage]:
        """All records, safe against changes meanwhile."""
        return iter(list(self._models.values()))

    def __len__(self) -> int:
        return len(self._models)

    def merge(
        self,
        source: str,
        counts: Mapping[str, tuple[int, int]],
        now: float,
        *,
        anew: bool = False,
        used_at: Mapping[str, float] = NEVER,
    ) -> None:
        """Take in one reading of a `UsageSource`: requests so far and in flight, by model; the rest as for one model.

        A model with a record that the source no longer names has nothing in flight there. Give only models that
        exist: each one named gets a record.
        """
        for usage in self:
            external = usage._external
            if external is not None and source in external and usage.name not in counts:
                usage.merge(source, external[source][0], 0, now)
        for name, (requests, in_flight) in counts.items():
            self.model(name).merge(source, requests, in_flight, now, anew=anew, used_at=used_at.get(name))

    def observe(self, transition: Transition) -> None:
        """Count a transition of a model."""
        self.transitions.observe(transition)

    def drain(self, now: float) -> list[Use]:
        """What the core should know anew: models used since the last call, and those whose rate fell since then.

        Rates fall from one second to the next, so within a second this takes the time of what was used in it.
        """
        uses = self.peek(now)
        self.touched.clear()
        self._second = int(now)
        for use in uses:
            usage = self._models[use.name]
            usage._told = usage._window
            if usage._window:
                self._falling.add(use.name)
            else:
                self._falling.discard(use.name)
        return uses

    def peek(self, now: float) -> list[Use]:
        """What `drain` would tell, and will still."""
        names = set(self.touched)
        if int(now) != self._second:
            names |= {name for name in self._falling if self._models[name].rate_changed(now)}
        used = [self._models[name] for name in names]
        return [Use(u.name, u.in_flight, u.requests, u.last_used, u.qps(now)) for u in used]

    def forget(self, name: str) -> None:
        """Drop all that is known of a model; requests that still end are counted nowhere."""
        usage = self._models.pop(name, None)
        if usage is not None:
            usage._book = None
        self.touched.discard(name)
        self._falling.discard(name)
        self.transitions.forget(name)
