"""PrunedManager, PrunedSpec and EvictionPlanner on vLLM's own BlockPool, no engine."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    get_manager_for_kv_cache_spec,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug.contract import EngineView, LayerView, ResidentView, ScoringPolicy
from kvplug.hosts.pruning import SETTLED_TOKENS, Eviction, EvictionPlan, Limits, layout
from kvplug.hosts.vllm.messages import Plans, RowPlan, SequenceDirectives, merge_measured
from kvplug.hosts.vllm.scheduler.evictions import SIZES_REPORTED, EvictionPlanner
from kvplug.hosts.vllm.scheduler.kind import SchedulerStep
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.hosts.vllm.spec import PrunedManager, PrunedSpec, WindowedSpec

BLOCK = 16
LIMITS = Limits(BLOCK, budget=64, share=1.0, always=20, interval=2, protected=2)
"""Four blocks survive, after two shared ones; two are written between evictions."""


def spec(limits: Limits = LIMITS, **changes: Any) -> PrunedSpec:
    values = {
        "block_size": BLOCK,
        "num_kv_heads": 2,
        "head_size": 8,
        "dtype": torch.float32,
        "limits": limits,
        "exact_tokens": limits.protected * BLOCK,
        "in_flight_tokens": 40,
        "max_tokens": 1024,
    }
    return PrunedSpec(**(values | changes))


def plain_spec(**changes: Any) -> FullAttentionSpec:
    values = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    return FullAttentionSpec(**(values | changes))


def manager(
    of: PrunedSpec | None = None, blocks: int = 201, pool: BlockPool | None = None, group: int = 0
) -> PrunedManager:
    made = get_manager_for_kv_cache_spec(
        of or spec(),
        max_in_flight_tokens=40,
        max_model_len=1024,
        block_pool=pool or BlockPool(blocks, enable_caching=True, hash_block_size=BLOCK),
        enable_caching=True,
        kv_cache_group_id=group,
        scheduler_block_size=BLOCK,
    )
    assert isinstance(made, PrunedManager)
    return made


def give(m: PrunedManager, name: str, tokens: int) -> list[int]:
    """Blocks for so many tokens; returns the ids of all it has."""
    m.allocate_new_blocks(name, tokens, tokens)
    return ids(m, name)


def ids(m: PrunedManager, name: str = "r") -> list[int]:
    return [b.block_id for b in m.req_to_blocks[name]]


def held(m: PrunedManager, name: str = "r") -> list[int]:
    return [i for i, b in enumerate(m.req_to_blocks[name]) if not b.is_null]


def schedule(m: PrunedManager, name: str, tokens: int) -> EvictionPlan:
    """What a step does that ends at so many tokens."""
    give(m, name, tokens)
    plan = m.plan(name)
    assert plan is not None
    plan.until(tokens)
    return plan


def request(name: str, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        block_hashes=[BlockHash(f"block {i}".encode()) for i in range(tokens // BLOCK)],
        shared_prefix_boundary=None,
        num_prompt_tokens=tokens,
        num_tokens=tokens,
    )


def left_by(cuts: Sequence[Eviction], filled: int, limits: Limits = LIMITS) -> list[int]:
    """Blocks kept after these evictions, from the meaning of one alone."""
    if not cuts:
        return list(range(filled))
    last = cuts[-1]
    front = range(limits.protected, limits.protected + last.kept)
    return [*front, *range(last.end - last.grown, filled)]


# -- freeing ---------------------------------------------------------------------------------------


def test_what_an_eviction_empties_is_freed_once_its_tokens_are_acknowledged() -> None:
    m = manager()
    m.prompt_tokens["r"] = 200
    before = schedule(m, "r", 200)
    assert before.evictions == [Eviction(200, 12, 4)]
    table = ids(m)
    free = m.block_pool.get_num_free_blocks()
    for acked in range(200):
        m.remove_skipped_blocks("r", acked)
        assert held(m) == list(range(13))
    m.remove_skipped_blocks("r", 200)
    assert held(m) == [2, 3, 4, 5, 12]
    assert [ids(m)[i] for i in held(m)] == [table[i] for i in held(m)], "the table is positional"
    assert m.block_pool.get_num_free_blocks() == free + 8
    m.remove_skipped_blocks("r", 200)
    assert m.block_pool.get_num_free_blocks() == free + 8


@pytest.mark.parametrize("hold", [0, 9])
@pytest.mark.parametrize("seed", range(8))
def test_exactly_what_the_layout_says_is_freed(seed: int, hold: int) -> None:
    """Chunks of any size, acknowledged late or at once."""
    choose = random.Random(seed)
    limits = LIMITS.with_prefill_limit(hold)
    m = manager(spec(limits))
    prompt = m.prompt_tokens["r"] = choose.randrange(1, 700)
    whole = EvictionPlan(limits, prompt)
    whole.until(1000)
    acked = scheduled = 0
    while acked < 1000:
        m.remove_skipped_blocks("r", acked)
        room = 40 - (scheduled - acked)
        scheduled = min(1000, scheduled + choose.randrange(room + 1))
        if scheduled:
            schedule(m, "r", scheduled)
        made = [c for c in whole.evictions if c.at <= acked]
        filled = -(-scheduled // BLOCK)
        assert held(m) == left_by(made, filled, limits)
        assert len(held(m)) + m.block_pool.get_num_free_blocks() == 200
        acked = choose.choice([acked, scheduled, choose.randrange(acked, scheduled + 1)])


def test_several_evictions_acknowledged_at_once_are_all_followed() -> None:
    m = manager(spec(LIMITS.with_prefill_limit(8)))
    m.prompt_tokens["r"] = 500
    reported: list[tuple[int, str, int]] = []
    m.on_freed = lambda *what: reported.append(what)
    plan = schedule(m, "r", 600)
    assert len(plan.evictions) > 4
    m.remove_skipped_blocks("r", 600)
    assert held(m) == left_by(plan.evictions, 38)
    assert sum(n for _, _, n in reported) == 38 - len(held(m))
    assert len(reported) == len(plan.evictions), "each eviction that frees is reported once"
    assert {(group, name) for group, name, _ in reported} == {(0, "r")}


def test_the_deepest_blocks_are_handed_out_first() -> None:
    m = manager(spec(exact_tokens=1024))
    m.prompt_tokens["r"] = 192
    schedule(m, "r", 192)
    table = ids(m)
    m.cache_blocks(request("r", 192), 192, replay_boundaries=())
    m.remove_skipped_blocks("r", 192)
    free = [b.block_id for b in m.block_pool.free_block_queue.get_all_free_blocks()]
    assert free[-8:] == [table[i] for i in (11, 10, 9, 8, 7, 6, 1, 0)]


def test_null_entries_are_not_freed_again() -> None:
    m = manager()
    m.prompt_tokens["r"] = 192
    reported: list[tuple[int, str, int]] = []
    m.on_freed = lambda *what: reported.append(what)
    schedule(m, "r", 192)
    first = m.req_to_blocks["r"][0]
    m.req_to_blocks["r"][0] = m.block_pool.null_block
    m.block_pool.free_blocks([first])
    m.remove_skipped_blocks("r", 192)
    assert reported == [(0, "r", 7)]
    assert m.block_pool.get_num_free_blocks() == 200 - 4


def test_a_block_shared_with_another_request_stays_with_it() -> None:
    m = manager()
    m.prompt_tokens["r"] = 200
    r = request("r", 200)
    schedule(m, "r", 200)
    m.cache_blocks(r, 200, replay_boundaries=())
    (hit,), length = find(m, r, 199)
    assert length == 32
    m.add_local_computed_blocks("other", hit, length, 0)
    m.remove_skipped_blocks("r", 200)
    assert ids(m, "r")[:2] == [0, 0]
    assert all(b.ref_cnt == 1 and b.block_hash is not None for b in m.req_to_blocks["other"])


def test_a_request_nobody_announced_is_never_evicted_from() -> None:
    m = manager()
    give(m, "r", 800)
    assert m.plan("r") is None
    m.remove_skipped_blocks("r", 800)
    assert len(held(m)) == 50
    m.remove_skipped_blocks("nobody", 500)
    assert "nobody" not in m.req_to_blocks


def test_an_exempt_request_keeps_everything() -> None:
    m = manager()
    m.prompt_tokens |= {"r": 300, "other": 300}
    m.exempt.add("r")
    give(m, "r", 320)
    assert m.plan("r") is None
    schedule(m, "other", 320)
    for name in ("r", "other"):
        m.remove_skipped_blocks(name, 300)
    assert len(held(m, "r")) == 20
    assert len(held(m, "other")) < 20


def test_freed_blocks_serve_others_and_the_pool_balances_at_the_end() -> None:
    m = manager(blocks=31)
    names = ("a", "b", "c")
    choose = random.Random(0)
    computed = dict.fromkeys(names, 0)
    finished = 0
    while finished < 6:
        name = choose.choice(names)
        m.prompt_tokens.setdefault(name, choose.randrange(1, 100))
        m.remove_skipped_blocks(name, computed[name])
        computed[name] += BLOCK
        schedule(m, name, computed[name])
        owned = [i for r in computed for i in ids(m, r) if i]
        assert len(set(owned)) == len(owned), "one block in two requests"
        if computed[name] >= 960:
            m.free(name)
            del m.prompt_tokens[name]
            computed[name] = 0
            finished += 1
    for name in names:
        m.free(name)
    assert m.block_pool.get_num_free_blocks() == 30
    assert m._plans == m._made == {}


# -- life of a request -----------------------------------------------------------------------------


def test_a_preempted_request_starts_over() -> None:
    m = manager()
    m.prompt_tokens["r"] = 200
    for _ in range(3):
        first = schedule(m, "r", 300)
        m.remove_skipped_blocks("r", 300)
        assert held(m) == left_by(first.evictions, 19)
        popped = m.pop_blocks_for_free("r")
        assert len(popped) == 19
        m.block_pool.free_blocks(reversed(popped))
        assert m.block_pool.get_num_free_blocks() == 200
        again = m.plan("r")
        assert again is not first
        assert again is not None
        assert again.evictions == []
        give(m, "r", 100)
        m.remove_skipped_blocks("r", 100)
        assert len(held(m)) == 7, "evictions of its former life"
        m.free("r")


def test_a_request_resumed_from_the_prefix_cache_is_evicted_from_where_it_would_have_been() -> None:
    m = manager()
    r = request("r", 200)
    m.prompt_tokens["r"] = 200
    schedule(m, "r", 200)
    m.cache_blocks(r, 200, replay_boundaries=())
    m.remove_skipped_blocks("r", 200)
    m.free("r")
    (hit,), length = find(m, r, 199)
    assert length == 32
    m.add_local_computed_blocks("r", hit, length, 0)
    plan = schedule(m, "r", 250)
    assert plan.evictions == [Eviction(200, 12, 4), Eviction(224, 14, 4)]
    m.remove_skipped_blocks("r", 250)
    assert held(m) == [2, 3, 4, 5, 14, 15]
    m.free("r")
    assert m.block_pool.get_num_free_blocks() == 200


def test_a_plan_is_found_once() -> None:
    m = manager()
    m.prompt_tokens["r"] = 200
    plan = m.plan("r")
    assert m.plan("r") is plan
    m.prompt_tokens["r"] = 7
    assert m.plan("r") is plan


# -- admission -------------------------------------------------------------------------------------


def need(m: PrunedManager, tokens: int, cap: bool) -> int:
    return m.get_num_blocks_to_allocate("r", tokens, [], 0, 0, tokens, apply_admission_cap=cap)


def test_admission_counts_on_what_will_be_freed() -> None:
    m = manager()
    # Two shared, four survivors, two of an interval and one begun; 40 tokens in flight.
    assert m.kv_cache_spec.resident_blocks == 9
    assert m.max_admission_blocks_per_request == m.kv_cache_spec.cap_blocks == 9 + 4
    assert need(m, 1000, cap=True) == 13
    assert need(m, 1000, cap=False) == 63
    assert need(m, 100, cap=True) == 7


@pytest.mark.parametrize(
    ("blocks", "hold", "cap"),
    [
        pytest.param(30, 30, 31 + 4, id="a prompt may hold more"),
        pytest.param(3, 3, 9 + 4, id="never less than a text that is generated"),
        pytest.param(500, 500, 64, id="never more than the longest text"),
    ],
)
def test_a_host_limits_the_blocks_of_a_prompt(blocks: int, hold: int, cap: int) -> None:
    m = manager()
    m.limit_prefill(blocks)
    assert m.limits == LIMITS.with_prefill_limit(hold)
    assert m.max_admission_blocks_per_request == cap
    assert m.kv_cache_spec.limits == LIMITS


def test_the_policys_own_prefill_limit_goes_before_the_hosts() -> None:
    m = manager(spec(LIMITS.with_prefill_limit(20)))
    assert m.max_admission_blocks_per_request == 21 + 4
    m.limit_prefill(100)
    assert m.limits == LIMITS.with_prefill_limit(20)
    assert m.max_admission_blocks_per_request == 21 + 4


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("budget", [64, 0.2])
def test_no_request_ever_has_more_than_the_cap(budget: int | float, resized: bool) -> None:
    """Chunks of any size up to what may be in flight, acknowledged late or at once; whatever
    a policy that changes budgets asks for."""
    for seed in range(20):
        choose = random.Random(seed)
        in_flight = choose.randrange(1, 90)
        own = Limits(BLOCK, budget, choose.choice([0.5, 1, 2]), 20, 2, 2)
        m = manager(spec(own, in_flight_tokens=in_flight))
        m.limit_prefill(choose.randrange(1, 50))
        m.prompt_tokens["r"] = choose.randrange(1, 1000)
        if resized:
            m.resize = lambda name, nth, blocks, choose=choose: choose.choice([1, blocks + 2, 1000])
        acked = scheduled = 0
        while acked < 1000:
            m.remove_skipped_blocks("r", acked)
            room = in_flight - (scheduled - acked)
            scheduled = min(1000, scheduled + choose.randrange(room + 1))
            if scheduled:
                schedule(m, "r", scheduled)
            assert len(held(m)) <= m.max_admission_blocks_per_request
            acked = choose.choice([acked, scheduled, choose.randrange(acked, scheduled + 1)])


# -- prefix cache ----------------------------------------------------------------------------------


def find(m: PrunedManager, r: Any, limit: int) -> tuple[tuple[list[Any], ...], int]:
    return type(m).find_longest_cache_hit(
        block_hashes=r.block_hashes,
        max_length=limit,
        kv_cache_group_ids=[0],
        block_pool=m.block_pool,
        kv_cache_spec=m.kv_cache_spec,
        drop_eagle_block=False,
        alignment_tokens=BLOCK,
    )


@pytest.mark.parametrize("exact", [0, 2, 5])
def test_only_exact_blocks_are_cached(exact: int) -> None:
    m = manager(spec(exact_tokens=exact * BLOCK))
    r = request("r", 320)
    give(m, "r", 320)
    for computed in (20, 32, 33, 90, 320):
        m.cache_blocks(r, computed, replay_boundaries=())
        with_content = [b.block_hash is not None for b in m.req_to_blocks["r"]]
        assert with_content == [i < min(computed // BLOCK, exact) for i in range(20)]


def test_survivors_are_never_written_into_cached_blocks() -> None:
    """What admission of exact tokens and the layout of evictions must agree on."""
    m = manager()
    r = request("r", 320)
    m.prompt_tokens["r"] = 320
    plan = schedule(m, "r", 320)
    m.cache_blocks(r, 320, replay_boundaries=())
    (cut,) = plan.evictions
    lay = layout(None, cut, LIMITS.protected, BLOCK)
    assert not any(
        m.req_to_blocks["r"][i].block_hash is not None for i in lay.blocks[: lay.survivors]
    )


@pytest.mark.parametrize("limit,length", [(10, 0), (16, 16), (31, 16), (32, 32), (300, 32)])
def test_a_hit_ends_at_the_exact_prefix_even_if_more_is_cached(limit: int, length: int) -> None:
    m = manager()
    r = request("r", 320)
    give(m, "r", 320)
    FullAttentionManager.cache_blocks(m, r, 320, replay_boundaries=())
    assert sum(b.block_hash is not None for b in m.req_to_blocks["r"]) == 20
    (blocks,), found = find(m, r, limit)
    assert (len(blocks), found) == (length // BLOCK, length)


# -- the spec --------------------------------------------------------------------------------------


def windowed() -> WindowedSpec:
    return WindowedSpec(
        block_size=BLOCK,
        num_kv_heads=2,
        head_size=8,
        dtype=torch.float32,
        exact_tokens=32,
        in_flight_tokens=40,
        max_tokens=1024,
        sink_tokens=16,
        window_tokens=32,
    )


def test_layers_with_one_rule_merge() -> None:
    merged = PrunedSpec.merge([spec(), spec(), spec()])
    assert merged == spec()
    assert type(merged) is PrunedSpec


OTHERS = [
    pytest.param(spec(Limits(BLOCK, 64, 0.5, 20, 2, 2)), id="share"),
    pytest.param(spec(Limits(BLOCK, 80, 1.0, 20, 2, 2)), id="budget"),
    pytest.param(spec(exact_tokens=16), id="exact"),
    pytest.param(plain_spec(), id="plain"),
    pytest.param(windowed(), id="windowed"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_layers_that_differ_do_not_merge(other: FullAttentionSpec) -> None:
    with pytest.raises(AssertionError):
        PrunedSpec.merge([spec(), other])
    with pytest.raises(AssertionError):
        PrunedSpec.merge([other, spec()])


@pytest.mark.parametrize("other", OTHERS)
def test_uniform_means_one_rule(other: FullAttentionSpec) -> None:
    same = {"a": spec(), "b": spec()}
    assert spec().is_uniform_with_collection(same)
    assert not spec().is_uniform_with_collection(same | {"c": other})


def test_head_sizes_do_not_merge() -> None:
    with pytest.raises(AssertionError):
        PrunedSpec.merge([spec(), spec(head_size=16)])


def test_a_request_is_sized_by_its_cap_not_by_the_longest_text() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1024),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    assert spec().max_memory_usage_bytes(config) == 13 * spec().page_size_bytes
    assert spec().page_size_bytes == plain_spec().page_size_bytes
    config.model_config.max_model_len = 64
    assert spec().max_memory_usage_bytes(config) == 4 * spec().page_size_bytes


def test_specs_travel_between_processes() -> None:
    own = spec(LIMITS.with_prefill_limit(7))
    back = pickle.loads(pickle.dumps(own))
    assert back == own
    assert back.limits == LIMITS.with_prefill_limit(7)
    assert KVCacheSpecRegistry.get_manager_class(back) is PrunedManager
    assert len({own, back, spec()}) == 2


# -- the scheduler's plans -------------------------------------------------------------------------


class Sized(ScoringPolicy):
    """A policy whose budgets a test sets."""

    name = "sized"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.asked: list[tuple[list[float], int, int]] = []
        self.answers: list[int | Exception] = []

    def score(self, held: ResidentView) -> Tensor:
        raise AssertionError("the scheduler scores nothing")

    def measure(self, held: ResidentView, scores: Tensor) -> Tensor | None:
        return None

    def resize(self, measured: Sequence[float], budget: int, num_tokens: int) -> int:
        self.asked.append((list(measured), budget, num_tokens))
        answer = self.answers.pop(0) if self.answers else budget
        if isinstance(answer, Exception):
            raise answer
        return answer


class Fixed(Sized):
    """The same, and budgets stay."""

    measure = ScoringPolicy.measure


def policy(of: type[Sized] = Sized, **options: Any) -> Sized:
    layers = tuple(LayerView(i, 2) for i in range(2))
    given = {"budget": 64, "sink": 4, "recent": 16, "interval": 32} | options
    return of(of.Options.model_validate(given), EngineView(BLOCK, layers=layers))


def planner(of: Sized | None = None) -> tuple[EvictionPlanner, PrunedManager]:
    m = manager()
    return EvictionPlanner(of or policy(Fixed), [m], [0], Slots()), m


def made_step(own: EvictionPlanner, **spans: tuple[int, int]) -> SchedulerStep:
    """A scheduler step of some requests, ``name=(start, end)``."""
    cached = SimpleNamespace(
        req_ids=list(spans), num_computed_tokens=[a for a, _ in spans.values()]
    )
    output = SimpleNamespace(
        scheduled_cached_reqs=cached,
        scheduled_new_reqs=[],
        num_scheduled_tokens={name: b - a for name, (a, b) in spans.items()},
    )
    return SchedulerStep(output, 1, own._slots)


def step(
    own: EvictionPlanner, managers: Sequence[PrunedManager], name: str, start: int, end: int
) -> list[RowPlan]:
    """One step of one request; returns its plan in each group."""
    for m in managers:
        give(m, name, end)
    one = made_step(own, **{name: (start, end)})
    plans = own.step(one)
    slot = one.slots[name]
    assert list(plans) == [(group, slot) for group in range(len(managers))]
    return list(plans.values())


def finish(own: EvictionPlanner, name: str) -> list[tuple[int, int]]:
    """The end of a request, as the scheduler half has it."""
    sizes = own.finish(name)
    own._slots.release(name)
    return sizes


def test_a_plan_has_the_eviction_in_force_and_those_of_the_step() -> None:
    planned, m = planner()
    planned.add("r", 200)
    assert step(planned, [m], "r", 0, 100) == [RowPlan(200, None, ())]
    first, second = Eviction(200, 12, 4), Eviction(224, 14, 4)
    assert step(planned, [m], "r", 100, 200) == [RowPlan(200, None, (first,))]
    assert step(planned, [m], "r", 200, 201) == [RowPlan(200, first, ())]
    assert step(planned, [m], "r", 201, 224) == [RowPlan(200, first, (second,))]
    assert finish(planned, "r") == [(200, 64), (224, 64)]


def test_whatever_the_chunks_the_evictions_are_the_same() -> None:
    whole, m = planner()
    whole.add("r", 333)
    (at_once,) = step(whole, [m], "r", 0, 600)
    for seed in range(5):
        choose = random.Random(seed)
        planned, m = planner()
        planned.add("r", 333)
        found: list[Eviction] = []
        start = 0
        while start < 600:
            end = min(600, start + choose.randrange(1, 90))
            (plan,) = step(planned, [m], "r", start, end)
            assert plan.state == (found[-1] if found else None)
            found += plan.evictions
            start = end
        assert tuple(found) == at_once.evictions


def test_requests_that_keep_everything_have_no_plan() -> None:
    planned, m = planner()
    planned.add("exempt", 200)
    m.exempt.add("exempt")
    for name in ("exempt", "unknown"):
        give(m, name, 300)
    one = made_step(planned, exempt=(0, 300), unknown=(0, 300))
    assert planned.step(one) == {}
    assert not one.names_slots, "nobody needs to know whose rows they are"


def test_each_group_has_a_plan_of_its_own() -> None:
    own = policy(Fixed, layers={"0": 2.0})
    pool = BlockPool(201, enable_caching=True, hash_block_size=BLOCK)
    managers = [
        manager(spec(Limits(BLOCK, 64, share, 20, 2, 2)), pool=pool, group=i)
        for i, share in enumerate((1.0, 2.0))
    ]
    planned = EvictionPlanner(own, managers, [0, 1], Slots())
    planned.add("r", 200)
    narrow, wide = step(planned, managers, "r", 0, 200)
    assert narrow == RowPlan(200, None, (Eviction(200, 12, 4),))
    assert wide == RowPlan(200, None, (Eviction(200, 12, 8),))
    assert finish(planned, "r") == [(200, 64)], "listed once, of the first group"


def test_the_latest_sizes_are_reported() -> None:
    planned, m = planner()
    planned.add("r", 100)
    step(planned, [m], "r", 0, 2700)
    sizes = finish(planned, "r")
    assert len(sizes) == SIZES_REPORTED
    assert sizes[-1] == (2688, 64)


def test_the_latest_sizes_are_reported_after_a_preemption_too() -> None:
    planned, m = planner()
    planned.add("r", 100)
    step(planned, [m], "r", 0, 2700)
    m.free("r")
    step(planned, [m], "r", 0, 2700)
    assert finish(planned, "r") == [(2720 - 32 * n, 64) for n in range(SIZES_REPORTED, 0, -1)]


# -- budgets that change ---------------------------------------------------------------------------


def measured(*rows: tuple[float, ...]) -> Any:
    """Rows of slot, group, layers and sums, measured long ago."""
    return np.array([(*row[:2], 0, *row[2:]) for row in rows], dtype=np.float64)


def test_a_budget_follows_what_was_measured() -> None:
    own = policy()
    planned, m = planner(own)
    planned.add("r", 200)
    step(planned, [m], "r", 0, 200)
    planned.take(measured((0, 0, 2, 3.0, 5.0)))
    own.answers = [90]
    (plan,) = step(planned, [m], "r", 200, 224)
    assert own.asked == [([1.5, 2.5], 64, 224)]
    assert plan.evictions == (Eviction(224, 14, 4, 2),), "90 tokens are six blocks, two of them new"
    planned.take(measured((0, 0, 4, 4.0, 8.0)))
    own.answers = [33]
    (plan,) = step(planned, [m], "r", 224, 256)
    assert own.asked[1:] == [([1.0, 2.0], 96, 256)], "the latest measurement, the latest budget"
    assert plan.evictions == (Eviction(256, 16, 3),)


def test_a_measurement_decides_once_it_has_surely_arrived() -> None:
    """However many steps the scheduler runs ahead, a size depends on the text alone."""
    own = policy()
    planned, m = planner(own)
    planned.add("r", 200)
    step(planned, [m], "r", 0, 200)
    step(planned, [m], "r", 200, 210)
    young = 224 - SETTLED_TOKENS + 1
    planned.take(np.array([(0, 0, young - 1, 1, 3.0), (0, 0, young, 1, 5.0)]))
    step(planned, [m], "r", 210, 224)
    assert own.asked == [([3.0], 64, 224)]
    planned.take(np.array([(0, 0, 999, 1, 7.0)]))
    step(planned, [m], "r", 224, 256)
    assert own.asked[1][0] == [5.0], "nobody is measured where it has not been"


def test_without_a_measurement_the_budget_stays() -> None:
    own = policy()
    planned, m = planner(own)
    planned.add("r", 200)
    step(planned, [m], "r", 0, 200)
    for rows in (measured((7, 0, 1, 3.0)), measured((0, 1, 1, 3.0)), measured((0, 0, 0, 3.0))):
        planned.take(rows)
    (plan,) = step(planned, [m], "r", 200, 224)
    assert own.asked == []
    assert plan.evictions == (Eviction(224, 14, 4),)


def test_a_measurement_goes_to_the_request_of_its_slot_and_ends_with_it() -> None:
    own = policy()
    planned, m = planner(own)
    for name in "ab":
        planned.add(name, 200)
        step(planned, [m], name, 0, 200)
    planned.take(measured((1, 0, 1, 7.0)))
    step(planned, [m], "a", 200, 224)
    assert own.asked == []
    step(planned, [m], "b", 200, 224)
    assert own.asked == [([7.0], 64, 224)]
    finish(planned, "b")
    m.free("b")
    planned.add("c", 200)
    step(planned, [m], "c", 0, 224)
    assert len(own.asked) == 1


def test_groups_are_measured_and_resized_apart_in_tokens_of_share_one() -> None:
    own = policy(layers={"0": 2.0})
    pool = BlockPool(201, enable_caching=True, hash_block_size=BLOCK)
    managers = [
        manager(spec(Limits(BLOCK, 64, share, 20, 2, 2)), pool=pool, group=i)
        for i, share in enumerate((1.0, 2.0))
    ]
    planned = EvictionPlanner(own, managers, [0, 1], Slots())
    planned.add("r", 200)
    step(planned, managers, "r", 0, 200)
    planned.take(measured((0, 1, 1, 7.0)))
    own.answers = [72]
    narrow, wide = step(planned, managers, "r", 200, 224)
    assert own.asked == [([7.0], 64, 224)]
    assert narrow.evictions == (Eviction(224, 14, 4),)
    assert wide.evictions == (Eviction(224, 14, 8, 1),), "72 x 2 tokens are nine blocks"


def test_an_exception_while_resizing_leaves_budgets_as_they_are_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = policy()
    planned, m = planner(own)
    said: list[Any] = []
    monkeypatch.setattr("kvplug.containment.logger.error", lambda *a, **k: said.append(a))
    planned.add("r", 200)
    step(planned, [m], "r", 0, 200)
    planned.take(measured((0, 0, 1, 7.0)))
    own.answers = [96, RuntimeError("no more"), 64]
    found = [step(planned, [m], "r", at - 20, at)[0].evictions for at in (224, 256, 288)]
    assert found == [
        (Eviction(224, 14, 4, 2),),
        (Eviction(256, 16, 4, 2),),
        (Eviction(288, 18, 4, 2),),
    ]
    assert planned.resize_error == "RuntimeError: no more"
    assert len(own.asked) == 2
    assert len(said) == 1
    assert "'sized' failed in resize()" in said[0][0] % said[0][1:]


def test_a_request_that_starts_over_is_evicted_from_as_it_was_before() -> None:
    """Prompt and generated tokens come in one chunk then, long after they were measured."""
    own = policy()
    planned, m = planner(own)
    for name in "ab":
        planned.add(name, 200)
        planned._slots.take(name)
    made: list[Eviction] = []
    asked_for = [96, 48, 80]
    own.answers = list(asked_for)
    for start, end in ((0, 200), (200, 224), (224, 256), (256, 288)):
        made += step(planned, [m], "a", start, end)[0].evictions
        planned.take(measured((0, 0, 1, float(end))))
    assert [cut.blocks for cut in made] == [4, 6, 3, 5]
    m.free("a")
    for ends in ((288,), (100, 201, 256, 288)):
        again: list[Eviction] = []
        start = 0
        for end in ends:
            again += step(planned, [m], "a", start, end)[0].evictions
            start = end
        assert again == made
        assert len(own.asked) == len(asked_for), "a policy is asked once per eviction"
        m.free("a")
    own.answers = [64]
    step(planned, [m], "a", 0, 320)
    assert [said for said, _, _ in own.asked] == [[200.0], [224.0], [256.0], [288.0]]
    assert finish(planned, "a")[-1] == (320, 64)
    planned.take(measured((1, 0, 1, 7.0)))
    step(planned, [m], "b", 0, 224)
    assert len(own.asked) == 5, "what was decided is the request's own"


def test_a_policy_that_measures_nothing_is_never_asked_for_a_budget() -> None:
    planned, m = planner()
    assert m.resize is None
    assert not planned.policy.resizes
    planned, m = planner(policy())
    assert m.resize is not None


# -- on the way to the workers and back ------------------------------------------------------------


def test_plans_arrive_as_they_were_sent() -> None:
    plans: Plans = {
        (0, 7): RowPlan(200, None, ()),
        (1, 7): RowPlan(1, Eviction(200, 12, 4), (Eviction(224, 14, 4, 2), Eviction(256, 16, 3))),
        (0, 2): RowPlan(5, Eviction(16, 1, 1, 1), ()),
        (0, 0): RowPlan(9, None, (Eviction(16, 1, 1),)),
    }
    sent = SequenceDirectives()
    assert sent.plans() == {}
    sent.set_plans(plans)
    assert sent.rows is not None and sent.evictions is not None
    assert (sent.rows.shape, sent.evictions.shape) == ((4, 8), (3, 4))
    assert sent.rows.dtype == sent.evictions.dtype == np.int32
    back = pickle.loads(pickle.dumps(sent)).plans()
    assert back == plans
    assert list(back) == list(plans)
    sent.set_plans({})
    assert sent.plans() == {}


def test_ranks_add_up() -> None:
    one = measured((3, 0, 2, 11.0, 22.0), (1, 0, 1, 3.0, 4.0))
    other = measured((0, 0, 1, 5.0, 6.0), (3, 0, 2, 1.0, 2.0), (3, 1, 1, 7.0, 8.0))
    both = merge_measured(one, other)
    assert both is not None
    later = np.array([(3, 0, 9, 1, 2.0, 4.0)])
    expected = [[0, 0, 0, 1, 5, 6], [1, 0, 0, 1, 3, 4], [3, 0, 0, 4, 12, 24], [3, 1, 0, 1, 7, 8]]
    assert sorted(both.tolist()) == expected
    turned = merge_measured(other, one)
    assert turned is not None
    assert sorted(turned.tolist()) == expected
    apart = merge_measured(one, later)
    assert apart is not None and len(apart) == 3, "two evictions of one request"
    assert merge_measured(None, None) is None
    assert merge_measured(one, None) is one
    assert merge_measured(None, one) is one


def test_ranks_of_a_request_make_one_mean() -> None:
    own = policy()
    planned, m = planner(own)
    planned.add("r", 200)
    step(planned, [m], "r", 0, 200)
    both = merge_measured(measured((0, 0, 3, 6.0)), measured((0, 0, 1, 4.0)))
    assert both is not None
    planned.take(both)
    step(planned, [m], "r", 200, 224)
    assert own.asked == [([2.5], 64, 224)]
