"""Policies and tiers inside vLLM's own offloading framework: each part alone, then an engine."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from kvplug.contract import TierError
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.offload import orders
from kvplug.hosts.vllm.offload.tier import KVPlugTier
from kvplug.hosts.vllm.offload.worker import CopyWorker, own_rows
from kvplug_lab.engine.trial import TrialRequest, TrialResult

MODULE = "kvplug.hosts.vllm.offload.orders"


def key(i: int) -> Any:
    return i.to_bytes(32, "big") + bytes(4)


def context(name: str = "r") -> ReqContext:
    return ReqContext(name)


class Store:
    """vLLM's manager of host memory, with requests that store and load chunks."""

    def __init__(self, order: str, chunks: int):
        self.manager = CPUOffloadingManager(chunks, order, MODULE)

    def request(self, ids: Sequence[int]) -> int:
        """One request's chunks: loads the run there is, stores the rest. Returns chunks loaded."""
        own, keys = context(), [key(i) for i in ids]
        self.manager.on_new_request(own)
        hits = 0
        while hits < len(keys) and self.manager.lookup(keys[hits], own) is LookupResult.HIT:
            hits += 1
        if hits:
            self.manager.prepare_load(keys[:hits], own)
            self.manager.complete_load(keys[:hits], own)
        if self.manager.prepare_store(keys, own) is not None:
            self.manager.complete_store(keys, own)
        self.manager.on_request_finished(own)
        return hits

    def there(self, ids: Sequence[int]) -> list[bool]:
        own = context("look")
        return [self.manager.lookup(key(i), own) is LookupResult.HIT for i in ids]


def test_its_own_lru_evicts_as_vllms_does() -> None:
    rng = np.random.default_rng(0)
    mine, theirs = Store("kvplug_lru", 12), Store("lru", 12)
    for _ in range(300):
        first = int(rng.zipf(1.4)) % 12 * 4
        ids = list(range(first, first + int(rng.integers(1, 5))))
        assert mine.request(ids) == theirs.request(ids)
    every = range(48)
    assert mine.there(every) == theirs.there(every)


@pytest.mark.parametrize("name", ["s3fifo", "lfu", "tree", "foresight", "kvplug_arc"])
def test_every_order_keeps_to_the_room_there_is(name: str) -> None:
    store, rng = Store(name, 8), np.random.default_rng(1)
    for _ in range(120):
        first = int(rng.zipf(1.3)) % 10 * 3
        store.request(range(first, first + int(rng.integers(1, 4))))
        assert sum(store.there(range(40))) <= 8
    assert sum(store.there(range(40))) == 8
    store.manager.reset_cache()
    assert not any(store.there(range(40)))
    assert store.request([1, 2]) == 0 and store.request([1, 2]) == 2


def test_a_scan_does_not_flush_what_is_used_again_under_s3fifo() -> None:
    found = {}
    for name in ("s3fifo", "lru"):
        store = Store(name, 10)
        for _ in range(3):
            store.request([0, 1, 2])
        for i in range(100, 120):
            store.request([i])
        found[name] = all(store.there([0, 1, 2]))
    assert found == {"s3fifo": True, "lru": False}


def chunk(ref_cnt: int = 0) -> ChunkStatus:
    made = ChunkStatus(0)
    made.ref_cnt = ref_cnt
    return made


def test_both_forms_of_insert_and_what_is_protected_or_copied_stays() -> None:
    policy = orders.order("fifo")(4)
    own = context()
    own.set_offload_key_position(key(1), 32)
    policy.insert(key(0), chunk())
    policy.insert(key(1), chunk(), own)  # The form of vLLM 0.33.
    policy.insert(key(2), chunk(-1))
    policy.on_request_access([key(0)], own)
    assert policy.evict(3, set()) is None, "one is being written"
    assert policy.evict(2, {key(0)}) is None
    policy.mark_non_evictable(key(0))
    assert policy.evict(2, set()) is None
    found = policy.evict(1, set())
    assert found is not None and [k for k, _ in found] == [key(1)]
    policy.mark_evictable(key(2))
    policy.mark_evictable(key(0))
    policy.remove(key(2))
    policy.remove(key(2))
    assert policy.get(key(2)) is None and policy.get(key(0)) is not None
    assert policy.evict(0, set()) == []


def test_what_is_protected_stays_though_it_would_go_first() -> None:
    policy = orders.order("fifo")(4)
    for i in range(3):
        policy.insert(key(i), chunk())
        policy.touch([key(i)], context())
    found = policy.evict(1, {key(0)})
    assert found is not None and [k for k, _ in found] == [key(1)]
    assert policy.get(key(0)) is not None


def test_a_policy_that_fails_leaves_the_oldest_first(caplog: pytest.LogCaptureFixture) -> None:
    policy = orders.order("lfu")(8)
    for i in range(4):
        policy.insert(key(i), chunk())
    assert policy._order is not None
    policy._order.target.victims = lambda n: [0] * n
    policy.touch([key(0)], context())
    found = policy.evict(2, set())
    assert found is not None and [k for k, _ in found] == [key(1), key(2)]
    assert "lfu failed" in caplog.text
    policy.insert(key(9), chunk())
    assert policy.evict(3, set()) is not None


def test_no_such_order_is_refused_by_name() -> None:
    with pytest.raises(DeploymentError, match=r"eviction_policy.*no_such_order"):
        orders.no_such_order  # noqa: B018


# -- the worker ------------------------------------------------------------------------------------


def caches(blocks: int = 10) -> CanonicalKVCaches:
    rng = torch.Generator().manual_seed(3)
    tensors = [
        torch.randint(-128, 128, (blocks, size), generator=rng).to(torch.int8) for size in (12, 20)
    ]
    made = [CanonicalKVCacheTensor(tensor, tensor.shape[1]) for tensor in tensors]
    return CanonicalKVCaches(made, [])


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_blocks_return_from_the_part_of_a_chunk_they_went_to(per_chunk: int) -> None:
    pool = caches()
    before = [own.tensor.clone() for own in pool.tensors]
    rows = own_rows(pool, 4, per_chunk)
    worker = CopyWorker(pool, rows, per_chunk)
    blocks = [7, 2, 9, 4][: 2 * per_chunk + 1 if per_chunk == 1 else 4]
    first = per_chunk - 1
    chunks = list(range(3, 3 - -(-(first + len(blocks)) // per_chunk), -1))
    gpu = GPULoadStoreSpec(blocks, [len(blocks)], [first])
    assert worker.submit_store(1, gpu, CPULoadStoreSpec(chunks))
    for own, row in zip(before, rows, strict=True):
        part = row.view(4, per_chunk, -1)[chunks[0], first]
        assert torch.equal(part, own[blocks[0]]), "the first block's place in its chunk"
    for own in pool.tensors:
        own.tensor.zero_()
    back = GPULoadStoreSpec(blocks[::-1], [len(blocks)], [first])
    assert worker.submit_load(2, CPULoadStoreSpec(chunks), back, expedited=True)
    done = worker.get_finished()
    assert [(r.job_id, r.success, r.transfer_size) for r in done] == [
        (1, True, 32 * len(blocks)),
        (2, True, 32 * len(blocks)),
    ]
    assert worker.get_finished() == []
    for own, was in zip(pool.tensors, before, strict=True):
        assert torch.equal(own.tensor[blocks[::-1]], was[blocks])
    worker.wait({1, 2})
    wrong = GPULoadStoreSpec([1, 2], [2], [0])
    assert worker.submit_store(3, wrong, CPULoadStoreSpec([0, 1, 2, 3]))
    assert [(r.job_id, r.success) for r in worker.get_finished()] == [(3, False)]
    released: list[int] = []
    worker = CopyWorker(pool, [], 1, release=lambda: released.append(1))
    worker.shutdown()
    worker.shutdown()
    assert released == [1]


# -- a tier ----------------------------------------------------------------------------------------

ROW = 512 * 1024


def spec(name: str = "engine") -> Any:
    config = SimpleNamespace(
        engine_id=name,
        model=SimpleNamespace(name="m", dtype="bfloat16"),
        groups=(SimpleNamespace(tokens_per_block=32, layer_names=("a", "b")),),
        worker_kv_bytes_per_block=ROW,
        cache=SimpleNamespace(blocks_per_chunk=1, tokens_per_hash=32),
        parallel=SimpleNamespace(
            world_size=1, tp_size=1, pp_size=1, dcp_size=1, data_parallel_index=0
        ),
        kv_cache_layout="LBHNC",
        canonical_layout=False,
        replicated_layout=False,
    )
    return SimpleNamespace(config=config)


class Below:
    """A tier below host memory of eight rows."""

    def __init__(self, section: Any = None, **more: Any):
        self.memory = bytearray(8 * ROW)
        self.rows = np.frombuffer(self.memory, np.uint8).reshape(8, ROW)
        view = memoryview(self.memory).cast("B", (8, ROW))
        self.tier = KVPlugTier(spec(), view, "mine", tier=section or HOST, **more)
        self.jobs = 0

    def fill(self, row: int, number: int) -> None:
        self.rows[row] = np.random.default_rng(number).integers(0, 256, ROW, np.uint8)

    def run(self, store: bool, keys: list[Any], rows: list[int]) -> JobResult:
        self.jobs += 1
        job = TransferJob(self.jobs, keys, np.array(rows), not store, context())
        (self.tier.submit_store if store else self.tier.submit_load)(job)
        self.tier.drain_jobs()
        (found,) = self.tier.get_finished_jobs()
        assert found.job_id == self.jobs
        return found

    def looked_up(self, *keys: Any) -> list[LookupResult]:
        own = context("look")
        assert all(self.tier.lookup(k, own) is LookupResult.RETRY for k in keys)
        assert self.tier.has_pending_work()
        self.tier.on_schedule_end(ScheduleEndContext([], []))
        self.tier.drain_jobs()
        found = [self.tier.lookup(k, own) for k in keys]
        self.tier.on_request_finished(own)
        assert not self.tier._asked
        return found


HOST = {"host": {"size": "2MiB"}}


@pytest.fixture
def below() -> Iterator[Below]:
    made = Below()
    yield made
    made.tier.shutdown()


def test_chunks_return_from_a_tier_and_others_are_not_there(below: Below) -> None:
    for row in (0, 1):
        below.fill(row, row)
    before = below.rows[:2].copy()
    assert below.run(True, [key(1), key(2)], [0, 1]).success
    below.rows[:] = 0
    assert below.looked_up(key(1), key(3)) == [LookupResult.HIT, LookupResult.MISS]
    found = below.run(False, [key(2), key(1)], [5, 6])
    assert found.success and found.transfer_bytes == 2 * ROW
    assert np.array_equal(below.rows[5:7], before[::-1])
    found = below.run(False, [key(1), key(3)], [2, 3])
    assert not found.success and found.successful_keys == (key(1),)
    assert not below.rows[3].any()
    # The answer of a tier is forgotten with the request that asked.
    assert below.looked_up(key(1)) == [LookupResult.HIT]


def test_a_full_tier_gives_up_chunks_in_its_order() -> None:
    below = Below({"host": {"size": "2MiB", "order": "fifo"}})
    for i in range(6):
        below.fill(0, i)
        assert below.run(True, [key(i)], [0]).success
    there = below.looked_up(*(key(i) for i in range(6)))
    # Three rows and their headers fit.
    assert there == [LookupResult.MISS] * 3 + [LookupResult.HIT] * 3
    below.tier.shutdown()


def test_what_is_damaged_is_a_miss_and_no_byte_of_it_is_copied(below: Below) -> None:
    below.fill(0, 0)
    below.run(True, [key(1)], [0])
    held: Any = below.tier._tier
    (own,) = held._held
    damaged = bytearray(held._held[own])
    damaged[-1] ^= 1
    held._held[own] = memoryview(bytes(damaged))
    below.rows[4] = 9
    assert not below.run(False, [key(1)], [4]).success
    assert (below.rows[4] == 9).all()


def test_a_tier_that_fails_is_a_miss(below: Below, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: Any) -> Any:
        raise TierError("unreachable", "nobody there")

    held: Any = below.tier._tier
    held.has = held.get = held.put = fail
    assert below.looked_up(key(7)) == [LookupResult.MISS]
    assert not below.run(True, [key(7)], [0]).success
    assert not below.run(False, [key(7)], [0]).success
    assert "nobody there" in caplog.text


class Unreadable(RuntimeError):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise Unreadable


ANSWERS = [Unreadable(), SystemExit(1), [], None, itertools.repeat(True), [np.ones(2)]]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda one: type(one).__name__)
def test_whatever_a_tier_answers_every_job_ends_and_every_lookup(below: Below, answer: Any) -> None:
    """vLLM waits for a job, and for a chunk that is asked about, for as long as it takes."""

    def wrong(*arguments: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    held: Any = below.tier._tier
    held.has = held.get = held.put = wrong
    assert below.looked_up(key(7)) == [LookupResult.MISS]
    assert not below.run(True, [key(7)], [0]).success
    assert not below.run(False, [key(7)], [0]).success


def test_an_order_that_names_victims_without_end_is_retired(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = orders.order("lfu")(8)
    for i in range(3):
        policy.insert(key(i), chunk())
    assert policy._order is not None
    policy._order.target.victims = lambda n: itertools.count()
    found = policy.evict(1, set())
    assert found is not None and [k for k, _ in found] == [key(0)]
    assert "ValueError: victims(1)" in caplog.text


def test_jobs_beyond_the_queue_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplug.hosts.vllm.offload.tier.QUEUED", 2)
    below = Below()
    held: Any = below.tier._tier
    put = held.put
    held.put = lambda items: (time.sleep(0.2), put(items))[1]
    for i in range(4):
        below.tier.submit_store(TransferJob(i, [key(i)], np.array([0]), False, context()))
    below.tier.drain_jobs()
    found = {r.job_id: r.success for r in below.tier.get_finished_jobs()}
    assert found == {0: True, 1: True, 2: False, 3: False}
    below.tier.shutdown()
    below.tier.submit_store(TransferJob(9, [key(9)], np.array([0]), False, context()))
    assert [r.success for r in below.tier.get_finished_jobs()] == [False]


@pytest.mark.parametrize(
    ("section", "match"),
    [({"no_such": {}}, "no_such"), ({"host": {"size": "2MiB", "order": "nothing"}}, "nothing")],
)
def test_what_is_no_tier_is_refused(section: Any, match: str) -> None:
    with pytest.raises(DeploymentError, match=match):
        Below(section)


# -- an engine -------------------------------------------------------------------------------------

ENGINE = {"max_model_len": 1024, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 34}
"""A pool of one of the longest requests."""


def connector(host: int, **more: Any) -> dict[str, Any]:
    flags = {"cpu_bytes_to_use": host, "spec_module_path": "kvplug.hosts.vllm.offload.spec"}
    flags["eviction_policy"] = "s3fifo"
    flags["cache_policy_module_path"] = MODULE
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": flags | more,
    }


def test_stock_offload_with_an_order_and_a_tier_of_kvplug_on_a_cpu(
    run: Callable[..., TrialResult], tiny: Path, tmp_path: Path
) -> None:
    """What left the pool comes back: out of host memory, and where that is too small, out of the
    tier below it. Answers are those of an engine that computes everything."""
    choose = random.Random(7)
    texts = [[choose.randrange(10, 300) for _ in range(n)] for n in (500, 700, 960, 640)]
    work = [TrialRequest(text, 8, 4 * wave + i) for wave in (0, 1) for i, text in enumerate(texts)]
    stock = run(tiny, work, None, **ENGINE)
    assert sum(a.cached_tokens for a in stock.answers) == 0
    block = stock.block_bytes
    whole = connector(200 * block, spec_name="KVPlugOffloadingSpec")
    below = {"type": "KVPlugTier", "module_path": "kvplug.hosts.vllm.offload.tier"}
    tiered = connector(
        48 * block,
        spec_name="KVPlugTieringSpec",
        secondary_tiers=[below | {"tier": {"host": {"size": "64MiB"}}}],
    )
    for flags in (whole, tiered):
        ours = run(tiny, work, None, kv_transfer_config=flags, **ENGINE)
        assert [a.token_ids for a in ours.answers] == [a.token_ids for a in stock.answers]
        cached = [a.cached_tokens for a in ours.answers]
        assert cached[:4] == [0] * 4
        assert cached[4:] == [480, 672, 960, 640], "whole blocks"
