"""KV-cache specs and managers of layers whose blocks a policy manages.

Every full-attention layer of a deployment with a sequence policy gets a `WindowedSpec` or a
`PrunedSpec`. Their managers free blocks that no query can see any more (the freed entry becomes
the null block; the table stays positional), let admission count on that, and keep approximate KV
out of the prefix cache. Under reuse or an attention policy a layer gets an `ApproximateSpec`,
whose manager only does the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvplug.contract import Kind, Window
from kvplug.hosts.pruning import Eviction, EvictionPlan, Limits, layout
from kvplug.hosts.sizes import cap_blocks, in_flight_blocks, pruned_blocks

# vLLM registers its own specs only into an empty registry, so they must go first.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})

STOCK_FIELDS = tuple(f.name for f in fields(FullAttentionSpec))


class ShorteningManager(FullAttentionManager):
    """Full attention whose running requests give blocks back.

    A block is freed by the computed and acknowledged tokens that vLLM passes in: any step still in
    flight started at or after those tokens, and its queries do not see the block either. So no
    further handshake is needed, with async scheduling and pipeline batches too.
    """

    def __init__(self, kv_cache_spec: ShorteningSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        # Exempt requests are admitted by the cap too: they are rare, fit the pool alone, and vLLM
        # preempts where that was too optimistic.
        self.max_admission_blocks_per_request = kv_cache_spec.cap_blocks
        self.exempt: set[str] = set()
        # Somebody writes stored tokens into all of their blocks, whatever queries will see.
        self.loading: set[str] = set()
        self.on_freed: Callable[[int, str, int], None] | None = None

    def release(self, request_id: str, blocks: list[Any], indices: Iterable[int]) -> None:
        """Free the blocks at some indices of a request's table."""
        freed = []
        for i in indices:
            if not blocks[i].is_null:
                freed.append(blocks[i])
                blocks[i] = self._null_block
        self.block_pool.free_blocks(freed)
        if self.on_freed is not None and freed:
            self.on_freed(self.kv_cache_group_id, request_id, len(freed))

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash only blocks whose tokens saw everything before them; the others are not exact."""
        exact = self.kv_cache_spec.exact_tokens
        cached = self.num_cached_block.get(request.request_id, 0)
        if cached * self.block_size >= exact:
            return
        super().cache_blocks(
            request,
            min(num_tokens, exact),
            retention_interval,
            replay_boundaries=replay_boundaries,
        )

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        """Match no further than the exact prefix, so that a hit never exceeds the budget."""
        spec = kwargs["kv_cache_spec"]
        return super().find_longest_cache_hit(
            block_hashes, min(max_length, spec.exact_tokens), *args, **kwargs
        )


class WindowedManager(ShorteningManager):
    """Full attention with a `Window`: frees blocks by position alone."""

    def __init__(self, kv_cache_spec: WindowedSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self.window: Window = kv_cache_spec.window
        self._freed_to: dict[str, int] = {}

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        # Called for every running request in every step; nearly always there is nothing to free.
        end = processed_computed_tokens // self.block_size - self.window.window_blocks
        start = self._freed_to.get(request_id, self.window.sink_blocks)
        if end <= start or request_id in self.exempt or request_id in self.loading:
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        end = min(end, len(blocks))
        if end <= start:
            return
        self._freed_to[request_id] = end
        self.release(request_id, blocks, range(end - 1, start - 1, -1))

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._freed_to.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class PrunedManager(ShorteningManager):
    """Full attention under a scoring policy: frees the blocks that each eviction empties.

    Attributes:
        prompt_tokens: Tokens of the prompt of each request that is evicted from.
        resize: Blocks to keep at the n-th resizable eviction of a request, given what it kept
            last; or None.
    """

    def __init__(self, kv_cache_spec: PrunedSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self.limits = kv_cache_spec.limits
        self.prompt_tokens: dict[str, int] = {}
        self.resize: Callable[[str, int, int], int] | None = None
        self._plans: dict[str, EvictionPlan] = {}
        self._made: dict[str, int] = {}

    def limit_prefill(self, blocks: int) -> None:
        """Limit the blocks of a prompt before its first eviction where the options set none."""
        spec = self.kv_cache_spec
        self.limits = spec.limits.with_prefill_limit(spec.limits.prefill_limit or blocks)
        self.max_admission_blocks_per_request = cap_blocks(
            pruned_blocks(self.limits, spec.max_tokens),
            spec.in_flight_tokens,
            spec.max_tokens,
            self.block_size,
        )

    def plan(self, request_id: str) -> EvictionPlan | None:
        """Evictions of a request, or None for one that keeps every token."""
        plan = self._plans.get(request_id)
        if plan is None:
            prompt = self.prompt_tokens.get(request_id)
            if prompt is None or request_id in self.exempt:
                return None
            resize, asked = self.resize, count()
            plan = EvictionPlan(
                self.limits,
                prompt,
                None if resize is None else lambda blocks: resize(request_id, next(asked), blocks),
            )
            self._plans[request_id] = plan
        return plan

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        plan = self._plans.get(request_id)
        if plan is None or request_id in self.loading:
            return
        made = self._made.get(request_id, 0)
        # Acknowledged tokens were scheduled, so their evictions have been found.
        while made < len(plan.evictions) and plan.evictions[made].at <= processed_computed_tokens:
            last: Eviction | None = plan.evictions[made - 1] if made else None
            left = layout(last, plan.evictions[made], self.limits.protected, self.block_size)
            made += 1
            self._made[request_id] = made
            self.release(
                request_id,
                self.req_to_blocks[request_id],
                reversed(left.blocks[left.survivors : left.candidates]),
            )

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._plans.pop(request_id, None)
        self._made.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


@dataclass(frozen=True, kw_only=True)
class ShorteningSpec(FullAttentionSpec):
    """A full-attention layer whose running requests give blocks back.

    Attributes:
        exact_tokens: Leading tokens that see everything before them in every layer of the model,
            and whose blocks are never written again.
        in_flight_tokens: Most tokens scheduled and not yet computed and acknowledged.
        max_tokens: Longest sequence.
    """

    exact_tokens: int
    in_flight_tokens: int
    max_tokens: int

    @property
    def in_flight_blocks(self) -> int:
        """Most blocks of tokens that are not yet computed and acknowledged."""
        return in_flight_blocks(self.in_flight_tokens, self.block_size)

    @property
    def resident_blocks(self) -> int:
        """Most blocks of a request at once, not counting what is in flight."""
        raise NotImplementedError

    @property
    def cap_blocks(self) -> int:
        """Most blocks of a request at once."""
        return cap_blocks(
            self.resident_blocks, self.in_flight_tokens, self.max_tokens, self.block_size
        )

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return min(
            super().max_memory_usage_bytes(vllm_config), self.cap_blocks * self.page_size_bytes
        )

    def rule(self) -> tuple[Any, ...]:
        """Values that layers of one KV-cache group must have in common."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in STOCK_FIELDS)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge layers with one rule. Raises AssertionError otherwise, as vLLM expects."""
        assert all(isinstance(s, cls) for s in specs), (
            "layers with and without a sequence policy cannot share a KV-cache group"
        )
        assert len({s.rule() for s in specs}) == 1, (
            "layers with different budgets cannot share a KV-cache group"
        )
        plain = [FullAttentionSpec(**{n: getattr(s, n) for n in STOCK_FIELDS}) for s in specs]
        merged = FullAttentionSpec.merge(plain)
        own = {f.name: getattr(specs[0], f.name) for f in fields(cls)}
        return cls(**own | {n: getattr(merged, n) for n in STOCK_FIELDS})

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(s, type(self)) and s.rule() == self.rule() for s in kv_cache_specs.values()
        )


@register_kv_cache_spec(manager_class=WindowedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class WindowedSpec(ShorteningSpec):
    """A full-attention layer whose requests keep a sink and a window.

    Attributes:
        sink_tokens: Tokens kept from the start; a multiple of the block size.
        window_tokens: Tokens of full blocks kept before a query's own block; a multiple of the
            block size.
    """

    sink_tokens: int
    window_tokens: int

    @property
    def window(self) -> Window:
        """The rule in blocks of this spec (kernel blocks may be smaller than the pool's)."""
        return Window(self.sink_tokens // self.block_size, self.window_tokens // self.block_size)

    @property
    def resident_blocks(self) -> int:
        return self.window.exact_blocks


@register_kv_cache_spec(manager_class=PrunedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PrunedSpec(ShorteningSpec):
    """A full-attention layer whose requests keep what a policy scores highest.

    Attributes:
        limits: How much is kept, and when tokens are evicted.
    """

    limits: Limits

    @property
    def resident_blocks(self) -> int:
        return pruned_blocks(self.limits, self.max_tokens)


class ApproximateManager(FullAttentionManager):
    """Full attention whose requests may hold KV that other requests must not be given: from a
    token on that kinds state, it is approximate, or not known to be there yet."""

    def __init__(self, kv_cache_spec: ApproximateSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self._from: dict[str, dict[Kind, int]] = {}
        self._held: dict[str, int] = {}

    def hold(self, request_id: str, first: int | None) -> None:
        """Keep a request's tokens out of the prefix cache from one on; None to let them in.

        vLLM hashes the blocks of a run when it allocates them, before a worker has filled them.
        """
        if first is None:
            self._held.pop(request_id, None)
        else:
            self._held[request_id] = first

    def set_approximate(self, kind: Kind, request_id: str, first: int | None) -> None:
        """State the first token of a request whose KV a kind approximates; None for no token."""
        own = self._from.setdefault(request_id, {})
        if first is None:
            own.pop(kind, None)
        else:
            own[kind] = first
        if not own:
            del self._from[request_id]

    def approximate_from(self, request_id: str) -> int | None:
        """First token of a request whose KV is not exactly what its text gives, or None."""
        own = self._from.get(request_id)
        return min(own.values()) if own else None

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash only blocks before the first token that is approximate or held: what follows saw
        it."""
        request_id = request.request_id
        limit, held = self.approximate_from(request_id), self._held.get(request_id)
        if held is not None:
            limit = held if limit is None else min(limit, held)
        if limit is not None:
            cached = self.num_cached_block.get(request_id, 0)
            num_tokens = min(num_tokens, limit)
            if cached * self.block_size >= num_tokens:
                return
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )


@register_kv_cache_spec(manager_class=ApproximateManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class ApproximateSpec(FullAttentionSpec):
    """A full-attention layer whose requests may hold approximate KV."""


def manager_of(spec: Any) -> type[FullAttentionManager] | None:
    """The manager that blocks of one of kvplug's specs need; None for another spec."""
    by_spec: dict[type[KVCacheSpec], type[FullAttentionManager]] = {
        WindowedSpec: WindowedManager,
        PrunedSpec: PrunedManager,
        ApproximateSpec: ApproximateManager,
    }
    return by_spec.get(type(spec))
