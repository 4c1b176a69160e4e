"""LRU: evict the block that was released longest ago.

Recency is the moment the last request released a block, last block of its text first, which is
vLLM's own order: this policy makes the decisions stock vLLM makes, one for one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from kvplug.contract import EngineView, PolicyOptions, PrefixCachePolicy, Released


class Lru(PrefixCachePolicy):
    """Least recently used, by release. O(1) per block; about 100 bytes per candidate."""

    name = "lru"
    changes = "nothing: the eviction order of stock vLLM, through kvplug"
    paper = "the order of vLLM's free block queue"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._order: OrderedDict[int, None] = OrderedDict()

    def on_release(self, released: Released) -> None:
        order = self._order
        for block in released.ids:
            order[block] = None
            order.move_to_end(block)

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._order.pop(block, None)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._order.pop(block, None)

    def victims(self, n: int) -> list[int]:
        return list(islice(self._order, n))
