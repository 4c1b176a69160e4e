"""The simulator with the storage rules of vLLM's pool, on traces small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvplug.contract import BlockFact, EngineView, PolicyOptions, PrefixCachePolicy, Released
from kvplug.hosts.trace.pool import PoolReplay
from kvplug.hosts.trace.simulator import PolicyFailed, Replay
from kvplug.hosts.trace.traces import Trace
from kvplug_policies.prefix_cache.fifo import Fifo
from kvplug_policies.prefix_cache.lru import Lru

SIZE = 16


def trace(*requests: tuple[list[int], int, int]) -> Trace:
    """Requests of (all full blocks, prompt tokens, output tokens)."""
    ids = [i for blocks, _, _ in requests for i in blocks]
    return Trace(
        name="t",
        off=np.cumsum([0, *(len(blocks) for blocks, _, _ in requests)]),
        ids=np.array(ids),
        arrival=np.arange(float(len(requests))),
        prompt_tokens=np.array([prompt for _, prompt, _ in requests]),
        output_tokens=np.array([output for _, _, output in requests]),
        session=np.zeros(len(requests), dtype=np.int64),
        block_size=SIZE,
        num_distinct=max(ids) + 1,
    )


def hits(found: Trace, policy: type[PrefixCachePolicy], capacity: int) -> list[int]:
    replay = PoolReplay(found)
    built = policy(policy.Options(), replay.engine(capacity))
    return [hit for hit, _ in replay._serve(built, capacity)]


def even(*blocks: int) -> tuple[list[int], int, int]:
    """A request that leaves no block half full: its last token is never computed."""
    return list(blocks), len(blocks) * SIZE, 1


class Scripted(Lru):
    """Gives up the blocks it is told to, and notes which ones were hit."""

    name = "scripted"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.script: list[list[int]] = []
        self.hit: list[list[int]] = []

    def on_hit(self, ids: Sequence[int]) -> None:
        self.hit.append(list(ids))
        super().on_hit(ids)

    def victims(self, n: int) -> list[int]:
        assert len(self.script[0]) == n
        return self.script.pop(0)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    twice = trace(even(0, 1, 2), even(0, 1, 2), ([0, 1, 2], 3 * SIZE + 1, 1))
    assert hits(twice, Lru, 9) == [0, 2, 3]


def test_an_answers_blocks_are_found_by_the_next_turn() -> None:
    turns = trace(([0, 1], SIZE + 4, SIZE), ([0, 1, 2], 3 * SIZE - 3, 8))
    assert hits(turns, Lru, 9) == [0, 2]


def test_a_block_that_is_not_full_takes_room_while_it_is_written() -> None:
    """Four blocks: with the half one, the second request needs a block of the first."""
    full = trace(even(0, 1), even(2, 3), ([0, 1], 2 * SIZE + 1, 1))
    part = trace(even(0, 1), ([2, 3], 2 * SIZE + 1, 2), ([0, 1], 2 * SIZE + 1, 1))
    assert hits(full, Lru, 4) == [0, 0, 2]
    assert hits(part, Lru, 4) == [0, 0, 1]
    assert hits(part, Lru, 5) == [0, 0, 2]


def test_a_block_behind_a_gap_is_stored_again_and_both_copies_stay() -> None:
    longer = ([0, 1, 2], 3 * SIZE + 1, 1)
    found = trace(even(0, 1, 2), even(3), even(4), even(5), even(0, 1, 2), longer)
    replay = PoolReplay(found)
    policy = Scripted(Scripted.Options(), replay.engine(5))
    # The head of 0, 1, 2 goes for 5; then all but 1 and 2 go, which are useless without it.
    policy.script = [[0], [0, 3, 4], [3]]
    assert list(replay._serve(policy, 5)) == [(0, 0), (0, 0), (0, 0), (0, 1), (0, 3), (3, 1)]
    assert policy.hit == [[0, 1, 2]], "the older copies of 1 and 2"
    assert policy.script == []


class Curious(Fifo):
    name = "curious"
    needs = frozenset(BlockFact)

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.told: list[Any] = []

    def on_finished(self, request: Any, keys: Sequence[bytes], num_output_tokens: int) -> None:
        self.told.append(("finished", request.request_id, list(keys), num_output_tokens))

    def on_release(self, released: Released) -> None:
        assert released.request is not None
        self.told.append(
            ("released", released.positions, released.keys, released.parents, released.ids)
        )
        super().on_release(released)


def test_a_policy_is_told_what_it_asks_for() -> None:
    replay = PoolReplay(trace(even(0, 1), ([], 3, 4)))
    policy = Curious(Curious.Options(), replay.engine(4))
    assert list(replay._serve(policy, 4)) == [(0, 0), (0, 0)]
    names = [i.to_bytes(8, "little") for i in (0, 1)]
    assert policy.told == [
        ("finished", "0", names, 1),
        ("released", [1, 0], names[::-1], [0, -1], [1, 0]),
        ("finished", "1", [], 4),
    ]


def test_a_request_longer_than_the_pool_is_an_error() -> None:
    replay = PoolReplay(trace(even(0, 1, 2)))
    with pytest.raises(PolicyFailed):
        replay.run(Lru(Lru.Options(), replay.engine(2)), 2)


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_evicted_out_of_order_both_simulators_agree(seed: int) -> None:
    """LRU leaves no gaps; prompts one token past their blocks leave the other rules nothing."""
    choose = np.random.default_rng(seed)
    known: dict[tuple[int, ...], int] = {}
    requests = []
    for _ in range(300):
        text = [int(choose.integers(3))] + [int(t) for t in choose.integers(2, size=5)]
        text = text[: choose.integers(2, 7)]
        blocks = [known.setdefault(tuple(text[: i + 1]), len(known)) for i in range(len(text))]
        requests.append((blocks, len(blocks) * SIZE + 1, 1))
    found = trace(*requests)
    ours, theirs = PoolReplay(found), Replay(found)
    for capacity in (8, 15, 40):
        # The token past the last block lies in a block that is never full.
        ours_hits = ours.run(Lru(Lru.Options(), ours.engine(capacity + 1)), capacity + 1).hits
        assert ours_hits == theirs.run(Lru(Lru.Options(), theirs.engine(capacity)), capacity).hits
        assert ours_hits > 100
