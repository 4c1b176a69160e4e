"""Slots: a small number for each request under way, by which both processes know it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Slots:
    """Assigns slots; the smallest free one goes first.

    Workers keep per-request state by slot, so numbers stay below the number of requests that run. A
    preempted request gives its slot back, and takes one when it starts over.
    """

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._requests: dict[int, str] = {}
        self._free: list[int] = []

    def take(self, request_id: str) -> int:
        """The request's slot; assigned on first use."""
        slot = self._slots.get(request_id)
        if slot is None:
            slot = heapq.heappop(self._free) if self._free else len(self._slots)
            self._slots[request_id] = slot
            self._requests[slot] = request_id
        return slot

    def request(self, slot: int) -> str | None:
        """Id of the request that has the slot, or None."""
        return self._requests.get(slot)

    def release(self, request_id: str) -> None:
        """Free the slot of a request that ended; one without a slot is ignored."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            del self._requests[slot]
            heapq.heappush(self._free, slot)


def row_slots(
    managers: Sequence[Any],
    starts: Mapping[str, int],
    scheduled: Mapping[str, int],
    slots: Mapping[str, int],
    drafts: int = 0,
) -> npt.NDArray[np.int32]:
    """Blocks each scheduled request may write last, per KV-cache group, and its slot, ``[n, 2]``.

    A block that is being written is never shared, so its id identifies the request in a row of
    attention metadata, where nothing else does. The scheduler knows the last block only up to
    drafts that are rejected.

    Args:
        managers: vLLM's KV-cache managers, one per group.
        starts: Tokens computed before the step, by request.
        scheduled: Tokens scheduled in the step, by request.
        slots: Slots by request.
        drafts: Most draft tokens of a request that may turn out to be rejected.
    """
    rows = []
    for request_id, start in starts.items():
        last = start + scheduled[request_id] - 1
        for manager in managers:
            blocks = manager.req_to_blocks[request_id]
            first = max(0, last - drafts) // manager.block_size
            rows += [
                (block.block_id, slots[request_id])
                for block in blocks[first : last // manager.block_size + 1]
                if not block.is_null
            ]
    return np.array(rows, dtype=np.int32).reshape(-1, 2)
