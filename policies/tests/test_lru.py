from __future__ import annotations

from collections import OrderedDict

import pytest

from kvplug.testing.prefix_cache import Blocks, build, life
from kvplug_policies.prefix_cache.lru import Lru


def test_the_block_let_go_longest_ago_goes_first() -> None:
    blocks = Blocks(build(Lru))
    blocks.release(5, 4, 3)
    blocks.release(9, 8)
    assert blocks.policy.victims(5) == [5, 4, 3, 9, 8]


def test_being_used_again_makes_it_newest_when_it_is_let_go() -> None:
    blocks = Blocks(build(Lru))
    blocks.release(5, 4, 3)
    blocks.hit(5)
    assert blocks.policy.victims(2) == [4, 3]
    blocks.release(5)
    assert blocks.policy.victims(3) == [4, 3, 5]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_list_moved_by_hand(seed: int) -> None:
    class Book(Blocks):
        def __init__(self) -> None:
            super().__init__(build(Lru))
            self.order: OrderedDict[int, None] = OrderedDict()

        def release(self, *ids: int) -> None:
            super().release(*ids)
            for i in ids:
                self.order.pop(i, None)
                self.order[i] = None

    book = Book()
    for _ in life(book, 500, seed):
        expected = [i for i in book.order if i in book.candidates]
        assert book.policy.victims(len(expected)) == expected
