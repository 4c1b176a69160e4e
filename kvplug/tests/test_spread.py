"""The spread of a sample."""

from __future__ import annotations

import math
import statistics

import pytest

from kvplug_lab.spread import Spread


def test_quartiles_are_interpolated_and_inclusive() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.5, 9.0]
    found = Spread.of(values)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high))
    assert found.n == 6
    assert Spread.of([1.0, 2.0, 3.0]).text(".1f") == "2.0 [1.5, 2.5]"


def test_a_tail_widens_the_range() -> None:
    found = Spread.of([float(i) for i in range(101)], tail=0.05)
    assert (found.low, found.median, found.high) == pytest.approx((5, 50, 95))
    whole = Spread.of([3.0, 1.0, 2.0], tail=0)
    assert (whole.low, whole.high) == (1, 3)


def test_one_value_is_its_own_spread_and_no_values_have_none() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    empty = Spread.of([])
    assert empty.n == 0
    assert all(math.isnan(v) for v in (empty.median, empty.low, empty.high))
