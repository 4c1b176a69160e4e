"""Sessions about to return."""

from __future__ import annotations

import pytest
from test_hierarchy import KEYS, POOL, Clock, book, hierarchy, stored

from kvplug.contract import Action, EngineView, Move, RequestView
from kvplug.tiers import sessions
from kvplug.tiers.sessions import EARLY, LATE, Sessions
from kvplug_policies.lifecycle.watermarks import Watermarks


def turns(found: Sessions, name: str, pause: float, count: int, now: float = 0.0) -> float:
    """Requests of a session that take no time, with a pause after each; the time after the last."""
    for _ in range(count):
        found.began(name, now)
        found.ended(name, [name.encode()], now)
        found.due(now + pause * 0.999)
        now += pause
    return now


def test_a_session_is_due_half_a_pause_after_its_request() -> None:
    found = Sessions()
    now = turns(found, "a", 10.0, 5)
    found.began("a", now)
    found.ended("a", [b"x"], now)
    assert found.due(now + 10 * EARLY - 0.1) == []
    assert found.due(now + 10 * EARLY + 0.1) == [(b"x",)]
    assert found.due(now + 9) == [], "once a pause"


def test_a_new_session_is_expected_to_pause_as_the_others_do() -> None:
    found = Sessions()
    assert found.due(1e9) == []
    now = turns(found, "a", 100.0, 5)
    found.ended("new", [b"y"], now)
    assert found.due(now + 49) == [] and found.due(now + 51) == [(b"y",)]


def test_a_session_that_is_back_is_not_due() -> None:
    found = Sessions()
    now = turns(found, "a", 10.0, 3)
    found.began("a", now)
    found.ended("a", [b"x"], now)
    found.began("a", now + 1)
    assert found.due(now + 9) == []


def test_how_many_returned_is_how_likely_it_is() -> None:
    found = Sessions()
    turns(found, "a", 10.0, 200)
    assert found.probability > 0.9
    now = 1e6
    for i in range(300):
        found.ended(f"gone {i}", [b"z"], now)
        found.due(now + 10 * LATE + 1)
        now += 1000
    assert found.probability < 0.1


def test_sessions_and_their_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SESSIONS", 50)
    monkeypatch.setattr(sessions, "KEYS", 400)
    found = Sessions()
    turns(found, "a", 10.0, 3)
    for i in range(1000):
        found.ended(str(i % 120), [b"k"] * 100, float(i))
    assert len(found) <= 8 and found._kept <= 400
    assert all(len(s.keys) <= 50 for s in found._sessions.values())
    for i in range(3000):
        found.ended("same", [b"k"], float(i))
    assert len(found._due) <= 4 * 50


def test_what_a_returning_session_needs_is_fetched_while_it_pauses() -> None:
    clock = Clock()
    policy = Watermarks(
        Watermarks.Options.model_validate({"high": 0.9, "low": 0.8}),
        EngineView(16, 8, host="test"),
    )
    books = hierarchy(book("fast", 8), book("slow", 8), policy=policy, clock=clock)
    stored(books, "slow", KEYS[:3])
    stored(books, "fast", KEYS[3:4])
    view = RequestView("1", 64, session_id="s")
    for _ in range(4):
        books.began(view)
        books.finished(view, KEYS[:4], 5)
        clock.now += 10
        books.plan(0, POOL)
    books.began(view)
    books.finished(view, KEYS[:4], 5)
    assert books.plan(0, POOL) == []
    for key in KEYS[:3]:
        books.lost("fast", key, "the first time it was fetched is of no matter here")
    clock.now += 10 * EARLY + 0.1
    [move] = books.plan(1, POOL)
    assert move == Move(Action.PROMOTE, KEYS[:3], "slow", "fast")
    assert books.plan(2, POOL) == []
