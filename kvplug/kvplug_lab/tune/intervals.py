"""Intervals of ratios to stock and of losses in answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Level of all intervals, two-sided."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: The estimate.
        low: The interval's lower end.
        high: Its upper end.
        n: Values it is of.
    """

    value: float
    low: float
    high: float
    n: int

    def text(self, form: str) -> str:
        """``value [low, high]`` in a number format."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean(values: Sequence[float]) -> Interval:
    """Mean with Student's interval; from minus to plus infinity for a single value.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    found = statistics.fmean(values)
    n = len(values)
    if n == 1:
        return Interval(found, -math.inf, math.inf, 1)
    from scipy import stats

    if len(set(values)) == 1:
        return Interval(found, found, found, n)
    low, high = stats.t.interval(LEVEL, n - 1, found, stats.sem(values))
    return Interval(found, float(low), float(high), n)


def ratio(own: Sequence[float], stock: Sequence[float]) -> Interval:
    """Geometric mean of paired ratios, with Student's interval of their logarithms.

    Args:
        own: Figures of one engine, one a round, above 0.
        stock: Stock's figures of the same rounds.
    """
    logs = mean([math.log(a / b) for a, b in zip(own, stock, strict=True)])
    high = math.exp(logs.high) if logs.high < 700 else math.inf
    return Interval(math.exp(logs.value), math.exp(logs.low), high, logs.n)


def rise(own: Sequence[Sequence[float]], stock: Sequence[Sequence[float]]) -> Interval:
    """Rise of the perplexity of the same answers, as a share of stock's.

    Args:
        own: Log-probabilities of the tokens of each answer, in nats.
        stock: Stock's, of the same tokens.

    Returns:
        The rise over all tokens, and an interval by whole answers: tokens of one answer depend on
        one another. One answer alone has no interval.
    """
    lost = [sum(b) - sum(a) for a, b in zip(own, stock, strict=True) if a]
    tokens = [len(a) for a in own if a]
    if not tokens:
        return Interval(math.nan, math.nan, math.nan, 0)
    per_token = statistics.fmean(tokens)
    # The mean over tokens is a ratio of means: linearised around it, answers count by length.
    centre = sum(lost) / sum(tokens)
    around = mean(
        [(x - centre * n) / per_token + centre for x, n in zip(lost, tokens, strict=True)]
    )
    low, high = (math.expm1(min(end, 700.0)) for end in (around.low, around.high))
    return Interval(math.expm1(centre), low, high, len(tokens))
