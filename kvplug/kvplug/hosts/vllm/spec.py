"""The KV-cache spec and manager that give blocks of a running request back to the pool.

Every full-attention layer of a deployment with a sequence policy gets a `WindowedSpec`. Its
manager frees what no query can see any more (the freed entry becomes the null block; the table
stays positional), lets admission count on it, and keeps approximate KV out of the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from kvplug.contract import Window

# A registry that is not empty never registers vLLM's own specs, so those go first.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


class WindowedManager(FullAttentionManager):
    """Full attention with a `Window`: frees blocks mid-request, by position alone.

    A block is freed on the settled-token basis vLLM passes in: any step still in flight started
    at or after those tokens, and its queries do not see the block either. So nothing has to be
    announced or acknowledged, with async scheduling and pipeline batches too.
    """

    def __init__(self, kv_cache_spec: WindowedSpec, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self.window: Window = kv_cache_spec.window
        # Exempt requests are admitted by the cap too: they are rare, fit the pool alone, and vLLM
        # preempts where that was too hopeful.
        self.max_admission_blocks_per_request = kv_cache_spec.cap_blocks
        self.exempt: set[str] = set()
        self.on_freed: Callable[[int, str, int], None] | None = None
        self._freed_to: dict[str, int] = {}

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        # Called for every running request in every step, and nearly always in vain.
        end = processed_computed_tokens // self.block_size - self.window.window_blocks
        start = self._freed_to.get(request_id, self.window.sink_blocks)
        if end <= start or request_id in self.exempt:
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        end = min(end, len(blocks))
        if end <= start:
            return
        freed = [b for b in reversed(blocks[start:end]) if not b.is_null]
        blocks[start:end] = [self._null_block] * (end - start)
        self._freed_to[request_id] = end
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
        """Hash only blocks whose tokens saw everything before them: those are exact."""
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

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._freed_to.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


@register_kv_cache_spec(manager_class=WindowedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class WindowedSpec(FullAttentionSpec):
    """A full-attention layer whose requests hold a sink and a window.

    Attributes:
        sink_tokens: Tokens kept from the start; a multiple of the block size.
        window_tokens: Tokens of full blocks kept before a query's own block; a multiple of the
            block size.
        exact_tokens: Leading tokens that see everything before them in every layer of the model.
        in_flight_tokens: Tokens that can be scheduled and not settled at once.
        max_tokens: Longest sequence.
    """

    sink_tokens: int
    window_tokens: int
    exact_tokens: int
    in_flight_tokens: int
    max_tokens: int

    @property
    def window(self) -> Window:
        """The rule in blocks of this spec (kernel blocks may be smaller than the pool's)."""
        return Window(self.sink_tokens // self.block_size, self.window_tokens // self.block_size)

    @property
    def cap_blocks(self) -> int:
        """Most blocks a request holds at once: sink, window, own block and what is in flight."""
        in_flight = -(-self.in_flight_tokens // self.block_size) + 1
        held = self.window.exact_blocks + in_flight
        return min(held, -(-self.max_tokens // self.block_size))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return min(
            super().max_memory_usage_bytes(vllm_config), self.cap_blocks * self.page_size_bytes
        )

    def _rule(self) -> tuple[int, ...]:
        return (self.sink_tokens, self.window_tokens, self.exact_tokens)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers with one window; refuses (AssertionError, as vLLM expects) else."""
        assert all(isinstance(s, WindowedSpec) for s in specs), (
            "layers with and without a window cannot share a KV-cache group"
        )
        assert len({s._rule() for s in specs}) == 1, (
            "layers with different windows cannot share a KV-cache group"
        )
        plain = [
            FullAttentionSpec(**{f.name: getattr(s, f.name) for f in fields(FullAttentionSpec)})
            for s in specs
        ]
        merged = FullAttentionSpec.merge(plain)
        own = {f.name: getattr(merged, f.name) for f in fields(FullAttentionSpec)}
        first = specs[0]
        return cls(
            **own,
            sink_tokens=first.sink_tokens,
            window_tokens=first.window_tokens,
            exact_tokens=first.exact_tokens,
            in_flight_tokens=first.in_flight_tokens,
            max_tokens=first.max_tokens,
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(s, WindowedSpec) and s._rule() == self._rule()
            for s in kv_cache_specs.values()
        )
