"""The pool's blocks on their way out, by key: what leaves next, and what has just left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_block_hash,
    make_block_hash_with_group_id,
)

from kvplug.contract import Leaving
from kvplug.hosts.vllm.scheduler.queue import next_cached
from kvplug.hosts.vllm.scheduler.tiers_requests import TieredRequest

REMEMBERED = 16
"""Steps whose largest number of blocks taken is expected of the next ones, too."""

HORIZON = 3
"""Steps of which blocks are stored ahead."""


@dataclass(slots=True)
class Content:
    """Text of a block: its key, position, and the requests that used it.

    Attributes:
        key: Its key.
        start: Position of its first token.
        parent: Key of the chunk before it; empty for the first.
        uses: Requests that used it, the one that computed it included.
        last: When the latest of them gave it up.
        session: The session of the latest one, or None.
        priority: Priority of the latest one.
        text: Name of the text that is loaded together with it.
    """

    key: bytes
    start: int
    parent: bytes
    uses: int = 0
    last: float = 0.0
    session: str | None = None
    priority: int = 0
    text: bytes = b""


class PoolWatch(KVCacheMetricsCollector):
    """Follows a block pool through what it tells its metrics collector.

    Args:
        pool: The pool.
        inner: Its collector so far, or None.
        chunk: Tokens of a block.

    Attributes:
        pool: As given.
        taken: Blocks taken in the step so far.
    """

    def __init__(self, pool: Any, inner: KVCacheMetricsCollector | None, chunk: int):
        super().__init__(sample_rate=1.0)
        self.taken = 0
        self.pool = pool
        self._inner = inner
        self._chunk = chunk
        self._contents: dict[bytes, Content] = {}
        self._untrusted: set[bytes] = set()
        self._offered: dict[int, bytes] = {}
        self._evicted: list[tuple[int, bytes]] = []
        self._recent: deque[int] = deque(maxlen=REMEMBERED)
        self._seen: object = None

    # -- called by the pool --------------------------------------------------------------------

    def on_block_allocated(self, block: KVCacheBlock) -> None:
        self.taken += 1
        if self._inner is not None:
            self._inner.on_block_allocated(block)

    def on_block_accessed(self, block: KVCacheBlock) -> None:
        # When it is released again, that is news to the tiers that hold it.
        self._offered.pop(block.block_id, None)
        if self._inner is not None:
            self._inner.on_block_accessed(block)

    def on_block_evicted(self, block: KVCacheBlock) -> None:
        if block.block_hash is not None:
            found = get_block_hash(block.block_hash)
            offered = self._offered.pop(block.block_id, None)
            # In the queue, or in use, it loses its content without being overwritten.
            given_out = block.prev_free_block is None and not block.ref_cnt
            if given_out and offered != found:
                self._evicted.append((block.block_id, found))
        if self._inner is not None:
            self._inner.on_block_evicted(block)

    def reset(self) -> None:
        self.forget()
        if self._inner is not None:
            self._inner.reset()

    def drain_events(self) -> list[Any]:
        return self._inner.drain_events() if self._inner is not None else []

    # -- contents ------------------------------------------------------------------------------

    def learn(self, tiered: TieredRequest, hash_size: int, used: bool) -> None:
        """Take note of a request's text, so that its blocks are known by their keys.

        Args:
            tiered: The request.
            hash_size: Tokens of one of the engine's hashes.
            used: True if the request gives its blocks up now.
        """
        now, keys = time.monotonic(), tiered.extend()
        text = (tiered.session or str(tiered.request.request_id)).encode()
        hashes = tiered.hashes(hash_size, self._chunk)
        parent, doubtful = b"", not tiered.keeps
        for i, (found, key) in enumerate(zip(hashes, keys, strict=False)):
            content = self._contents.get(found)
            # One hash of the engine's may stand for two texts, as of two adapters of one name.
            twice = content is not None and content.key != key
            if twice or doubtful or found in self._untrusted:
                doubtful = True
                self._distrust(found)
                continue
            if not tiered.stores:
                continue
            if content is None:
                content = self._contents[found] = Content(key, i * self._chunk, parent)
            parent = key
            if used:
                content.uses += 1
                content.last, content.priority = now, int(tiered.request.priority)
                content.session, content.text = tiered.session, text
        if len(self._contents) > 2 * self.pool.num_gpu_blocks + 4096:
            self._prune()

    def forget(self) -> None:
        """Forget all contents: the pool has none any more, or they are of other weights.

        What it still holds stays unknown, and so does what is computed after that: requests may
        take it from the pool until the engine's own prefix cache is reset.
        """
        self._contents.clear()
        blocks = (block.block_hash for block in self.pool.blocks)
        self._untrusted = {get_block_hash(own) for own in blocks if own is not None}
        self._offered.clear()
        self._evicted.clear()
        self._seen = None

    def forget_uncomputed(self, hashes: Sequence[bytes]) -> None:
        """Take blocks that nobody has filled out of the pool's prefix cache.

        Args:
            hashes: Their hashes. Other blocks of the same text go with them.
        """
        if not hashes:
            return
        gone, cached = set(hashes), self.pool.cached_block_hash_to_block
        self._evicted = [one for one in self._evicted if one[1] not in gone]
        for found in gone:
            key = make_block_hash_with_group_id(found, 0)
            while (block := cached.get_one_block(key)) is not None:
                self.pool.evict_blocks({block.block_id})

    def _distrust(self, found: bytes) -> None:
        if len(self._untrusted) > 2 * self.pool.num_gpu_blocks + 4096:
            self.forget()
        self._contents.pop(found, None)
        self._untrusted.add(found)

    def _prune(self) -> None:
        cached = self.pool.cached_block_hash_to_block
        self._contents = {
            found: content
            for found, content in self._contents.items()
            if cached.get_one_block(make_block_hash_with_group_id(found, 0)) is not None
        }

    # -- what leaves ---------------------------------------------------------------------------

    def leaving(self, room: int) -> tuple[list[tuple[int, Leaving]], int]:
        """Find the blocks that are overwritten now or in the next few steps.

        Args:
            room: Most blocks to return.

        Returns:
            Ids and contents of blocks, first to leave first, and how many of them leave now.
        """
        self._recent.append(self.taken)
        self.taken = 0
        evicted, self._evicted = self._evicted, []
        now = time.monotonic()
        found = []
        for block, content in evicted:
            known = self._contents.get(content)
            if known is not None:
                found.append((block, self._leaving(known, now)))
        late = len(found)
        queue = self.pool.free_block_queue
        ahead = min(HORIZON * max(self._recent), queue.num_free_blocks)
        state = ahead, queue.num_free_blocks, queue.fake_free_list_tail.prev_free_block
        if ahead and (state != self._seen or evicted):
            self._seen = state
            for block in next_cached(queue, ahead):
                if len(found) >= room:
                    self._seen = None
                    break
                content = get_block_hash(block.block_hash)
                if self._offered.get(block.block_id) == content:
                    continue
                known = self._contents.get(content)
                if known is None:
                    continue
                self._offered[block.block_id] = content
                found.append((block.block_id, self._leaving(known, now)))
        return found, late

    def cached(self) -> Iterable[tuple[int, Leaving]]:
        """Go through all blocks with content that nobody is computing: ids and contents."""
        now = time.monotonic()
        for block in self.pool.blocks:
            if block.block_hash is None or block.is_null:
                continue
            known = self._contents.get(get_block_hash(block.block_hash))
            if known is not None:
                yield block.block_id, self._leaving(known, now)

    def holds(self, blocks: Sequence[tuple[int, bytes]]) -> list[bool]:
        """Tell which blocks still hold the chunks of some keys."""
        found = []
        for block, key in blocks:
            own = self.pool.blocks[block].block_hash
            known = self._contents.get(get_block_hash(own)) if own is not None else None
            found.append(known is not None and known.key == key)
        return found

    def _leaving(self, content: Content, now: float) -> Leaving:
        return Leaving(
            content.key,
            content.start,
            self._chunk,
            max(1, content.uses),
            max(0.0, now - content.last) if content.last else 0.0,
            session=content.session is not None,
            priority=content.priority,
            parent=content.parent,
            text=content.text,
        )
