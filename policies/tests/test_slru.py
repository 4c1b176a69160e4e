from __future__ import annotations

import pytest
from singles import Singles, evictions, skewed

from kvplug_policies.prefix_cache.slru import Slru


def test_what_was_hit_outlives_what_was_not() -> None:
    cache = Singles(Slru, 4, protected=0.5)
    cache.use("a", "b", "a", "c", "d")
    assert cache.order() == ["b", "c", "d", "a"]
    cache.use(*"efghij")
    assert "a" in cache.slots, "a scan passes through the probationary list alone"


def test_what_falls_off_the_protected_list_is_young_on_probation() -> None:
    cache = Singles(Slru, 5, protected=0.4)
    cache.use(*"abcde", *"abc")
    assert cache.order() == ["d", "e", "a", "b", "c"]
    cache.use("f", "g", "h")
    assert cache.evicted == ["d", "e", "a"]


def test_a_demoted_block_needs_another_hit() -> None:
    cache = Singles(Slru, 4, protected=0.25)
    cache.use(*"abcd", "a", "b")
    assert cache.order() == ["c", "d", "a", "b"]
    cache.use("a")
    assert cache.order() == ["c", "d", "b", "a"]


def test_protecting_nothing_is_lru() -> None:
    cache = Singles(Slru, 3, protected=0)
    cache.use(*"abc", "a")
    assert cache.order() == ["b", "c", "a"]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_two_lists_kept_by_hand(seed: int) -> None:
    contents = skewed(seed, 3000, 60)
    probation: list[int] = []
    protected: list[int] = []
    expected = []
    for content in contents:
        if content in protected or content in probation:
            (protected if content in protected else probation).remove(content)
            protected.append(content)
            if len(protected) > 8:
                probation.append(protected.pop(0))
            continue
        if len(probation) + len(protected) == 20:
            expected.append((probation or protected).pop(0))
        probation.append(content)
    assert evictions(Singles(Slru, 20, protected=0.4), contents) == expected
