"""Spans of requests, as the scheduler notes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvplug.observe import request_spans
from kvplug.observe.request_spans import LINGER, RequestSpans, RequestTrace

WALL = 1_700_000_000_000_000_000


@dataclass
class Clock:
    """Nanoseconds that pass with every look."""

    now: int = 1000
    done: list[RequestTrace] = field(default_factory=list)

    def __call__(self) -> int:
        self.now += 10
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spans(clock: Clock) -> RequestSpans:
    return RequestSpans(clock.done.append, clock, lambda: WALL)


def tree(trace: RequestTrace) -> list[Any]:
    return [(s.name, [c.name for c in s.children]) for s in trace.root.children]


CHECKS = [("structure", 1031, 1034, "exact", ""), ("position", 1034, 1039, "refused", "too far")]


def test_what_is_done_for_a_request_is_handed_on_as_it_ends(
    spans: RequestSpans, clock: Clock
) -> None:
    spans.began("a", {"traceparent": "x"}, 70)
    begin = spans.looking("a")
    spans.checked("a", "s1", 40, CHECKS)
    spans.looked_up("a", begin, 32, 38, "segment")
    spans.allocated("a")
    spans.open("a", ("run", 1), "kvplug.load", {"kvplug.tokens": 38})
    spans.close(("run", 1), child=("kvplug.adapt", 5e-9, {"kvplug.shifted_tokens": 20}))
    spans.freed("a", 2)
    spans.freed("a", 3)
    assert not clock.done
    spans.ended("a", {"kvplug.exact": False})
    (trace,) = clock.done
    assert (trace.request_id, trace.headers) == ("a", {"traceparent": "x"})
    assert trace.root.begin + trace.epoch == WALL and trace.left_out == 0
    assert trace.root.attributes == {"kvplug.prompt_tokens": 70, "kvplug.exact": False}
    assert tree(trace) == [
        ("kvplug.lookup", ["kvplug.check", "kvplug.check"]),
        ("kvplug.load", ["kvplug.adapt"]),
        ("kvplug.evict", []),
    ]
    lookup, load, evict = trace.root.children
    assert lookup.begin == begin < lookup.end
    assert lookup.attributes == {
        "kvplug.prefix_tokens": 32,
        "kvplug.segment_tokens": 38,
        "kvplug.tier_tokens": 0,
        "kvplug.lookup.asked": 1,
        "kvplug.lookup.waited": 0,
    }
    assert lookup.children[1].attributes == {
        "kvplug.check.stage": "position",
        "kvplug.check.verdict": "refused",
        "kvplug.check.reason": "too far",
        "kvplug.check.seconds": 5e-9,
        "kvplug.segment": "s1",
        "kvplug.tokens": 40,
    }
    assert "kvplug.check.reason" not in lookup.children[0].attributes
    adapt = load.children[0]
    assert adapt.end == load.end and adapt.end - adapt.begin == 5
    assert evict.attributes == {"kvplug.blocks": 5} and evict.end - evict.begin == 10


def test_a_request_that_is_looked_up_again_and_again_has_one_lookup(
    spans: RequestSpans, clock: Clock
) -> None:
    spans.began("a", None, 70)
    first = spans.looking("a")
    spans.checked("a", "s1", 40, CHECKS)
    spans.looked_up("a", first, 0, None, "tier")
    for _ in range(1000):
        begin = spans.looking("a")
        spans.checked("a", "s2", 40, CHECKS[:1])
        spans.looked_up("a", begin, 0, 64, "tier")
    spans.allocated("a")
    # After a preemption it is another one.
    spans.looked_up("a", spans.looking("a"), 16, 0, "")
    spans.ended("a", {})
    lookup, again = clock.done[0].root.children
    assert lookup.begin == first and len(lookup.children) == 1
    assert lookup.attributes["kvplug.lookup.asked"] == 1001
    assert lookup.attributes["kvplug.lookup.waited"] == 1
    assert lookup.attributes["kvplug.tier_tokens"] == 64
    assert (again.attributes["kvplug.prefix_tokens"], again.children) == (16, [])


def test_what_is_ordered_is_waited_for_after_the_end_but_not_for_ever(
    spans: RequestSpans, clock: Clock
) -> None:
    for name in ("a", "b"):
        spans.began(name, None, 70)
        spans.open(name, ("segment", name), "kvplug.save", {})
        spans.ended(name, {})
    assert not clock.done
    spans.close(("segment", "a"), failed="no room")
    (trace,) = clock.done
    assert trace.root.children[0].end > trace.root.end
    assert trace.root.children[0].failed == "no room"
    spans.sweep()
    assert len(clock.done) == 1
    clock.now += round(LINGER * 1e9)
    spans.sweep()
    assert [t.request_id for t in clock.done] == ["a", "b"]
    assert clock.done[1].root.children[0].end == 0
    spans.close(("segment", "b"))
    assert (len(clock.done), spans._open, spans._lingering) == (2, {}, {})


def test_at_the_end_all_are_handed_on(spans: RequestSpans, clock: Clock) -> None:
    spans.began("runs", None, 1)
    spans.open("runs", "k", "kvplug.load", {})
    spans.began("waits", None, 1)
    spans.looked_up("waits", spans.looking("waits"), 0, None, "tier")
    spans.sweep(everything=True)
    assert {t.request_id: tree(t) for t in clock.done} == {
        "runs": [("kvplug.load", [])],
        "waits": [("kvplug.lookup", [])],
    }
    assert (spans._running, spans._open, spans._lingering) == ({}, {}, {})


def test_spans_and_checks_of_a_request_are_bounded(
    spans: RequestSpans, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_spans, "MOST_SPANS", 3)
    monkeypatch.setattr(request_spans, "MOST_CHECKS", 4)
    spans.began("a", None, 1)
    begin = spans.looking("a")
    for _ in range(5):
        spans.checked("a", "s", 1, CHECKS)
    spans.looked_up("a", begin, 0, 0, "")
    spans.allocated("a")
    for i in range(10):
        spans.open("a", i, "kvplug.save", {})
    for i in range(10):
        spans.close(i)
    spans.ended("a", {})
    (trace,) = clock.done
    assert [len(s.children) for s in trace.root.children] == [4, 0, 0]
    assert trace.left_out == 6 + 8 and not spans._open


def test_what_is_not_known_is_ignored(spans: RequestSpans, clock: Clock) -> None:
    spans.checked("x", "s", 1, CHECKS)
    spans.looked_up("x", spans.looking("x"), 0, 0, "")
    spans.allocated("x")
    spans.freed("x", 1)
    spans.open("x", 1, "kvplug.load", {})
    spans.close(1)
    spans.ended("x", {})
    spans.sweep(everything=True)
    assert not clock.done
