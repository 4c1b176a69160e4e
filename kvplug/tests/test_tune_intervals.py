"""Intervals of `kvplug tune`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvplug_lab.tune import intervals


def test_a_mean_has_students_interval() -> None:
    found = intervals.mean([1.0, 2.0, 3.0])
    # t of 0.975 with 2 degrees of freedom is 4.3027; the standard error is 1 / sqrt(3).
    assert found.value == 2.0 and found.n == 3
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)


def test_one_value_says_nothing_about_spread() -> None:
    found = intervals.mean([5.0])
    assert (found.value, found.low, found.high) == (5.0, -math.inf, math.inf)
    found = intervals.ratio([2.0], [1.0])
    assert (found.value, found.low, found.high) == (2.0, 0.0, math.inf)
    with pytest.raises(ValueError):
        intervals.mean([])


def test_ratios_are_paired_and_geometric() -> None:
    # Each engine is four times slower in the second round; their ratio is the same.
    found = intervals.ratio([20.0, 5.0], [10.0, 2.5])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    found = intervals.ratio([2.0, 0.5], [1.0, 1.0])
    assert found.value == pytest.approx(1.0) and found.low < 1.0 < found.high


def test_the_interval_of_ratios_covers_as_often_as_it_says() -> None:
    source = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        own = 1.2 * np.exp(source.normal(0, 0.1, 4))
        found = intervals.ratio(own.tolist(), [1.0] * 4)
        covered += found.low <= 1.2 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_the_rise_of_perplexity_is_over_all_tokens() -> None:
    stock = [[-1.0, -1.0], [-1.0], [-2.0, -2.0, -2.0]]
    own = [[-1.1, -1.1], [-1.1], [-2.1, -2.1, -2.1]]
    found = intervals.rise(own, stock)
    assert found.value == pytest.approx(math.expm1(0.1)) and found.n == 3
    assert found.low == pytest.approx(found.value) and found.high == pytest.approx(found.value)
    assert intervals.rise(stock, stock).value == 0.0
    # Long answers weigh as many tokens as they have.
    found = intervals.rise([[-1.0], [-2.0] * 9], [[-1.0], [-1.0] * 9])
    assert found.value == pytest.approx(math.expm1(0.9))
    assert found.low < found.value < found.high


def test_no_answer_has_no_rise() -> None:
    assert math.isnan(intervals.rise([[]], [[]]).value)
