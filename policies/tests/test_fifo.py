from __future__ import annotations

import pytest

from kvplug.testing.prefix_cache import Blocks, build, life
from kvplug_policies.prefix_cache.fifo import Fifo


def test_first_cached_goes_first_whatever_was_done_since() -> None:
    blocks = Blocks(build(Fifo))
    blocks.release(5, 4, 3)
    blocks.hit(5)
    blocks.release(9)
    blocks.release(5)
    assert blocks.policy.victims(4) == [5, 4, 3, 9]


def test_a_block_in_use_is_skipped_and_keeps_its_place() -> None:
    blocks = Blocks(build(Fifo))
    blocks.release(5, 4, 3)
    blocks.hit(5)
    assert blocks.policy.victims(2) == [4, 3]
    blocks.release(5)
    assert blocks.policy.victims(1) == [5]


def test_new_content_in_an_old_block_is_young() -> None:
    blocks = Blocks(build(Fifo))
    blocks.release(5, 4, 3)
    assert blocks.evict(1) == [5]
    blocks.release(5)
    assert blocks.policy.victims(3) == [4, 3, 5]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_birthdays_kept_by_hand(seed: int) -> None:
    class Book(Blocks):
        def __init__(self) -> None:
            super().__init__(build(Fifo))
            self.born: dict[int, int] = {}
            self.clock = 0

        def release(self, *ids: int) -> None:
            super().release(*ids)
            for i in ids:
                if i not in self.born:
                    self.born[i] = self.clock = self.clock + 1

        def evict(self, n: int) -> list[int]:
            gone = super().evict(n)
            for i in gone:
                del self.born[i]
            return gone

        def forget(self, *ids: int) -> None:
            super().forget(*ids)
            for i in ids:
                self.born.pop(i, None)

    book = Book()
    for _ in life(book, 500, seed):
        expected = sorted(book.candidates, key=book.born.__getitem__)
        assert book.policy.victims(len(expected)) == expected


def test_the_heap_stays_bounded() -> None:
    blocks = Blocks(build(Fifo))
    blocks.release(*range(64))
    for i in range(20_000):
        blocks.hit(i % 64)
        blocks.release(i % 64)
    assert len(blocks.policy._heap) <= 64  # type: ignore[attr-defined]
