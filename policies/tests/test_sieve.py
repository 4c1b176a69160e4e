from __future__ import annotations

import pytest
from singles import Singles, evictions, skewed

from kvplug.testing.prefix_cache import Blocks, build
from kvplug_policies.prefix_cache.sieve import Sieve


def test_the_hand_passes_what_was_hit_and_takes_its_mark() -> None:
    cache = Singles(Sieve, 4)
    cache.use(*"abcd", "a", "c", "e")
    assert cache.evicted == ["b"]
    cache.use("f")
    assert cache.evicted == ["b", "d"], "the hand went on; c lost its mark"
    cache.use("g", "h", "i")
    assert cache.evicted == ["b", "d", "e", "f", "g"], "new blocks are ahead of the hand"


def test_past_the_newest_it_starts_again_at_the_oldest() -> None:
    cache = Singles(Sieve, 3)
    cache.use(*"abc", *"abc", "d")
    assert cache.evicted == ["a"], "all were marked: once around"
    assert cache.order() == ["b", "c", "d"]


def test_a_hit_does_not_move_a_block() -> None:
    cache = Singles(Sieve, 4)
    cache.use(*"abcd", "a")
    assert cache.order() == ["b", "c", "d", "a"]


def test_a_block_in_use_keeps_its_place() -> None:
    blocks = Blocks(build(Sieve))
    blocks.release(5, 4, 3, 2)
    blocks.hit(4)
    assert blocks.evict(2) == [5, 3]
    blocks.release(4)
    assert blocks.policy.victims(2) == [2, 4], "it lies behind the hand, and is marked"


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_paper_written_plainly(seed: int) -> None:
    """Algorithm 1 with a list, head first."""
    size = 20
    contents = skewed(seed, 4000, 80)
    queue: list[int] = []
    visited: dict[int, bool] = {}
    hand: int | None = None
    expected = []
    for x in contents:
        if x in visited:
            visited[x] = True
            continue
        if len(queue) == size:
            at = queue.index(hand) if hand is not None else len(queue) - 1
            while visited[queue[at]]:
                visited[queue[at]] = False
                at = at - 1 if at > 0 else len(queue) - 1
            hand = queue[at - 1] if at > 0 else None
            expected.append(queue.pop(at))
            del visited[expected[-1]]
        queue.insert(0, x)
        visited[x] = False
    assert evictions(Singles(Sieve, size), contents) == expected
