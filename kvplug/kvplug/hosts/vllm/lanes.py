"""The scheduler half of a format that treats requests apart: whose memory is whose, and which of
its assignments each was given."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt


class LaneScheduler:
    """Gives every request a small number of its own while it lives.

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
        self._free: list[int] = []

    def add(self, request_id: str, assigned: int = 0) -> None:
        """A request arrived, with the assignment it was given."""
        if request_id not in self._lanes:
            self._assigned[request_id] = assigned
            lane = heapq.heappop(self._free) if self._free else len(self._lanes)
            self._lanes[request_id] = lane

    def finish(self, request_id: str) -> None:
        """A request ended."""
        lane = self._lanes.pop(request_id, None)
        self._assigned.pop(request_id, None)
        if lane is not None:
            heapq.heappush(self._free, lane)

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
