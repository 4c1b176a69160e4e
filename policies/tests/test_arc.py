from __future__ import annotations

import pytest
from singles import Singles, evictions, skewed

from kvplug_policies.prefix_cache.arc import Arc


def target(cache: Singles) -> float:
    return cache.policy.counters()["target_once"]


def test_once_seen_goes_before_seen_again() -> None:
    cache = Singles(Arc, 4)
    cache.use(*"abcd", "a", "c")
    assert cache.order() == ["b", "d", "a", "c"]


def test_a_scan_does_not_displace_what_was_seen_again() -> None:
    cache = Singles(Arc, 4)
    cache.use(*"abab", *range(40))
    assert {"a", "b"} <= cache.slots.keys()


def test_content_that_returns_too_late_from_the_once_list_makes_it_larger() -> None:
    cache = Singles(Arc, 4)
    cache.use(*"ab", *"ab", *"cdef")
    assert cache.evicted == ["c", "d"] and target(cache) == 0
    cache.use("c")
    assert target(cache) == 1
    assert cache.order() == ["a", "b", "c", "f"], "f is as many as the target allows"


def test_content_that_returns_too_late_from_the_other_list_makes_it_smaller() -> None:
    cache = Singles(Arc, 4)
    cache.use(*"ab", *"ab", *"cdef", "c", "d", "e")
    grown = target(cache)
    gone = next(c for c in cache.evicted if c in "ab")
    cache.use(gone)
    assert grown >= 2 and target(cache) == grown - max(1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_paper_written_plainly(seed: int) -> None:
    """Cases I to IV of the paper's figure 4, with the deviation the docstring states: room is
    made first, then p moves."""
    size = 16
    contents = skewed(seed, 4000, 70)
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p = 0.0
    expected = []
    for x in contents:
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            continue
        if len(t1) + len(t2) == size:
            source, ghosts = (t1, b1) if t1 and (len(t1) > p or not t2) else (t2, b2)
            expected.append(source.pop(0))
            ghosts.append(expected[-1])
            del b1[: max(0, len(t1) + len(b1) - size)]
            del b2[: max(0, len(t1) + len(t2) + len(b1) + len(b2) - 2 * size)]
        if x in b1:
            p = min(size, p + max(1, len(b2) / len(b1)))
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            b2.remove(x)
            t2.append(x)
        else:
            t1.append(x)
        del b1[: max(0, len(t1) + len(b1) - size)]
        del b2[: max(0, len(t1) + len(t2) + len(b1) + len(b2) - 2 * size)]
    cache = Singles(Arc, size)
    assert evictions(cache, contents) == expected
    assert target(cache) == p > 0


def test_ghosts_stay_within_the_cache() -> None:
    cache = Singles(Arc, 8)
    for i in range(500):
        cache.use(i, i - 3, i % 5)
    once, again = cache.policy._ghosts  # type: ignore[attr-defined]
    assert len(once) <= 8 and len(once) + len(again) <= 8
