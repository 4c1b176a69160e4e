"""Causes of missed blocks, one by one, on texts of small numbers; and all together at random."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.observe.misses import (
    CHILDREN_OF_ROOT,
    MAX_BLOCKS,
    MIN_BLOCKS,
    SHARED_AT_ROOT,
    Again,
    FirstMiss,
    Lookup,
    MissCause,
    Misses,
    Source,
    blocks_kept,
)

SIZE = 4


def hashes_of(tokens: Sequence[int], salt: str = "") -> list[bytes]:
    """Hashes of full blocks, each of all before it, as vLLM's."""
    found, before = [], salt.encode()
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        block = repr(list(tokens[start : start + SIZE])).encode()
        before = hashlib.sha256(before + block).digest()
        found.append(before)
    return found


class Cache:
    """A prefix cache beside `Misses`: what is in it, and requests that run one after another."""

    def __init__(self, blocks: int = 100, **options: Any):
        self.now = 100.0
        self.misses = Misses(blocks, SIZE, clock=lambda: self.now, **options)
        self.held: dict[bytes, None] = {}
        self._number = itertools.count()

    def admit(
        self, tokens: Sequence[int], salt: str = "", computed: int | None = None, **facts: Any
    ) -> tuple[str, Lookup]:
        """Look a prompt up and admit it; its blocks are cached as far as it is ``computed``."""
        hashes = hashes_of(tokens, salt)
        hit = 0
        while hit < min(len(hashes), (len(tokens) - 1) // SIZE) and hashes[hit] in self.held:
            hit += 1
        name = f"r{next(self._number)}"
        done = len(tokens) if computed is None else computed
        serial = self.misses.looked_up()
        known = dict(self.held)
        found = self.misses.admitted(
            name,
            tokens,
            hashes,
            serial=serial,
            prompt_tokens=len(tokens),
            served=facts.pop("served", hit * SIZE),
            cached=lambda block: hashes[block] in known,
            computed=lambda: done,
            **facts,
        )
        self.held |= dict.fromkeys(hashes[: done // SIZE])
        return name, found

    def run(self, tokens: Sequence[int], salt: str = "", **facts: Any) -> Lookup:
        """Admit a request, and end it."""
        name, found = self.admit(tokens, salt, **facts)
        hashes = hashes_of(tokens, salt)
        self.misses.ended(name, tokens, hashes, sum(h in self.held for h in hashes))
        return found

    def evict(self, hashes: Sequence[bytes]) -> None:
        for one in hashes:
            del self.held[one]
            self.misses.evicted(one)


def causes(found: Lookup) -> list[MissCause]:
    return [run.cause for run in found.runs for _ in range(run.blocks)]


TEXT = list(range(100, 124))


def test_new_text_was_never_seen() -> None:
    found = Cache().run(TEXT)
    assert causes(found) == [MissCause.NEVER_SEEN] * 6
    assert found.first == FirstMiss(0, MissCause.NEVER_SEEN)
    assert found.sources == {Source.HIT: 0, Source.TIER: 0, Source.MISSED: 6}


def test_a_whole_hit_computes_the_block_of_the_last_token() -> None:
    cache = Cache()
    cache.run(TEXT)
    assert causes(cache.run(TEXT)) == [MissCause.LAST_TOKEN]
    assert causes(cache.run([*TEXT, 1])) == []


@pytest.mark.parametrize("at", [9, 12, 21])
def test_the_first_token_that_differs_is_told(at: int) -> None:
    cache = Cache()
    cache.run(TEXT)
    other = list(TEXT)
    other[at] = 7
    found = cache.run(other)
    block = at // SIZE
    expected = [MissCause.PROMPT_DIFFERS] + [MissCause.AFTER_A_DIFFERENCE] * (5 - block)
    assert causes(found) == expected
    assert found.first is not None and (found.first.block, found.first.token) == (block, at)
    assert found.first.asked[0] == 7 and found.first.known[0] == TEXT[at]
    assert found.first.sentence() == f"block {block}: differs from known text at token {at}"


def test_the_nearest_of_several_texts_is_compared() -> None:
    cache = Cache()
    for last in ([5, 6, 7, 8], [1, 2, 3, 9], [1, 9, 9, 9]):
        cache.run([*TEXT, *last])
    first = cache.run([*TEXT, 1, 2, 3, 4]).first
    assert first is not None and first.token == len(TEXT) + 3 and first.known[0] == 9


def test_texts_that_begin_alike_by_chance_are_not_compared() -> None:
    shared = SHARED_AT_ROOT - 1
    cache = Cache()
    cache.run(TEXT)
    assert causes(cache.run([*TEXT[:shared], *range(50, 60)]))[0] is MissCause.NEVER_SEEN


def test_text_behind_a_difference_of_another_length_is_new() -> None:
    cache = Cache()
    cache.run(TEXT)
    found = cache.run([*TEXT[:9], 7, 7, *TEXT[9:]])
    assert causes(found)[0] is MissCause.PROMPT_DIFFERS
    assert set(causes(found)[1:]) == {MissCause.NEVER_SEEN}


def test_an_answer_is_a_part_of_the_text() -> None:
    cache = Cache()
    name, _ = cache.admit(TEXT, computed=len(TEXT) + 8)
    whole = [*TEXT, *range(8)]
    cache.held |= dict.fromkeys(hashes_of(whole))
    cache.misses.ended(name, whole, hashes_of(whole), 8)
    first = cache.run([*whole[:-1], 99]).first
    assert first is not None and first.cause is MissCause.PROMPT_DIFFERS and first.token == 31


def test_an_eviction_is_told_with_its_time_and_policy() -> None:
    cache = Cache()
    cache.run(TEXT)
    cache.misses.policy = "foresight"
    cache.misses.next_step(7)
    cache.evict(hashes_of(TEXT)[4:])
    cache.now += 2.5
    found = cache.run(TEXT)
    assert causes(found) == [MissCause.EVICTED] * 2
    assert found.first == FirstMiss(4, MissCause.EVICTED, None, 2.5, "foresight", 7)
    assert found.first.sentence() == "block 4: evicted 2.5 s before, in step 7, by foresight"
    assert found.thrashed == 2 == cache.misses.thrashed


def test_thrash_is_what_comes_back_within_one_pool() -> None:
    cache = Cache(blocks=10)
    cache.run(TEXT)
    cache.evict(hashes_of(TEXT)[5:])
    cache.misses.next_step(2)
    for one in range(10):
        cache.misses.evicted(bytes([one] * 32))
    assert cache.run([*TEXT, 1]).thrashed == 0
    cache.evict(hashes_of(TEXT)[5:])
    assert cache.run([*TEXT, 1]).thrashed == 1


def test_a_cached_block_behind_a_gap() -> None:
    cache = Cache()
    cache.run(TEXT)
    cache.evict(hashes_of(TEXT)[1:2])
    expected = [MissCause.EVICTED, *[MissCause.AFTER_A_GAP] * 4]
    assert causes(cache.run(TEXT)) == expected


def test_what_the_admission_itself_evicted_was_there() -> None:
    cache = Cache()
    cache.run(TEXT)
    hashes = hashes_of(TEXT)
    cache.evict(hashes[1:2])
    serial = cache.misses.looked_up()
    cache.evict(hashes[3:])
    found = cache.misses.admitted(
        "r",
        TEXT,
        hashes,
        prompt_tokens=len(TEXT),
        served=SIZE,
        serial=serial,
        cached=lambda block: hashes[block] in cache.held,
        computed=lambda: 0,
    )
    assert causes(found) == [MissCause.EVICTED, *[MissCause.AFTER_A_GAP] * 4]


def test_a_block_that_another_request_is_to_compute() -> None:
    cache = Cache()
    first, _ = cache.admit(TEXT, computed=8)
    assert causes(cache.admit(TEXT, computed=8)[1]) == [MissCause.NOT_YET_COMPUTED] * 4
    cache.misses.ended(first, TEXT, hashes_of(TEXT), 2)


def test_a_request_that_ended_first() -> None:
    cache = Cache()
    cache.run(TEXT, computed=8)
    assert causes(cache.run(TEXT)) == [MissCause.ABANDONED] * 4


def test_what_was_computed_and_not_cached_is_approximate() -> None:
    cache = Cache()
    for _ in range(2):
        name, found = cache.admit(TEXT)
        for one in hashes_of(TEXT)[2:]:
            del cache.held[one]
        cache.misses.ended(name, TEXT, hashes_of(TEXT), 2)
    assert causes(found) == [MissCause.APPROXIMATE] * 4


@pytest.mark.parametrize("windowed", [False, True])
def test_while_the_other_request_runs_too(windowed: bool) -> None:
    cache = Cache(windowed=windowed)
    cache.admit(TEXT)
    for one in hashes_of(TEXT)[2:]:
        del cache.held[one]
    expected = MissCause.WINDOW if windowed else MissCause.APPROXIMATE
    assert causes(cache.run(TEXT)) == [expected] * 4


def test_the_same_tokens_of_another_tenant() -> None:
    cache = Cache()
    cache.run(TEXT, salt="a")
    found = cache.run([*TEXT[:20], 1, 2, 3, 4], salt="b")
    assert causes(found) == [*[MissCause.SALT_OR_ADAPTER] * 5, MissCause.NEVER_SEEN]


def test_a_reset_of_the_cache() -> None:
    cache = Cache()
    cache.run(TEXT)
    cache.held.clear()
    cache.misses.reset()
    assert causes(cache.run(TEXT)) == [MissCause.RESET] * 6
    assert causes(cache.run(TEXT)) == [MissCause.LAST_TOKEN]


def test_requests_that_read_no_cache_and_engines_without() -> None:
    cache = Cache()
    cache.run(TEXT)
    assert causes(cache.run(TEXT, served=0, reads=False)) == [MissCause.NOT_READ] * 6
    off = Cache(caching=False)
    assert causes(off.run(TEXT)) == [MissCause.CACHING_OFF] * 6
    name = off.misses.looked_up()
    found = off.misses.admitted(
        "bare",
        TEXT,
        [],
        prompt_tokens=len(TEXT),
        served=0,
        serial=name,
        cached=lambda _: False,
        computed=lambda: 0,
    )
    assert causes(found) == [MissCause.CACHING_OFF] * 6


def test_loaded_blocks_are_not_missed() -> None:
    cache = Cache()
    found = cache.run(TEXT, loaded=10, loaded_from=Source.SEGMENT)
    assert found.sources == {Source.HIT: 0, Source.SEGMENT: 2, Source.MISSED: 4}
    assert found.first is not None and found.first.block == 2


def test_a_request_that_comes_back_is_counted_apart() -> None:
    cache = Cache()
    name, _ = cache.admit(TEXT)
    before = dict(cache.misses.sources)
    hashes = hashes_of(TEXT)
    cache.evict(hashes[4:])
    for preempted, again in ((True, Again.PREEMPTED), (False, Again.LOAD_FAILED)):
        found = cache.misses.admitted(
            name,
            TEXT,
            hashes,
            prompt_tokens=len(TEXT),
            served=16,
            serial=cache.misses.looked_up(),
            cached=lambda _: False,
            computed=lambda: 0,
            preempted=preempted,
        )
        assert found.again is again and not found.runs
    assert cache.misses.again == {Again.PREEMPTED: 2, Again.LOAD_FAILED: 2}
    assert cache.misses.sources == before and cache.misses.thrashed == 2


def test_what_the_tables_dropped_is_forgotten() -> None:
    cache = Cache(limit=64)
    cache.run(TEXT)
    cache.evict(hashes_of(TEXT))
    for one in range(64):
        cache.misses.evicted(one.to_bytes(2, "big") * 16)
    other = Cache(limit=64)
    for start in range(0, 4000, 100):
        cache.run(range(start + 10_000, start + 10_024))
        other.run(range(start + 10_000, start + 10_024))
    assert causes(cache.run(TEXT)) == [MissCause.FORGOTTEN] * 6
    assert causes(other.run(TEXT)) == [MissCause.NEVER_SEEN] * 6


@pytest.mark.parametrize(("pool", "kept"), [(10, MIN_BLOCKS), (5000, 10_000), (10**6, MAX_BLOCKS)])
def test_the_tables_are_twice_the_pool_within_bounds(pool: int, kept: int) -> None:
    assert blocks_kept(pool) == kept == Misses(pool, SIZE).limit


def test_no_table_outgrows_its_bound() -> None:
    cache = Cache(limit=50)
    misses = cache.misses
    for start in range(300):
        text = [1, 2, 3, 4, *range(1000 * start, 1000 * start + 40)]
        cache.run(text, computed=24)
        cache.evict([one for one in hashes_of(text) if one in cache.held])
    assert not misses._promised and not misses._live
    for table in (misses._ghosts, misses._unhashed, misses._of):
        assert 0 < len(table) <= 50
    assert len(misses._children) <= 50
    assert sum(len(text.hashes) for text in misses._texts) == misses._text_blocks <= 50
    root = misses._children.get(b"", ())
    assert isinstance(root, tuple) and len(root) <= CHILDREN_OF_ROOT


def test_tokens_that_are_no_token_ids_are_not_compared() -> None:
    cache = Cache()
    cache.run(TEXT)
    assert causes(cache.run([2**40] * 24)) == [MissCause.NEVER_SEEN] * 6


PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@settings(deadline=None)
@given(st.data(), st.integers(4, 60), st.integers(8, 80))
def test_causes_add_up_whatever_happens(data: st.DataObject, pool: int, limit: int) -> None:
    cache = Cache(pool, limit=limit)
    misses, total, running = cache.misses, 0, []
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["run", "admit", "end", "evict", "reset", "step"])):
            case "run" | "admit":
                text = data.draw(PROMPTS)
                salt = data.draw(st.sampled_from(["", "a"]))
                computed = data.draw(st.integers(0, len(text)))
                name, found = cache.admit(text, salt, computed)
                running.append((name, text, salt))
                full = len(text) // SIZE
                total += full
                assert sum(found.sources.values()) == full == found.blocks
                assert sum(found.causes.values()) == found.sources[Source.MISSED]
                block = full - found.sources[Source.MISSED]
                for run in found.runs:
                    assert run.first == block
                    block += run.blocks
                assert block == full
            case "end" if running:
                name, text, salt = running.pop(data.draw(st.integers(0, len(running) - 1)))
                hashes = hashes_of(text, salt)
                misses.ended(name, text, hashes, sum(h in cache.held for h in hashes))
            case "evict" if cache.held:
                cache.evict(data.draw(st.lists(st.sampled_from([*cache.held]), unique=True)))
            case "reset" if not running:
                cache.held.clear()
                misses.reset()
            case _:
                misses.next_step(misses.step + 1)
    assert sum(misses.sources.values()) == total
    assert sum(misses.causes.values()) == misses.sources[Source.MISSED]
    assert len(misses._ghosts) <= limit and misses._text_blocks <= limit
