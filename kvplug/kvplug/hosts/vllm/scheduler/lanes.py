"""Lanes: a small number for each running request, under which workers keep what they remember."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt


class Lanes:
    """Small numbers, given out and taken back; the smallest free one goes first."""

    def __init__(self) -> None:
        self._given = 0
        self._free: list[int] = []

    def take(self) -> int:
        """A number nobody has."""
        if self._free:
            return heapq.heappop(self._free)
        self._given += 1
        return self._given - 1

    def give_back(self, lane: int) -> None:
        """The number is free again."""
        heapq.heappush(self._free, lane)


class LaneScheduler:
    """The scheduler half of a format that treats requests apart: the lane of each, and which of the
    format's assignments it was given.

    What the workers keep of a request's recent tokens lies under it. A request that is preempted
    keeps its lane: it starts over at a block boundary, where nothing recent is needed. It keeps
    its assignment too, which its block hashes were made with.

    Args:
        managers: The KV-cache managers, one a group.
    """

    def __init__(self, managers: list[Any]):
        self.managers = managers
        self._lanes: dict[str, int] = {}
        self._assigned: dict[str, int] = {}
        self._numbers = Lanes()

    def add(self, request_id: str, assigned: int = 0) -> None:
        """A request arrived, with the assignment it was given."""
        if request_id not in self._lanes:
            self._assigned[request_id] = assigned
            self._lanes[request_id] = self._numbers.take()

    def finish(self, request_id: str) -> None:
        """A request ended."""
        lane = self._lanes.pop(request_id, None)
        self._assigned.pop(request_id, None)
        if lane is not None:
            self._numbers.give_back(lane)

    def step(
        self, starts: dict[str, int], scheduled: dict[str, int]
    ) -> npt.NDArray[np.int32] | None:
        """The block each scheduled request writes last, its lane and its assignment, ``[n, 3]``,
        or None.

        Args:
            starts: Tokens computed before the step, by request.
            scheduled: Tokens scheduled in it, by request.
        """
        rows = []
        for request_id, start in starts.items():
            lane = self._lanes.get(request_id)
            if lane is None:
                continue
            last = start + scheduled[request_id] - 1
            for manager in self.managers:
                blocks = manager.req_to_blocks[request_id]
                if last // manager.block_size < len(blocks):
                    tail = blocks[last // manager.block_size].block_id
                    rows.append((tail, lane, self._assigned[request_id]))
        return np.array(rows, dtype=np.int32) if rows else None
