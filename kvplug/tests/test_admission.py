"""Admission, ghosts and returns: what storing less is worth is measured, not assumed."""

from __future__ import annotations

import hashlib
import random
import sys
from functools import cache

import pytest

from kvplug.contract import EngineView, Leaving, LifecyclePolicy, TierView
from kvplug.tiers.admission import FRACTION, Admission, Way
from kvplug.tiers.ghost import SURE, GhostList
from kvplug.tiers.hierarchy import Hierarchy, TierBook
from kvplug.tiers.returns import ENOUGH, Returns
from kvplug_policies.lifecycle.everything import Everything
from kvplug_policies.lifecycle.ladder import Ladder
from kvplug_policies.lifecycle.watermarks import Watermarks
from kvplug_policies.prefix_cache.lru import Lru

ENGINE = EngineView(16, 64, host="test")
CHUNKS = 8
"""Chunks of a text."""


@cache
def key(text: int, chunk: int = 0) -> bytes:
    return hashlib.blake2b(b"%d %d" % (text, chunk), digest_size=32).digest()


def served(lifecycle: LifecyclePolicy, texts: list[int], room: int) -> tuple[Hierarchy, list[bool]]:
    """Serve texts with a tier of ``room`` texts and a pool that keeps nothing; which were hits."""
    now = [0.0]
    lru = Lru(Lru.Options.model_validate({}), ENGINE)
    book = TierBook("host", room * CHUNKS * 100, True, False, False, lru)
    books = Hierarchy([book], lifecycle, lambda: now[0])
    hits = []
    for step, text in enumerate(texts):
        now[0] += 1
        keys = [key(text, chunk) for chunk in range(CHUNKS)]
        holders = books.holders(keys)
        found = holders.index(None) if None in holders else CHUNKS
        books.asked(keys, found)
        books.used(keys[:found])
        hits.append(found == CHUNKS)
        chunks = [
            Leaving(keys[c], 16 * c, 16, text=b"%d of %d" % (step, text)) for c in range(CHUNKS)
        ]
        for stored, tier in books.leaving(chunks[::-1], 100):
            books.put(tier, stored, 100)
        while moves := books.plan(step, TierView("pool", 1, 1)):
            assert all(move.target is None for move in moves)
    return books, hits


def test_a_scan_larger_than_the_tier_gets_nothing_of_lru_and_its_part_of_a_fraction() -> None:
    scan = [step % 150 for step in range(150 * 50)]
    _, hits = served(Everything(Everything.Options.model_validate({}), ENGINE), scan, room=100)
    assert not any(hits)
    for policy in (Watermarks, Ladder):
        books, hits = served(policy(policy.Options.model_validate({}), ENGINE), scan, room=100)
        latest = hits[-150 * 10 :]
        # A tier of 100 of 150 texts can serve two thirds.
        assert sum(latest) / len(latest) > 0.4, policy.name
        assert books.counters()["thrash"] > 0.9
        assert books.counters()["host_stored"] < CHUNKS * len(scan) / 2


def test_once_the_scan_ends_new_texts_are_taken_in_again() -> None:
    scan = [step % 150 for step in range(150 * 50)]
    # Each text is asked for twice, soon after another.
    pairs = [10_000 + step // 8 * 4 + step % 4 for step in range(6_000)]
    _, hits = served(
        Watermarks(Watermarks.Options.model_validate({}), ENGINE), scan + pairs, room=100
    )
    latest = hits[-2_000:]
    assert sum(latest) / len(latest) > 0.45


def test_texts_that_never_return_are_turned_away() -> None:
    choose = random.Random(0)
    texts = [choose.randrange(60) if choose.random() < 0.3 else 1000 + i for i in range(6_000)]
    everything, hits = served(
        Everything(Everything.Options.model_validate({}), ENGINE), texts, room=40
    )
    marks, more = served(Watermarks(Watermarks.Options.model_validate({}), ENGINE), texts, room=40)
    assert sum(more) > 1.2 * sum(hits)
    assert marks.counters()["host_stored"] < 0.5 * everything.counters()["host_stored"]


def test_ghosts_are_bounded_and_the_oldest_go() -> None:
    ghosts = GhostList(limit=100)
    ghosts.add([key(i) for i in range(150)], held=True)
    assert len(ghosts) == 100
    assert ghosts.missed([key(0)]) == 0 and ghosts.missed([key(149)]) == 1
    assert ghosts.misses(key(149)) == 1 and ghosts.misses(key(0)) == 0


def test_a_ghost_is_remembered_while_its_content_comes_back_and_goes() -> None:
    ghosts = GhostList(limit=100)
    ghosts.add([key(1)], held=False)
    assert ghosts.missed([key(1)]) == 1 and ghosts.thrash == 0
    ghosts.add([key(1)], held=False)
    ghosts.missed([key(1)])
    assert ghosts.misses(key(1)) == 2 and ghosts.thrash > 0


def test_thrash_is_the_share_of_misses_that_had_been_there_and_fades() -> None:
    ghosts = GhostList(limit=10_000, half_life=500)
    ghosts.add([key(i) for i in range(1000)], held=True)
    for i in range(1000):
        ghosts.missed([key(i), key(-1 - i)])
    assert ghosts.thrash == pytest.approx(0.5, abs=0.05)
    ghosts.missed([key(-5000 - i) for i in range(3000)])
    assert ghosts.thrash < 0.02


def test_a_few_misses_prove_no_thrash() -> None:
    ghosts = GhostList()
    ghosts.add([key(1)], held=True)
    ghosts.missed([key(1)])
    assert 0 < ghosts.thrash <= 1 / SURE


def test_a_ghost_takes_what_its_limit_says() -> None:
    ghosts = GhostList(limit=20_000)
    keys = [i.to_bytes(8, "little") * 4 for i in range(20_000)]
    ghosts.add(keys, held=True)
    held = sys.getsizeof(ghosts._ghosts) + sum(sys.getsizeof(n) for n in ghosts._ghosts)
    assert held / len(ghosts) < 200


def leave(number: int, **more: object) -> Leaving:
    return Leaving(key(number), 0, 16, **more)  # type: ignore[arg-type]


def test_classes_of_chunks_return_as_often_as_they_did() -> None:
    returns = Returns(watched=64)
    assert returns.left(leave(0)) is None
    for i in range(1, 4000):
        returns.left(leave(i, uses=1 + i % 2))
        if i % 2 and i % 10 < 8:
            returns.asked(key(i))
    assert returns.left(leave(5000, uses=2)) == pytest.approx(0.8, abs=0.03)
    assert returns.left(leave(5002, uses=1)) == pytest.approx(0.0, abs=0.03)


def test_a_return_after_the_tiers_lifetime_is_none() -> None:
    returns = Returns(watched=64)
    for i in range(2000):
        returns.left(leave(i))
        returns.asked(key(i - 100))
    assert returns.left(leave(5000)) == pytest.approx(0.0, abs=0.01)


def test_what_classes_did_lately_counts_most() -> None:
    returns = Returns(watched=64)
    for i in range(int(3 * ENOUGH)):
        returns.left(leave(i))
    for i in range(int(3 * ENOUGH)):
        returns.left(leave(-i))
        returns.asked(key(-i))
    latest = returns.left(leave(10**6))
    assert latest is not None and latest > 0.7


def test_without_a_limit_everything_is_admitted() -> None:
    admission = Admission(0)
    assert all(admission.left(leave(i)) for i in range(100))


def test_a_fraction_is_of_texts_and_not_of_chunks() -> None:
    admission = Admission(1000)
    admission.way = Way.FRACTION
    texts = [b"%d" % i for i in range(64 * FRACTION)]
    taken = [[admission.left(leave(j, text=text)) for j in range(3)] for text in texts]
    assert all(len(set(chunks)) == 1 for chunks in taken)
    assert sum(chunks[0] for chunks in taken) == pytest.approx(64, abs=30)
