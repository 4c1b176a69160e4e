"""Load or recompute: what prefill costs, as measured, against what loading costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from kvplug.contract import LinkView
from kvplug.tiers.fitting import fit_times

REMEMBERED = 256
"""Steps that the speed of prefill is fitted to."""

FITTED_EVERY = 16
"""Steps between two fits, once there are that many."""


def pairs(start: int, tokens: int) -> float:
    """Pairs of a query and a key that ``tokens`` tokens attend after ``start`` others."""
    return tokens * (start + (tokens + 1) / 2)


class Prefill:
    """Speed of prefill: seconds = fixed + per token + per pair of query and key.

    A layer's products with its weights take time in proportion to tokens, its attention in
    proportion to pairs, a step has a fixed share; the three are fitted to steps that were measured.

    Attributes:
        fixed: Seconds a step.
        token: Seconds a token.
        pair: Seconds a pair.
    """

    def __init__(self) -> None:
        self.fixed = self.token = self.pair = 0.0
        self._rows: deque[tuple[float, float, float]] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._new = 0
        self._attended = 0.0

    @property
    def known(self) -> bool:
        """True once a step was measured."""
        return bool(self._rows)

    def add(self, tokens: int, attended: float, seconds: float) -> None:
        """Take note of a step; what cannot be one is left out.

        Args:
            tokens: Tokens computed.
            attended: `pairs` of them, summed over requests.
            seconds: Time from the step's start to its result.
        """
        if tokens <= 0 or attended < 0 or not 0 < seconds < 1e6:
            return
        self._rows.append((1.0, float(tokens), float(attended)))
        self._seconds.append(seconds)
        self._new += 1
        if self._new >= FITTED_EVERY or len(self._rows) <= FITTED_EVERY:
            self._new = 0
            self._attended = sum(row[2] for row in self._rows) / sum(row[1] for row in self._rows)
            rows, seconds_ = np.array(self._rows), np.array(self._seconds)
            if len(rows) < 3:
                # One time for three unknowns: all of it is the tokens'.
                self.fixed = self.pair = 0.0
                self.token = float(np.median(seconds_ / rows[:, 1]))
                return
            self.fixed, self.token, self.pair = map(float, fit_times(rows, seconds_))

    def seconds(self, start: int, tokens: int) -> float:
        """Estimate the time to compute ``tokens`` tokens after ``start`` others."""
        if tokens <= 0:
            return 0.0
        return self.fixed + self.token * tokens + self.pair * pairs(start, tokens)

    def typical(self, tokens: int) -> float:
        """Estimate the time that tokens take with as much context as those measured, seconds."""
        return tokens * (self.token + self.pair * self._attended)

    def speed(self, start: int, tokens: int) -> float:
        """Tokens a second of that; 0 before anything was measured."""
        seconds = self.seconds(start, tokens)
        return tokens / seconds if seconds else 0.0


def computing(prefill: Prefill, start: int, total: int, tokens: Sequence[int]) -> list[float]:
    """Seconds to compute the rest of a text once its first n chunks after ``start`` are there."""
    if not prefill.known:
        return []
    return [
        prefill.seconds(start + done, total - start - done)
        for done in accumulate(tokens, initial=0)
    ]


def loading(
    sizes: Sequence[int], tiers: Sequence[str], links: Mapping[str, LinkView]
) -> list[float]:
    """Seconds to load the first n chunks: tiers work side by side, each through its own queue.

    Returns:
        One number more than there are chunks; empty if no tier of them was measured.
    """
    if not any(links[name].bandwidth for name in set(tiers) if name in links):
        return []
    sums: dict[str, int] = {}
    slowest, found = 0.0, [0.0]
    for size, name in zip(sizes, tiers, strict=True):
        sums[name] = sums.get(name, 0) + size
        slowest = max(slowest, links.get(name, LinkView()).seconds(sums[name]))
        found.append(slowest)
    return found
