"""LFU: evict the block that was referred to least often, the least recent of those first.

A reference is a request that uses the block, the one that computes it included. Counts outlive
eviction: content that comes back has the count it left with. Without aging (the default) this is
the plain least-frequently-used order; with ``half_life`` a reference counts half after so many
further references, which is the exponential weighing of LRFU, from LFU (a long half-life) to
LRU (a short one).

D. Lee et al., LRFU: a spectrum of policies that subsumes the least recently used and least
frequently used policies, IEEE Transactions on Computers 50 (12), 2001.

Deviation: LRFU remembers every block it ever saw; here ``history`` bounds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import Ghosts, Ranking


class Lfu(PrefixCachePolicy):
    """Least frequently used. O(log n) per block; about 700 bytes per cached block."""

    name = "lfu"
    needs = frozenset({BlockFact.KEY})
    paper = "least frequently used; aging as in LRFU, IEEE Trans. Computers 50 (12), 2001"

    class Options(PolicyOptions):
        """Options of `Lfu`."""

        half_life: float = Field(
            0.0,
            ge=0,
            le=10**12,
            description="references to blocks after which a reference counts half; 0: no aging",
        )
        history: int = Field(
            1 << 20,
            ge=0,
            le=1 << 27,
            description="evicted blocks whose counts are remembered",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._half_life = self.options.half_life
        self._clock = 0
        self._ranking = Ranking()
        self._weight: dict[int, float] = {}
        self._key: dict[int, bytes] = {}
        self._hits: dict[int, int] = {}
        self._history: Ghosts[float] = Ghosts(self.options.history)

    def on_release(self, released: Released) -> None:
        keys = released.keys or [b""] * len(released.ids)
        for block, key in zip(released.ids, keys, strict=True):
            hits = self._hits.pop(block, 0)
            weight = self._weight.get(block)
            if weight is None:
                hits += 1
                weight = self._history.pop(key) if key else None
                if key:
                    self._key[block] = key
            weight = self._add(weight, hits)
            self._weight[block] = weight
            self._clock += 1
            self._ranking.put((weight, self._clock, block))

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._hits[block] = self._hits.get(block, 0) + 1
            self._ranking.discard(block)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._ranking.discard(block)
            self._hits.pop(block, None)
            weight = self._weight.pop(block, None)
            key = self._key.pop(block, None)
            if weight is not None and key is not None:
                self._history.add(key, weight)

    def victims(self, n: int) -> list[int]:
        return self._ranking.first(n)

    def _add(self, weight: float | None, references: int) -> float:
        """A weight with more references: a count, or with aging the logarithm of its growth.

        With aging a reference at time t weighs ``2 ** (t / half_life)``, and kept is the base-2
        logarithm of the sum: that never has to be aged, as all weights fade alike.
        """
        if not self._half_life:
            return (weight or 0) + references
        now = self._clock / self._half_life
        before = -inf if weight is None else weight
        return now + log2(2 ** (before - now) + references) if references else before
