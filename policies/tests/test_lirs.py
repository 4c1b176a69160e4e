from __future__ import annotations

import pytest
from singles import Singles, evictions, skewed

from kvplug_policies.prefix_cache.lirs import Lirs


def lir(cache: Singles) -> set[object]:
    at = {slot: content for content, slot in cache.slots.items()}
    return {at[slot] for slot in cache.policy._lir}  # type: ignore[attr-defined]


def test_the_first_blocks_are_lir_and_newcomers_are_not() -> None:
    cache = Singles(Lirs, 4, hir=0.25)
    cache.use(*"abc", *"defgh")
    assert lir(cache) == {"a", "b", "c"}
    assert cache.evicted == ["d", "e", "f", "g"]


def test_a_shorter_distance_than_the_oldest_lir_block_changes_places_with_it() -> None:
    cache = Singles(Lirs, 4, hir=0.25)
    cache.use(*"abc", "d", "b", "c", "d")
    assert lir(cache) == {"b", "c", "d"}
    assert cache.order()[0] == "a"


def test_so_does_content_that_was_evicted_while_it_is_remembered() -> None:
    cache = Singles(Lirs, 4, hir=0.25)
    cache.use(*"abc", "d", "e", "d")
    assert cache.evicted == ["d", "e"]
    assert lir(cache) == {"b", "c", "d"}


def test_without_history_it_does_not() -> None:
    cache = Singles(Lirs, 4, hir=0.25, history=0)
    cache.use(*"abc", "d", "e", "d")
    assert lir(cache) == {"a", "b", "c"}


def test_a_loop_a_little_larger_than_the_cache_still_hits() -> None:
    cache = Singles(Lirs, 10, hir=0.1)
    hits = cache.use(*list(range(12)) * 20)
    assert sum(hits[24:]) > 0.7 * len(hits[24:]), "LRU would not hit once"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hir", [0.05, 0.3])
def test_agrees_with_the_paper_written_plainly(seed: int, hir: float) -> None:
    """Section 3.2 with lists, the youngest last; S holds evicted contents without bound."""
    size = 20
    most = size - max(1, round(hir * size))
    contents = skewed(seed, 3000, 60)
    s: list[int] = []
    q: list[int] = []
    low: set[int] = set()
    cached: set[int] = set()
    expected = []

    def prune() -> None:
        while s and s[0] not in low:
            s.pop(0)

    def top(x: int) -> None:
        if x in s:
            s.remove(x)
        s.append(x)
        prune()

    def make_low(x: int) -> None:
        low.add(x)
        top(x)
        if len(low) > most:
            oldest = s.pop(0)
            low.discard(oldest)
            q.append(oldest)
            prune()

    for x in contents:
        if x in low:
            top(x)
            continue
        if x in cached:
            q.remove(x)
            if x in s:
                make_low(x)
            else:
                top(x)
                q.append(x)
            continue
        if len(cached) == size:
            expected.append(q.pop(0))
            cached.discard(expected[-1])
        cached.add(x)
        if x in s:
            make_low(x)
        elif len(low) < most:
            low.add(x)
            top(x)
        else:
            top(x)
            q.append(x)
    assert evictions(Singles(Lirs, size, hir=hir, history=64.0), contents) == expected


def test_what_is_remembered_is_bounded() -> None:
    cache = Singles(Lirs, 8, history=1.0)
    cache.use(*range(3000))
    assert cache.policy.counters()["remembered"] <= 8
    assert len(cache.policy._stack) <= 16  # type: ignore[attr-defined]
