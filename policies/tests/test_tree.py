from __future__ import annotations

import random

import pytest

from kvplug.contract import PrefixCachePolicy, Released
from kvplug.testing.prefix_cache import Blocks, build
from kvplug_policies.prefix_cache.tree import Tree


def release(policy: PrefixCachePolicy, *path: int) -> None:
    """A request lets go of a path from the root."""
    ids = list(path)[::-1]
    policy.on_release(Released(ids, parents=[*ids[1:], -1]))


def test_a_parent_never_goes_before_its_child_however_old_it_is() -> None:
    policy = build(Tree)
    policy.on_release(Released([1], parents=[-1]))
    policy.on_release(Released([2], parents=[1]))
    policy.on_release(Released([9], parents=[-1]))
    policy.on_release(Released([3], parents=[2]))
    assert policy.victims(4) == [9, 3, 2, 1]


def test_the_least_recent_leaf_goes_first() -> None:
    policy = build(Tree)
    release(policy, 1, 2, 3)
    policy.on_hit([1])
    release(policy, 1, 4)
    policy.on_hit([1, 2])
    release(policy, 1, 2, 5)
    assert policy.victims(5) == [3, 4, 5, 2, 1]


def test_a_parent_becomes_a_leaf_when_its_last_child_is_gone() -> None:
    policy = build(Tree)
    release(policy, 1, 2)
    policy.on_hit([1])
    release(policy, 1, 3)
    assert policy.victims(2) == [2, 3]
    policy.on_remove([2])
    assert policy.victims(2) == [3, 1]


def test_a_parent_whose_child_is_in_use_goes_last() -> None:
    policy = build(Tree)
    release(policy, 1, 2)
    policy.on_hit([2])
    release(policy, 8)
    assert policy.victims(2) == [8, 1]


def test_a_block_that_holds_other_content_is_nobodys_parent() -> None:
    policy = build(Tree)
    release(policy, 1, 2)
    policy.on_remove([1])
    release(policy, 1)
    assert policy.victims(2) == [2, 1]
    policy.on_remove([2])
    assert policy.victims(1) == [1]


def test_without_parents_it_is_least_recent_first() -> None:
    blocks = Blocks(build(Tree))
    blocks.release(5, 4, 3)
    blocks.hit(5)
    blocks.release(5)
    assert blocks.policy.victims(3) == [4, 3, 5]


def test_parents_in_a_circle_end() -> None:
    policy = build(Tree)
    policy.on_release(Released([1, 2, 3], parents=[2, 3, 1]))
    assert set(policy.victims(3)) == {1, 2, 3}


@pytest.mark.parametrize("seed", range(4))
def test_no_parent_before_its_cached_child(seed: int) -> None:
    choose = random.Random(seed)
    policy = build(Tree)
    cached: dict[int, tuple[int, ...]] = {}
    at: dict[tuple[int, ...], int] = {}
    free = list(range(64))
    checked = 0
    for _ in range(800):
        text = tuple(choose.randrange(3) for _ in range(choose.randint(1, 7)))
        path = [text[: i + 1] for i in range(len(text))]
        found = [at[c] for c in path if c in at]
        policy.on_hit(found)
        while len(free) < len(path) - len(found):
            n = choose.randint(1, 3)
            candidates = set(cached) - set(found)
            victims = list(policy.victims(min(n, len(candidates))))
            gone: set[int] = set()
            for victim in victims:
                children = {
                    b for b, c in cached.items() if c[:-1] == cached[victim] and b not in gone
                }
                assert not children, "a child is still cached"
                gone.add(victim)
                checked += 1
            policy.on_remove(victims)
            for victim in victims:
                del at[cached.pop(victim)]
                free.append(victim)
        for content in path:
            if content not in at:
                at[content] = free.pop()
                cached[at[content]] = content
        release(policy, *(at[c] for c in path))
    assert checked > 200
