"""The simulator against the published definitions, written out a second time without any care for
speed, and against the published figures where the traces are at hand."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracegen import conversations, requests_of

from kvplug.contract import (
    BlockFact,
    EngineView,
    Kind,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
    RequestView,
)
from kvplug.hosts.trace import traces
from kvplug.hosts.trace.minimum import Minimum, next_use
from kvplug.hosts.trace.simulator import PolicyFailed, Replay
from kvplug.hosts.trace.traces import Trace
from kvplug.registry import plugins

PUBLISHED = {
    ("mooncake_conversation", "1%"): (1828, ".0525 .0513 .0979 .2399"),
    ("mooncake_conversation", "2%"): (3656, ".0793 .0767 .1243 .3119"),
    ("mooncake_conversation", "5%"): (9140, ".1958 .1754 .1811 .3664"),
    ("mooncake_conversation", "10%"): (18279, ".2789 .2481 .2393 .3664"),
    ("mooncake_synthetic", "1%"): (439, ".0381 .0389 .0469 .1593"),
    ("mooncake_synthetic", "5%"): (2196, ".1566 .1521 .1436 .3903"),
    ("mooncake_synthetic", "10%"): (4392, ".2623 .2468 .2400 .5057"),
    ("sharegpt_3k", "1%"): (2313, ".1495 .1387 .0510 .4967"),
    ("sharegpt_3k", "2%"): (4626, ".3906 .2954 .0760 .5867"),
    ("tau_airline", "1%"): (386, ".5426 .5175 .5239 .5831"),
    ("tau_airline", "2%"): (772, ".7279 .6335 .5725 .8081"),
    ("tau_airline", "5%"): (1930, ".9076 .8096 .5931 .9225"),
}
"""LRU, FIFO, LFU and MIN of the traces' own page."""

BASELINES = ("lru", "fifo", "lfu", "min")


def build(name: str, trace: Trace, engine: EngineView) -> PrefixCachePolicy:
    if name == "min":
        return Minimum(trace, engine)
    policy = plugins().registry.get(Kind.PREFIX_CACHE, name)
    assert policy is not None and issubclass(policy, PrefixCachePolicy)
    return policy(policy.Options(), engine)


def hits(name: str, trace: Trace, capacity: int) -> int:
    replay = Replay(trace)
    return replay.run(build(name, trace, replay.engine(capacity)), capacity).hits


class Book:
    """What the definitions speak of, kept by hand."""

    def __init__(self, requests: list[list[int]]):
        self.requests = requests
        self.now = 0
        self.used: dict[int, int] = {}
        self.inserted: dict[int, int] = {}
        self.references: Counter[int] = Counter()
        self.depth = {b: i for r in requests for i, b in enumerate(r)}

    def next_use(self, block: int) -> int:
        later = range(self.now, len(self.requests))
        return next((r for r in later if block in self.requests[r]), len(self.requests))


ORDERS: dict[str, Callable[[Book, int], Any]] = {
    "lru": lambda book, b: (book.used[b], -book.depth[b]),
    "fifo": lambda book, b: (book.inserted[b], -book.depth[b]),
    "lfu": lambda book, b: (book.references[b], book.used[b], -book.depth[b]),
    "min": lambda book, b: (-book.next_use(b), -book.depth[b]),
}


def by_definition(requests: list[list[int]], capacity: int, order: str) -> int:
    book, cached, found = Book(requests), set[int](), 0
    for now, request in enumerate(requests):
        book.now = now
        mine = request[:capacity]
        for block in mine:
            if block not in cached:
                break
            found += 1
        others = sorted(cached - set(mine), key=lambda b: ORDERS[order](book, b))
        for victim in others[: max(0, len(cached | set(mine)) - capacity)]:
            cached.remove(victim)
            del book.inserted[victim]
        for block in mine:
            if block not in cached:
                book.inserted[block] = now
            book.used[block] = now
            book.references[block] += 1
        cached |= set(mine)
        assert len(cached) <= capacity
    return found


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("seed", range(8))
def test_baselines_are_their_definitions(name: str, seed: int) -> None:
    trace = conversations(seed)
    for capacity in (1, 2, 5, 8, 13, 21, 34, 400):
        assert hits(name, trace, capacity) == by_definition(requests_of(trace), capacity, name)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_hits_more_than_min_and_none_more_than_a_cache_that_holds_all(seed: int) -> None:
    trace = conversations(seed, requests=200)
    everything = trace.num_distinct
    best = {capacity: hits("min", trace, capacity) for capacity in (4, 12, 30, everything)}
    for name in plugins().registry.names(Kind.PREFIX_CACHE):
        if name == "record":
            continue
        for capacity, most in best.items():
            found = hits(name, trace, capacity)
            assert found <= most, (name, capacity)
            if capacity == everything:
                assert found == most == len(trace.ids) - everything


@pytest.mark.parametrize(("trace", "share"), PUBLISHED, ids=lambda x: x)
def test_published_figures_to_the_fourth_digit(trace: str, share: str) -> None:
    folder = os.environ.get("KVPLUG_TRACES")
    if not folder or not (path := Path(folder) / f"{trace}.npz").is_file():
        pytest.skip("KVPLUG_TRACES names no folder with this trace")
    loaded = traces.read(path)
    capacity, figures = PUBLISHED[trace, share]
    assert loaded.capacity(share) == capacity
    replay = Replay(loaded)
    found = [
        replay.run(build(name, loaded, replay.engine(capacity)), capacity).hit_rate
        for name in BASELINES
    ]
    assert [f"{rate:.4f}".removeprefix("0") for rate in found] == figures.split()


# -- what policies are told ------------------------------------------------------------------------


class Told(PrefixCachePolicy):
    """LRU that writes down what it hears."""

    name = "told"
    changes = "nothing"

    def __init__(self, *facts: BlockFact) -> None:
        super().__init__(PolicyOptions(), EngineView(16))
        self.needs = frozenset(facts)
        self.heard: list[Any] = []
        self.order: list[int] = []

    def on_release(self, released: Released) -> None:
        self.heard.append(released)
        self.order += released.ids

    def on_hit(self, ids: Sequence[int]) -> None:
        self.heard.append(("hit", list(ids)))
        self.on_remove(ids)

    def on_remove(self, ids: Sequence[int]) -> None:
        self.order = [b for b in self.order if b not in ids]

    def victims(self, n: int) -> list[int]:
        return self.order[:n]

    def on_finished(
        self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int
    ) -> None:
        self.heard.append(("finished", request.request_id, list(keys), num_output_tokens))

    def on_stop(self) -> None:
        self.heard.append("stop")


def small_trace(
    off: Sequence[int] = (0, 3, 5, 5),
    ids: Sequence[int] = (0, 1, 2, 0, 3),
    session: Sequence[int] = (4, 5, 4),
) -> Trace:
    return Trace(
        name="small",
        off=np.array(off, dtype=np.int64),
        ids=np.array(ids, dtype=np.int64),
        arrival=np.array([0.5, 1.5, 2.0]),
        prompt_tokens=np.array([50, 33, 4], dtype=np.int64),
        output_tokens=np.array([7, 8, 9], dtype=np.int64),
        session=np.array(session, dtype=np.int64),
        block_size=16,
        num_distinct=4,
    )


def test_policies_are_told_what_they_asked_for_and_nothing_else() -> None:
    policy = Told(*BlockFact)
    result = Replay(small_trace()).run(policy, 10)
    assert (result.hits, result.references, result.evicted) == (1, 5, 0)
    key = [i.to_bytes(8, "little") for i in range(4)]
    first, second = (
        RequestView(str(i), n, session_id=s, arrival=t)
        for i, n, s, t in (
            (0, 50, "4", 0.5),
            (1, 33, "5", 1.5),
        )
    )
    assert policy.heard == [
        ("finished", "0", key[:3], 7),
        Released([2, 1, 0], [2, 1, 0], [key[2], key[1], key[0]], first, [1, 0, -1]),
        ("hit", [0]),
        ("finished", "1", [key[0], key[3]], 8),
        Released([3, 0], [1, 0], [key[3], key[0]], second, [0, -1]),
        ("finished", "2", [], 9),
        "stop",
    ]
    plain = Told()
    Replay(small_trace()).run(plain, 10)
    assert plain.heard == [Released([2, 1, 0]), ("hit", [0]), Released([3, 0]), "stop"]


def test_sessions_are_none_where_the_source_names_none() -> None:
    policy = Told(BlockFact.REQUEST)
    Replay(small_trace(session=[0, 0, 0])).run(policy, 10)
    assert [r.request.session_id for r in policy.heard if isinstance(r, Released)] == [None, None]


def test_the_engine_a_policy_is_built_for() -> None:
    engine = Replay(small_trace()).engine(7)
    assert (engine.num_blocks, engine.block_size, engine.host) == (7, 16, "trace")


def test_what_is_cached_behind_a_gap_is_no_hit_and_not_stored_twice() -> None:
    class Head(Told):
        """Gives up the head of a prefix first."""

        def victims(self, n: int) -> list[int]:
            return self.order[::-1][:n]

    trace = small_trace(off=[0, 3, 4, 7], ids=[0, 1, 2, 3, 0, 1, 2])
    policy = Head()
    result = Replay(trace).run(policy, 3)
    assert result.hits == 0 and result.evicted == 2
    # Slot 0 changed hands twice; 1 and 2 were cached throughout, and are pinned as such.
    assert policy.heard == [
        Released([2, 1, 0]),
        Released([0]),
        ("hit", [1, 2]),
        Released([2, 1, 0]),
        "stop",
    ]


def test_a_request_longer_than_the_cache_keeps_its_head() -> None:
    policy = Told(BlockFact.POSITION)
    result = Replay(small_trace()).run(policy, 2)
    assert result.references == 5
    assert [r.positions for r in policy.heard if isinstance(r, Released)] == [[1, 0], [1, 0]]


# -- policies that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([], r"victims\(1\) returned 0 ids"),
        ([0, 1], r"victims\(1\) returned 2 ids"),
        ([0], "blocks in use"),
        ([-1], "without content"),
        ([9], "IndexError"),
    ],
)
def test_a_wrong_victim_is_named(answer: list[int], says: str) -> None:
    class Wrong(Told):
        def victims(self, n: int) -> list[int]:
            return answer

    with pytest.raises(PolicyFailed, match=says) as failed:
        Replay(small_trace()).run(Wrong(), 3)
    assert "policy told failed on small at 3 blocks" in str(failed.value)


def test_an_exception_of_a_policy_is_named() -> None:
    class Broken(Told):
        def on_hit(self, ids: Sequence[int]) -> None:
            raise RuntimeError("no idea")

    with pytest.raises(PolicyFailed, match=re.escape("RuntimeError: no idea")):
        Replay(small_trace()).run(Broken(), 3)


# -- the rest --------------------------------------------------------------------------------------


def test_next_use_is_the_next_request_with_the_block() -> None:
    trace = conversations(5, requests=60)
    requests = requests_of(trace)
    expected = [
        next((j for j in range(i + 1, len(requests)) if b in requests[j]), len(requests))
        for i, r in enumerate(requests)
        for b in r
    ]
    assert next_use(trace).tolist() == expected


def test_progress_adds_up() -> None:
    trace = conversations(1, requests=700)
    told: list[int] = []
    replay = Replay(trace)
    replay.run(build("lru", trace, replay.engine(8)), 8, step=told.append)
    assert sum(told) == 700 and len(told) == 3
