"""A test of a bounded mean that may be looked at after every number.

A gambler starts with a wealth of 1 and bets on each next number: with the bet ``b`` the wealth
becomes ``wealth * (1 + b * (x - bound))``. If the numbers' means, each given the ones before, do
not exceed the bound, no way of betting makes money on average: the wealth is a nonnegative
supermartingale, and the probability that it *ever* reaches ``1 / error`` is at most ``error``
(Ville, 1939). So the test may stop whenever it likes, and the numbers need no distribution and no
independence. Bets are not chosen but mixed: the wealth is divided among `FRACTIONS` of the largest
bet that cannot go bankrupt (Waudby-Smith and Ramdas, "Estimating means of bounded random variables
by betting", J. R. Stat. Soc. B 86(1), 2024).

A gambler who has lost for long would need long to win it back. With ``changes`` the initial wealth
is therefore not bet at once: of it, ``1 / (t * (t + 1))`` enters the game before the t-th number.
The sum stays a supermartingale that starts at 1, with the same error for good; a change after t
numbers costs what ``log(t * (t + 1))`` nats of evidence cost.
"""

from __future__ import annotations

import math
from typing import Literal

FRACTIONS = tuple(0.9 * 0.5**i for i in range(8))
"""Bets, as fractions of the largest one that cannot lose everything."""


class MeanTest:
    """Whether numbers within ``[0, 1]`` have a mean beyond a bound.

    Args:
        bound: The bound, within ``(0, 1)``.
        error: Probability of rejecting, ever, although the means are not beyond the bound.
        side: ``above`` rejects that the mean is at most the bound, ``below`` that it is at least.
        changes: Stay quick to notice a change, however long ago the test began.

    Attributes:
        count: Numbers so far.
        rejected: The wealth has reached ``1 / error``.
    """

    def __init__(
        self, bound: float, error: float, side: Literal["above", "below"], *, changes: bool = False
    ):
        if not 0 < bound < 1 or not 0 < error < 1:
            raise ValueError(f"bound and error must be within (0, 1), got {bound} and {error}")
        self.bound, self.error = bound, error
        self.count = 0
        self.rejected = False
        largest = 1 / bound if side == "above" else -1 / (1 - bound)
        self._bets = [largest * fraction for fraction in FRACTIONS]
        self._changes = changes
        self._bet = [0.0 if changes else 1 / len(FRACTIONS)] * len(FRACTIONS)

    def add(self, x: float) -> bool:
        """Take in the next number; returns `rejected`.

        Raises:
            ValueError: It is not within ``[0, 1]``.
        """
        if not 0 <= x <= 1:
            raise ValueError(f"must be within [0, 1], got {x}")
        if self.rejected:
            return True
        self.count += 1
        entering = 0.0
        if self._changes:
            entering = 1 / (self.count * (self.count + 1)) / len(FRACTIONS)
        off = x - self.bound
        pairs = zip(self._bet, self._bets, strict=True)
        self._bet = [(wealth + entering) * (1 + bet * off) for wealth, bet in pairs]
        self.rejected = self.wealth >= 1 / self.error
        return self.rejected

    @property
    def wealth(self) -> float:
        """The gambler's wealth, 1 at first."""
        waiting = 1 / (self.count + 1) if self._changes else 0.0
        return sum(self._bet) + waiting

    @property
    def evidence(self) -> float:
        """Evidence gathered, as a share of what rejects: 0 for none, 1 when `rejected`."""
        wealth = max(1.0, self.wealth)
        return min(1.0, math.log(wealth) / math.log(1 / self.error))
