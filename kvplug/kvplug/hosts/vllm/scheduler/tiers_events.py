"""What tiers hold, told to routers: vLLM's KV events, with the tier as the medium."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

MOST = 1 << 20
"""Chunks whose hashes are remembered; of those known longest, nothing is told any more."""


class TierEvents:
    """Collects events of chunks by their keys, under the hashes that the engine's own events have.

    A chunk that no request of this engine has named has no such hash: another engine stored it.

    Args:
        block_size: Tokens of a block.
        remote: Tiers that other engines see.
    """

    def __init__(self, block_size: int, remote: Iterable[str]):
        self._block_size = block_size
        self._remote = frozenset(remote)
        self._hashes: dict[bytes, bytes] = {}
        self._events: list[Any] = []

    def learn(self, keys: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """Take note of the hashes of chunks."""
        self._hashes.update(zip(keys, hashes, strict=False))
        while len(self._hashes) > MOST:
            del self._hashes[next(iter(self._hashes))]

    def stored(self, tier: str, key: bytes) -> None:
        """A tier has a chunk."""
        known = self._hashes.get(key)
        if known is None:
            return
        self._events.append(
            BlockStored(
                block_hashes=[maybe_convert_block_hash(known)],
                parent_block_hash=None,
                token_ids=[],
                block_size=self._block_size,
                lora_id=None,
                medium=tier,
                lora_name=None,
                group_idx=0,
                locality="REMOTE" if tier in self._remote else "LOCAL",
            )
        )

    def removed(self, tier: str, keys: Iterable[bytes]) -> None:
        """A tier does not have some chunks any more."""
        known = [self._hashes[key] for key in keys if key in self._hashes]
        if known:
            hashes = [maybe_convert_block_hash(one) for one in known]
            self._events.append(BlockRemoved(block_hashes=hashes, medium=tier, group_idx=0))

    def take(self) -> list[Any]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events
