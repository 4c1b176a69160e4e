from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.reuse import guard as guard_module
from kvplug.reuse.guard import LEAST_ENTROPY, SPREADS, BreakerState, Drift, Guard
from kvplug.reuse.settings import GuardSettings


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A guard and a clock, and answers one call long."""

    def __init__(self, **settings: Any):
        breaker = {k: settings.pop(k) for k in ("threshold", "window", "cooldown") if k in settings}
        self.clock = Clock()
        self.guard = Guard(GuardSettings(breaker=breaker, **settings), self.clock)
        self.made = 0

    def answer(
        self,
        entropy: float,
        logprob: float = -0.5,
        *families: str,
        approximate: bool = True,
        tokens: int = 4,
    ) -> Drift | None:
        self.made += 1
        name = f"r{self.made}"
        self.guard.started(name, families or ("doc",), approximate)
        self.guard.observe(name, np.full(tokens, entropy), np.full(tokens, logprob))
        return self.guard.finished(name)

    def exact(self, *entropies: float, logprob: float = -0.5, family: str = "doc") -> None:
        for entropy in entropies:
            assert self.answer(entropy, logprob, family, approximate=False) is None

    def state(self, family: str = "doc") -> BreakerState:
        (found,) = (f for f in self.guard.families() if f.family == family)
        return found.state


def counter(watched: Watched, name: str) -> float:
    return watched.guard.counters()[f"guard_{name}"]


def test_answers_like_exact_ones_are_no_drift() -> None:
    watched = Watched()
    watched.exact(1.0, 1.0, 1.0)
    for entropy, logprob in [(1.0, -0.5), (1.19, -0.9), (0.81, -0.1)]:
        assert watched.answer(entropy, logprob) is None
    assert counter(watched, "compared") == 3 and counter(watched, "drifted") == 0
    assert counter(watched, "exact") == 3 and watched.guard.allows("doc")


@pytest.mark.parametrize(
    ("entropy", "logprob", "off", "nats"),
    [(1.5, -0.5, 0.5, 0.0), (0.5, -0.5, 0.5, 0.0), (1.0, -1.1, 0.0, 0.6), (1.0, 0.1, 0.0, 0.6)],
)
def test_one_bound_is_enough_either_way(
    entropy: float, logprob: float, off: float, nats: float
) -> None:
    watched = Watched()
    watched.exact(1.0, 1.0, 1.0)
    drift = watched.answer(entropy, logprob)
    assert drift is not None and drift.request_id == "r4"
    (family,) = drift.families
    assert family.family == "doc" and family.over and family.state is BreakerState.CLOSED
    assert family.entropy == pytest.approx(off) and family.logprob == pytest.approx(nats)
    assert drift.entropies == (entropy,) * 4 and drift.logprobs == (logprob,) * 4
    assert family.history.count == 3 and family.history.entropy == 1.0


def test_what_exact_answers_spread_over_is_no_drift() -> None:
    entropies = [0.6, 1.0, 1.4]
    watched = Watched(max_entropy_drift=0.1)
    watched.exact(*entropies)
    spread = statistics.stdev(entropies)
    edge = 1.0 + SPREADS * spread + 0.1
    assert watched.answer(edge - 0.01) is None
    drift = watched.answer(edge + 0.01)
    assert drift is not None
    history = drift.families[0].history
    assert (history.entropy, history.entropy_spread) == pytest.approx((1.0, spread))


def test_a_small_entropy_is_compared_as_if_larger() -> None:
    watched = Watched(max_entropy_drift=0.2)
    watched.exact(0.001, 0.001, 0.001)
    assert watched.answer(0.01) is None
    assert watched.answer(0.001 + 0.21 * LEAST_ENTROPY) is not None


def test_without_enough_history_nothing_is_said() -> None:
    watched = Watched(history=3)
    watched.exact(1.0, 1.0)
    assert watched.answer(9.0) is None and watched.answer(9.0, -0.5, "new") is None
    assert counter(watched, "uncompared") == 2 and counter(watched, "compared") == 0


def test_every_comparison_tells_its_largest_distances() -> None:
    watched = Watched(max_entropy_drift=0.5, max_logprob_drift=0.5)
    told: list[tuple[float, float]] = []
    watched.guard._on_compared = lambda *distances: told.append(distances)
    watched.exact(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    watched.exact(*[2.0] * 10, family="other")
    assert told == [], "exact answers are compared with nothing"
    assert watched.answer(1.25, -0.75) is None, "within the bounds"
    assert watched.answer(4.0, -0.5, "doc", "other") is not None
    assert watched.answer(4.0, -0.5, "unknown") is None
    assert told == [pytest.approx((0.25, 0.25)), pytest.approx((3.0, 0.0))]


def test_only_the_first_tokens_count() -> None:
    watched = Watched(tokens=4)
    watched.exact(1.0, 1.0, 1.0)
    guard = watched.guard
    guard.started("x", ["doc"], True)
    guard.observe("x", [1.0, 1.0], [-0.5, -0.5])
    assert guard.watching("x")
    guard.observe("x", [1.0, 1.0, 99.0], [-0.5, -0.5, -99.0])
    assert not guard.watching("x")
    guard.observe("x", [99.0], [-99.0])
    assert guard.finished("x") is None and counter(watched, "compared") == 1


def test_numbers_that_are_none_are_not_heard() -> None:
    watched = Watched()
    watched.exact(1.0, 1.0, 1.0)
    guard = watched.guard
    guard.started("x", ["doc"], True)
    guard.observe("x", [np.nan, np.inf, 1.0], [-0.5, -0.5, -np.inf])
    assert guard.finished("x") is None
    assert counter(watched, "uncompared") == 1
    with pytest.raises(ValueError):
        guard.started("y", ["doc"], True)
        guard.observe("y", [1.0, 2.0], [1.0])


def test_requests_nobody_started_are_ignored() -> None:
    guard = Watched().guard
    guard.observe("x", [1.0], [-1.0])
    assert guard.finished("x") is None and not guard.watching("x")


def test_an_exact_answer_is_a_history_only_of_its_families() -> None:
    watched = Watched()
    watched.exact(1.0, 1.0, 1.0, family="a")
    watched.exact(2.0, 2.0, 2.0, family="b")
    drift = watched.answer(2.0, -0.5, "a", "b", "unknown")
    assert drift is not None
    assert [(f.family, f.over) for f in drift.families] == [("a", True), ("b", False)]
    reports = {f.family: f for f in watched.guard.families()}
    assert reports["a"].errors == 1 and reports["b"].errors == 0
    assert reports["a"].uses == reports["b"].uses == 1


def test_a_request_that_was_approximate_once_teaches_nothing() -> None:
    watched = Watched()
    guard = watched.guard
    guard.started("x", ["doc"], True)
    guard.started("x", ["doc"], False)  # preempted, and computed the second time
    guard.observe("x", [5.0], [-1.0])
    guard.finished("x")
    assert counter(watched, "exact") == 0 and guard.families() == []


# -- The breaker -----------------------------------------------------------------------------------


def opened(**settings: Any) -> Watched:
    watched = Watched(**{"threshold": 2, "window": 10, "cooldown": 60.0, **settings})
    watched.exact(1.0, 1.0, 1.0)
    assert watched.answer(3.0) is not None and watched.guard.allows("doc")
    last = watched.answer(3.0)
    assert last is not None and last.families[0].state is BreakerState.OPEN
    return watched


def test_enough_errors_open_it_and_the_cooldown_half_opens_it() -> None:
    watched = opened()
    guard = watched.guard
    assert not guard.allows("doc") and guard.allows("other")
    assert counter(watched, "opened") == 1 and counter(watched, "open") == 1
    watched.clock.now += 59.9
    assert not guard.allows("doc") and watched.state() is BreakerState.OPEN
    watched.clock.now += 0.1
    assert guard.allows("doc") and watched.state() is BreakerState.HALF_OPEN


def test_errors_among_many_uses_do_not() -> None:
    watched = Watched(threshold=2, window=10)
    watched.exact(1.0, 1.0, 1.0)
    for _ in range(5):
        watched.answer(3.0)
        for _ in range(9):
            watched.answer(1.0)
    assert watched.guard.allows("doc") and counter(watched, "drifted") == 5
    watched.answer(3.0)
    watched.answer(3.0)
    assert not watched.guard.allows("doc")


@pytest.mark.parametrize(("between", "opens"), [(8, True), (9, False)])
def test_the_window_is_the_latest_uses(between: int, opens: bool) -> None:
    watched = Watched(threshold=2, window=10)
    watched.exact(1.0, 1.0, 1.0)
    watched.answer(3.0)
    for _ in range(between):
        watched.answer(1.0)
    watched.answer(3.0)
    assert watched.guard.allows("doc") != opens


def test_a_trial_that_goes_well_closes_it() -> None:
    watched = opened()
    watched.clock.now += 60
    assert watched.answer(1.0) is None
    assert watched.guard.allows("doc") and watched.state() is BreakerState.CLOSED
    assert counter(watched, "trials") == 1 and counter(watched, "closed") == 1
    # What opened it is not counted again.
    assert watched.answer(3.0) is not None and watched.guard.allows("doc")


def test_a_trial_that_drifts_opens_it_for_another_cooldown() -> None:
    watched = opened()
    watched.clock.now += 60
    drift = watched.answer(3.0)
    assert drift is not None and drift.families[0].state is BreakerState.OPEN
    assert counter(watched, "opened") == 2
    watched.clock.now += 59
    assert not watched.guard.allows("doc")
    watched.clock.now += 1
    assert watched.guard.allows("doc")


def test_one_trial_at_a_time() -> None:
    watched = opened()
    guard = watched.guard
    watched.clock.now += 60
    assert guard.allows("doc") and guard.allows("doc"), "asking takes nothing"
    guard.started("exact", ["doc"], False)
    assert guard.allows("doc"), "an exact request is no trial"
    guard.started("trial", ["doc"], True)
    assert not guard.allows("doc")
    guard.started("late", ["doc"], True)
    guard.observe("late", [1.0], [-0.5])
    guard.finished("late")
    assert not guard.allows("doc") and watched.state() is BreakerState.HALF_OPEN
    guard.observe("trial", [1.0], [-0.5])
    guard.finished("trial")
    assert watched.state() is BreakerState.CLOSED


def test_a_trial_that_says_nothing_leaves_room_for_the_next() -> None:
    watched = opened()
    watched.clock.now += 60
    watched.guard.started("aborted", ["doc"], True)
    assert not watched.guard.allows("doc")
    watched.guard.finished("aborted")
    assert watched.guard.allows("doc") and watched.state() is BreakerState.HALF_OPEN


def test_answers_that_began_before_it_opened_change_nothing() -> None:
    watched = Watched(threshold=1, cooldown=60.0)
    watched.exact(1.0, 1.0, 1.0)
    guard = watched.guard
    for name in ("early", "drifts"):
        guard.started(name, ["doc"], True)
    guard.observe("drifts", [3.0], [-0.5])
    guard.finished("drifts")
    assert not guard.allows("doc")
    guard.observe("early", [1.0], [-0.5])
    guard.finished("early")
    assert not guard.allows("doc")


# -- Bounds ----------------------------------------------------------------------------------------


def test_families_are_bounded_and_open_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "FAMILIES", 3)
    watched = opened(threshold=2)
    for family in "abcd":
        watched.exact(1.0, family=family)
    assert [f.family for f in watched.guard.families()] == ["doc", "c", "d"]
    assert counter(watched, "forgotten") == 2
    watched.exact(1.0, family="c")
    watched.exact(1.0, family="e")
    assert [f.family for f in watched.guard.families()] == ["doc", "c", "e"]


def test_running_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "RUNNING", 2)
    watched = Watched()
    for name in "abc":
        watched.guard.started(name, ["doc"], False)
    assert [watched.guard.watching(n) for n in "abc"] == [True, True, False]
    assert counter(watched, "unwatched") == 1
    watched.guard.finished("a")
    watched.guard.started("c", ["doc"], False)
    assert watched.guard.watching("c")


@given(st.lists(st.floats(0.0, 20.0), min_size=3, max_size=40))
def test_the_history_is_that_of_all_exact_answers(entropies: list[float]) -> None:
    watched = Watched()
    watched.exact(*entropies)
    (report,) = watched.guard.families()
    assert report.history is not None
    assert report.history.count == len(entropies)
    assert report.history.entropy == pytest.approx(statistics.fmean(entropies), abs=1e-9)
    assert report.history.entropy_spread == pytest.approx(statistics.stdev(entropies), abs=1e-6)
    assert report.history.logprob == pytest.approx(-0.5)


@given(
    st.lists(
        st.tuples(st.sampled_from("se"), st.booleans(), st.integers(0, 40)), min_size=1, max_size=80
    )
)
def test_the_breaker_is_the_machine_it_says(events: list[tuple[str, bool, int]]) -> None:
    """Against a model: answers one after another, with time passing between them."""
    threshold, window, cooldown = 3, 6, 50.0
    watched = Watched(threshold=threshold, window=window, cooldown=cooldown)
    watched.exact(1.0, 1.0, 1.0)
    recent: list[bool] = []
    open_until: float | None = None
    for kind, drifts, wait in events:
        watched.clock.now += wait
        now = watched.clock.now
        allowed = open_until is None or now >= open_until
        assert watched.guard.allows("doc") == allowed
        if kind == "e" or not allowed:
            continue
        watched.answer(3.0 if drifts else 1.0)
        if open_until is not None:
            open_until = now + cooldown if drifts else None
            recent = []
            continue
        recent = [*recent, drifts][-window:]
        if sum(recent) >= threshold:
            open_until, recent = now + cooldown, []
