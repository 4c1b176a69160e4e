"""Which request computed a block and where it stands in it, for policies that ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvplug.contract import RequestView


class BlockTracker:
    """Owner and index of each block, kept from what the scheduler sends each step.

    A block that several requests share belongs to the latest one that was given it.
    """

    def __init__(self, num_blocks: int):
        self._position = np.full(num_blocks, -1, dtype=np.int32)
        self._owner: list[RequestView | None] = [None] * num_blocks
        self._lengths: dict[str, list[int]] = {}
        self._requests: dict[str, RequestView] = {}

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Index of each block in its request's text, -1 where unknown."""
        return self._position[list(ids)].tolist()

    def owner(self, block: int) -> RequestView | None:
        """The latest request that was given the block."""
        return self._owner[block]

    def add(self, request: Any) -> None:
        """A vLLM ``Request`` arrived."""
        self._requests[request.request_id] = RequestView(
            request_id=request.request_id,
            num_prompt_tokens=request.num_prompt_tokens,
            priority=request.priority,
            session_id=getattr(request, "session_id", None),
            arrival=request.arrival_time,
        )

    def update(self, output: Any) -> None:
        """Take in one ``SchedulerOutput``."""
        for request in output.scheduled_new_reqs:
            self._lengths[request.req_id] = [0] * len(request.block_ids)
            self._extend(request.req_id, request.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if block_ids is None:
                continue
            if request_id in cached.resumed_req_ids:
                self._lengths[request_id] = [0] * len(block_ids)
            self._extend(request_id, block_ids)
        for request_id in output.finished_req_ids:
            self._lengths.pop(request_id, None)
            self._requests.pop(request_id, None)

    def _extend(self, request_id: str, groups: Sequence[Sequence[int]]) -> None:
        lengths = self._lengths.get(request_id)
        if lengths is None:
            return
        request = self._requests.get(request_id)
        for group, ids in enumerate(groups):
            held = lengths[group]
            self._position[list(ids)] = np.arange(held, held + len(ids), dtype=np.int32)
            for block in ids:
                self._owner[block] = request
            lengths[group] += len(ids)
