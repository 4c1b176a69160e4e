from __future__ import annotations

import pytest
from singles import Singles, evictions, skewed

from kvplug_policies.prefix_cache.s3fifo import S3Fifo


def test_one_hit_wonders_leave_through_the_small_queue() -> None:
    cache = Singles(S3Fifo, 10)
    cache.use(*"abcdefgh", *"abcdefgh", *"abcdefgh", *range(30))
    assert set("abcdefgh") <= cache.slots.keys()


def test_one_hit_is_not_enough_to_be_promoted() -> None:
    cache = Singles(S3Fifo, 4, small=0.25)
    cache.use("a", "a", "b", "b", "b", "c", "d")
    assert cache.order()[0] == "a"
    cache.use("e", "f")
    assert cache.evicted == ["a", "c"], "b was promoted on the way"


def test_what_the_ghost_queue_knows_enters_the_main_queue() -> None:
    cache = Singles(S3Fifo, 4, small=0.5)
    cache.use(*"abcd", "e")
    assert cache.evicted == ["a"]
    cache.use("a")
    assert cache.evicted == ["a", "b"]
    cache.use("f", "g", "h")
    assert "a" in cache.slots and cache.evicted[2:] == ["c", "d", "e"]


def test_in_the_main_queue_hits_buy_rounds() -> None:
    cache = Singles(S3Fifo, 4, small=0.01)
    cache.use(*"abc", *"aabbbbbbcc")
    cache.use(*range(8))
    kept = [c for c in cache.evicted if c in ("a", "b", "c")]
    assert kept == ["a", "c", "b"][: len(kept)]


def test_the_ghost_queue_is_as_long_as_the_main_queue() -> None:
    cache = Singles(S3Fifo, 10)
    cache.use(*range(1000))
    assert len(cache.policy._ghosts) == 9  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("small", [0.1, 0.4])
def test_agrees_with_the_paper_written_plainly(seed: int, small: float) -> None:
    """Algorithm 1 with lists, and the deviation the docstring states: an eviction gives up one
    block, wherever it comes from."""
    size = 20
    contents = skewed(seed, 4000, 80)
    s: list[int] = []
    m: list[int] = []
    g: list[int] = []
    freq: dict[int, int] = {}

    def evict_m() -> int:
        while True:
            t = m.pop(0)
            if freq[t] == 0:
                return t
            freq[t] -= 1
            m.append(t)

    def evict_s() -> int:
        while s:
            t = s.pop(0)
            if freq[t] <= 1:
                g.append(t)
                del g[: max(0, len(g) - int(size - small * size))]
                return t
            full = len(m) >= size - small * size
            freq[t] = 0
            m.append(t)
            if full:
                break
        return evict_m()

    expected = []
    for x in contents:
        if x in s or x in m:
            freq[x] = min(3, freq[x] + 1)
            continue
        if len(s) + len(m) == size:
            expected.append(evict_s() if s and (len(s) >= small * size or not m) else evict_m())
        if x in g:
            g.remove(x)
            m.append(x)
        else:
            s.append(x)
        freq[x] = 0
    assert evictions(Singles(S3Fifo, size, small=small), contents) == expected
