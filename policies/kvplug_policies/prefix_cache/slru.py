"""SLRU: blocks that were hit are kept apart from blocks that were not.

Two LRU lists. New content enters the probationary one; a hit moves it to the protected one, whose
size is limited: what falls off its end goes back to the young end of the probationary one. Victims
come from the probationary list, and from the protected one only when that is empty.

R. Karedla, J. S. Love, B. G. Wherry, Caching strategies to improve disk system performance,
Computer 27 (3), 1994.

Deviation: blocks that requests hold are in neither list and count for neither; a block moves when
it is released after the hit, last block first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, islice

from pydantic import Field

from kvplug.contract import EngineView, PolicyOptions, PrefixCachePolicy, Released


class Slru(PrefixCachePolicy):
    """Segmented LRU. O(1) per block; about 240 bytes per candidate."""

    name = "slru"
    paper = "Karedla et al., Caching strategies to improve disk system performance, Computer 1994"

    class Options(PolicyOptions):
        """Options of `Slru`."""

        protected: float = Field(
            0.8, ge=0, le=1, description="fraction of the cache that blocks hit before may fill"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._limit = int(self.options.protected * engine.num_blocks)
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()
        self._hit: set[int] = set()

    def on_release(self, released: Released) -> None:
        probation, protected = self._probation, self._protected
        for block in released.ids:
            # Kept in one list only, whatever a host says twice.
            probation.pop(block, None)
            protected.pop(block, None)
            (protected if block in self._hit else probation)[block] = None
        while len(protected) > self._limit:
            block, _ = protected.popitem(last=False)
            self._hit.discard(block)
            probation[block] = None

    def on_hit(self, ids: Sequence[int]) -> None:
        self._hit.update(ids)
        for block in ids:
            self._probation.pop(block, None)
            self._protected.pop(block, None)

    def on_remove(self, ids: Sequence[int]) -> None:
        self._hit.difference_update(ids)
        for block in ids:
            self._probation.pop(block, None)
            self._protected.pop(block, None)

    def victims(self, n: int) -> list[int]:
        return list(islice(chain(self._probation, self._protected), n))
