"""MIN: the order of someone who has read the rest of the trace."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from kvplug.contract import (
    BlockFact,
    EngineView,
    PrefixCachePolicy,
    Released,
)
from kvplug.hosts.trace.traces import Ints, Trace


class Minimum(PrefixCachePolicy):
    """Farthest next use goes first, then the deeper block: Belady's optimum without bypass.

    L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems
    Journal 5 (2), 1966. No policy of a deployment: it needs the future.

    Args:
        trace: The trace it is replayed on.
        engine: The engine of that replay.
    """

    name = "min"
    needs = frozenset({BlockFact.REQUEST})

    def __init__(self, trace: Trace, engine: EngineView):
        super().__init__(self.Options(), engine)
        self._off: list[int] = trace.off.tolist()
        self._next: list[int] = next_use(trace).tolist()
        self._entry: dict[int, tuple[int, int, int]] = {}
        self._heap: list[tuple[int, int, int]] = []

    def on_release(self, released: Released) -> None:
        assert released.request is not None
        first = self._off[int(released.request.request_id)]
        n = len(released.ids)
        for depth, block in zip(range(n - 1, -1, -1), released.ids, strict=True):
            entry = (-self._next[first + depth], -depth, block)
            self._entry[block] = entry
            heappush(self._heap, entry)

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._entry.pop(block, None)

    def on_remove(self, ids: Sequence[int]) -> None:
        self.on_hit(ids)

    def victims(self, n: int) -> list[int]:
        found: dict[int, tuple[int, int, int]] = {}
        while len(found) < n:
            entry = heappop(self._heap)
            if self._entry.get(entry[2]) == entry:
                found[entry[2]] = entry
        for entry in found.values():
            heappush(self._heap, entry)
        return list(found)


def next_use(trace: Trace) -> Ints:
    """(N,) int64: the request that refers to each reference's block next, R where none does."""
    owner = np.repeat(np.arange(trace.num_requests), np.diff(trace.off))
    order = np.argsort(trace.ids, kind="stable")
    same = trace.ids[order][1:] == trace.ids[order][:-1]
    found = np.full(trace.num_references, trace.num_requests, dtype=np.int64)
    found[order[:-1][same]] = owner[order[1:]][same]
    return found
