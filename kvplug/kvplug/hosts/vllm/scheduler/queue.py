"""vLLM's queue of free blocks with a prefix-cache policy inside.

The queue remains a complete linked list in vLLM's own order. Blocks without cached content are
allocated first, as in stock vLLM. Where stock would then take the front of the list, the policy
names the victims instead. If the policy fails, the list is used as it is from then on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from kvplug.containment import STARTING, ContainedPolicy, PolicyFailure
from kvplug.contract import BlockFact, PrefixCachePolicy, Released, RequestView
from kvplug.hosts.vllm.scheduler.blocks import BlockTracker

logger = init_logger("vllm.kvplug")


@dataclass
class QueueCounters:
    """Counters of a policy's decisions.

    Attributes:
        evicted: Cached blocks evicted as the policy chose.
        reordered: Those that stock vLLM would not have evicted at that moment.
        hits: Cached blocks matched by requests.
        errors: Exceptions and wrong answers of the policy; the first one retires it.
    """

    evicted: int = 0
    reordered: int = 0
    hits: int = 0
    errors: int = 0


class PolicyQueue(FreeKVCacheBlockQueue):
    """Free block queue whose cached blocks are evicted in a policy's order.

    Args:
        stock: The pool's own queue; its free blocks are taken over, in order.
        policy: The policy.
        tracker: Owners and positions of blocks; needed if the policy asks for them.
        on_failure: Called once with the cause when the policy is retired.
        facts: What the policy asks for; its ``needs`` if None.

    Attributes:
        policy: The policy; None once it is retired.
        contained: The policy, retired or not, as it is called.
        counters: Counters of its decisions.
        finishes: Ended requests reported to the policy.
    """

    def __init__(
        self,
        stock: FreeKVCacheBlockQueue,
        policy: PrefixCachePolicy,
        tracker: BlockTracker | None = None,
        on_failure: Callable[[PolicyFailure], None] | None = None,
        facts: frozenset[BlockFact] | None = None,
    ):
        super().__init__(stock.get_all_free_blocks())
        self.policy: PrefixCachePolicy | None = policy
        self.contained = ContainedPolicy(policy, log=logger)
        self.counters = QueueCounters()
        self.finishes = 0
        self._facts = facts if facts is not None else policy.needs
        self._tracker = tracker
        self._on_failure = on_failure
        self._candidates: dict[int, KVCacheBlock] = {}
        self._hits: list[int] = []
        cached = [b for b in self.get_all_free_blocks() if b.block_hash is not None]
        if cached:
            self._release(cached)

    # -- called by the pool --------------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        if self.num_free_blocks == 0:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if self.policy is None or not self._candidates:
            return super().popleft_n(n)
        assert self.num_free_blocks >= n
        plain = min(n, self.num_free_blocks - len(self._candidates))
        taken = self._pop_plain(plain) if plain else []
        if n > plain:
            victims = self._ask(n - plain)
            if victims is None:
                return taken + super().popleft_n(n - plain)
            taken += victims
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        super().remove(block)
        self._candidates.pop(block.block_id, None)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        super().append_n(blocks)
        if self.policy is not None and blocks:
            cached = [b for b in blocks if b.block_hash is not None]
            if cached:
                self._release(cached)

    # -- called by the metrics collector -------------------------------------------------------

    def hit(self, block: KVCacheBlock) -> None:
        """Take note that a request matched a cached block."""
        if self.policy is None:
            self.counters.hits += 1
        else:
            self._hits.append(block.block_id)

    def content_gone(self, block: KVCacheBlock) -> None:
        """Take note that a block lost its content without being allocated."""
        if self._candidates.pop(block.block_id, None) is not None:
            super().remove(block)
            self.prepend_n([block])
        if self.policy is not None:
            self._flush_hits()
            self._report("on_remove", [block.block_id])

    def all_content_gone(self) -> None:
        """Take note that the prefix cache was reset."""
        gone = list(self._candidates)
        self._candidates.clear()
        self._hits.clear()
        if self.policy is not None and gone:
            self._report("on_remove", gone)

    # -- called by the scheduler half ----------------------------------------------------------

    def cached_first(self, n: int) -> list[KVCacheBlock]:
        """Name the blocks with content among the next ``n`` to be taken, in order. Changes
        nothing."""
        if self.policy is None or not self._candidates:
            return _cached_first(self, n)
        plain = self.num_free_blocks - len(self._candidates)
        wanted = min(n - plain, len(self._candidates))
        if wanted <= 0:
            return []
        self._flush_hits()
        if self.policy is None:
            return _cached_first(self, n)
        try:
            ids: list[int] = self.contained.run(self._victims, wanted)
        except PolicyFailure as failure:
            self._retire(failure)
            return _cached_first(self, n)
        return [self._candidates[i] for i in ids]

    def finished(self, request: RequestView, keys: list[bytes], num_output_tokens: int) -> None:
        """Report a request that ended; its blocks are released next."""
        if self.policy is not None:
            self.finishes += 1
            self._report("on_finished", request, keys, num_output_tokens)

    def stop(self) -> None:
        """Report the engine's end to the policy."""
        self.contained.deadline = STARTING
        try:
            self.contained.call("on_stop")
        except PolicyFailure as failure:
            self.counters.errors += 1
            self.contained.log("failed in on_stop()", failure)

    # -- the policy ----------------------------------------------------------------------------

    def _release(self, blocks: list[KVCacheBlock]) -> None:
        self._flush_hits()
        if self.policy is None:
            return
        ids = [b.block_id for b in blocks]
        if not self._facts:
            released = Released(ids)
        else:
            facts, tracker = self._facts, self._tracker
            released = Released(
                ids,
                tracker.positions(ids) if tracker and BlockFact.POSITION in facts else None,
                [bytes(b.block_hash) for b in blocks] if BlockFact.KEY in facts else None,
                tracker.owner(ids[0]) if tracker and BlockFact.REQUEST in facts else None,
                tracker.parents(ids) if tracker and BlockFact.PARENT in facts else None,
            )
        self._candidates.update(zip(ids, blocks, strict=True))
        self._report("on_release", released)

    def _flush_hits(self) -> None:
        if self._hits:
            hits, self._hits = self._hits, []
            self.counters.hits += len(hits)
            if self.policy is not None:
                self._report("on_hit", hits)

    def _pop_plain(self, n: int) -> list[KVCacheBlock]:
        """Take ``n`` blocks without content; they are at the front, with rare exceptions."""
        taken: list[KVCacheBlock] = []
        block = self.fake_free_list_head.next_free_block
        while len(taken) < n:
            assert block is not None
            following = block.next_free_block
            if block.block_id not in self._candidates:
                super().remove(block)
                taken.append(block)
            block = following
        return taken

    def _ask(self, n: int) -> list[KVCacheBlock] | None:
        self._flush_hits()
        if self.policy is None:
            return None
        try:
            ids: list[int] = self.contained.run(self._victims, n)
        except PolicyFailure as failure:
            self._retire(failure)
            return None
        blocks = [self._candidates[i] for i in ids]
        front = set()
        block = self.fake_free_list_head.next_free_block
        for _ in range(n):
            assert block is not None
            front.add(block.block_id)
            block = block.next_free_block
        for victim in blocks:
            super().remove(victim)
            del self._candidates[victim.block_id]
        self.counters.evicted += n
        self.counters.reordered += sum(i not in front for i in ids)
        self._report("on_remove", ids)
        return blocks

    def _victims(self, n: int) -> list[int]:
        """Ask the policy, and check its answer: distinct candidates, as plain integers."""
        policy = self.policy
        assert policy is not None
        # One more than wanted shows that there are too many, however many there are.
        ids = [i if type(i) is int else _block_id(i) for i in islice(policy.victims(n), n + 1)]
        if len(ids) != n or len(set(ids)) != n:
            more = "more than " if len(ids) > n else ""
            count = f"{more}{min(len(ids), n)} ids, {len(set(ids))} distinct"
            raise ValueError(f"victims({n}) returned {count}")
        for i in ids:
            if i not in self._candidates:
                raise KeyError(i)
        return ids

    def _report(self, verb: str, *what: Any) -> None:
        try:
            self.contained.call(verb, *what)
        except PolicyFailure as failure:
            self._retire(failure)

    def _retire(self, failure: PolicyFailure) -> None:
        self.counters.errors += 1
        policy, self.policy = self.policy, None
        self._candidates.clear()
        self._hits.clear()
        if policy is not None:
            self.contained.log("failed and is retired; vLLM's own order takes over", failure)
            if self._on_failure is not None:
                self._on_failure(failure)


def next_cached(queue: Any, n: int) -> list[KVCacheBlock]:
    """Name the blocks with content among the next ``n`` that a pool's queue gives out, in order.
    Changes nothing."""
    return queue.cached_first(n) if isinstance(queue, PolicyQueue) else _cached_first(queue, n)


def _cached_first(queue: FreeKVCacheBlockQueue, n: int) -> list[KVCacheBlock]:
    found: list[KVCacheBlock] = []
    block = queue.fake_free_list_head.next_free_block
    for _ in range(min(n, queue.num_free_blocks)):
        assert block is not None
        if block.block_hash is not None:
            found.append(block)
        block = block.next_free_block
    return found


def _block_id(given: Any) -> int:
    """A block id of another integer type, as a plain one."""
    if isinstance(given, bool):
        raise TypeError(f"{given} is no block id")
    # A subclass of int is its own index.
    return int.__add__(operator.index(given), 0)


class HitCollector(KVCacheMetricsCollector):
    """Forwards what the pool reports to its metrics collector to a `PolicyQueue` as well.

    Args:
        queue: The queue.
        inner: The collector of ``--kv-cache-metrics``, or None when that is off.
    """

    def __init__(self, queue: PolicyQueue, inner: KVCacheMetricsCollector | None):
        super().__init__(sample_rate=1.0)
        self._queue = queue
        self._inner = inner

    def on_block_allocated(self, block: KVCacheBlock) -> None:
        if self._inner is not None:
            self._inner.on_block_allocated(block)

    def on_block_accessed(self, block: KVCacheBlock) -> None:
        if block.block_hash is not None:
            self._queue.hit(block)
        if self._inner is not None:
            self._inner.on_block_accessed(block)

    def on_block_evicted(self, block: KVCacheBlock) -> None:
        # Allocating a block evicts its content too, after it left the queue: already reported.
        if block.block_hash is not None and (block.prev_free_block is not None or block.ref_cnt):
            self._queue.content_gone(block)
        if self._inner is not None:
            self._inner.on_block_evicted(block)

    def reset(self) -> None:
        self._queue.all_content_gone()
        if self._inner is not None:
            self._inner.reset()

    def drain_events(self) -> list[Any]:
        return self._inner.drain_events() if self._inner is not None else []
