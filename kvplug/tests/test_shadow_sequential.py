"""The sequential test keeps its error however often it is looked at, and has power."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Literal

import pytest

from kvplug.shadow.sequential import MeanTest

BOUND = 0.1
ERROR = 0.05
STREAMS, LENGTH = 2000, 150

Stream = Callable[[random.Random, float], Iterable[float]]


def coins(rng: random.Random, mean: float) -> Iterable[float]:
    """All or nothing."""
    return (float(rng.random() < mean) for _ in itertools.count())


def spread(rng: random.Random, mean: float) -> Iterable[float]:
    """Many small numbers, some large ones."""
    return (rng.betavariate(0.5, 0.5 / mean - 0.5) for _ in itertools.count())


def bursts(rng: random.Random, mean: float) -> Iterable[float]:
    """Dependent: what comes next has the mean given all before, but its spread follows them."""
    last = 0.0
    while True:
        height = 1.0 if last else 2 * mean
        last = height if rng.random() < mean / height else 0.0
        yield last


def rejected(stream: Stream, mean: float, side: Literal["above", "below"], changes: bool) -> int:
    """Streams in which the test, looked at after every number, ever rejects."""
    found = 0
    for seed in range(STREAMS):
        test = MeanTest(BOUND, ERROR, side, changes=changes)
        numbers = itertools.islice(stream(random.Random(seed), mean), LENGTH)
        found += any(test.add(x) for x in numbers)
    return found


@pytest.mark.parametrize("stream", [coins, spread, bursts])
@pytest.mark.parametrize(("side", "changes"), [("above", False), ("above", True), ("below", False)])
def test_it_errs_no_more_often_than_it_says(
    stream: Stream, side: Literal["above", "below"], changes: bool
) -> None:
    assert rejected(stream, BOUND, side, changes) <= ERROR * STREAMS


def test_a_test_that_is_not_sequential_would_err_more_often() -> None:
    """The same simulation sees the error of one that is looked at after every number although it
    may be looked at once: a z-test at the same level."""
    found = 0
    for seed in range(200):
        total, rejects = 0.0, False
        for n, x in enumerate(itertools.islice(coins(random.Random(seed), BOUND), LENGTH), 1):
            total += x
            deviation = (BOUND * (1 - BOUND) / n) ** 0.5
            rejects |= n >= 20 and total / n - BOUND > 1.645 * deviation
        found += rejects
    assert found > 2 * ERROR * 200


@pytest.mark.parametrize(("stream", "needed"), [(coins, 400), (spread, 250)])
def test_twice_the_bound_is_found(stream: Stream, needed: int) -> None:
    found = 0
    for seed in range(200):
        test = MeanTest(BOUND, ERROR, "above", changes=True)
        numbers = itertools.islice(stream(random.Random(seed), 2 * BOUND), needed)
        found += any(test.add(x) for x in numbers)
    assert found >= 0.9 * 200


def test_a_change_after_long_is_found_where_changes_are_expected() -> None:
    watchful = MeanTest(BOUND, ERROR, "above", changes=True)
    settled = MeanTest(BOUND, ERROR, "above")
    for _ in range(1000):
        watchful.add(0.02)
        settled.add(0.02)
    needed = 0
    while not watchful.rejected:
        needed += 1
        watchful.add(0.3)
        settled.add(0.3)
    assert needed < 40
    assert not settled.rejected
    assert settled.evidence == 0


def test_wealth_is_what_the_bets_make() -> None:
    test = MeanTest(0.2, 0.05, "above")
    test.add(0.5)
    bets = [0.9 * 0.5**i / 0.2 for i in range(8)]
    assert test.wealth == pytest.approx(sum(1 + b * 0.3 for b in bets) / 8)
    below = MeanTest(0.2, 0.05, "below")
    below.add(0.0)
    assert below.wealth > 1
    late = MeanTest(0.2, 0.05, "above", changes=True)
    late.add(0.5)
    # Half of it entered before the first number, the other half has not yet.
    assert late.wealth == pytest.approx(0.5 * test.wealth + 0.5)


def test_evidence_ends_at_one() -> None:
    test = MeanTest(BOUND, ERROR, "above")
    assert test.evidence == 0
    seen = []
    while not test.add(1.0):
        seen.append(test.evidence)
    assert seen == sorted(seen)
    assert 0 < seen[0] <= seen[-1] < 1
    assert test.evidence == 1
    count = test.count
    assert test.add(0.0)
    assert test.count == count


@pytest.mark.parametrize("x", [-0.01, 1.01, float("nan")])
def test_numbers_outside_are_refused(x: float) -> None:
    with pytest.raises(ValueError, match="within"):
        MeanTest(BOUND, ERROR, "above").add(x)


@pytest.mark.parametrize(("bound", "error"), [(0, 0.05), (1, 0.05), (0.1, 0), (0.1, 1)])
def test_bounds_and_errors_outside_are_refused(bound: float, error: float) -> None:
    with pytest.raises(ValueError, match="within"):
        MeanTest(bound, error, "above")
