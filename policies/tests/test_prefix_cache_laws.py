"""The same laws for every registered prefix-cache policy."""

from __future__ import annotations

import pytest
from laws import Blocks, build, life, prefix_policies

from kvplug.contract import PrefixCachePolicy

every = pytest.mark.parametrize("policy", prefix_policies(), ids=lambda p: p.name)


@every
@pytest.mark.parametrize("seed", range(5))
def test_victims_are_distinct_candidates(policy: type[PrefixCachePolicy], seed: int) -> None:
    blocks = Blocks(build(policy))
    for _ in life(blocks, 600, seed):
        n = len(blocks.candidates)
        for asked in {0, min(1, n), n // 2, n}:
            victims = list(blocks.policy.victims(asked))
            assert len(victims) == asked
            assert len(set(victims)) == asked
            assert set(victims) <= blocks.candidates


@every
def test_victims_changes_nothing(policy: type[PrefixCachePolicy]) -> None:
    blocks = Blocks(build(policy))
    for _ in life(blocks, 400, seed=9):
        n = len(blocks.candidates)
        first = list(blocks.policy.victims(n))
        for asked in (1, n // 3, n):
            if asked <= n:
                assert list(blocks.policy.victims(asked)) == first[:asked]
        assert list(blocks.policy.victims(n)) == first


@every
def test_asking_for_one_at_a_time_gives_the_same_order(policy: type[PrefixCachePolicy]) -> None:
    together, apart = Blocks(build(policy)), Blocks(build(policy))
    for blocks in (together, apart):
        for _ in life(blocks, 300, seed=4):
            pass
    n = len(together.candidates)
    assert n > 5
    assert together.evict(n) == [apart.evict(1)[0] for _ in range(n)]


@every
def test_unknown_blocks_may_be_hit_and_removed(policy: type[PrefixCachePolicy]) -> None:
    blocks = Blocks(build(policy))
    blocks.policy.on_hit([3])
    blocks.policy.on_remove([3, 4])
    blocks.release(1, 2)
    assert set(blocks.evict(2)) == {1, 2}


@every
def test_content_that_comes_back_starts_anew(policy: type[PrefixCachePolicy]) -> None:
    blocks = Blocks(build(policy))
    blocks.release(1, 2, 3)
    blocks.forget(2)
    blocks.release(2)
    assert set(blocks.evict(3)) == {1, 2, 3}
    assert list(blocks.policy.victims(0)) == []
