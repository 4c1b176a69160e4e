"""Which chunks pay for their store: the ways to choose are tried in miniature, side by side.

When what comes back is more than the tiers hold, an order that takes in everything may give up each
chunk just before it is asked for. Whether that is so depends on the traffic, so it is measured:
small caches of the tiers' size, for a sample of the keys, each with its own way to admit, count the
hits they would have had, and the way that had the most decides. C. Waldspurger et al., Cache
modeling and optimization using miniature simulations, USENIX ATC 2017; the fraction is that of M.
Qureshi et al., Adaptive insertion policies, ISCA 2007.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from enum import StrEnum

from kvplug.contract import Leaving

SAMPLED = 16
"""One key in so many is simulated, where a miniature holds `SMALLEST` chunks at least."""

SMALLEST = 256
FRACTION = 32
"""One text in so many is admitted where a fraction is."""

HALF_LIFE = 4096
"""Sampled requests for chunks after which a hit counts half."""

STORE_COST = 1 / 64
"""Hits that a store must bring on average to be worth its bytes."""

MARGIN = 0.02
"""Share of all sampled requests by which a way must beat the one in force."""


class Way(StrEnum):
    """A way to admit.

    ``ALL``: everything. ``SECOND``: what was used twice, or missed after it had gone.
    ``FRACTION``: one text in 32, and what is in a tier stays.
    """

    ALL = "all"
    SECOND = "second"
    FRACTION = "fraction"


class Admission:
    """Miniature caches of the three ways, and the one that is in force.

    Args:
        chunks: Chunks that the tiers hold together; 0 for no limit, where everything is admitted.

    Attributes:
        way: The way in force.
    """

    def __init__(self, chunks: int):
        self.way = Way.ALL
        self._rate = max(1, min(SAMPLED, chunks // SMALLEST))
        self._size = chunks // self._rate
        self._caches: dict[Way, OrderedDict[int, None]] = {way: OrderedDict() for way in Way}
        self._score = dict.fromkeys(Way, 0.0)
        self._asked = 0.0
        self._fade = 0.5 ** (1 / HALF_LIFE)

    def left(self, chunk: Leaving, misses: int = 0) -> bool:
        """Take note of a chunk that leaves the pool, and say whether its store pays."""
        if not self._size:
            return True
        name = int.from_bytes(chunk.key[8:16], "little")
        if name % self._rate == 0:
            for way, cache in self._caches.items():
                if name in cache:
                    cache.move_to_end(name)
                elif self._admits(way, chunk, misses):
                    cache[name] = None
                    self._score[way] -= STORE_COST
                    if len(cache) > self._size:
                        cache.popitem(last=False)
        return self._admits(self.way, chunk, misses)

    def asked(self, key: bytes) -> None:
        """Take note that a request asked for a chunk that the pool did not hold."""
        if not self._size:
            return
        name = int.from_bytes(key[8:16], "little")
        if name % self._rate:
            return
        self._asked = self._asked * self._fade + 1.0
        for way, cache in self._caches.items():
            self._score[way] *= self._fade
            if name in cache:
                cache.move_to_end(name)
                self._score[way] += 1.0
        best = max(Way, key=self._score.__getitem__)
        if self._score[best] > self._score[self.way] + MARGIN * max(self._asked, SMALLEST):
            self.way = best

    @staticmethod
    def _admits(way: Way, chunk: Leaving, misses: int) -> bool:
        if way is Way.ALL:
            return True
        if way is Way.SECOND:
            return chunk.uses > 1 or misses > 0
        return _drawn(chunk.text or chunk.key)


def _drawn(text: bytes) -> bool:
    """True for one text in `FRACTION`, the same for all its chunks."""
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return int.from_bytes(digest, "little") % FRACTION == 0
