"""Slots: a small number for each request under way, by which both processes know it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Slots:
    """Assigns slots; the smallest free one goes first.

    Workers keep per-request state by slot, so numbers stay as small as the number of requests. A
    preempted request keeps its slot.
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
) -> npt.NDArray[np.int32]:
    """The block each scheduled request writes last, per KV-cache group, and its slot, ``[n, 2]``.

    A block that is being written is never shared, so its id identifies the request in a row of
    attention metadata, where nothing else does.

    Args:
        managers: vLLM's KV-cache managers, one per group.
        starts: Tokens computed before the step, by request.
        scheduled: Tokens scheduled in the step, by request.
        slots: Slots by request.
    """
    rows = []
    for request_id, start in starts.items():
        last = start + scheduled[request_id] - 1
        for manager in managers:
            blocks = manager.req_to_blocks[request_id]
            index = last // manager.block_size
            if index < len(blocks) and not blocks[index].is_null:
                rows.append((blocks[index].block_id, slots[request_id]))
    return np.array(rows, dtype=np.int32).reshape(-1, 2)
