"""FIFO: evict the block that was cached longest ago, whatever its use since.

A block keeps its place in the order from the moment its content was first released; being used
again does not move it. Within one request the last block is released first, so it is evicted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from kvplug.contract import EngineView, PolicyOptions, PrefixCachePolicy, Released


class Fifo(PrefixCachePolicy):
    """First in, first out. O(log n) per block; about 200 bytes per cached block."""

    name = "fifo"
    paper = "first in, first out"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._clock = 0
        self._born: dict[int, int] = {}
        self._candidates: set[int] = set()
        self._heap: list[tuple[int, int]] = []
        self._queued: set[tuple[int, int]] = set()

    def on_release(self, released: Released) -> None:
        for block in released.ids:
            if block not in self._born:
                self._born[block] = self._clock
                self._clock += 1
            self._candidates.add(block)
            entry = (self._born[block], block)
            if entry not in self._queued:
                self._queued.add(entry)
                heappush(self._heap, entry)

    def on_hit(self, ids: Sequence[int]) -> None:
        self._candidates.difference_update(ids)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._candidates.discard(block)
            self._born.pop(block, None)

    def victims(self, n: int) -> list[int]:
        heap = self._heap
        found: list[tuple[int, int]] = []
        while heap and len(found) < n:
            entry = heappop(heap)
            born, block = entry
            if block in self._candidates and self._born.get(block) == born:
                found.append(entry)
            else:
                self._queued.discard(entry)
        for entry in found:
            heappush(heap, entry)
        return [block for _, block in found]
