"""Stored segments are found by their text, time and request, and by nobody else's."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from kvplug.errors import KVPlugError
from kvplug.reuse.hashing import RollingHash, SimHash
from kvplug.reuse.index import Match, SegmentIndex

Tokens = NDArray[np.int32]


def ids(*tokens: int) -> Tokens:
    return np.array(tokens, np.int32)


def random_ids(seed: int, size: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 49152, size).astype(np.int32)


def zeros(tokens: Tokens, width: int) -> NDArray[np.uint64]:
    """A hash under which every text collides with every other."""
    return np.zeros(max(len(tokens) - width + 1, 0), np.uint64)


def parity(tokens: Tokens, width: int) -> NDArray[np.uint64]:
    """A hash with two values."""
    places = max(len(tokens) - width + 1, 0)
    return (tokens[:places] & 1).astype(np.uint64)


def common(one: Tokens, other: Tokens) -> int:
    count = 0
    for a, b in zip(one.tolist(), other.tolist(), strict=False):
        if a != b:
            break
        count += 1
    return count


def plain(
    stored: dict[str, tuple[str, Tokens]], tokens: Tokens, tenant: str, min_tokens: int
) -> Any:
    """What `match` is to find, by comparing everything with everything."""
    found = []
    for name, (owner, text) in stored.items():
        for start in range(len(tokens)):
            length = common(text, tokens[start:])
            if owner == tenant and length >= min(min_tokens, len(text)):
                found.append(Match(name, start, length))
    return sorted(found, key=lambda m: (m.start, -m.length, m.segment))


# -- Hashes ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**31 - 1), max_size=80), st.integers(1, 70), st.integers(0, 5))
def test_a_rolling_hash_is_that_of_each_window_alone(
    tokens: list[int], width: int, seed: int
) -> None:
    rolling, text = RollingHash(seed), ids(*tokens)
    hashes = rolling(text, width)
    assert hashes.dtype == np.uint64
    assert len(hashes) == max(len(tokens) - width + 1, 0)
    alone = [rolling(text[i : i + width].copy(), width)[0] for i in range(len(hashes))]
    assert hashes.tolist() == [int(h) for h in alone]


def test_hashes_differ_by_text_order_and_seed() -> None:
    text = random_ids(0, 100_016)
    hashes = RollingHash(3)(text, 16)
    assert len(np.unique(hashes)) == len(hashes)
    assert RollingHash(3)(text[:16][::-1].copy(), 16)[0] != hashes[0]
    assert RollingHash(4)(text[:16], 16)[0] != hashes[0]
    assert RollingHash()(text[:16], 16)[0] != RollingHash()(text[:16], 16)[0]


def test_texts_of_one_token_repeated_have_their_own_hashes() -> None:
    rolling = RollingHash(0)
    seen = {int(rolling(np.full(32, token, np.int32), 32)[0]) for token in range(1000)}
    assert len(seen) == 1000


def test_simhash_is_near_for_near_texts() -> None:
    simhash = SimHash(seed=1)
    text, other = random_ids(1, 256), random_ids(2, 256)
    changed = text.copy()
    changed[::20] = 7

    def distance(one: Tokens, two: Tokens) -> int:
        return int(np.bitwise_count(simhash(one) ^ simhash(two)).sum())

    assert simhash(text).shape == (simhash.bits // 8,)
    assert distance(text, text.copy()) == 0
    assert distance(text, changed) < simhash.bits // 4 < distance(text, other)
    assert simhash(text[:1]).shape == simhash(text).shape
    with pytest.raises(ValueError, match="multiple of 64"):
        SimHash(100)


# -- Matching --------------------------------------------------------------------------------------


def test_a_segment_is_found_at_every_place_where_it_stands() -> None:
    index, segment = SegmentIndex(), random_ids(0, 100)
    index.add("a", segment, "", 1.0, "r")
    text = np.concatenate([random_ids(1, 37), segment, random_ids(2, 5), segment[:60]])
    assert index.match(text, "") == [Match("a", 37, 100), Match("a", 142, 60)]
    assert index.match(text[38:], "") == [Match("a", 104, 60)]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 200])
def test_at_least_so_many_tokens_must_stand_there(length: int) -> None:
    index, segment = SegmentIndex(min_tokens=32), random_ids(0, length)
    index.add("a", segment, "", 1.0, "r")
    need = min(32, length)
    assert index.match(segment[:need], "") == [Match("a", 0, need)]
    assert index.match(segment[: need - 1], "") == []
    assert index.match(np.concatenate([ids(-5), segment]), "") == [Match("a", 1, length)]


def test_the_longest_comes_first_and_copies_of_a_text_are_all_found() -> None:
    index, segment = SegmentIndex(), random_ids(0, 100)
    for name, cut in (("long", 100), ("short", 40), ("copy", 100)):
        index.add(name, segment[:cut].copy(), "", 1.0, "r")
    index.add("other", np.concatenate([segment[:70], random_ids(1, 30)]), "", 1.0, "r")
    found = index.match(segment, "")
    assert [(m.segment, m.length) for m in found] == [
        ("copy", 100),
        ("long", 100),
        ("other", 70),
        ("short", 40),
    ]


def test_one_place_gives_no_more_than_the_limit_and_the_longest_of_them() -> None:
    index, begin = SegmentIndex(limit=3), random_ids(0, 100)
    for n in range(40):
        index.add(f"{n:02}", np.concatenate([begin[: 32 + n], ids(-1, n)]), "", 1.0, "r")
    assert [m.length for m in index.match(begin, "")] == [71, 70, 69]


def test_what_is_removed_is_not_found() -> None:
    index, segment = SegmentIndex(near_duplicates=True), random_ids(0, 64)
    for name in "abc":
        index.add(name, segment, "t", 1.0, "r")
    index.remove("b")
    assert [m.segment for m in index.match(segment, "t")] == ["a", "c"]
    assert "b" not in index and len(index) == 2
    index.remove("a")
    index.remove("c")
    assert index.match(segment, "t") == []
    assert index.nearest(segment, "t") == []
    assert index.since(0.0) == [] == index.of_request("r")
    with pytest.raises(KeyError):
        index.remove("a")


def test_what_cannot_be_added() -> None:
    index = SegmentIndex()
    with pytest.raises(ValueError, match="no tokens"):
        index.add("a", ids(), "", 1.0, "r")
    index.add("a", ids(1), "", 1.0, "r")
    with pytest.raises(ValueError, match="already"):
        index.add("a", ids(2), "", 1.0, "r")
    with pytest.raises(ValueError, match="positive"):
        SegmentIndex(min_tokens=0)


# -- Tenants and collisions ------------------------------------------------------------------------


@pytest.mark.parametrize("hasher", [None, zeros, parity], ids=["rolling", "zeros", "parity"])
def test_two_tenants_with_equal_text_never_share(hasher: Any) -> None:
    index, segment = SegmentIndex(hasher=hasher, near_duplicates=True), random_ids(0, 80)
    index.add("mine", segment, "me", 1.0, "r")
    index.add("theirs", segment, "them", 1.0, "r")
    for tenant, name in (("me", "mine"), ("them", "theirs")):
        assert {m.segment for m in index.match(segment, tenant)} == {name}
        assert {name for name, _ in index.nearest(segment, tenant)} == {name}
    for nobody in ("", "me ", "me\0", "them,me"):
        assert index.match(segment, nobody) == []
        assert index.nearest(segment, nobody) == []


def test_a_collision_finds_nothing_that_is_not_there() -> None:
    """Every window has the hash of every segment, and only equal tokens count."""
    index = SegmentIndex(hasher=zeros)
    for n in range(20):
        index.add(f"s{n}", random_ids(n, 50), "", 1.0, "r")
    assert index.match(random_ids(99, 500), "") == []
    text = np.concatenate([random_ids(98, 41), random_ids(7, 50), random_ids(97, 9)])
    assert index.match(text, "") == [Match("s7", 41, 50)]
    almost = text.copy()
    almost[41 + 31] ^= 1
    assert index.match(almost, "") == []


# -- Against a plain model -------------------------------------------------------------------------

# Few tokens and many repetitions, so that texts have beginnings in common.
words = st.lists(
    st.sampled_from([(1,), (2,), (1, 2), (1,) * 9, (2,) * 7, (1, 1, 2, 1, 2)]), max_size=8
).map(lambda parts: ids(*(token for part in parts for token in part)))


class AgainstAPlainModel(RuleBasedStateMachine):
    @initialize(
        min_tokens=st.integers(1, 12),
        window=st.integers(1, 9),
        hasher=st.sampled_from([None, zeros, parity]),
    )
    def start(self, min_tokens: int, window: int, hasher: Any) -> None:
        self.min_tokens = min_tokens
        self.index = SegmentIndex(min_tokens, window=window, limit=1000, hasher=hasher, seed=0)
        self.stored: dict[str, tuple[str, Tokens]] = {}
        self.facts: dict[str, tuple[float, str]] = {}
        self.number = 0

    @rule(
        text=words,
        tenant=st.sampled_from(["", "x"]),
        created=st.integers(0, 5),
        request=st.sampled_from(["p", "pp", "q"]),
    )
    def add(self, text: Tokens, tenant: str, created: int, request: str) -> None:
        if not len(text):
            return
        self.number += 1
        name = f"{self.number:04}"
        self.index.add(name, text, tenant, float(created), request)
        self.stored[name] = tenant, text
        self.facts[name] = float(created), request

    @rule(pick=st.integers(0, 1 << 30))
    def remove(self, pick: int) -> None:
        if self.stored:
            name = sorted(self.stored)[pick % len(self.stored)]
            self.index.remove(name)
            del self.stored[name], self.facts[name]

    @rule(text=words, tenant=st.sampled_from(["", "x", "y"]))
    def match(self, text: Tokens, tenant: str) -> None:
        assert self.index.match(text, tenant) == plain(self.stored, text, tenant, self.min_tokens)

    @rule(since=st.integers(-1, 6), request=st.sampled_from(["p", "pp", "q", "r"]))
    def by_time_and_request(self, since: int, request: str) -> None:
        order = sorted(self.facts, key=lambda name: (self.facts[name][0], name))
        assert self.index.since(since) == [n for n in order if self.facts[n][0] >= since]
        assert self.index.of_request(request) == [n for n in order if self.facts[n][1] == request]

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "index"):
            assert len(self.index) == len(self.stored)


TestAgainstAPlainModel = AgainstAPlainModel.TestCase
TestAgainstAPlainModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_growing_and_shrinking_loses_nothing() -> None:
    index = SegmentIndex(seed=2)
    texts = {f"{n:05}": random_ids(n, 40) for n in range(3000)}
    for name, text in texts.items():
        index.add(name, text, "", 1.0, name)
    for name in list(texts)[::3]:
        index.remove(name)
        del texts[name]
    for name in list(texts)[::97]:
        assert index.match(texts[name], "") == [Match(name, 0, 40)]
    gone = random_ids(0, 40)
    assert index.match(gone, "") == []


# -- Near-equal text -------------------------------------------------------------------------------


def test_near_equal_text_is_found_likest_first() -> None:
    index = SegmentIndex(near_duplicates=True, seed=1)
    texts = [random_ids(n, 256) for n in range(500)]
    for n, text in enumerate(texts):
        index.add(f"{n:03}", text, "", 1.0, "r")
    changed = texts[123].copy()
    changed[::10] = -7
    index.add("changed", changed, "", 1.0, "r")
    found = index.nearest(texts[123], "", 5)
    assert [name for name, _ in found[:2]] == ["123", "changed"]
    assert found[0][1] == 1.0
    assert 0.5 < found[1][1] < 1.0 and found[2][1] < 0.5
    assert len(found) == 5
    index.remove("123")
    assert index.nearest(texts[123], "", 1)[0][0] == "changed"


def test_near_duplicates_need_a_package_that_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "kvplug.reuse.near_duplicates", raising=False)
    for module in ("usearch", "usearch.compiled", "usearch.index"):
        monkeypatch.setitem(sys.modules, module, None)
    SegmentIndex()
    with pytest.raises(KVPlugError, match=r"pip install 'kvplug\[prefetch\]'"):
        SegmentIndex(near_duplicates=True)


def test_near_is_off_unless_asked_for() -> None:
    index = SegmentIndex()
    index.add("a", random_ids(0, 64), "", 1.0, "r")
    assert index.nearest(random_ids(0, 64), "") == []
    asked = SegmentIndex(near_duplicates=True)
    asked.add("a", random_ids(0, 64), "", 1.0, "r")
    assert asked.nearest(ids(), "") == [] == asked.nearest(random_ids(0, 64), "", 0)
