"""When will this be used again? Learned online, from what was and from what was not.

Things are told apart by a tuple of small integers, their features. The hazard of a thing, its
rate of reuse in 1/s at the age it has reached, is modelled as

    hazard(age, features) = base(age) * exp(sum over features f of w[f, value of f, age])

with ages in bins that grow by the square root of two: a proportional-hazards model with a
piecewise constant base (D. R. Cox, Regression models and life tables, 1972; as a Poisson
regression: M. Friedman, Piecewise exponential models, 1982). Time that passed without a reuse
counts as much as a reuse does, so things that were never used again are learned from as well. Where no
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
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FIRST_BIN = 0.25
_BINS = 35
_BINS_PER_WEIGHT = 6
_BATCH = 1024
_RATE = 0.07
_NEVER_LEARNED = 0.3
"""Chance of reuse per e-fold of age before anything is known; the order does not depend on it."""


class ReuseModel:
    """Hazards and indices of reuse for things told apart by features.

    Args:
        sizes: Number of values of each feature; values are ``0 .. size - 1``.
        half_life: Observations after which what was learned counts half.
        max_kinds: Distinct feature tuples told apart; later ones keep their first two features.
    """

    def __init__(self, sizes: Sequence[int], half_life: float = 200_000, max_kinds: int = 1 << 15):
        self.edges: list[float] = [0.0, *(_FIRST_BIN * 2 ** (i / 2) for i in range(_BINS))]
        """Ages in seconds that bound the bins; the last bin is open."""
        self._widths: Floats = np.diff(np.array(self.edges))
        middles = (np.array(self.edges[:-1]) + np.array(self.edges[1:])) / 2
        self._middles: list[float] = middles.tolist()
        self._fall: Floats = np.append(1.0, middles[:-1] / middles[1:])
        self._slots = -(-_BINS // _BINS_PER_WEIGHT)
        self._slot: Ints = np.arange(_BINS) // _BINS_PER_WEIGHT
        self._starts: Ints = np.cumsum([0, *sizes[:-1]]) * self._slots
        total = sum(sizes) * self._slots
        self._weights: Floats = np.zeros(total)
        self._seen: Floats = np.ones(total)
        self._reuses: Floats = np.zeros(_BINS)
        self._waits: Floats = np.zeros(_BINS)
        self._keep = 0.5 ** (1 / half_life)
        self._num_features = len(sizes)
        self._max_kinds = max_kinds
        self._kinds: dict[tuple[int, ...], int] = {}
        self._rows: Ints = np.zeros((256, len(sizes)), dtype=np.int64)
        self._curves: list[list[float] | None] = []
        self._pending: tuple[list[int], list[int], list[float], list[bool], list[float]]
        self._pending = ([], [], [], [], [])
        self._base: Floats = self._smooth()

    @property
    def num_kinds(self) -> int:
        """Feature tuples seen."""
        return len(self._kinds)

    def kind(self, features: tuple[int, ...]) -> int:
        """The number that stands for a feature tuple from now on."""
        kind = self._kinds.get(features)
        if kind is None:
            if len(self._kinds) >= self._max_kinds:
                coarse = features[:2] + (0,) * (self._num_features - 2)
                if features != coarse:
                    return self.kind(coarse)
            kind = self._kinds[features] = len(self._kinds)
            if kind == len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._rows[kind] = self._starts + np.array(features) * self._slots
            self._curves.append(None)
        return kind

    def bin(self, age: float) -> int:
        """The bin that holds an age in seconds."""
        return min(max(bisect_right(self.edges, age) - 1, 0), _BINS - 1)

    def waited(self, kind: int, bin: int, seconds: float, reused: bool, weight: float) -> None:
        """Something spent ``seconds`` in an age bin and was reused at the end of them, or not."""
        kinds, bins, waits, ends, weights = self._pending
        kinds.append(kind)
        bins.append(bin)
        waits.append(seconds)
        ends.append(reused)
        weights.append(weight)
        if len(kinds) >= _BATCH:
            self.learn()

    def learn(self) -> None:
        """Take in what was observed since the last time; indices follow at `refresh`."""
        count = len(self._pending[0])
        if not count:
            return
        kinds, bins, waits, ends, weights = (np.array(column) for column in self._pending)
        self._pending = ([], [], [], [], [])
        keep = self._keep**count
        cells = self._rows[kinds] + self._slot[bins][:, None]
        hazard = np.exp(np.minimum(self._base[bins] + self._weights[cells].sum(1), 5.0))
        expected = hazard * waits
        surprise = weights * np.clip(ends - expected, -3, 3)
        information = weights**2 * np.minimum(expected + ends, 3)
        flat = cells.ravel()
        size, times = len(self._weights), self._num_features
        push = np.bincount(flat, np.repeat(surprise, times), size)
        gained = np.bincount(flat, np.repeat(information, times), size)
        self._seen = 1 + (self._seen - 1) * keep + gained
        # AdaGrad's step, and never more than this table's share of a Newton step on the batch.
        step = push / np.maximum(np.sqrt(self._seen) / _RATE, times * gained)
        self._weights = np.clip(self._weights + step, -4, 4)
        self._reuses = self._reuses * keep + np.bincount(bins, weights * ends, _BINS)
        self._waits = self._waits * keep + np.bincount(bins, weights * waits, _BINS)
        self._base = self._smooth()

    def refresh(self, kinds: Iterable[int]) -> None:
        """Bring the indices of these kinds up to date with what was learned."""
        todo = np.fromiter(kinds, dtype=np.int64)
        for start in range(0, len(todo), 128):
            some = todo[start : start + 128]
            for kind, curve in zip(some.tolist(), self._indices(some).tolist(), strict=True):
                self._curves[kind] = curve

    def hazards(self, kind: int) -> Floats:
        """(bins,) rates of reuse in 1/s by age."""
        row = self._rows[kind][None] + self._slot[:, None]
        return np.exp(np.minimum(self._base + self._weights[row].sum(1), 5.0))

    def index(self, kind: int, age: float) -> float:
        """Reuses per second of the best wait from this age on, as of the last `refresh`."""
        curve = self._curves[kind]
        if curve is None:
            self.refresh([kind])
            curve = self._curves[kind]
            assert curve is not None
        middles = self._middles
        after = bisect_right(middles, age)
        if after == 0:
            return curve[0]
        if after == _BINS:
            return curve[-1] * middles[-1] / age
        low, high = middles[after - 1], middles[after]
        share = (age - low) / (high - low)
        return curve[after - 1] * (1 - share) + curve[after] * share

    def _smooth(self) -> Floats:
        """Log base hazard per bin: observed, or the previous bin's, falling as 1/age."""
        reuses, waits = self._reuses.tolist(), self._waits.tolist()
        hazard = _NEVER_LEARNED / self._middles[0]
        base = np.empty(_BINS)
        for b, fall in enumerate(self._fall.tolist()):
            hazard = max((reuses[b] + 1) / (waits[b] + 1 / (hazard * fall)), 1e-12)
            base[b] = hazard
        return np.log(base)

    def _indices(self, kinds: Ints) -> Floats:
        """(kinds, bins) index at the start of each age bin."""
        cells = self._rows[kinds][:, None, :] + self._slot[None, :, None]
        log_hazard = np.minimum(self._base + self._weights[cells].sum(2), 5.0)
        hazard = np.exp(log_hazard)
        lost = hazard * self._widths
        alive = np.exp(-np.cumsum(lost, axis=1))
        start = np.concatenate([np.ones((len(kinds), 1)), alive[:, :-1]], axis=1)
        reused = start * -np.expm1(-lost)
        chance = np.cumsum(np.pad(reused, ((0, 0), (1, 0))), axis=1)
        wait = np.cumsum(np.pad(reused / hazard, ((0, 0), (1, 0))), axis=1)
        gain = chance[:, None, 1:] - chance[:, :-1, None]
        cost = wait[:, None, 1:] - wait[:, :-1, None]
        # Where next to nothing is left alive, differences of sums are noise: the bin's own rate.
        known = _LATER & (cost > 1e-9 * self._widths[None, :, None])
        rate = np.where(known, gain / np.where(known, cost, 1.0), 0.0)
        best: Floats = np.maximum(rate.max(axis=2), hazard)
        return best

    def state(self) -> dict[str, Any]:
        """Sizes, for counters and tests."""
        return {"kinds": len(self._kinds), "weights": len(self._weights)}


_LATER: npt.NDArray[np.bool_] = np.triu(np.ones((_BINS, _BINS), dtype=bool))[None]
