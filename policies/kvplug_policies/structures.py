"""Data structures that prefix-cache policies share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
Move = TypeVar("Move")


class Ranking:
    """Blocks in order of a rank, smallest first; O(log n) amortized per change.

    An entry is a tuple, the rank and then the block. A heap with lazy deletion: an entry whose
    block left or changed rank stays until it surfaces, and the heap is rebuilt when such entries
    outnumber the others.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, ...]] = {}
        self._heap: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __getitem__(self, block: int) -> tuple[Any, ...]:
        return self._entries[block]

    def put(self, entry: tuple[Any, ...]) -> None:
        """Add a block or change its rank."""
        entries, heap = self._entries, self._heap
        entries[entry[-1]] = entry
        if len(heap) > 2 * len(entries) + 64:
            heap[:] = entries.values()
            heapify(heap)
        else:
            heappush(heap, entry)

    def discard(self, block: int) -> None:
        """Remove a block if present."""
        self._entries.pop(block, None)

    def walk(self) -> Generator[tuple[Any, ...]]:
        """Entries in order. Close it (or run it out) before anything is changed."""
        heap, entries = self._heap, self._entries
        seen: list[tuple[Any, ...]] = []
        try:
            while heap:
                entry = heappop(heap)
                if entries.get(entry[-1]) is entry:
                    seen.append(entry)
                    yield entry
        finally:
            for entry in seen:
                heappush(heap, entry)

    def first(self, n: int) -> list[int]:
        """The first ``n`` blocks, or all if there are fewer."""
        heap, entries = self._heap, self._entries
        seen: list[tuple[Any, ...]] = []
        while heap and len(seen) < n:
            entry = heappop(heap)
            if entries.get(entry[-1]) is entry:
                seen.append(entry)
        for entry in seen:
            heappush(heap, entry)
        return [entry[-1] for entry in seen]


class Ghosts(Generic[Value]):
    """Values of evicted content by its key; the oldest is forgotten first.

    Args:
        limit: The most entries kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[bytes, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def add(self, key: bytes, value: Value) -> list[Value]:
        """Remember a key as the newest; returns the values forgotten for it."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        return self.trim(self.limit)

    def pop(self, key: bytes) -> Value | None:
        """Forget a key; returns its value, or None if it was not there."""
        return self._entries.pop(key, None)

    def trim(self, limit: int) -> list[Value]:
        """Forget the oldest beyond ``limit``; returns their values."""
        gone = []
        while len(self._entries) > limit:
            gone.append(self._entries.popitem(last=False)[1])
        return gone


class VictimPlan(Generic[Move]):
    """Victims chosen without changing the lists, with the moves that lead to each.

    `victims` may not change a policy, but in some orders finding a victim moves other blocks. The
    policy writes both down here and makes the moves when the host reports these victims gone.
    """

    def __init__(self) -> None:
        self.victims: list[int] = []
        self._moves: list[Move] = []
        self._upto: list[int] = []

    def move(self, move: Move) -> None:
        self._moves.append(move)

    def evict(self, block: int) -> None:
        self.victims.append(block)
        self._upto.append(len(self._moves))

    def moves_for(self, ids: Sequence[int]) -> list[Move]:
        """Moves to make when ``ids`` are evicted: none, unless they are the first victims."""
        n = len(ids)
        if n == 0 or n > len(self.victims) or self.victims[:n] != list(ids):
            return []
        return self._moves[: self._upto[n - 1]]
