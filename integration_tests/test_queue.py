"""PolicyQueue inside vLLM's own BlockPool, against a second BlockPool that stays stock."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from kvplug.contract import BlockFact, EngineView, PolicyOptions, PrefixCachePolicy, Released
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.scheduler.blocks import BlockTracker
from kvplug.hosts.vllm.scheduler.queue import HitCollector, PolicyQueue
from kvplug_policies.prefix_cache.fifo import Fifo
from kvplug_policies.prefix_cache.lru import Lru

BLOCK = 16
ENGINE = EngineView(block_size=BLOCK, num_blocks=40)
SEEDS = range(5)
STEPS = 5000


# -- pools, policies and what drives them ----------------------------------------------------------


class Recorder(KVCacheMetricsCollector):
    """A metrics collector that writes down what it is told, with the content at that moment."""

    def __init__(self) -> None:
        super().__init__(sample_rate=1.0)
        self.told: list[tuple[str, int, bytes | None]] = []

    def on_block_allocated(self, block: KVCacheBlock) -> None:
        self.told.append(("allocated", block.block_id, block.block_hash))

    def on_block_accessed(self, block: KVCacheBlock) -> None:
        self.told.append(("accessed", block.block_id, block.block_hash))

    def on_block_evicted(self, block: KVCacheBlock) -> None:
        self.told.append(("evicted", block.block_id, block.block_hash))

    def reset(self) -> None:
        self.told.append(("reset", -1, None))

    def drain_events(self) -> list[Any]:
        self.told.append(("drained", -1, None))
        return ["an event"]


def stock_pool(blocks: int = 41) -> BlockPool:
    return BlockPool(
        blocks, enable_caching=True, hash_block_size=BLOCK, metrics_collector=Recorder()
    )


def policy_pool(
    policy: PrefixCachePolicy,
    blocks: int = 41,
    tracker: BlockTracker | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> BlockPool:
    pool = stock_pool(blocks)
    queue = PolicyQueue(pool.free_block_queue, policy, tracker, on_failure)
    compat.install_queue(pool, queue, HitCollector(queue, pool.metrics_collector))
    return pool


def build(policy: type[PrefixCachePolicy]) -> PrefixCachePolicy:
    return policy(policy.Options(), ENGINE)


def recorder(pool: BlockPool) -> Recorder:
    collector = pool.metrics_collector
    return collector._inner if isinstance(collector, HitCollector) else collector


def free_list(pool: BlockPool) -> list[int]:
    """Ids of the free blocks, in order. (Blocks themselves compare by their neighbours.)"""
    return [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]


def content(names: Sequence[str]) -> SimpleNamespace:
    """As much of a vLLM Request as caching its blocks takes."""
    return SimpleNamespace(block_hashes=[BlockHash(n.encode()) for n in names])


def cache(pool: BlockPool, blocks: list[KVCacheBlock], names: Sequence[str], done: int = 0) -> None:
    pool.cache_full_blocks(content(names), blocks, done, len(names), BLOCK, 0)


def cached_at(pool: BlockPool, name: str) -> KVCacheBlock | None:
    found = pool.get_cached_block(BlockHash(name.encode()), [0])
    return found[0] if found else None


@dataclass
class Running:
    blocks: list[KVCacheBlock]
    names: list[str]
    hit: int
    cached: bool


@dataclass
class Driver:
    """Serves random requests from a pool as vLLM's KV-cache manager does.

    Two drivers with one seed do the same as long as their pools decide the same. Requests share
    documents, so blocks are hit, pinned by several requests, and cached twice under one key.
    """

    pool: BlockPool
    seed: int
    evicts: bool = False
    resets: bool = True
    running: dict[int, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.choose = random.Random(self.seed)
        self.admitted = 0

    def step(self) -> tuple[Any, ...]:
        what = self.choose.random()
        if what < 0.48:
            return self.admit()
        if what < 0.55:
            return self.grow()
        if what < 0.975 or not (self.evicts or self.resets):
            return self.finish()
        if self.resets and (what > 0.992 or not self.evicts):
            return self.reset()
        return self.evict()

    def admit(self) -> tuple[Any, ...]:
        self.admitted += 1
        document, shared = self.choose.randrange(9), self.choose.randrange(1, 9)
        own = self.choose.randrange(0, 4)
        plain = self.choose.random() < 0.7
        cached_now = self.choose.random() < 0.6
        names = [f"document {document} block {i}" for i in range(shared)]
        names += [f"request {self.admitted} block {i}" for i in range(own)]
        hits: list[KVCacheBlock] = []
        for name in names[: len(names) - 1]:
            block = cached_at(self.pool, name)
            if block is None:
                break
            hits.append(block)
        new = len(names) - len(hits) + plain
        if new + sum(b.ref_cnt == 0 for b in hits) > self.pool.get_num_free_blocks():
            return self.finish()
        self.pool.touch(hits)
        blocks = hits + self.pool.get_new_blocks(new)
        request = Running(blocks, names, len(hits), cached_now)
        if cached_now:
            cache(self.pool, blocks, names, len(hits))
        self.running[self.admitted] = request
        return "admit", [b.block_id for b in blocks]

    def grow(self) -> tuple[Any, ...]:
        if not self.running or not self.pool.get_num_free_blocks():
            return ("nothing",)
        request = self.running[self.choose.choice(list(self.running))]
        request.blocks += self.pool.get_new_blocks(1)
        return "grow", request.blocks[-1].block_id

    def finish(self) -> tuple[Any, ...]:
        if not self.running:
            return ("nothing",)
        number = self.choose.choice(list(self.running))
        request = self.running.pop(number)
        if not request.cached:
            cache(self.pool, request.blocks, request.names, request.hit)
        self.pool.free_blocks(reversed(request.blocks))
        return "finish", number

    def evict(self) -> tuple[Any, ...]:
        ids = self.choose.sample(range(1, self.pool.num_gpu_blocks), 3)
        self.pool.evict_blocks(set(ids))
        return "evict", ids

    def reset(self) -> tuple[Any, ...]:
        while self.running:
            self.finish()
        assert self.pool.reset_prefix_cache()
        return ("reset",)


class Strict(PrefixCachePolicy):
    """Evicts at random, and holds the host to every sentence of the contract."""

    name = "strict"
    changes = "nothing good"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.choose = random.Random(11)
        self.candidates: set[int] = set()
        self.pinned_hits = 0
        self.asked = False

    def on_release(self, released: Released) -> None:
        assert len(set(released.ids)) == len(released.ids) > 0
        assert not self.candidates & set(released.ids), "released twice"
        self.candidates |= set(released.ids)

    def on_hit(self, ids: Sequence[int]) -> None:
        assert ids
        self.pinned_hits += sum(i not in self.candidates for i in ids)
        self.candidates -= set(ids)

    def on_remove(self, ids: Sequence[int]) -> None:
        self.candidates -= set(ids)

    def victims(self, n: int) -> list[int]:
        assert 0 < n <= len(self.candidates)
        return self.choose.sample(sorted(self.candidates), n)


class Mru(Lru):
    """The opposite of stock: gives up what was let go last."""

    name = "mru"

    def victims(self, n: int) -> list[int]:
        return list(self._order)[::-1][:n]


def check(pool: BlockPool) -> None:
    """The free list is a list, is complete, and holds exactly what nobody holds."""
    queue = pool.free_block_queue
    forward, block = [], queue.fake_free_list_head.next_free_block
    while block is not queue.fake_free_list_tail:
        forward.append(block)
        block = block.next_free_block
    backward, block = [], queue.fake_free_list_tail.prev_free_block
    while block is not queue.fake_free_list_head:
        backward.append(block)
        block = block.prev_free_block
    ids = [b.block_id for b in forward]
    assert ids == [b.block_id for b in reversed(backward)]
    assert len(set(ids)) == len(ids) == queue.num_free_blocks
    assert set(ids) == {b.block_id for b in pool.blocks if b.ref_cnt == 0 and not b.is_null}
    for b in pool.blocks:
        if b.ref_cnt:
            assert b.prev_free_block is None and b.next_free_block is None


class Handouts:
    """Checks every hand-out of a queue: no block twice, and none with content too early."""

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.with_content = 0
        self._popleft_n = pool.free_block_queue.popleft_n
        pool.free_block_queue.popleft_n = self

    def __call__(self, n: int) -> list[KVCacheBlock]:
        before = self.pool.free_block_queue.get_all_free_blocks()
        plain = sum(b.block_hash is None for b in before)
        taken = self._popleft_n(n)
        assert len({b.block_id for b in taken}) == len(taken) == n
        assert {b.block_id for b in taken} <= {b.block_id for b in before}
        with_content = sum(b.block_hash is not None for b in taken)
        assert with_content == max(0, n - plain), "content was given up beside blocks without any"
        self.with_content += with_content
        return taken


# -- lru makes stock's decisions -------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_lru_hands_out_the_blocks_stock_hands_out(seed: int) -> None:
    ours, stock = Driver(policy_pool(build(Lru)), seed), Driver(stock_pool(), seed)
    for step in range(STEPS):
        assert ours.step() == stock.step(), f"step {step}"
    assert free_list(ours.pool) == free_list(stock.pool)
    counters = ours.pool.free_block_queue.counters
    assert counters.evicted > 500 and counters.hits > 500
    assert counters.reordered == counters.errors == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_metrics_collector_hears_what_it_hears_in_stock(seed: int) -> None:
    ours, stock = Driver(policy_pool(build(Lru)), seed), Driver(stock_pool(), seed)
    for _ in range(600):
        ours.step(), stock.step()
    assert recorder(ours.pool).told == recorder(stock.pool).told
    verbs = {verb for verb, _, _ in recorder(stock.pool).told}
    assert verbs == {"allocated", "accessed", "evicted", "reset"}


def test_events_are_drained_from_the_metrics_collector() -> None:
    pool = policy_pool(build(Lru))
    assert pool.metrics_collector.drain_events() == ["an event"]
    assert recorder(pool).told == [("drained", -1, None)]


def test_without_a_metrics_collector_there_is_nothing_to_drain() -> None:
    pool = BlockPool(9, enable_caching=True, hash_block_size=BLOCK)
    queue = PolicyQueue(pool.free_block_queue, build(Lru))
    compat.install_queue(pool, queue, HitCollector(queue, None))
    blocks = pool.get_new_blocks(8)
    cache(pool, blocks, [f"{i}" for i in range(8)])
    pool.free_blocks(reversed(blocks))
    pool.touch(blocks[:1])
    pool.free_blocks(blocks[:1])
    pool.get_new_blocks(2)
    assert pool.metrics_collector.drain_events() == []
    assert queue.counters.evicted == 2 and queue.counters.errors == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_lru_gives_up_content_in_stock_order_when_content_is_also_evicted_by_id(seed: int) -> None:
    """Ids cannot be compared here, contents can.

    A block that `evict_blocks` empties stays where it is in stock's queue, so stock may give up
    content while an empty block waits further back. Ours hands the empty block out first and so
    evicts later: what it evicts must still be what stock evicts, in that order, and it must never
    lose content that stock keeps. Only content that both hold is hit or evicted by id, since
    a hit in one pool alone would rightly change the order.
    """
    pools = {"ours": policy_pool(build(Lru)), "stock": stock_pool()}
    held: dict[str, dict[int, list[KVCacheBlock]]] = {which: {} for which in pools}
    given_up: dict[str, list[bytes]] = {which: [] for which in pools}
    choose = random.Random(seed)
    later = 0

    def contents(which: str) -> set[bytes]:
        return {b.block_hash for b in pools[which].blocks if b.block_hash is not None}

    def by_content(pool: BlockPool, wanted: set[bytes]) -> list[KVCacheBlock]:
        return sorted(
            (b for b in pool.blocks if b.block_hash in wanted), key=lambda b: b.block_hash
        )

    for step in range(STEPS):
        what, size = choose.random(), choose.randrange(1, 7)
        both = sorted(contents("ours") & contents("stock"))
        some = set(choose.sample(both, min(len(both), choose.randrange(1, 4))))
        done = choose.choice(list(held["stock"])) if held["stock"] else None
        for which, pool in pools.items():
            mark = len(recorder(pool).told)
            if what < 0.4:
                if size > pool.get_num_free_blocks():
                    continue
                blocks = pool.get_new_blocks(size)
                given_up[which] += [
                    key for verb, _, key in recorder(pool).told[mark:] if verb == "evicted" and key
                ]
                cache(pool, blocks, [f"{step} block {i}" for i in range(size)])
                held[which][step] = blocks
            elif what < 0.47:
                pool.touch(hits := by_content(pool, some))
                held[which][step] = hits
            elif what < 0.52:
                pool.evict_blocks({b.block_id for b in by_content(pool, some)})
            elif done is not None:
                pool.free_blocks(reversed(held[which].pop(done)))
        check(pools["ours"])
        assert contents("stock") <= contents("ours")
        assert given_up["ours"] == given_up["stock"][: len(given_up["ours"])]
        later = max(later, len(given_up["stock"]) - len(given_up["ours"]))
    assert len(given_up["ours"]) > 300
    assert later > 0, "nothing made the two differ: the test does not test"


def test_an_emptied_block_is_handed_out_before_any_content() -> None:
    pool = policy_pool(build(Lru), blocks=9)
    blocks = pool.get_new_blocks(8)
    cache(pool, blocks, [f"{i}" for i in range(8)])
    pool.free_blocks(reversed(blocks))
    newest = blocks[0]
    pool.evict_blocks({newest.block_id})
    check(pool)
    assert free_list(pool)[0] == newest.block_id, "the list itself has it first"
    assert [b.block_id for b in pool.get_new_blocks(1)] == [newest.block_id]
    assert pool.free_block_queue.counters.evicted == 0


# -- invariants, whatever the policy ---------------------------------------------------------------


@pytest.mark.parametrize("evicts", [False, True], ids=["no-evict", "evict"])
@pytest.mark.parametrize("policy", [Lru, Fifo, Mru, Strict])
def test_no_policy_breaks_the_queue(policy: type[PrefixCachePolicy], evicts: bool) -> None:
    pool = policy_pool(build(policy))
    handouts = Handouts(pool)
    driver = Driver(pool, seed=5, evicts=evicts)
    for _ in range(STEPS):
        driver.step()
        check(pool)
    counters = pool.free_block_queue.counters
    assert counters.errors == 0
    assert counters.evicted == handouts.with_content > 300
    assert (counters.reordered > 0) == (policy is not Lru)


def test_a_policy_knows_exactly_the_free_blocks_with_content() -> None:
    policy = build(Strict)
    pool = policy_pool(policy)
    driver = Driver(pool, seed=3, evicts=True)
    for _ in range(STEPS):
        driver.step()
        pool.free_block_queue._flush_hits()
        with_content = {i for i in free_list(pool) if pool.blocks[i].block_hash is not None}
        assert policy.candidates == with_content
    assert policy.pinned_hits > 0
    assert pool.free_block_queue.policy is policy


def test_the_policy_decides() -> None:
    """Stock would take the front; a policy that says otherwise is obeyed, in its order."""
    pool = policy_pool(build(Mru), blocks=9)
    blocks = pool.get_new_blocks(8)
    cache(pool, blocks, [f"{i}" for i in range(6)])
    pool.free_blocks(reversed(blocks))
    last_first = [b.block_id for b in blocks[:6]]
    taken = [b.block_id for b in pool.get_new_blocks(5)]
    assert set(taken[:2]) == {blocks[6].block_id, blocks[7].block_id}
    assert taken[2:] == last_first[:3]
    counters = pool.free_block_queue.counters
    assert (counters.evicted, counters.reordered) == (3, 3)


def test_cached_blocks_that_were_free_already_are_candidates_from_the_start() -> None:
    pool = stock_pool(9)
    blocks = pool.get_new_blocks(5)
    cache(pool, blocks, [f"{i}" for i in range(5)])
    pool.free_blocks(reversed(blocks))
    order = free_list(pool)
    policy = build(Strict)
    queue = PolicyQueue(pool.free_block_queue, policy)
    compat.install_queue(pool, queue, HitCollector(queue, None))
    assert free_list(pool) == order
    assert policy.candidates == {b.block_id for b in blocks}
    check(pool)


def test_an_empty_queue_says_what_stock_says() -> None:
    pool = policy_pool(build(Lru), blocks=3)
    pool.get_new_blocks(2)
    with pytest.raises(ValueError, match="No free blocks available"):
        pool.free_block_queue.popleft()
    with pytest.raises(ValueError, match="Cannot get 1 free blocks"):
        pool.get_new_blocks(1)


def test_single_blocks_come_and_go_too() -> None:
    pool = policy_pool(build(Mru), blocks=4)
    queue = pool.free_block_queue
    blocks = pool.get_new_blocks(3)
    cache(pool, blocks, ["a", "b", "c"])
    for b in blocks:
        b.ref_cnt = 0
        queue.append(b)
    check(pool)
    assert queue.popleft() is blocks[2], "the policy decides on popleft too"
    assert queue.num_free_blocks == 2


# -- what a policy is told -------------------------------------------------------------------------


class Told(Lru):
    """Lru that writes down every call."""

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.calls: list[tuple[str, Any]] = []

    def on_release(self, released: Released) -> None:
        self.calls.append(("release", released))
        super().on_release(released)

    def on_hit(self, ids: Sequence[int]) -> None:
        self.calls.append(("hit", list(ids)))
        super().on_hit(ids)

    def on_remove(self, ids: Sequence[int]) -> None:
        self.calls.append(("remove", list(ids)))
        super().on_remove(ids)


def asking(*facts: BlockFact) -> Told:
    return build(type("Asking", (Told,), {"needs": frozenset(facts)}))  # type: ignore[return-value]


def tracked(request_id: str, blocks: list[KVCacheBlock], pool_size: int) -> BlockTracker:
    tracker = BlockTracker(pool_size)
    tracker.add(
        SimpleNamespace(request_id=request_id, num_prompt_tokens=70, priority=2, arrival_time=1.5)
    )
    tracker.update(
        SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=request_id, block_ids=([b.block_id for b in blocks],))
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[], new_block_ids=[], resumed_req_ids=set()
            ),
            finished_req_ids=set(),
        )
    )
    return tracker


@pytest.mark.parametrize(
    "facts",
    [
        (),
        (BlockFact.POSITION,),
        (BlockFact.KEY,),
        (BlockFact.REQUEST,),
        (BlockFact.PARENT,),
        (BlockFact.POSITION, BlockFact.KEY, BlockFact.REQUEST),
    ],
    ids=lambda facts: "+".join(facts) or "none",
)
def test_a_policy_gets_the_facts_it_asked_for_and_no_others(facts: tuple[BlockFact, ...]) -> None:
    policy = asking(*facts)
    pool = policy_pool(policy, blocks=9)
    blocks = pool.get_new_blocks(4)
    pool.free_block_queue._tracker = tracked("r", blocks, pool.num_gpu_blocks)
    cache(pool, blocks, ["a", "b", "c"])
    pool.free_blocks(reversed(blocks))
    ((verb, released),) = policy.calls
    assert verb == "release"
    assert released.ids == [blocks[2].block_id, blocks[1].block_id, blocks[0].block_id]
    assert released.positions == ([2, 1, 0] if BlockFact.POSITION in facts else None)
    keys = [bytes(blocks[i].block_hash) for i in (2, 1, 0)]
    assert released.keys == (keys if BlockFact.KEY in facts else None)
    before = [blocks[1].block_id, blocks[0].block_id, -1]
    assert released.parents == (before if BlockFact.PARENT in facts else None)
    if BlockFact.REQUEST in facts:
        assert released.request is not None
        assert (released.request.request_id, released.request.priority) == ("r", 2)
    else:
        assert released.request is None


def test_positions_and_requests_are_none_without_a_tracker() -> None:
    policy = asking(*BlockFact)
    pool = policy_pool(policy, blocks=9)
    blocks = pool.get_new_blocks(2)
    cache(pool, blocks, ["a", "b"])
    pool.free_blocks(reversed(blocks))
    released = policy.calls[0][1]
    assert released.positions is None and released.request is None and released.parents is None
    assert len(released.keys) == 2


def test_a_hit_is_told_before_what_follows_from_it() -> None:
    policy = asking()
    pool = policy_pool(policy, blocks=5)
    blocks = pool.get_new_blocks(2)
    cache(pool, blocks, ["a", "b"])
    pool.free_blocks(reversed(blocks))
    pool.touch(blocks)
    pool.free_blocks(reversed(blocks))
    a, b = (block.block_id for block in blocks)
    assert [(v, w if v == "hit" else w.ids) for v, w in policy.calls] == [
        ("release", [b, a]),
        ("hit", [a, b]),
        ("release", [b, a]),
    ]
    assert pool.free_block_queue.counters.hits == 2


def test_a_hit_on_a_pinned_block_is_told_too() -> None:
    """A second request uses what the first still computes: no candidate, and yet a hit."""
    policy = asking()
    pool = policy_pool(policy, blocks=5)
    (block,) = pool.get_new_blocks(1)
    cache(pool, [block], ["a"])
    pool.touch([block])
    pool.free_blocks([block])
    assert policy.calls == [], "one request still holds it"
    pool.free_blocks([block])
    assert policy.calls[0] == ("hit", [block.block_id])
    assert policy.calls[1][0] == "release"
    assert pool.free_block_queue.counters.hits == 1


def test_touching_a_block_without_content_is_no_hit() -> None:
    policy = asking()
    pool = policy_pool(policy, blocks=5)
    blocks = pool.get_new_blocks(1)
    pool.touch(blocks)
    pool.touch([pool.null_block])
    pool.free_blocks(blocks)
    pool.free_blocks(blocks)
    assert policy.calls == []


def test_an_eviction_is_told_once() -> None:
    policy = asking()
    pool = policy_pool(policy, blocks=3)
    blocks = pool.get_new_blocks(2)
    cache(pool, blocks, ["a", "b"])
    pool.free_blocks(reversed(blocks))
    pool.get_new_blocks(1)
    assert policy.calls[1:] == [("remove", [blocks[1].block_id])]


@pytest.mark.parametrize("in_use", [False, True])
def test_content_evicted_by_id_is_told_even_of_a_block_in_use(in_use: bool) -> None:
    policy = asking()
    pool = policy_pool(policy, blocks=5)
    blocks = pool.get_new_blocks(2)
    cache(pool, blocks, ["a", "b"])
    if not in_use:
        pool.free_blocks(reversed(blocks))
    del policy.calls[:]
    pool.evict_blocks({blocks[0].block_id})
    assert policy.calls == [("remove", [blocks[0].block_id])]
    check(pool)


def test_a_reset_takes_everything() -> None:
    policy = asking()
    pool = policy_pool(policy, blocks=5)
    blocks = pool.get_new_blocks(4)
    cache(pool, blocks, ["a", "b", "c", "d"])
    pool.free_blocks(reversed(blocks))
    assert pool.reset_prefix_cache()
    assert policy.calls[1][0] == "remove"
    assert sorted(policy.calls[1][1]) == sorted(b.block_id for b in blocks)
    pool.get_new_blocks(4)
    assert pool.free_block_queue.counters.evicted == 0
    assert len(policy.calls) == 2


# -- a policy that fails ---------------------------------------------------------------------------

VERBS = ("on_release", "on_hit", "on_remove", "victims")
WRONG_ANSWERS: dict[str, Callable[[list[int]], Any]] = {
    "too-few": lambda ids: ids[:-1],
    "too-many": lambda ids: [*ids, 99],
    "none": lambda ids: None,
    "duplicates": lambda ids: [ids[0]] * (len(ids) + (len(ids) == 1)),
    "unknown": lambda ids: [*ids[:-1], 10_000],
    "in-use-or-null": lambda ids: [*ids[:-1], 0],
    "unhashable": lambda ids: [[i] for i in ids],
    "text": lambda ids: [str(i) for i in ids],
    "floats": lambda ids: [float(i) for i in ids],
    "nan": lambda ids: [float("nan")] * len(ids),
    "a flag": lambda ids: [True, *ids[1:]],
    "without end": lambda ids: itertools.count(1),
    "a number": lambda ids: 3,
    "an exit": lambda ids: sys.exit(1),
    "an index that fails": lambda ids: [*ids[:-1], Unindexed()],
}


class Unindexed:
    def __index__(self) -> int:
        raise KeyboardInterrupt


class OddInt(int):
    """Equal to nothing."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __hash__(self) -> int:
        return 7

    def __index__(self) -> int:
        raise RuntimeError("no index")


class LyingList(list[int]):
    def __len__(self) -> int:
        return 1000


RIGHT_ANSWERS: dict[str, Callable[[list[int]], Any]] = {
    "numpy": lambda ids: np.array(ids),
    "torch": lambda ids: list(torch.tensor(ids)),
    "a generator": lambda ids: (i for i in ids),
    "keys": lambda ids: dict.fromkeys(ids),
    "a subclass": lambda ids: [OddInt(i) for i in ids],
    "a list of another length": lambda ids: LyingList(ids),
}

BREAKS: tuple[BaseException, ...] = (
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    GeneratorExit(),
    MemoryError(),
)


def failing(verb: str, nth: int, error: BaseException | None = None) -> PrefixCachePolicy:
    """Lru that raises in its nth call of a verb and must not be called again."""
    policy = build(Lru)
    calls = 0
    failed = False

    def watched(name: str, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(what: Any) -> Any:
            nonlocal calls, failed
            assert not failed, "called after it failed"
            calls += name == verb
            if name == verb and calls == nth:
                failed = True
                raise error or RuntimeError(f"{name} is broken")
            return plain(what)

        return call

    for name in VERBS:
        setattr(policy, name, watched(name, getattr(policy, name)))
    return policy


def lying(answer: Callable[[list[int]], Any], nth: int) -> PrefixCachePolicy:
    """Lru whose nth answer is wrong."""
    policy = build(Lru)
    truth, calls = policy.victims, 0

    def victims(n: int) -> Any:
        nonlocal calls
        calls += 1
        return answer(truth(n)) if calls == nth else truth(n)

    policy.victims = victims  # type: ignore[method-assign]
    return policy


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What the host logs; vLLM's loggers do not propagate."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.kvplug")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def stays_stock(policy: PrefixCachePolicy, log: list[logging.LogRecord], says: str) -> None:
    causes: list[BaseException] = []
    ours = Driver(policy_pool(policy, on_failure=causes.append), seed=8)
    stock = Driver(stock_pool(), seed=8)
    queue = ours.pool.free_block_queue
    failed_at = None
    for step in range(1500):
        assert ours.step() == stock.step(), f"step {step}, failed at step {failed_at}"
        assert free_list(ours.pool) == free_list(stock.pool)
        if failed_at is None and queue.policy is None:
            failed_at = step
    assert failed_at is not None and failed_at < 1000, "it has to go on for a while afterwards"
    assert queue.counters.errors == 1
    assert len(causes) == 1 and says in str(causes[0])
    (record,) = log
    assert record.levelno == logging.ERROR
    assert policy.name in record.getMessage() and str(causes[0]) in record.getMessage()
    assert recorder(ours.pool).told == recorder(stock.pool).told


@pytest.mark.parametrize("nth", [1, 20])
@pytest.mark.parametrize("verb", VERBS)
def test_a_policy_that_raises_leaves_stock_behind(
    verb: str, nth: int, log: list[logging.LogRecord]
) -> None:
    stays_stock(failing(verb, nth), log, f"{verb} is broken")


@pytest.mark.parametrize("nth", [1, 20])
@pytest.mark.parametrize("answer", WRONG_ANSWERS)
def test_a_policy_that_answers_wrongly_leaves_stock_behind(
    answer: str, nth: int, log: list[logging.LogRecord]
) -> None:
    stays_stock(lying(WRONG_ANSWERS[answer], nth), log, "")


@pytest.mark.parametrize("verb", VERBS)
def test_a_policy_that_would_end_the_process_leaves_stock_behind(
    verb: str, log: list[logging.LogRecord]
) -> None:
    for error in BREAKS:
        log.clear()
        stays_stock(failing(verb, 5, error), log, type(error).__name__)


@pytest.mark.parametrize("answer", RIGHT_ANSWERS)
def test_answers_in_other_types_are_answers(answer: str) -> None:
    policy, plain = build(Lru), build(Lru)
    truth = policy.victims
    policy.victims = lambda n: RIGHT_ANSWERS[answer](truth(n))  # type: ignore[method-assign]
    ours, same = (Driver(policy_pool(p), seed=4) for p in (policy, plain))
    for _ in range(400):
        assert ours.step() == same.step()
    counters = ours.pool.free_block_queue.counters
    assert counters == same.pool.free_block_queue.counters and counters.evicted > 20
    assert counters.errors == 0


def test_what_a_policy_is_handed_is_its_own() -> None:
    """One that empties it changes nothing but itself."""

    class Emptying(Lru):
        needs = frozenset(BlockFact)

        def on_release(self, released: Released) -> None:
            super().on_release(released)
            for given in (released.ids, released.positions, released.keys, released.parents):
                if given is not None:
                    given.clear()  # type: ignore[attr-defined]

        def on_hit(self, ids: Sequence[int]) -> None:
            super().on_hit(ids)
            ids.clear()  # type: ignore[attr-defined]

        def on_remove(self, ids: Sequence[int]) -> None:
            super().on_remove(ids)
            ids.clear()  # type: ignore[attr-defined]
            self.answer.clear()

        def victims(self, n: int) -> list[int]:
            self.answer = super().victims(n)
            return self.answer

        answer: ClassVar[list[int]] = []

    tracker = BlockTracker(41)
    ours = Driver(policy_pool(build(Emptying), tracker=tracker), seed=6)
    same = Driver(policy_pool(build(Lru)), seed=6)
    for _ in range(600):
        assert ours.step() == same.step()
        check(ours.pool)
    assert ours.pool.free_block_queue.counters == same.pool.free_block_queue.counters


@pytest.mark.parametrize("verb", VERBS)
def test_after_a_failure_the_front_of_the_list_goes_first(verb: str) -> None:
    """A policy unlike stock leaves the list as stock keeps it: in order of release."""
    policy = build(Mru)
    pool = policy_pool(policy)
    driver = Driver(pool, seed=2, resets=False)
    for _ in range(400):
        driver.step()

    def broken(what: Any) -> Any:
        raise RuntimeError("broken")

    setattr(policy, verb, broken)
    queue = pool.free_block_queue
    while queue.policy is not None:
        driver.step()
        check(pool)
    for _ in range(400):
        front = free_list(pool)
        if len(front) >= 3:
            assert [b.block_id for b in queue.popleft_n(3)] == front[:3]
            queue.prepend_n([pool.blocks[i] for i in front[:3]])
        driver.step()
        check(pool)
    assert queue.counters.errors == 1
    evicted = queue.counters.evicted
    for _ in range(200):
        driver.step()
    assert queue.counters.evicted == evicted, "stock decides now; nothing is the policy's doing"


def test_a_failure_needs_no_callback(log: list[logging.LogRecord]) -> None:
    pool = policy_pool(failing("on_release", 1), blocks=5)
    blocks = pool.get_new_blocks(2)
    cache(pool, blocks, ["a", "b"])
    pool.free_blocks(reversed(blocks))
    assert pool.free_block_queue.policy is None
    assert len(log) == 1


def test_after_a_failure_hits_are_counted_and_do_not_pile_up() -> None:
    pool = policy_pool(failing("victims", 1))
    driver = Driver(pool, seed=1, resets=False)
    queue = pool.free_block_queue
    while queue.policy is not None:
        driver.step()
    hits = queue.counters.hits
    for _ in range(3000):
        driver.step()
    assert queue.counters.hits > hits
    assert len(queue._hits) < 100
