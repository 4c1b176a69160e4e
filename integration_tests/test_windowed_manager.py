"""WindowedManager and WindowedSpec on vLLM's own BlockPool, without an engine."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    get_manager_for_kv_cache_spec,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug.contract import Window
from kvplug.hosts.vllm.spec import WindowedManager, WindowedSpec

BLOCK = 16


def spec(sink: int = 1, window: int = 2, **changes: Any) -> WindowedSpec:
    """Sink and window in blocks."""
    values = {
        "block_size": BLOCK,
        "num_kv_heads": 2,
        "head_size": 8,
        "dtype": torch.float32,
        "sink_tokens": sink * BLOCK,
        "window_tokens": window * BLOCK,
        "exact_tokens": (sink + window + 1) * BLOCK,
        "in_flight_tokens": 40,
        "max_tokens": 1024,
    }
    return WindowedSpec(**(values | changes))


def plain_spec(**changes: Any) -> FullAttentionSpec:
    values = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    return FullAttentionSpec(**(values | changes))


def manager(of: WindowedSpec | None = None, blocks: int = 101, **kwargs: Any) -> WindowedManager:
    pool = BlockPool(blocks, enable_caching=True, hash_block_size=BLOCK)
    made = get_manager_for_kv_cache_spec(
        of or spec(),
        max_in_flight_tokens=40,
        max_model_len=1024,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
        **kwargs,
    )
    assert isinstance(made, WindowedManager)
    return made


def give(m: WindowedManager, request: str, tokens: int) -> list[int]:
    """Blocks for so many tokens; returns the ids of all it has."""
    m.allocate_new_blocks(request, tokens, tokens)
    return ids(m, request)


def ids(m: WindowedManager, request: str = "r") -> list[int]:
    return [b.block_id for b in m.req_to_blocks[request]]


def nulled(m: WindowedManager, request: str = "r") -> list[int]:
    return [i for i, b in enumerate(m.req_to_blocks[request]) if b.is_null]


def request(name: str, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        block_hashes=[BlockHash(f"block {i}".encode()) for i in range(tokens // BLOCK)],
        shared_prefix_boundary=None,
        num_prompt_tokens=tokens,
        num_tokens=tokens,
    )


# -- freeing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink,window", [(0, 0), (0, 2), (1, 0), (1, 2), (3, 1)])
def test_exactly_the_gap_of_the_acknowledged_tokens_is_freed(sink: int, window: int) -> None:
    m = manager(spec(sink, window))
    rule = Window(sink, window)
    table = give(m, "r", 400)
    free = m.block_pool.get_num_free_blocks()
    for acked in range(0, 385):
        m.remove_skipped_blocks("r", acked)
        start, end = rule.gap(acked // BLOCK)
        assert nulled(m) == list(range(start, end)), acked
        assert m.block_pool.get_num_free_blocks() == free + end - start
        kept = [i for i in range(len(table)) if i not in range(start, end)]
        assert [ids(m)[i] for i in kept] == [table[i] for i in kept], "the table is not positional"


def test_freeing_twice_frees_once() -> None:
    m = manager()
    give(m, "r", 320)
    m.remove_skipped_blocks("r", 200)
    free = m.block_pool.get_num_free_blocks()
    m.remove_skipped_blocks("r", 200)
    m.remove_skipped_blocks("r", 199)
    m.remove_skipped_blocks("r", 40)
    assert m.block_pool.get_num_free_blocks() == free
    m.remove_skipped_blocks("r", 200 + BLOCK)
    assert m.block_pool.get_num_free_blocks() == free + 1


def test_tokens_in_flight_are_not_freed() -> None:
    """Steps in flight began at the acknowledged tokens: what their first query sees must stay."""
    m = manager(spec(1, 2))
    give(m, "r", 320)
    m.remove_skipped_blocks("r", 100)
    assert nulled(m) == [1, 2, 3], "a query at 100 is in block 6 and sees blocks 4 and 5"
    assert len(ids(m)) == 20


def test_blocks_not_allocated_yet_cannot_be_freed() -> None:
    m = manager(spec(1, 0))
    give(m, "r", 48)
    m.remove_skipped_blocks("r", 200)
    assert nulled(m) == [1, 2]
    give(m, "r", 240)
    m.remove_skipped_blocks("r", 200)
    assert nulled(m) == list(range(1, 12))


def test_an_unknown_request_frees_nothing_and_leaves_no_trace() -> None:
    m = manager()
    m.remove_skipped_blocks("nobody", 500)
    assert "nobody" not in m.req_to_blocks
    give(m, "nobody", 500)
    m.remove_skipped_blocks("nobody", 500)
    assert nulled(m, "nobody")


def test_freed_blocks_serve_others_and_the_pool_balances_at_the_end() -> None:
    m = manager(spec(1, 1), blocks=13)
    computed = dict.fromkeys(("a", "b", "c"), 0)
    choose = random.Random(0)
    finished = 0
    while finished < 6:
        name = choose.choice(list(computed))
        m.remove_skipped_blocks(name, computed[name])
        computed[name] += BLOCK
        give(m, name, computed[name])
        table = [i for r in computed for i in ids(m, r) if i]
        assert len(set(table)) == len(table), "one block in two requests"
        if computed[name] >= 960:
            m.free(name)
            computed[name] = 0
            finished += 1
    for name in computed:
        m.free(name)
    assert m.block_pool.get_num_free_blocks() == 12
    assert m._freed_to == {}


def test_no_request_ever_holds_more_than_the_cap() -> None:
    """Chunks of any size up to what may be in flight, acknowledged late or at once."""
    for seed in range(30):
        choose = random.Random(seed)
        s = spec(choose.randrange(3), choose.randrange(4), in_flight_tokens=choose.randrange(1, 90))
        m = manager(s)
        acked = scheduled = 0
        while scheduled < 1000:
            m.remove_skipped_blocks("r", acked)
            room = s.in_flight_tokens - (scheduled - acked)
            scheduled = min(1000, scheduled + choose.randrange(room + 1))
            give(m, "r", scheduled)
            assert len(ids(m)) - len(nulled(m)) <= s.cap_blocks
            acked = choose.choice([acked, scheduled, choose.randrange(acked, scheduled + 1)])


def test_each_call_that_frees_is_reported_once() -> None:
    m = manager(spec(1, 1))
    reported: list[tuple[int, str, int]] = []
    m.on_freed = lambda *what: reported.append(what)
    give(m, "r", 320)
    for acked in (0, 40, 100, 100, 101, 200):
        m.remove_skipped_blocks("r", acked)
    assert reported == [(0, "r", 4), (0, "r", 6)]
    assert sum(count for _, _, count in reported) == len(nulled(m))


def test_null_blocks_are_not_counted_as_freed() -> None:
    """A request that resumes may come with entries that are null already."""
    m = manager(spec(1, 1))
    reported: list[tuple[int, str, int]] = []
    m.on_freed = lambda *what: reported.append(what)
    give(m, "r", 160)
    first = m.req_to_blocks["r"][1]
    m.req_to_blocks["r"][1] = m.block_pool.null_block
    m.block_pool.free_blocks([first])
    m.remove_skipped_blocks("r", 160)
    assert reported == [(0, "r", 7)]
    assert nulled(m) == list(range(1, 9))


def test_the_deepest_blocks_are_handed_out_first() -> None:
    m = manager(spec(1, 0, exact_tokens=1024))
    table = give(m, "r", 128)
    m.cache_blocks(request("r", 128), 128, replay_boundaries=())
    m.remove_skipped_blocks("r", 112)
    free = [b.block_id for b in m.block_pool.free_block_queue.get_all_free_blocks()]
    assert free[-6:] == [table[i] for i in (6, 5, 4, 3, 2, 1)]


def test_an_exempt_request_keeps_everything() -> None:
    m = manager(spec(1, 1))
    m.exempt.add("r")
    table = give(m, "r", 320)
    give(m, "other", 320)
    for name in ("r", "other"):
        m.remove_skipped_blocks(name, 300)
    assert ids(m) == table and nulled(m) == []
    assert nulled(m, "other")


def test_a_request_that_is_being_loaded_gives_nothing_back_until_it_is_there() -> None:
    m = manager(spec(1, 1))
    m.loading.add("r")
    table = give(m, "r", 320)
    m.remove_skipped_blocks("r", 300)
    assert ids(m) == table and nulled(m) == []
    m.loading.discard("r")
    m.remove_skipped_blocks("r", 300)
    assert nulled(m)


# -- life of a request -----------------------------------------------------------------------------


def test_a_request_that_runs_again_under_its_id_frees_again() -> None:
    m = manager(spec(1, 1))
    free = m.block_pool.get_num_free_blocks()
    for _ in range(3):
        give(m, "r", 320)
        m.remove_skipped_blocks("r", 300)
        assert nulled(m) == list(range(1, 17))
        m.free("r")
        assert m.block_pool.get_num_free_blocks() == free


def test_a_preempted_request_resumes_from_its_exact_prefix_and_frees_what_it_must() -> None:
    m = manager(spec(1, 1))
    r = request("r", 320)
    give(m, "r", 320)
    m.cache_blocks(r, 320, replay_boundaries=())
    m.remove_skipped_blocks("r", 300)
    free = m.block_pool.get_num_free_blocks()
    m.block_pool.free_blocks(reversed(m.pop_blocks_for_free("r")))
    assert m.block_pool.get_num_free_blocks() == 100 > free

    (hit,), length = find(m, r, 319)
    assert length == 48
    m.add_local_computed_blocks("r", hit, length, 0)
    give(m, "r", 160)
    m.remove_skipped_blocks("r", 48)
    assert nulled(m) == [1]
    give(m, "r", 320)
    m.remove_skipped_blocks("r", 300)
    assert nulled(m) == list(range(1, 17))
    m.free("r")
    assert m.block_pool.get_num_free_blocks() == 100


def test_popping_blocks_gives_them_in_order_with_the_null_block_in_the_gap() -> None:
    m = manager(spec(1, 1))
    table = give(m, "r", 96)
    m.remove_skipped_blocks("r", 80)
    popped = m.pop_blocks_for_free("r")
    assert [b.block_id for b in popped] == [table[0], 0, 0, 0, table[4], table[5]]
    assert "r" not in m.req_to_blocks
    assert m.pop_blocks_for_free("r") == []


# -- admission -------------------------------------------------------------------------------------


def need(m: WindowedManager, name: str, tokens: int, cap: bool) -> int:
    return m.get_num_blocks_to_allocate(name, tokens, [], 0, 0, tokens, apply_admission_cap=cap)


def test_admission_counts_on_what_will_be_freed() -> None:
    m = manager(spec(1, 2))
    assert m.max_admission_blocks_per_request == m.kv_cache_spec.cap_blocks == 1 + 2 + 1 + 3 + 1
    assert need(m, "r", 1000, cap=True) == 8
    assert need(m, "r", 1000, cap=False) == 63
    assert need(m, "r", 100, cap=True) == 7


def test_an_exempt_request_is_admitted_by_the_cap_too() -> None:
    m = manager(spec(1, 2))
    m.exempt.add("r")
    assert need(m, "r", 1000, cap=True) == need(m, "other", 1000, cap=True) == 8


def test_the_cap_never_exceeds_the_longest_sequence() -> None:
    assert spec(1, 2, max_tokens=50).cap_blocks == 4
    assert spec(1, 2, max_tokens=128).cap_blocks == 8
    assert spec(1, 2, in_flight_tokens=1).cap_blocks == 6


# -- prefix cache ----------------------------------------------------------------------------------


def find(m: WindowedManager, r: Any, limit: int) -> tuple[tuple[list[Any], ...], int]:
    return type(m).find_longest_cache_hit(
        block_hashes=r.block_hashes,
        max_length=limit,
        kv_cache_group_ids=[0],
        block_pool=m.block_pool,
        kv_cache_spec=m.kv_cache_spec,
        drop_eagle_block=False,
        alignment_tokens=BLOCK,
    )


def test_only_exact_blocks_are_cached() -> None:
    m = manager(spec(1, 2))
    r = request("r", 320)
    give(m, "r", 320)
    for computed in (20, 64, 65, 320):
        m.cache_blocks(r, computed, replay_boundaries=())
        with_content = [b.block_hash is not None for b in m.req_to_blocks["r"]]
        assert with_content == [i < min(computed // BLOCK, 4) for i in range(20)]


def test_the_shortest_exact_prefix_of_the_model_counts_not_the_layers_own() -> None:
    """A layer with a wide window above one with a narrow window carries approximate KV."""
    m = manager(spec(1, 9, exact_tokens=2 * BLOCK))
    r = request("r", 320)
    give(m, "r", 320)
    m.cache_blocks(r, 320, replay_boundaries=())
    assert sum(b.block_hash is not None for b in m.req_to_blocks["r"]) == 2


@pytest.mark.parametrize("limit,length", [(10, 0), (16, 16), (63, 48), (64, 64), (65, 64)])
def test_a_hit_is_as_long_as_asked(limit: int, length: int) -> None:
    m = manager(spec(1, 2))
    r = request("r", 320)
    give(m, "r", 320)
    m.cache_blocks(r, 320, replay_boundaries=())
    (blocks,), found = find(m, r, limit)
    assert (len(blocks), found) == (length // BLOCK, length)


def test_a_hit_ends_at_the_exact_prefix_even_if_more_is_cached() -> None:
    """For instance by a manager that had no window."""
    m = manager(spec(1, 2))
    r = request("r", 320)
    give(m, "r", 320)
    FullAttentionManager.cache_blocks(m, r, 320, replay_boundaries=())
    assert sum(b.block_hash is not None for b in m.req_to_blocks["r"]) == 20
    (blocks,), found = find(m, r, 320)
    assert (len(blocks), found) == (4, 64)


# -- the spec --------------------------------------------------------------------------------------


REGISTRY = """
from kvplug.hosts.vllm import plugin
plugin.register()

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as registry
from kvplug.hosts.vllm.spec import WindowedManager, WindowedSpec

base = dict(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
rule = dict(
    sink_tokens=16, window_tokens=32, exact_tokens=64, in_flight_tokens=40, max_tokens=1024
)
specs = {
    "windowed": WindowedSpec(**base, **rule),
    "full": FullAttentionSpec(**base),
    "sliding": SlidingWindowSpec(**base, sliding_window=64),
}
registry.check_kv_cache_spec_registry(specs)
assert registry.get_uniform_type_base_spec(specs["windowed"]) is FullAttentionSpec
for name, spec in specs.items():
    print(name, registry.get_manager_class(spec).__name__)
"""


def test_the_registry_finds_our_manager_and_still_finds_vllms() -> None:
    """A registry that is not empty never registers vLLM's own specs; so in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", REGISTRY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-4:-1] == [
        "windowed WindowedManager",
        "full FullAttentionManager",
        "sliding SlidingWindowManager",
    ]


def test_layers_with_one_window_merge() -> None:
    merged = WindowedSpec.merge([spec(), spec(), spec()])
    assert merged == spec()
    assert type(merged) is WindowedSpec


@pytest.mark.parametrize(
    "other",
    [spec(1, 3), spec(2, 2), spec(1, 2, exact_tokens=32), spec(1, 2, head_size=16), plain_spec()],
    ids=["window", "sink", "exact", "head-size", "plain"],
)
def test_layers_that_differ_do_not_merge(other: FullAttentionSpec) -> None:
    with pytest.raises(AssertionError):
        WindowedSpec.merge([spec(1, 2), other])
    with pytest.raises(AssertionError):
        WindowedSpec.merge([other, spec(1, 2)])


def test_uniform_means_one_window() -> None:
    same = {"a": spec(), "b": spec()}
    assert spec().is_uniform_with_collection(same)
    assert not spec().is_uniform_with_collection(same | {"c": spec(1, 3)})
    assert not spec().is_uniform_with_collection(same | {"c": spec(1, 2, exact_tokens=16)})
    assert not spec().is_uniform_with_collection(same | {"c": plain_spec()})


def test_a_request_is_sized_by_its_cap_not_by_the_longest_text() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1024),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    assert plain_spec().max_memory_usage_bytes(config) == 64 * plain_spec().page_size_bytes
    assert spec(1, 2).max_memory_usage_bytes(config) == 8 * spec().page_size_bytes
    config.model_config.max_model_len = 64
    assert spec(1, 2).max_memory_usage_bytes(config) == 4 * spec().page_size_bytes
    assert spec().page_size_bytes == plain_spec().page_size_bytes


@pytest.mark.parametrize("block", [8, 32])
def test_another_block_size_keeps_the_rule_in_tokens(block: int) -> None:
    of = spec(2, 4)
    other = of.copy_with_new_block_size(block)
    assert type(other) is WindowedSpec
    assert other.window == Window(2 * BLOCK // block, 4 * BLOCK // block)
    for name in ("sink_tokens", "window_tokens", "exact_tokens", "max_tokens", "in_flight_tokens"):
        assert getattr(other, name) == getattr(of, name)


def test_specs_travel_between_processes() -> None:
    back = pickle.loads(pickle.dumps(spec(2, 5)))
    assert back == spec(2, 5)
    assert back.window == Window(2, 5)
    assert KVCacheSpecRegistry.get_manager_class(back) is WindowedManager


def test_specs_with_different_rules_are_different() -> None:
    assert len({spec(1, 2), spec(1, 2), spec(1, 3), spec(2, 2)}) == 3


def test_importing_the_spec_first_leaves_vllms_own_specs_registered() -> None:
    code = """
import torch
from kvplug.hosts.vllm import spec
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
plain = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
assert KVCacheSpecRegistry.get_manager_class(plain) is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_sink_stays_when_acknowledged_tokens_run_ahead_of_the_blocks() -> None:
    m = manager(spec(4, 0))
    give(m, "r", 32)
    m.remove_skipped_blocks("r", 320)
    give(m, "r", 320)
    m.remove_skipped_blocks("r", 320)
    assert nulled(m) == list(range(4, 20))
