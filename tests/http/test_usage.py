"""The usage book: counts exact, windows sliding, labels bounded, and nothing left of a model that is gone."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelium.api import Transition
from modelium.engine.usage import LATENCY_BUCKETS_S, OTHER, WINDOW_S, Labels, TransitionCounter, UsageBook, Use

ORGANISATIONS = ["", "a", "b", "c", "d", "e"]

step = st.one_of(
    st.tuples(st.just("begin")),
    st.tuples(st.just("end"), st.floats(0, 100), st.booleans(), st.sampled_from(ORGANISATIONS)),
    st.tuples(st.just("pass"), st.floats(0, 90)),
    st.tuples(st.just("drain")),
)


@settings(deadline=None)
@given(st.lists(step, max_size=200), st.floats(0, 2e9))
def test_counts_follow_what_happened(steps: list[tuple[object, ...]], start: float) -> None:
    book = UsageBook(organisations=2)
    model = book.model("m")
    now, begun, latencies, results, seen = start, deque[int](), list[float](), list[tuple[bool, str]](), set[str]()
    in_flight = requests = 0
    told = Use("m", 0, 0, 0.0, 0.0)
    for what, *values in steps:
        if what == "begin":
            model.begin(now)
            begun.append(int(now))
            in_flight, requests = in_flight + 1, requests + 1
        elif what == "end" and in_flight:
            seconds, ok, organisation = values
            assert isinstance(seconds, float) and isinstance(ok, bool) and isinstance(organisation, str)
            model.end(now, seconds, ok, organisation)
            in_flight -= 1
            latencies.append(seconds)
            if organisation and organisation not in seen:
                organisation = organisation if len(seen) < 2 else OTHER
                seen.add(organisation)
            results.append((ok, organisation))
        elif what == "pass":
            assert isinstance(values[0], float)
            now += values[0]
        elif what == "drain":
            peeked = book.peek(now)
            assert book.peek(now) == peeked
            assert book.drain(now) == peeked
            told = peeked[0] if peeked else told
            assert told == ("m", in_flight, requests, model.last_used, model.qps(now))
        in_window = sum(second > int(now) - WINDOW_S for second in begun)
        assert model.qps(now) == in_window / WINDOW_S
        assert (model.in_flight, model.requests) == (in_flight, requests)
    assert sum(model.latency.counts) == len(latencies)
    for index, bound in enumerate(LATENCY_BUCKETS_S):
        assert sum(model.latency.counts[: index + 1]) == sum(seconds <= bound for seconds in latencies)
    assert model.failures == sum(not ok for ok, _ in results)
    for organisation, (ok_count, failed, refused) in model.results():
        assert ok_count == sum(ok and o == organisation for ok, o in results)
        assert failed == sum(not ok and o == organisation for ok, o in results)
        assert refused == 0
    assert {organisation for organisation, _ in model.results()} <= {"", OTHER, *list(seen)}


def test_what_changed_is_told_once_and_a_falling_rate_until_it_is_zero() -> None:
    book = UsageBook()
    book.model("idle")
    used = book.model("used")
    used.begin(1000.0)
    used.end(1000.5, 0.5, True)
    assert book.drain(1001.0) == [("used", 0, 1, 1000.5, 1 / 60)]
    assert book.drain(1001.5) == []
    assert book.drain(1059.9) == []
    used.qps(1060.0)  # that others look at it in between makes no difference
    assert book.drain(1060.0) == [("used", 0, 1, 1000.5, 0.0)]
    assert book.drain(1061.0) == []


def test_a_clock_that_goes_back_loses_no_request() -> None:
    model = UsageBook().model("m")
    model.begin(1000.0)
    model.begin(900.0)
    assert model.qps(900.0) == 2 / 60
    assert model.qps(1059.0) == 2 / 60
    assert model.qps(1060.0) == 0.0


def test_known_organisations_have_a_label_whoever_came_first() -> None:
    labels = Labels(2, known=("vip",))
    assert [labels(value) for value in ("x", "y", "z", "vip", "x", "")] == ["x", "y", OTHER, "vip", "x", ""]


def test_a_forgotten_model_leaves_nothing_and_late_ends_harm_nobody() -> None:
    book = UsageBook()
    old = book.model("m")
    old.begin(1.0)
    book.observe(_transition("m", "QUEUED", "LOADING", "request"))
    book.observe(_transition("m", "LOADING", "READY", "loaded"))
    book.forget("m")
    assert (len(book), book.get("m"), book.drain(2.0), book.transitions.loads) == (0, None, [], {})
    new = book.model("m")
    old.end(3.0, 2.0, False, "late")
    assert (new.in_flight, new.requests, new.failures, new.results()) == (0, 0, 0, [])
    assert book.drain(4.0) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=30))
def test_another_counters_readings_add_up(readings: list[tuple[int, int, bool]]) -> None:
    """Each reading: requests since the last one, requests in flight, whether the source began anew before it."""
    book = UsageBook()
    own = book.model("m")
    own.begin(10.0)
    total, expected, now, first = 0, 1, 10.0, True
    for new, in_flight, anew in readings:
        reset = anew and new < total  # a source that began anew and counted further than before can't be told apart
        total = new if reset else total + new
        expected += 0 if first else new
        first = False
        now += 1
        book.merge("proxy", {"m": (total, in_flight)}, now)
        assert (own.requests, own.in_flight) == (expected, 1 + in_flight)
    book.merge("proxy", {}, now + 1)
    assert (own.requests, own.in_flight) == (expected, 1)


def test_two_sources_do_not_mix() -> None:
    book = UsageBook()
    book.merge("a", {"m": (100, 1)}, 1.0)
    book.merge("b", {"m": (5, 2)}, 1.0)
    book.merge("a", {"m": (101, 0)}, 2.0)
    assert (book.model("m").requests, book.model("m").in_flight) == (1, 2)


LIFE = [  # transitions, then completed loads, failed loads, and unloads by reason
    ([("COLD", "QUEUED", "asked for"), ("QUEUED", "LOADING", "request, 3 waiting; 4 of 5"), ("LOADING", "READY", "")],
     {"request": 1}, 0, {}),
    ([("QUEUED", "LOADING", "resident; x"), ("LOADING", "FAILED", "broken")], {}, 1, {}),
    ([("RECOVERING", "READY", "adopted")], {}, 0, {}),
    ([("READY", "DRAINING", "evicted for other"), ("DRAINING", "UNLOADING", "x"), ("UNLOADING", "COLD", "x")],
     {}, 0, {"evicted": 1}),
    ([("READY", "DRAINING", "idle for 9 s, twice"), ("DRAINING", "READY", "asked for")], {}, 0, {}),
    ([("READY", "DRAINING", "unload asked for"), ("DRAINING", "UNLOADING", ""), ("UNLOADING", "COLD", "")],
     {}, 0, {"asked": 1}),
    ([("READY", "DRAINING", "cpu:0 is 5 MB over its limit of 2 GB"), ("DRAINING", "UNLOADING", ""),
      ("UNLOADING", "COLD", "")], {}, 0, {"pressure": 1}),
    ([("READY", "FAILED", "triton is gone")], {}, 0, {"lost": 1}),
    ([("QUEUED", "LOADING", "request"), ("LOADING", "UNLOADING", "unload asked for"), ("UNLOADING", "COLD", "")],
     {}, 0, {}),
    ([("READY", "READY", "reloaded: its files changed")], {"changed": 1}, 0, {}),
    ([("READY", "READY", "its new files do not load, the old ones still serve: bad")], {}, 1, {}),
    ([("QUEUED", "LOADING", "a new kind of reason"), ("LOADING", "READY", "")], {OTHER: 1}, 0, {}),
    ([("READY", "DRAINING", "a new kind of reason"), ("DRAINING", "UNLOADING", ""), ("UNLOADING", "COLD", "")],
     {}, 0, {OTHER: 1}),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "loads", "failed", "unloads"), LIFE)
def test_loads_and_unloads_are_counted_with_their_reason(
    steps: list[tuple[str, str, str]], loads: dict[str, int], failed: int, unloads: dict[str, int]
) -> None:
    counter = TransitionCounter()
    for number, (before, after, reason) in enumerate(steps):
        counter.observe(_transition("m", before, after, reason, at=10.0 * number))
    assert counter.loads.get("m", {}) == loads
    assert counter.failed_loads.get("m", 0) == failed
    assert counter.unloads.get("m", {}) == unloads
    if "LOADING" in str(steps) and loads:
        assert counter.last_load_s["m"] == 10.0
        assert (sum(counter.load_seconds.counts), counter.load_seconds.sum) == (1, 10.0)


SLEEP = [("READY", "DRAINING", "evicted for x"), ("DRAINING", "PARKING", ""), ("PARKING", "STANDBY", "")]


@pytest.mark.parametrize(
    ("then", "wakes", "unloads"),
    [
        ([], 0, {}),
        ([("STANDBY", "LOADING", "request, 1 waiting"), ("LOADING", "READY", "woken")], 1, {}),
        ([("STANDBY", "LOADING", ""), ("LOADING", "UNLOADING", "did not wake"), ("UNLOADING", "COLD", "")], 0, {}),
        ([("STANDBY", "UNLOADING", "evicted for y"), ("UNLOADING", "COLD", "")], 0, {"evicted": 1}),
        ([("STANDBY", "UNLOADING", "y is parked instead: it"), ("UNLOADING", "COLD", "")], 0, {"displaced": 1}),
        ([("STANDBY", "COLD", "its runtime is gone")], 0, {"lost": 1}),
    ],
)
def test_sleeps_and_wakes_are_no_unloads_and_loads(
    then: list[tuple[str, str, str]], wakes: int, unloads: dict[str, int]
) -> None:
    counter = TransitionCounter()
    for number, (before, after, reason) in enumerate([*SLEEP, *then]):
        counter.observe(_transition("m", before, after, reason, at=10.0 * number))
    assert counter.parks == {"m": {"evicted": 1}} and counter.loads == {}
    assert counter.wakes.get("m", 0) == wakes and counter.last_wake_s.get("m", 0.0) == 10.0 * wakes
    assert counter.unloads.get("m", {}) == unloads
    counter.forget("m")
    assert not (counter.parks or counter.wakes or counter.last_wake_s)


def test_runtimes_are_not_models() -> None:
    counter = TransitionCounter()
    counter.observe(_transition("runtime:triton", "STARTING", "READY", "x"))
    counter.observe(_transition("runtime:triton", "READY", "FAILED", "x"))
    assert (counter.loads, counter.unloads, counter.failed_loads) == ({}, {}, {})


def _transition(subject: str, before: str, after: str, reason: str, at: float = 0.0) -> Transition:
    return Transition(decision=1, at=at, subject=subject, before=before, after=after, reason=reason)


def test_what_goes_straight_to_the_runtime_is_use() -> None:
    usage = UsageBook().model("m")
    usage.see(100, 1.0)  # what it had counted before we came
    for now in (2.0, 3.0):
        usage.begin(now)
    usage.see(101, 4.0)  # one of ours is done, one under way
    assert (usage.requests, usage.last_used) == (2, 3.0)
    usage.end(5.0, 1.0, True)
    usage.end(5.0, 1.0, True)
    usage.see(102, 6.0)
    assert usage.requests == 2
    usage.see(105, 7.0)
    assert (usage.requests, usage.last_used, usage.qps(7.0)) == (5, 7.0, 5 / 60)
    usage.begin(8.0)  # one that the runtime does not count
    usage.end(8.0, 0.1, True)
    usage.see(105, 9.0)
    usage.see(106, 10.0)
    assert (usage.requests, usage.last_used) == (7, 10.0)
    usage.see(2, 11.0)  # loaded anew
    usage.see(3, 12.0)
    assert (usage.requests, usage.last_used) == (8, 12.0)
