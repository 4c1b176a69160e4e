from __future__ import annotations

from collections import Counter

import pytest
from singles import Singles, evictions, skewed

from kvplug.contract import Released
from kvplug.testing.prefix_cache import ENGINE
from kvplug_policies.prefix_cache.lfu import Lfu


def test_fewest_references_go_first_then_the_least_recent() -> None:
    cache = Singles(Lfu, 4)
    cache.use("a", "b", "c", "d", "b", "a", "a", "c")
    assert cache.order() == ["d", "b", "c", "a"]


def test_of_one_request_the_deeper_block_goes_first() -> None:
    policy = Lfu(Lfu.Options(), ENGINE)
    policy.on_release(Released([7, 3, 5], keys=[b"2", b"1", b"0"]))
    assert policy.victims(3) == [7, 3, 5]


def test_counts_outlive_eviction() -> None:
    cache = Singles(Lfu, 2)
    cache.use("a", "a", "a", "b", "b", "b", "b", "c", "c", "b")
    assert cache.evicted == ["a"]
    cache.use("a")
    assert cache.evicted == ["a", "c"]
    assert cache.order() == ["a", "b"]
    cache.use("c")
    assert cache.evicted == ["a", "c", "a"], "a has 4 references, b 5"


def test_history_bounds_what_is_remembered() -> None:
    cache = Singles(Lfu, 1, history=1)
    cache.use("a", "a", "a", "b")
    assert len(cache.policy._history) == 1  # type: ignore[attr-defined]
    cache.use("c", "a")
    assert cache.policy._weight == {0: 1}  # type: ignore[attr-defined]


def test_a_hit_before_the_first_release_counts() -> None:
    policy = Lfu(Lfu.Options(), ENGINE)
    policy.on_hit([1])
    policy.on_release(Released([1], keys=[b"1"]))
    policy.on_release(Released([2], keys=[b"2"]))
    assert policy.victims(2) == [2, 1]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_counts_kept_by_hand(seed: int) -> None:
    contents = skewed(seed, 3000, 60)
    references: Counter[int] = Counter()
    last: dict[int, int] = {}
    cached: set[int] = set()
    expected = []
    for now, content in enumerate(contents):
        if content not in cached and len(cached) == 12:
            victim = min(cached, key=lambda c: (references[c], last[c]))
            cached.remove(victim)
            expected.append(victim)
        cached.add(content)
        references[content] += 1
        last[content] = now
    assert evictions(Singles(Lfu, 12), contents) == expected


def test_with_aging_old_references_fade() -> None:
    plain, aging = Singles(Lfu, 3), Singles(Lfu, 3, half_life=10)
    for cache in (plain, aging):
        cache.use(*"a" * 8, *"c" * 40, *"b" * 3)
    assert plain.order() == ["b", "a", "c"]
    assert aging.order() == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(2))
def test_aging_is_the_weighing_of_lrfu(seed: int) -> None:
    """Against the sum that the paper writes, recomputed for every victim."""
    half_life = 37.0
    contents = skewed(seed, 1500, 50)
    used: dict[int, list[int]] = {}
    cached: set[int] = set()
    expected = []
    for now, content in enumerate(contents):
        if content not in cached and len(cached) == 10:
            weight = {c: sum(2 ** ((t - now) / half_life) for t in used[c]) for c in cached}
            victim = min(cached, key=weight.__getitem__)
            cached.remove(victim)
            expected.append(victim)
        cached.add(content)
        used.setdefault(content, []).append(now)
    assert evictions(Singles(Lfu, 10, half_life=half_life), contents) == expected


def test_a_short_half_life_is_lru() -> None:
    contents = skewed(3, 1000, 40)
    order: dict[int, None] = {}
    expected = []
    for content in contents:
        if content not in order and len(order) == 9:
            expected.append(next(iter(order)))
            del order[expected[-1]]
        order.pop(content, None)
        order[content] = None
    assert evictions(Singles(Lfu, 9, half_life=0.01), contents) == expected


def test_weights_do_not_overflow() -> None:
    cache = Singles(Lfu, 3, half_life=0.001)
    cache.use(*range(5), *[1, 2] * 3000)
    assert cache.order()[-2:] == [1, 2]
