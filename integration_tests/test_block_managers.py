"""Every prefix-cache policy with every manager, in vLLM's own pool: after any number of random
things every block is free or held, and holds what it is said to; and what breaks that is found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pool_fuzz import MANAGERS, PoolFuzz

from kvplug.contract import PrefixCachePolicy
from kvplug.hosts.vllm.scheduler.queue import PolicyQueue
from kvplug.hosts.vllm.spec import (
    ApproximateManager,
    PrunedManager,
    ShorteningManager,
    ShorteningSpec,
    WindowedManager,
)
from kvplug_policies.builtin import BUILTIN
from kvplug_policies.prefix_cache.lru import Lru

POLICIES = [
    None,
    *(p for p in BUILTIN if issubclass(p, PrefixCachePolicy) and p.name != "record"),
]
STOCK = ShorteningManager.__mro__[1]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("managed", MANAGERS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name if p else "vllm")
def test_every_block_is_accounted_for(
    policy: type[PrefixCachePolicy] | None, managed: str, pool_steps: int
) -> None:
    """``--pool-steps`` in all, in pools of several sizes one after the other."""
    steps = -(-pool_steps // (len(MANAGERS) * len(POLICIES)))
    worlds = max(2, steps // 5000)
    for seed in range(worlds):
        PoolFuzz(managed, policy, seed).run(-(-steps // worlds))


def _frees_shared_blocks(patch: Patch) -> None:
    release = ShorteningManager.release

    def greedy(self: ShorteningManager, request_id: str, blocks: list[Any], at: Any) -> None:
        at = list(at)
        shared = [blocks[i] for i in at if not blocks[i].is_null and blocks[i].ref_cnt > 1]
        release(self, request_id, blocks, at)
        self.block_pool.free_blocks(shared)

    patch.setattr(ShorteningManager, "release", greedy)


def _loses_blocks(patch: Patch) -> None:
    def lose(self: ShorteningManager, request_id: str, blocks: list[Any], at: Any) -> None:
        for i in at:
            blocks[i] = self._null_block

    patch.setattr(ShorteningManager, "release", lose)


def _hashes_whatever_there_is(patch: Patch) -> None:
    patch.setattr(ShorteningManager, "cache_blocks", STOCK.cache_blocks)


def _hashes_approximate_blocks(patch: Patch) -> None:
    patch.setattr(ApproximateManager, "set_approximate", lambda *_: None)


def _hashes_unfilled_blocks(patch: Patch) -> None:
    patch.setattr(ApproximateManager, "hold", lambda *_: None)


def _matches_beyond_the_exact(patch: Patch) -> None:
    patch.setattr(ShorteningManager, "cache_blocks", STOCK.cache_blocks)
    patch.setattr(
        ShorteningManager, "find_longest_cache_hit", STOCK.__dict__["find_longest_cache_hit"]
    )


def _admits_too_many(patch: Patch) -> None:
    patch.setattr(ShorteningSpec, "cap_blocks", property(lambda self: self.resident_blocks + 1))


def _forgets_nothing_at_a_preemption(patch: Patch) -> None:
    patch.setattr(WindowedManager, "pop_blocks_for_free", STOCK.pop_blocks_for_free)


def _keeps_plans_at_a_preemption(patch: Patch) -> None:
    patch.setattr(PrunedManager, "pop_blocks_for_free", STOCK.pop_blocks_for_free)


def _frees_what_is_in_flight(patch: Patch) -> None:
    skipped = WindowedManager.remove_skipped_blocks

    def early(self: WindowedManager, request_id: str, computed: int, prompt: Any = None) -> None:
        skipped(self, request_id, computed + self.block_size, prompt)

    patch.setattr(WindowedManager, "remove_skipped_blocks", early)


def _evicts_before_the_tokens_are_there(patch: Patch) -> None:
    skipped = PrunedManager.remove_skipped_blocks

    def early(self: PrunedManager, request_id: str, computed: int, prompt: Any = None) -> None:
        skipped(self, request_id, computed + 96, prompt)

    patch.setattr(PrunedManager, "remove_skipped_blocks", early)


def _hands_out_held_blocks(patch: Patch) -> None:
    def remove(self: PolicyQueue, block: Any) -> None:
        # What a request matched stays a candidate.
        super(PolicyQueue, self).remove(block)

    patch.setattr(PolicyQueue, "remove", remove)


def _hands_out_cached_blocks_first(patch: Patch) -> None:
    def popleft_n(self: PolicyQueue, n: int) -> list[Any]:
        cached = min(n, len(self._candidates))
        victims = (self._ask(cached) or []) if cached else []
        return victims + super(PolicyQueue, self).popleft_n(n - len(victims))

    patch.setattr(PolicyQueue, "popleft_n", popleft_n)


def _drops_a_freed_block(patch: Patch) -> None:
    append_n = PolicyQueue.append_n

    def drop(self: PolicyQueue, blocks: list[Any]) -> None:
        append_n(self, blocks[:-1] if len(blocks) > 3 else blocks)

    patch.setattr(PolicyQueue, "append_n", drop)


def _misses_lost_content(patch: Patch) -> None:
    patch.setattr(PolicyQueue, "content_gone", lambda *_: None)


def _misses_a_reset(patch: Patch) -> None:
    patch.setattr(PolicyQueue, "all_content_gone", lambda *_: None)


def _names_victims_that_are_not_free(patch: Patch) -> None:
    victims = Lru.victims
    patch.setattr(Lru, "victims", lambda self, n: [i + 1 for i in victims(self, n)])


def _names_one_victim_twice(patch: Patch) -> None:
    victims = Lru.victims
    patch.setattr(Lru, "victims", lambda self, n: [victims(self, 1)[0]] * n)


FAULTS: list[tuple[str, Callable[[Patch], None]]] = [
    ("windowed", _frees_shared_blocks),
    ("pruned", _frees_shared_blocks),
    ("windowed", _loses_blocks),
    ("pruned", _loses_blocks),
    ("windowed", _hashes_whatever_there_is),
    ("pruned", _hashes_whatever_there_is),
    ("approximate", _hashes_approximate_blocks),
    ("approximate", _hashes_unfilled_blocks),
    ("pruned", _matches_beyond_the_exact),
    ("windowed", _admits_too_many),
    ("windowed", _forgets_nothing_at_a_preemption),
    ("pruned", _keeps_plans_at_a_preemption),
    ("windowed", _frees_what_is_in_flight),
    ("pruned", _evicts_before_the_tokens_are_there),
    ("stock", _hands_out_held_blocks),
    ("stock", _hands_out_cached_blocks_first),
    ("stock", _drops_a_freed_block),
    ("stock", _misses_lost_content),
    ("stock", _misses_a_reset),
    ("stock", _names_victims_that_are_not_free),
    ("stock", _names_one_victim_twice),
]


@pytest.mark.parametrize(
    ("managed", "plant"), FAULTS, ids=[f"{managed}{plant.__name__}" for managed, plant in FAULTS]
)
def test_a_fault_is_found(
    managed: str, plant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within as many things as every pair of a policy and a manager goes through; vLLM's own
    assertions count."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(2):
            PoolFuzz(managed, Lru, seed).run(1000)
