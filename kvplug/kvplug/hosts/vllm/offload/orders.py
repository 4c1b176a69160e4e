"""Any ``prefix_cache`` policy as a cache policy of vLLM's offloading framework.

``eviction_policy: s3fifo`` with ``cache_policy_module_path: kvplug.hosts.vllm.offload.orders`` is
the policy of that name. vLLM keeps ``lru`` and ``arc`` for its own; ``kvplug_lru`` and
``kvplug_arc`` are kvplug's.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from kvplug.containment import ContainedPolicy, PolicyFailure
from kvplug.contract import BlockFact, EngineView, Kind, PrefixCachePolicy, Released, RequestView
from kvplug.deployment import Choice
from kvplug.parser import load_deployment

logger = logging.getLogger("kvplug")

PREFIX = "kvplug_"


class OrderedChunks(CachePolicy):
    """Chunks of host memory, of which a policy's order says which go first.

    A policy that fails is retired; the chunk used longest ago then goes first.

    Args:
        cache_capacity: Chunks there is room for.

    Attributes:
        choice: The policy.
    """

    choice: ClassVar[Choice]

    def __init__(self, cache_capacity: int):
        super().__init__(cache_capacity)
        self._chunks: OrderedDict[OffloadKey, ChunkStatus] = OrderedDict()
        self._slots: dict[OffloadKey, int] = {}
        self._keys: dict[int, OffloadKey] = {}
        self._free: list[int] = []
        self._idle: set[OffloadKey] = set()
        # Idle, and not yet released to the policy: with their request, in the order of its text.
        self._pending: dict[OffloadKey, None] = {}
        self._loaded: set[OffloadKey] = set()
        self._positions: dict[OffloadKey, int] = {}
        self._order: ContainedPolicy | None = None
        self._needs: frozenset[BlockFact] = frozenset()
        self._open()

    def _open(self) -> None:
        engine = EngineView(block_size=1, num_blocks=max(1, self.cache_capacity), host="vllm")
        try:
            policy = self.choice.build(engine)
            self._order = ContainedPolicy(policy)
            self._needs = self._order.run(_needs, policy)
        except PolicyFailure as failure:
            self._retire(failure)

    # -- chunks --------------------------------------------------------------------------------

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """Return a chunk, or None."""
        return self._chunks.get(key)

    def insert(
        self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None
    ) -> None:
        """Add a chunk. Before 0.33 vLLM says nothing of the request."""
        self._chunks[key] = chunk
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[key], self._keys[slot] = slot, key
        if req_context is not None:
            position = req_context.get_offload_key_position(key)
            if position is not None:
                self._positions[key] = position
        if chunk.ref_cnt == 0:
            self.mark_evictable(key)

    def remove(self, key: OffloadKey) -> None:
        """Remove a chunk."""
        if key not in self._chunks:
            return
        self._tell("on_remove", [self._slots[key]])
        self._forget(key)

    def clear(self) -> None:
        """Remove every chunk, and start over."""
        self._tell("on_remove", list(self._keys))
        for key in list(self._chunks):
            self._forget(key)
        self._free.clear()
        if self._order is not None:
            self._open()

    # -- uses ----------------------------------------------------------------------------------

    def mark_evictable(self, key: OffloadKey) -> None:
        """Let a chunk go when its turn comes: nothing copies it any more."""
        self._idle.add(key)
        self._pending[key] = None

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Keep a chunk that is being loaded."""
        self._idle.discard(key)
        self._pending.pop(key, None)
        self._loaded.add(key)
        self._tell("on_hit", [self._slots[key]])

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Take note that a request used chunks, given in text order."""
        found = list(keys)
        self._used(found, found)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Do nothing: an order learns of a chunk when it is there."""

    def on_request_access(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Do nothing before the request's end, which names all its chunks; since 0.33."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Take note of what a request used: chunks it loaded were reported then."""
        keys = order_request_keys(key_groups, req_context)
        self._used(keys, [key for key in keys if key in reused_keys and key not in self._loaded])
        self._loaded.difference_update(keys)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Remove exactly ``n`` chunks, none of them protected; None if there are not so many."""
        if n == 0:
            return []
        free = self._idle - protected
        if len(free) < n:
            return None
        found = self._first(n, protected)
        if len(found) < n:
            found = [key for key in self._chunks if key in free][:n]
        gone = [(key, self._chunks[key]) for key in found]
        self._tell("on_remove", [self._slots[key] for key in found])
        for key in found:
            self._forget(key)
        return gone

    def idle(self, protected: set[OffloadKey]) -> int:
        """Return how many chunks may go, protected ones left out."""
        return len(self._idle - protected)

    # -- the order -----------------------------------------------------------------------------

    def _first(self, n: int, protected: set[OffloadKey]) -> list[OffloadKey]:
        self._release([key for key in reversed(self._pending) if key not in protected])
        if self._order is None:
            return []
        known = self._idle - self._pending.keys()
        wanted = min(n + len(known & protected), len(known))
        try:
            slots: list[int] = self._order.run(self._ask, wanted)
        except PolicyFailure as failure:
            self._retire(failure)
            return []
        return [key for slot in slots if (key := self._keys[slot]) not in protected][:n]

    def _ask(self, wanted: int) -> list[int]:
        assert self._order is not None
        policy: Any = self._order.target
        slots = [int(slot) for slot in islice(policy.victims(wanted), wanted + 1)]
        known = self._idle - self._pending.keys()
        if (
            len(slots) != wanted
            or len(set(slots)) != wanted
            or any(self._keys.get(slot) not in known for slot in slots)
        ):
            raise ValueError(f"victims({wanted}) must name so many candidates, once each")
        return slots

    def _used(self, keys: list[OffloadKey], again: list[OffloadKey]) -> None:
        """Order a request's chunks by its text, some of them as used again."""
        hits = [key for key in again if key in self._idle and key not in self._pending]
        if hits:
            self._tell("on_hit", [self._slots[key] for key in hits])
            self._pending.update(dict.fromkeys(hits))
        self._release([key for key in reversed(keys) if key in self._pending])
        for key in reversed(keys):
            if key in self._chunks:
                self._chunks.move_to_end(key)

    def _release(self, keys: list[OffloadKey]) -> None:
        """Make chunks candidates, the last of their text first."""
        if not keys:
            return
        for key in keys:
            del self._pending[key]
        ids = [self._slots[key] for key in keys]
        positions = [self._positions.get(key, 0) for key in keys]
        needs = self._needs
        released = Released(
            ids,
            positions if BlockFact.POSITION in needs else None,
            [bytes(key) for key in keys] if BlockFact.KEY in needs else None,
            RequestView("", 0) if BlockFact.REQUEST in needs else None,
            [-1] * len(ids) if BlockFact.PARENT in needs else None,
        )
        self._tell("on_release", released)

    def _tell(self, method: str, argument: Any) -> None:
        if self._order is None:
            return
        try:
            self._order.call(method, argument)
        except PolicyFailure as failure:
            self._retire(failure)

    def _retire(self, failure: PolicyFailure) -> None:
        self._order = None
        name = self.choice.policy.name
        logger.error("%s failed (%s): chunks used longest ago go first now", name, failure.cause)

    def _forget(self, key: OffloadKey) -> None:
        del self._chunks[key]
        slot = self._slots.pop(key)
        del self._keys[slot]
        self._free.append(slot)
        self._idle.discard(key)
        self._pending.pop(key, None)
        self._loaded.discard(key)
        self._positions.pop(key, None)


def _needs(policy: PrefixCachePolicy) -> frozenset[BlockFact]:
    return frozenset(policy.needs)


@functools.cache
def order(name: str) -> type[OrderedChunks]:
    """Return the cache policy of a name, with or without ``kvplug_`` before it.

    Raises:
        DeploymentError: There is no such prefix_cache policy.
    """
    own = name.removeprefix(PREFIX)
    choice = load_deployment({"prefix_cache": own}, source="eviction_policy").choice(
        Kind.PREFIX_CACHE
    )
    assert choice is not None
    return type(name, (OrderedChunks,), {"choice": choice, "__module__": __name__})


def __getattr__(name: str) -> type[OrderedChunks]:
    """Return the cache policy that vLLM looks up here by its name."""
    if name.startswith("_"):
        raise AttributeError(name)
    return order(name)
