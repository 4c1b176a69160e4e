from __future__ import annotations

import random
from collections import Counter

import pytest
from singles import Singles

from kvplug_policies.prefix_cache.tinylfu import PROBATION, PROTECTED, WINDOW, Sketch, TinyLfu


def place(cache: Singles, content: object) -> int:
    places: dict[int, int] = cache.policy._place  # type: ignore[attr-defined]
    return places[cache.slots[content]]


def codes(seed: int, n: int) -> list[int]:
    return random.Random(seed).sample(range(1 << 32), n)


def test_the_sketch_never_counts_too_few_before_it_halves() -> None:
    sketch, choose, true = Sketch(64, 10_000), random.Random(1), Counter[int]()
    keys = codes(0, 300)
    for _ in range(3000):
        key = choose.choice(keys[: choose.randint(1, 300)])
        sketch.add(key)
        true[key] += 1
    for key in keys:
        # 15 in the counters, and the doorkeeper.
        assert sketch.count(key) >= min(true[key], 16)


def test_the_sketch_seldom_counts_too_many() -> None:
    sketch = Sketch(1024, 100_000)
    keys = codes(2, 2000)
    for key in keys[:1000]:
        for _ in range(3):
            sketch.add(key)
    assert sum(sketch.count(key) == 3 for key in keys[:1000]) > 900
    assert sum(sketch.count(key) == 0 for key in keys[1000:]) > 900


def test_the_doorkeeper_absorbs_what_is_asked_for_once() -> None:
    sketch = Sketch(64, 10_000)
    for key in codes(3, 500):
        sketch.add(key)
    assert sum(sum(row) for row in sketch._rows) < 4 * 10


def test_after_a_sample_counts_are_halved_and_the_door_is_empty() -> None:
    sketch = Sketch(64, 20)
    for _ in range(19):
        sketch.add(5)
    assert sketch.count(5) == 16
    sketch.add(5)
    assert sketch.count(5) == 7
    assert sketch.count(6) == 0


def test_a_newcomer_does_not_displace_what_is_asked_for_more_often() -> None:
    cache = Singles(TinyLfu, 10, window=0.1)
    cache.use(*"abcdefghi", *"abcdefghi", *range(50))
    assert set("abcdefgh") <= cache.slots.keys()
    assert cache.evicted == ["i", *range(48)], "i was in the window, and as often asked for as a"


def test_a_newcomer_asked_for_more_often_stays() -> None:
    cache = Singles(TinyLfu, 4, window=0.25)
    cache.use(*"abcd", *"zzz", "x", "y")
    assert "z" in cache.slots and place(cache, "z") == PROBATION
    assert cache.evicted[-1] != "z"


def test_hits_in_the_main_cache_protect_up_to_a_share() -> None:
    cache = Singles(TinyLfu, 10, window=0.1, protected=0.25)
    cache.use(*range(10))
    assert place(cache, 9) == WINDOW and place(cache, 3) == PROBATION
    cache.use(3, 4)
    assert place(cache, 3) == place(cache, 4) == PROTECTED
    cache.use(5)
    assert place(cache, 3) == PROBATION, "two blocks are protected at most"
    assert place(cache, 5) == PROTECTED


def test_a_hit_in_the_window_stays_there() -> None:
    cache = Singles(TinyLfu, 10, window=0.2)
    cache.use(*range(10), 9)
    assert place(cache, 9) == WINDOW


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_paper_written_plainly(seed: int) -> None:
    """Figure 5 with lists around the same sketch; the window is settled when room is needed."""
    from zlib import crc32

    size, window_size, main_size, protected_size = 20, 4, 16, 12
    choose = random.Random(seed)
    contents = choose.choices(range(60), [1 / (i + 1) for i in range(60)], k=3000)
    sketch = Sketch(size, 200)
    lists: tuple[list[int], list[int], list[int]] = ([], [], [])
    window, probation, protected = lists
    expected = []
    for x in contents:
        code = crc32(repr(x).encode())
        if x in window:
            window.remove(x)
            window.append(x)
            sketch.add(code)
            continue
        if x in probation or x in protected:
            (probation if x in probation else protected).remove(x)
            protected.append(x)
            if len(protected) > protected_size:
                probation.append(protected.pop(0))
            sketch.add(code)
            continue
        while sum(map(len, lists)) == size:
            main = probation or protected
            if len(window) > window_size:
                candidate = window.pop(0)
                counts = [sketch.count(crc32(repr(c).encode())) for c in (candidate, main[0])]
                if counts[0] <= counts[1]:
                    expected.append(candidate)
                    continue
                full = len(probation) + len(protected) == main_size
                if full:
                    expected.append(main.pop(0))
                probation.append(candidate)
            else:
                expected.append(main.pop(0))
        window.append(x)
        sketch.add(code)
        while len(window) > window_size and sum(map(len, lists)) < size:
            probation.append(window.pop(0))
    cache = Singles(TinyLfu, size, window=0.2, protected=0.75)
    cache.use(*contents)
    assert cache.evicted == expected
