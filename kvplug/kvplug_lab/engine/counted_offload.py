"""vLLM's own order of offloaded chunks, counting which of them were ever read."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import OffloadKey
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy

COUNTS = {"stored": 0, "useful": 0, "read": 0}
"""Chunks stored in this process, those of them that were read, and reads."""


class CountedLRU(LRUCachePolicy):
    """vLLM's ``lru``, counted in `COUNTS`."""

    def __init__(self, cache_capacity: int):
        super().__init__(cache_capacity)
        self._unread: set[OffloadKey] = set()

    def insert(self, key: OffloadKey, chunk: ChunkStatus, req_context: Any = None) -> None:
        """Add a chunk; since 0.33 with its request."""
        COUNTS["stored"] += 1
        self._unread.add(key)
        more = () if req_context is None else (req_context,)
        super().insert(key, chunk, *more)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Keep a chunk that is being loaded."""
        COUNTS["read"] += 1
        if key in self._unread:
            self._unread.discard(key)
            COUNTS["useful"] += 1
        super().mark_non_evictable(key)
