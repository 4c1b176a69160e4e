"""vLLM's own queue of free blocks under the verbs of a policy, to be measured beside policies."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from kvplug.contract import Released


class StockQueue:
    """`FreeKVCacheBlockQueue` with every block in use at first.

    Args:
        num_blocks: Blocks, with ids from 0.
    """

    def __init__(self, num_blocks: int):
        self._blocks = [KVCacheBlock(block_id=i) for i in range(num_blocks)]
        self._queue = FreeKVCacheBlockQueue(self._blocks)
        self._queue.popleft_n(num_blocks)

    def release(self, released: Released) -> None:
        """Append blocks, as `BlockPool.free_blocks` does."""
        self._queue.append_n([self._blocks[i] for i in released.ids])

    def hit(self, ids: Sequence[int]) -> None:
        """Take blocks out, as `BlockPool.touch` does."""
        for i in ids:
            self._queue.remove(self._blocks[i])

    def evict(self, n: int) -> list[int]:
        """Take the first blocks, as `BlockPool.get_new_blocks` does."""
        return [block.block_id for block in self._queue.popleft_n(n)]
