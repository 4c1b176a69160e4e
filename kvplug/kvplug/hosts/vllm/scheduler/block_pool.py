"""What is measured of vLLM's block pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvplug.hosts.vllm.scheduler.kind import SchedulerStep
from kvplug.observe.catalogue import FRAGMENTATION, POOL_BLOCKS
from kvplug.observe.metric import Sample

LOOKED_AT = 4096
"""Blocks that are looked at for one sample."""


def held_blocks(pool: Any) -> int:
    """Blocks that requests hold; the null block is none."""
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


class BlockPool:
    """Counts a pool's blocks by state.

    Args:
        pool: vLLM's pool.
        block_size: Tokens per block.
        latest: Returns the latest step, or None.
    """

    def __init__(self, pool: Any, block_size: int, latest: Callable[[], SchedulerStep | None]):
        self._pool = pool
        self._block_size = block_size
        self._latest = latest
        self._at = self._seen = self._cached = 0

    def samples(self) -> Iterator[Sample]:
        """Blocks by state, and both kinds of fragmentation."""
        pool = self._pool
        held, free = held_blocks(pool), int(pool.get_num_free_blocks())
        cached = min(self._look(), free)
        yield POOL_BLOCKS.of(held, "held")
        yield POOL_BLOCKS.of(cached, "cached")
        yield POOL_BLOCKS.of(free - cached, "empty")
        yield FRAGMENTATION.of(cached / free if free else 0.0, "free")
        unfilled = self._unfilled() if held else 0
        share = min(1.0, unfilled / (held * self._block_size)) if held else 0.0
        yield FRAGMENTATION.of(share, "held")

    def _look(self) -> int:
        """Free blocks with content, as of the latest time that all blocks were looked at."""
        blocks = self._pool.blocks
        end = self._at + LOOKED_AT
        part = blocks[self._at : end]
        self._seen += sum(block.block_hash is not None and not block.ref_cnt for block in part)
        self._at = end
        if end >= len(blocks):
            self._cached, self._seen, self._at = self._seen, 0, 0
        return self._cached

    def _unfilled(self) -> int:
        """Slots of the last blocks of the latest step's requests that no token fills."""
        step, size = self._latest(), self._block_size
        if step is None:
            return 0
        return sum(-(start + step.scheduled[name]) % size for name, start in step.starts.items())
