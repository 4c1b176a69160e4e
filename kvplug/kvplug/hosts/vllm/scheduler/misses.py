"""Why prompts missed, in the scheduler process: what vLLM's pool and requests do, told to
`kvplug.observe.misses`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import RequestStatus

from kvplug.contract import Kind
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.scheduler.events import MAX_HASHES, Events
from kvplug.hosts.vllm.scheduler.queue import PolicyQueue
from kvplug.observe.catalogue import (
    PREFIX_EVICTIONS,
    PROMPT_BLOCKS,
    PROMPT_MISSED_BLOCKS,
    RECOMPUTED_BLOCKS,
    THRASHED_BLOCKS,
)
from kvplug.observe.events import EventType
from kvplug.observe.live import Facts, outcomes
from kvplug.observe.metric import Sample
from kvplug.observe.misses import Lookup, Misses, Source

logger = init_logger("vllm.kvplug")

SOURCES = {Kind.REUSE: Source.SEGMENT, Kind.TIERS: Source.TIER}
"""Where a kind's tokens come from."""


class MissObserver:
    """Follows the pool and the requests of one engine.

    It watches the first KV-cache group with full attention, or the first one where there is none.
    A failure of its own ends the observation and nothing else.

    Args:
        events: Takes its events.
        tokens: True if events may hold token ids.

    Attributes:
        misses: What is known; None before `bind`.
        errors: Failures of its own; the first one ends it.
    """

    def __init__(self, events: Events, *, tokens: bool = False):
        self.misses: Misses | None = None
        self.errors = 0
        self._events = events
        self._tokens = tokens
        self._pages: Any = None
        self._pool: Any = None
        self._group = 0
        self._per_block = 1
        self._lookups: dict[str, tuple[int, Kind | None, int]] = {}
        self._evicted: list[bytes] = []
        self._more_evicted = 0
        self._said: dict[str, Lookup] = {}

    def bind(self, manager: Any) -> None:
        """Watch a KV-cache manager's pool, before its first allocation and behind every kind that
        puts a collector of its own there."""
        managers = manager.coordinator.single_type_managers
        if not managers:
            return
        full = [isinstance(one.kv_cache_spec, FullAttentionSpec) for one in managers]
        self._group = full.index(True) if True in full else 0
        size = int(managers[self._group].block_size)
        pool = self._pool = manager.block_pool
        self._pages = manager
        self._per_block = max(1, size // pool.hash_block_size)
        self.misses = Misses(
            pool.num_gpu_blocks - 1,
            size,
            caching=bool(manager.enable_caching),
            windowed=not all(full),
        )
        compat.install_collector(pool, MissCollector(self, pool.metrics_collector))

    # -- requests ------------------------------------------------------------------------------

    def looked_up(self, request: Any, num_local: int, kind: Kind | None) -> None:
        """Take note of what a lookup found; ``kind`` has the tokens behind ``num_local``."""
        self._guarded(self._looked_up, request, num_local, kind)

    def admitted(self, request: Any, blocks: Any, num_external: int) -> None:
        """Take note that a request that was looked up was given its blocks."""
        self._guarded(self._admitted, request, blocks, num_external)

    def finished(self, request: Any) -> Lookup | None:
        """Forget a request that ended; returns what became of its prompt."""
        self._guarded(self._finished, request)
        return self._said.pop(request.request_id, None)

    def step(self, step: int, preempted: Sequence[str]) -> None:
        """Close a scheduler step; ``step`` is the next one."""
        self._guarded(self._step, step, preempted)

    def retired(self) -> None:
        """Take note that the pool's policy failed: evictions are not its choice from now on."""
        self._guarded(self._retired)

    def _retired(self) -> None:
        assert self.misses is not None
        self._name_evicted()
        self.misses.policy = ""

    def _looked_up(self, request: Any, num_local: int, kind: Kind | None) -> None:
        assert self.misses is not None
        self._name_evicted()
        self._lookups[request.request_id] = (num_local, kind, self.misses.looked_up())

    def _admitted(self, request: Any, blocks: Any, num_external: int) -> None:
        found = self._lookups.pop(request.request_id, None)
        if found is None:  # its load ended: it was admitted when that began
            return
        assert self.misses is not None
        local, kind, serial = found
        hashes = self._hashes(request)
        own = blocks.blocks[self._group]
        lookup = self.misses.admitted(
            request.request_id,
            request.all_token_ids,
            hashes,
            prompt_tokens=request.num_prompt_tokens,
            served=local,
            loaded=num_external,
            loaded_from=SOURCES.get(kind, Source.TIER) if kind is not None else Source.TIER,
            serial=serial,
            cached=self._cached(hashes, own),
            computed=_computed(request),
            reads=not request.skip_reading_prefix_cache,
            preempted=request.num_preemptions > 0,
        )
        if lookup.again is None:
            self._said[request.request_id] = lookup
        self._name_evicted(request.request_id)
        if self._events.active:
            self._tell(request.request_id, lookup, hashes)

    def _cached(self, hashes: Sequence[bytes], own: Sequence[Any]) -> Callable[[int], bool]:
        """Says of a block whether another block than the request's own has its content."""
        cache, group = self._pool.cached_block_hash_to_block, self._group

        def cached(block: int) -> bool:
            key = make_block_hash_with_group_id(hashes[block], group)
            found = cache.get_one_block(key)
            return found is not None and not (block < len(own) and own[block] is found)

        return cached

    def _finished(self, request: Any) -> None:
        assert self.misses is not None
        self._lookups.pop(request.request_id, None)
        blocks = self._pages.get_blocks(request.request_id).blocks[self._group]
        hashed = len(blocks)
        while hashed and blocks[hashed - 1].block_hash is None:
            hashed -= 1
        self.misses.ended(request.request_id, request.all_token_ids, self._hashes(request), hashed)
        if self._events.active:
            self._events.add(
                EventType.ENDED,
                None,
                request.num_output_tokens,
                str(request.get_finished_reason() or ""),
                request=request.request_id,
            )

    def _step(self, step: int, preempted: Sequence[str]) -> None:
        misses = self.misses
        assert misses is not None
        self._name_evicted()
        for request_id in preempted:
            self._events.add(EventType.PREEMPTED, None, request=request_id)
        queue = self._pool.free_block_queue
        retired = not isinstance(queue, PolicyQueue) or queue.policy is None
        misses.policy = "" if retired else type(queue.policy).name
        misses.next_step(step)

    def _hashes(self, request: Any) -> Sequence[bytes]:
        hashes: Sequence[bytes] = request.block_hashes
        # Each hash covers all before it, so a block's last one stands for the block.
        return hashes if self._per_block == 1 else hashes[self._per_block - 1 :: self._per_block]

    # -- events --------------------------------------------------------------------------------

    def _name_evicted(self, request_id: str = "") -> None:
        if not self._evicted:
            return
        assert self.misses is not None
        named, self._evicted = self._evicted, []
        more, self._more_evicted = self._more_evicted, 0
        self._events.add(
            EventType.EVICTED,
            Kind.PREFIX_CACHE,
            len(named) + more,
            request=request_id,
            blocks=named,
            policy=self.misses.policy,
        )

    def _tell(self, request_id: str, lookup: Lookup, hashes: Sequence[bytes]) -> None:
        add, missed = self._events.add, lookup.sources[Source.MISSED]
        if lookup.again is not None:
            add(EventType.AGAIN, None, missed, str(lookup.again), request=request_id)
        else:
            sources = {str(source): n for source, n in lookup.sources.items() if n}
            add(EventType.ADMITTED, None, lookup.blocks, request=request_id, facts=sources)
        if (first := lookup.first) is not None:
            facts: dict[str, Any] = {
                "causes": {str(cause): n for cause, n in lookup.causes.items()},
                "runs": [[str(r.cause), r.first, r.blocks] for r in lookup.runs[:MAX_HASHES]],
                "block": first.block,
            }
            if first.token is not None:
                facts["token"] = first.token
                if self._tokens:
                    facts["asked"], facts["known"] = first.asked, first.known
            if first.seconds is not None:
                facts |= {"seconds": round(first.seconds, 3), "evicted_in_step": first.step}
            add(
                EventType.MISSED,
                None,
                missed,
                first.sentence(),
                request=request_id,
                blocks=hashes[first.block : first.block + missed],
                facts=facts,
            )
        if lookup.thrashed:
            add(EventType.THRASHED, None, lookup.thrashed, request=request_id)

    # -- the pool ------------------------------------------------------------------------------

    def evicted(self, block: Any) -> None:
        """Take note that a block loses its content."""
        misses, key = self.misses, block.block_hash
        if misses is None or key is None:
            return
        try:
            if get_group_id(key) != self._group:
                return
            one = get_block_hash(key)
            misses.evicted(one)
            if self._events.active:
                if len(self._evicted) < MAX_HASHES:
                    self._evicted.append(one)
                else:
                    self._more_evicted += 1
        except Exception as error:
            self._fail(error)

    def reset(self) -> None:
        """Take note that the prefix cache was reset."""
        if self.misses is not None:
            self.misses.reset()
            self._events.add(EventType.RESET, None)

    # -- reports -------------------------------------------------------------------------------

    def samples(self) -> Iterator[Sample]:
        """Blocks of prompts by source and cause, since the start."""
        misses = self.misses
        if misses is None:
            return
        for source, count in misses.sources.items():
            yield PROMPT_BLOCKS.of(count, source)
        for cause, count in misses.causes.items():
            yield PROMPT_MISSED_BLOCKS.of(count, cause)
        for again, count in misses.again.items():
            yield RECOMPUTED_BLOCKS.of(count, again)
        yield THRASHED_BLOCKS.of(misses.thrashed)
        yield PREFIX_EVICTIONS.of(misses.evictions)

    def show(self, facts: Facts) -> None:
        """Blocks of prompts that were missed, by cause."""
        if self.misses is not None:
            causes = {str(cause): count for cause, count in self.misses.causes.items()}
            facts.outcomes += outcomes("prefix cache", "missed blocks", causes)

    # -- failures ------------------------------------------------------------------------------

    def _guarded(self, do: Callable[..., None], *arguments: Any) -> None:
        if self.misses is None:
            return
        try:
            do(*arguments)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.errors += 1
        self.misses = None
        self._lookups.clear()
        self._said.clear()
        self._evicted.clear()
        logger.error("kvplug: why prompts miss is not observed any more: %r", error, exc_info=error)


class MissCollector(KVCacheMetricsCollector):
    """Forwards what the pool reports to its metrics collector to a `MissObserver` as well.

    Args:
        observer: The observer.
        inner: The pool's collector so far, or None.
    """

    def __init__(self, observer: MissObserver, inner: KVCacheMetricsCollector | None):
        super().__init__(sample_rate=1.0)
        self._observer = observer
        self._inner = inner

    def on_block_allocated(self, block: Any) -> None:
        if self._inner is not None:
            self._inner.on_block_allocated(block)

    def on_block_accessed(self, block: Any) -> None:
        if self._inner is not None:
            self._inner.on_block_accessed(block)

    def on_block_evicted(self, block: Any) -> None:
        if block.block_hash is not None:
            self._observer.evicted(block)
        if self._inner is not None:
            self._inner.on_block_evicted(block)

    def reset(self) -> None:
        self._observer.reset()
        if self._inner is not None:
            self._inner.reset()

    def drain_events(self) -> list[Any]:
        return self._inner.drain_events() if self._inner is not None else []


def _computed(request: Any) -> Callable[[], int]:
    """Says how many tokens of a request have KV, or will have once a step under way ends."""

    def computed() -> int:
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            return 0
        # The KV of its last sampled token was never computed.
        return int(min(request.num_computed_tokens, request.num_tokens - 1))

    return computed
