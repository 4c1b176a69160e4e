"""Median and spread of a sample, one rule for all figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median of a sample with a lower and an upper quantile.

    Attributes:
        median: The median.
        low: The lower quantile.
        high: The upper quantile.
        n: Values in the sample.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], tail: float = 0.25) -> Spread:
        """Summarise values; all NaN for none.

        Quantiles between two values are interpolated linearly, so the extremes of the sample are
        its quantiles 0 and 1.

        Args:
            values: The sample.
            tail: Share of the sample below ``low``, and above ``high``: quartiles by default.
        """
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        low, median, high = np.quantile(values, (tail, 0.5, 1 - tail)).tolist()
        return cls(median, low, high, len(values))

    def text(self, form: str) -> str:
        """``median [low, high]`` in a number format."""
        return f"{self.median:{form}} [{self.low:{form}}, {self.high:{form}}]"
