"""A model of the next use, learned online from uses and from their absence.

Things are distinguished by a tuple of small integers, their features. The hazard of a thing, its
rate of reuse in 1/s at the age it has reached, is modelled as

    hazard(age, features) = base(age) * exp(sum over features f of w[f, value of f, age])

with ages in bins that grow by the square root of two: a proportional-hazards model with a
piecewise constant base (D. R. Cox, Regression models and life tables, 1972; as a Poisson
regression: M. Friedman, Piecewise exponential models, 1982). Time that passed without a reuse
counts as much as a reuse does, so what was never used again is learned from as well. Where no
thing has yet grown so old, the base falls as 1/age: with nothing learned, older is worse.

What a cache wants to know is not the hazard of this moment but what waiting would bring: the
index of a thing at age ``a`` is the best rate of reuse over any time it could be waited for,

    index(a) = max over T > a of  P(reuse before T | none before a) / E(seconds waited | ...),

the Gittins index of its renewal (J. C. Gittins, Bandit processes and dynamic allocation indices,
1979). A thing that is never used for a minute and then surely at once is worth a lot all that
minute. Hit density (N. Beckmann et al., LHD, NSDI 2018) is this rate with T fixed by the cache's
own evictions; here it does not depend on what the cache did before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FIRST_BIN = 0.25
_BINS = 35
_BINS_PER_WEIGHT = 6
_BATCH = 256
_RATE = 0.07
_NEVER_LEARNED = 0.3
"""Chance of reuse per e-fold of age before anything was learned; the order ignores it."""


class NextUseModel:
    """Hazards and indices of reuse for things distinguished by features.

    Args:
        sizes: Number of values of each feature; values are ``0 .. size - 1``.
        half_life: Observations after which what was learned counts half.
    """

    def __init__(self, sizes: Sequence[int], half_life: float = 200_000):
        self.edges: list[float] = [0.0, *(_FIRST_BIN * 2 ** (i / 2) for i in range(_BINS))]
        """Ages in seconds that bound the bins."""
        edges = np.array(self.edges)
        middles = (edges[:-1] + edges[1:]) / 2
        self._widths: Floats = np.diff(edges)
        self._fall: list[float] = [1.0, *(middles[:-1] / middles[1:]).tolist()]
        self._first_hazard = _NEVER_LEARNED / float(middles[0])
        slots = -(-_BINS // _BINS_PER_WEIGHT)
        self._starts: Ints = np.cumsum([0, *sizes[:-1]]) * slots
        self._slots: Ints = np.arange(slots)
        self._slot: Ints = np.arange(_BINS) // _BINS_PER_WEIGHT
        self._weights: Floats = np.zeros(sum(sizes) * slots)
        self._seen: Floats = np.ones_like(self._weights)
        self._reuses: Floats = np.zeros(_BINS)
        self._waits: Floats = np.zeros(_BINS)
        self._keep = 0.5 ** (1 / half_life)
        self._rows: Ints = np.zeros((256, len(sizes)), dtype=np.int64)
        self._free: list[int] = list(range(255, -1, -1))
        self._given_back: list[int] = []
        self._observed: list[tuple[int, int, float, bool, float]] = []
        self._base: Floats = self._smooth()

    @property
    def num_things(self) -> int:
        """Things described and not forgotten."""
        return len(self._rows) - len(self._free) - len(self._given_back)

    def describe(self, features: Sequence[int]) -> int:
        """A number for a thing with these features, until it is forgotten."""
        if not self._free:
            count = len(self._rows)
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._free = list(range(2 * count - 1, count - 1, -1))
        thing = self._free.pop()
        self._rows[thing] = features
        return thing

    def forget(self, thing: int) -> None:
        """Forget a thing; its number may be reused."""
        self._given_back.append(thing)
        if len(self._given_back) >= _BATCH:
            self.learn()

    def bin(self, age: float) -> int:
        """The bin that holds an age in seconds."""
        return min(max(bisect_right(self.edges, age) - 1, 0), _BINS - 1)

    def waited(self, thing: int, age_bin: int, seconds: float, reused: bool, weight: float) -> None:
        """A thing spent ``seconds`` in an age bin and was reused at the end of them, or was not."""
        self._observed.append((thing, age_bin, seconds, reused, weight))
        if len(self._observed) >= _BATCH:
            self.learn()

    def learn(self) -> None:
        """Take in what was observed since the last time."""
        count = len(self._observed)
        if count:
            columns = np.array(self._observed, dtype=np.float64).T
            self._observed.clear()
            self._descend(columns, self._keep**count)
        self._free += self._given_back
        self._given_back.clear()

    def _descend(self, observed: Floats, keep: float) -> None:
        things, bins = observed[0].astype(np.int64), observed[1].astype(np.int64)
        waits, ends, weights = observed[2:]
        cells = self._rows[things] * len(self._slots) + self._starts
        cells += self._slot[bins][:, None]
        expected = waits * np.exp(np.minimum(self._base[bins] + self._weights[cells].sum(1), 5.0))
        surprise = weights * np.clip(ends - expected, -3, 3)
        information = weights**2 * np.minimum(expected + ends, 3)
        size, times = len(self._weights), cells.shape[1]
        push = np.bincount(cells.ravel(), np.repeat(surprise, times), size)
        gained = np.bincount(cells.ravel(), np.repeat(information, times), size)
        self._seen = 1 + (self._seen - 1) * keep + gained
        # AdaGrad's step, and never more than Newton's on this batch.
        step = push / np.maximum(np.sqrt(self._seen) / _RATE, gained)
        self._weights = np.clip(self._weights + step, -4, 4)
        self._reuses = self._reuses * keep + np.bincount(bins, weights * ends, _BINS)
        self._waits = self._waits * keep + np.bincount(bins, weights * waits, _BINS)
        self._base = self._smooth()

    def hazards(self, things: Sequence[int]) -> Floats:
        """(things, bins) rates of reuse in 1/s by age."""
        cells = self._rows[np.asarray(things)] * len(self._slots) + self._starts
        effects = self._weights[cells[:, None, :] + self._slots[:, None]].sum(2)
        hazards: Floats = np.exp(np.minimum(self._base + effects[:, self._slot], 5.0))
        return hazards

    def indices(self, things: Sequence[int], bins: Sequence[int]) -> Floats:
        """(things,) reuses per second of the best wait, for things amid these age bins."""
        hazards = self.hazards(things)
        reached = np.asarray(bins)[:, None]
        ahead = np.arange(_BINS) >= reached
        left = np.where(np.arange(_BINS) == reached, self._widths / 2, self._widths * ahead)
        lost = hazards * left
        alive = np.exp(-np.cumsum(lost, axis=1))
        chance = 1 - alive
        alive = np.concatenate([np.ones((len(alive), 1)), alive[:, :-1]], axis=1)
        wait = np.cumsum(alive * -np.expm1(-lost) / hazards, axis=1)
        rates = np.where(ahead, chance / np.where(ahead, wait, 1.0), 0.0)
        best: Floats = rates.max(axis=1)
        return best

    def _smooth(self) -> Floats:
        """Log base hazard per bin: as observed, or the previous bin's, falling as 1/age."""
        hazard = self._first_hazard
        base = np.empty(_BINS)
        reuses, waits = self._reuses.tolist(), self._waits.tolist()
        for b, fall in enumerate(self._fall):
            hazard = max((reuses[b] + 1) / (waits[b] + 1 / (hazard * fall)), 1e-12)
            base[b] = hazard
        return np.log(base)
