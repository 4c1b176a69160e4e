"""The worker half of scoring policies on hand-made metadata and a small CPU cache, no engine.

What a query sees and what a cut leaves is worked out here token by token, from the cuts of each
request alone; rows, phases, tables, side data and caches must say the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from kvplug.contract import EngineView, LayerView, ResidentView, ScoringPolicy
from kvplug.hosts.pruning import FLUSH, Eviction, EvictionPlan, Limits
from kvplug.hosts.spans import SpanStore
from kvplug.hosts.vllm.messages import Plans, RowPlan, StepReport
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker import residents
from kvplug.hosts.vllm.worker.composition import plugged_builder, plugged_impl
from kvplug.hosts.vllm.worker.evictions import EvictionLog, LayerEvictions
from kvplug.hosts.vllm.worker.phases import RowPart, StepPlanner
from kvplug.hosts.vllm.worker.residents import LayerResidents
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.sequence import ScoringWorker

CPU = torch.device("cpu")
BLOCK = 32
LIMITS = Limits(BLOCK, budget=96, share=1.0, always=12, interval=2, protected=2, prefill_limit=9)
"""Three blocks survive after two shared ones; a prompt holds nine or so when it must be cut."""


def spec(limits: Limits = LIMITS) -> PrunedSpec:
    return PrunedSpec(
        block_size=BLOCK,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        limits=limits,
        exact_tokens=limits.protected * BLOCK,
        in_flight_tokens=64,
        max_tokens=1 << 16,
    )


GROUP = 0


def planner(ring: int = FLUSH) -> StepPlanner:
    return StepPlanner(spec(), GROUP, ring, CPU)


# -- requests and steps by hand --------------------------------------------------------------------


def resizing(seed: int) -> Any:
    """Budgets that change at every cut."""
    choose = random.Random(seed)
    return lambda before: max(1, before + choose.randrange(-2, 3))


@dataclass
class Row:
    """A request that computes tokens ``[start, end)`` in a step; one without a plan keeps all."""

    slot: int
    start: int
    end: int
    plan: EvictionPlan | None
    table: list[int] = field(default_factory=list)

    def row_plan(self) -> RowPlan | None:
        if self.plan is None:
            return None
        state, cuts = self.plan.between(self.start, self.end)
        return RowPlan(self.plan.num_prompt_tokens, state, tuple(cuts))

    def state(self, position: int) -> Eviction | None:
        """The cut in force for a query at a position."""
        return self.plan.between(position, position)[0] if self.plan is not None else None

    def blocks(self, state: Eviction | None, end: int) -> list[int]:
        """Logical blocks held under a cut by a text of ``end`` tokens, in the text's order."""
        filled = -(-end // BLOCK)
        if state is None:
            return list(range(filled))
        front = range(LIMITS.protected, LIMITS.protected + state.kept)
        return [*front, *range(state.end - state.grown, filled)]

    def sees(self, position: int) -> list[int]:
        """Slots a query at a position attends to, in the text's order."""
        blocks = self.blocks(self.state(position), position + 1)
        slots = [self.table[b] * BLOCK + i for b in blocks for i in range(BLOCK)]
        unfilled = BLOCK - 1 - position % BLOCK
        return slots[: len(slots) - unfilled]


def metadata(rows: list[Row], nulls: random.Random | None = None) -> CommonAttentionMetadata:
    """A step's metadata as the runner makes it; what cuts of former steps freed may be null."""
    width = max(-(-r.end // BLOCK) for r in rows) + 1
    width = max(width, *(len(r.table) for r in rows))
    order = iter(torch.randperm(len(rows) * width, generator=torch.Generator().manual_seed(width)))
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    for i, row in enumerate(rows):
        row.table = row.table or [1 + int(next(order)) for _ in range(width)]
        table[i, : len(row.table)] = torch.tensor(row.table, dtype=torch.int32)
        state = row.state(row.start)
        if state is not None and nulls is not None and nulls.random() < 0.5:
            gone = set(range(state.end)) - set(row.blocks(state, row.start))
            table[i, sorted(gone)] = 0
    queries = torch.tensor([r.end - r.start for r in rows])
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = torch.cumsum(queries, 0)
    lens = torch.tensor([r.end for r in rows], dtype=torch.int32)
    slots = [r.table[p // BLOCK] * BLOCK + p % BLOCK for r in rows for p in range(r.start, r.end)]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lens,
        num_reqs=len(rows),
        num_actual_tokens=int(queries.sum()),
        max_query_len=int(queries.max()),
        max_seq_len=int(lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
        is_prefilling=queries > 1,
        seq_lens_cpu_upper_bound=lens.clone(),
        req_idx=np.arange(len(rows)) + 100,
    )


def plans(rows: list[Row]) -> Plans:
    """By group and slot, as the scheduler sends them."""
    made = {(GROUP, r.slot): r.row_plan() for r in rows if r.end > r.start}
    return {key: plan for key, plan in made.items() if plan is not None}


def step_rows(rows: list[Row]) -> Any:
    """The last block and slot of each row, as the scheduler sends them."""
    made = [(r.table[(r.end - 1) // BLOCK], r.slot) for r in rows if r.end > r.start]
    return np.array(made, dtype=np.int32)


def some_rows(choose: random.Random) -> list[Row]:
    rows = []
    for slot in range(choose.randrange(1, 6)):
        end = choose.choice([choose.randrange(1, 900), 32 * choose.randrange(1, 28)])
        queries = choose.choice([1, 1, choose.randrange(1, end + 1), end])
        prompt = choose.choice([end, choose.randrange(1, 900)])
        plan = EvictionPlan(LIMITS, prompt, resizing(slot) if choose.random() < 0.5 else None)
        keeps_all = choose.random() < 0.2
        rows.append(Row(slot * 3, end - queries, end, None if keeps_all else plan))
    return rows


class Planned:
    """A planner with the slots and plans of one step's rows."""

    def __init__(self, rows: list[Row], ring: int = FLUSH):
        self.planner = planner(ring)
        self.slots = [row.slot for row in rows]
        self.plans = plans(rows)

    def parts(self, common: Any) -> list[list[RowPart]] | None:
        return self.planner.parts(common, self.slots, self.plans)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.planner, name)


def planned(
    rows: list[Row], choose: random.Random | None = None, ring: int = FLUSH
) -> tuple[Any, Planned]:
    common = metadata(rows, choose)
    return common, Planned(rows, ring)


def text_of(rows: list[Row], segment: RowPart) -> range:
    """Tokens of the step that a segment computes, counted in the step."""
    return range(segment.first_token, segment.first_token + segment.end - segment.start)


# -- phases ----------------------------------------------------------------------------------------


def spans(phases: list[list[RowPart]] | None) -> list[list[tuple[int, int, int, int]]]:
    assert phases is not None
    return [[(s.row, s.start, s.end, s.first_token) for s in phase] for phase in phases]


def test_a_step_without_plans_is_left_alone() -> None:
    common, made = planned([Row(0, 10, 400, None), Row(1, 500, 501, None)])
    assert made.parts(common) is None
    made.plans = {(GROUP, 99): RowPlan(5, None, ()), (GROUP + 1, 0): RowPlan(5, None, ())}
    assert made.parts(common) is None, "plans of rows that are not there, and of another group"


def test_a_chunk_is_split_where_a_cut_falls() -> None:
    """The prompt must be cut at 288 tokens, and is at its end, 400."""
    first = Row(0, 100, 460, EvictionPlan(LIMITS, 400))
    rows = [Row(1, 20, 50, None), first, Row(2, 59, 60, EvictionPlan(LIMITS, 60))]
    common, made = planned(rows)
    ats = [c.at for c in first.row_plan().evictions]  # type: ignore[union-attr]
    assert ats == [288, 400, 448]
    phases = made.parts(common)
    assert spans(phases) == [
        [(0, 20, 50, 0), (1, 100, 288, 30), (2, 59, 60, 390)],
        [(1, 288, 400, 218)],
        [(1, 400, 448, 330)],
        [(1, 448, 460, 378)],
    ]
    assert phases is not None
    assert [s.eviction.at if s.eviction else None for p in phases for s in p if s.row == 1] == [
        *ats,
        None,
    ]
    states = [s.state.at if s.state else None for p in phases for s in p if s.row == 1]
    assert states == [None, *ats]


def test_a_cut_at_the_end_of_a_step_needs_no_phase_after_it() -> None:
    common, made = planned([Row(0, 400, 448, EvictionPlan(LIMITS, 400))])
    (phase,) = made.parts(common) or []
    assert [(s.start, s.end, s.eviction.at if s.eviction else 0) for s in phase] == [
        (400, 448, 448)
    ]


def test_padding_stays_in_a_step_that_is_not_split_and_goes_in_one_that_is() -> None:
    """Rows of no queries, as vLLM pads a batch."""
    for end, phases in ((447, 1), (500, 2)):
        rows = [Row(0, 400, end, EvictionPlan(LIMITS, 400)), Row(1, 0, 0, None)]
        common, made = planned(rows)
        found = made.parts(common)
        assert found is not None
        assert len(found) == phases
        assert sum(s.row == 1 for p in found for s in p) == (phases == 1)


@pytest.mark.parametrize("seed", range(60))
def test_every_token_sees_what_its_position_says(seed: int) -> None:
    choose = random.Random(seed)
    rows = some_rows(choose)
    common, made = planned(rows, choose)
    before = common.block_table_tensor.clone()
    phases = made.parts(common)
    if phases is None:
        assert all(r.plan is None for r in rows)
        return
    seen: dict[int, list[int]] = {}
    for segments in phases:
        part = made.common_of(common, segments, whole=len(phases) == 1)
        check(part, segments)
        for i, segment in enumerate(segments):
            length = int(part.seq_lens[i])
            ids = part.block_table_tensor[i, : -(-length // BLOCK)]
            slots = (ids[:, None] * BLOCK + torch.arange(BLOCK)).flatten().tolist()
            for token in text_of(rows, segment):
                assert token not in seen
                query = token - segment.first_token
                width = segment.end - segment.start
                seen[token] = slots[: length - width + query + 1]
            assert not part.block_table_tensor[i, len(ids) :].any()
    position = ((i, p) for i, r in enumerate(rows) for p in range(r.start, r.end))
    expected = {t: rows[i].sees(p) for t, (i, p) in enumerate(position)}
    assert seen == expected
    assert torch.equal(common.block_table_tensor, before)


def check(part: CommonAttentionMetadata, segments: list[RowPart]) -> None:
    """The fields agree with each other."""
    rows = len(segments)
    assert part.num_reqs == rows == len(part.seq_lens) == len(part.block_table_tensor)
    assert part.seq_lens.dtype == part.block_table_tensor.dtype == torch.int32
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist()
    assert part.query_start_loc.dtype == part.query_start_loc_cpu.dtype == torch.int32
    queries = part.query_start_loc[1:] - part.query_start_loc[:-1]
    assert queries.tolist() == [s.end - s.start for s in segments]
    assert part.num_actual_tokens == int(queries.sum())
    assert part.max_query_len == int(queries.max())
    assert part.max_seq_len == int(part.seq_lens.max())
    assert part.seq_lens_cpu_upper_bound is not None
    assert part.seq_lens_cpu_upper_bound.tolist() == part.seq_lens.tolist()
    assert part.req_idx is not None
    assert part.req_idx.tolist() == [s.row + 100 for s in segments]
    assert part.is_prefilling is not None
    assert len(part.is_prefilling) == rows
    assert part.compute_num_computed_tokens().tolist() == (part.seq_lens - queries).tolist()


@pytest.mark.parametrize("seed", range(30))
def test_decisions_name_the_blocks_that_are_held(seed: int) -> None:
    choose = random.Random(100 + seed)
    rows = some_rows(choose)
    common, made = planned(rows, choose)
    due = {
        (r.slot, c.at): (r, r.state(c.at - 1), c)
        for r in rows
        for c in (r.row_plan() or RowPlan(0, None, ())).evictions
    }
    for segments in made.parts(common) or []:
        shapes = set()
        for decision in made.decisions(common, segments):
            held = decision.resident
            shape = (held.tokens, decision.candidates, decision.count)
            assert shape not in shapes, "rows of one shape are decided together"
            shapes.add(shape)
            assert len(decision.slots) == len(held.blocks) == len(decision.num_tokens)
            for i, slot in enumerate(decision.slots):
                at = int(decision.num_tokens[i])
                row, state, cut = due.pop((slot, at))
                logical = held.logical[i].tolist()
                assert sorted(logical) == row.blocks(state, at)
                assert held.blocks[i].tolist() == [row.table[b] for b in logical]
                assert row.plan is not None
                assert int(decision.num_prompt_tokens[i]) == row.plan.num_prompt_tokens
                assert int(held.mixed[i]) == (state.end if state else 0)
                covered = [b for b in logical if b < cut.end]
                assert decision.candidates == len(covered) * BLOCK
                assert logical[: len(covered)] == covered
                survivors = logical[: decision.count // BLOCK]
                assert sorted(survivors) == row.blocks(cut, cut.end * BLOCK)
                whole = len(logical) * BLOCK
                assert held.tokens == whole - (-at % BLOCK)
            alone = decision.rows()
            assert [d.slots for d in alone] == [[slot] for slot in decision.slots]
            for i, one in enumerate(alone):
                assert torch.equal(one.resident.blocks[0], held.blocks[i])
                assert torch.equal(one.resident.logical[0], held.logical[i])
                assert int(one.resident.mixed) == int(held.mixed[i])
                assert int(one.num_tokens) == int(decision.num_tokens[i])
                assert int(one.num_prompt_tokens) == int(decision.num_prompt_tokens[i])
                assert (one.resident.tokens, one.candidates, one.count) == shape
    assert not due, "a cut that nobody decides"


# -- remembered queries and running totals, over whole texts ---------------------------------------


TABLE = random.Random(0).sample(range(1000, 2000), 30)
"""Blocks of a request over its whole life."""


def chunks(choose: random.Random, total: int) -> list[tuple[int, int]]:
    found, start = [], 0
    while start < total:
        end = min(total, start + choose.choice([1, 2, choose.randrange(1, 200)]))
        found.append((start, end))
        start = end
    return found


@pytest.mark.parametrize("ring", [1, 8, 32])
def test_the_latest_queries_are_remembered_at_their_place(ring: int) -> None:
    for seed in range(6):
        choose = random.Random(seed)
        plan = EvictionPlan(LIMITS, 300)
        places: dict[int, int] = {}
        for start, end in chunks(choose, 500):
            rows = [Row(0, 7, 8, None), Row(3, start, end, plan, TABLE)]
            common, made = planned(rows, ring=ring)
            for segments in made.parts(common) or []:
                remembered = made.remembered(segments)
                assert remembered is not None
                for token, place in zip(*(x.tolist() for x in remembered), strict=True):
                    assert 1 <= token <= end - start, "the first token is another row's"
                    places[place] = start + token - 1
                done = max(s.end for s in segments if s.row == 1)
                latest = range(max(0, done - ring), done)
                assert places == {3 * ring + p % ring: p for p in latest}
    assert planner(ring).remembered([RowPart(0, -1, None, 0, 5, 0, None, None)]) is None


def test_each_query_counts_once_in_the_totals_of_what_it_saw() -> None:
    for seed in range(6):
        choose = random.Random(seed)
        prompt = choose.randrange(100, 400)
        plan = EvictionPlan(LIMITS, prompt)
        whole = Row(5, 0, 700, EvictionPlan(LIMITS, prompt))
        counted: list[int] = []
        for start, end in chunks(choose, 700):
            row = Row(5, start, end, plan, TABLE)
            common, made = planned([row])
            for segments in made.parts(common) or []:
                (segment,) = segments
                for flush in made.flushes(common, segments):
                    positions = flush.positions[0].tolist()
                    counted += positions
                    check_flush(flush, row, whole, positions, start)
                if segment.eviction is not None:
                    assert counted[-1] == segment.eviction.at - 1, (
                        "all before a cut count before it"
                    )
            assert len(counted) >= end // FLUSH * FLUSH
        assert counted == list(range(len(counted)))


def check_flush(flush: Any, row: Row, whole: Row, positions: list[int], start: int) -> None:
    last = positions[-1]
    states = {whole.state(p) for p in positions}
    assert len(states) == 1, "queries before and after a cut"
    blocks = row.blocks(states.pop(), last + 1)
    assert flush.resident.logical[0].tolist() == blocks
    assert flush.resident.blocks[0].tolist() == [row.table[b] for b in blocks]
    assert flush.resident.tokens == len(blocks) * BLOCK - (-(last + 1) % BLOCK)
    fresh = [p - start if p >= start else -1 for p in positions]
    assert flush.fresh[0].tolist() == fresh
    old = [row.slot * FLUSH + p % FLUSH if p < start else -1 for p in positions]
    if flush.remembered is None:
        assert all(i < 0 for i in old)
    else:
        assert flush.remembered[0].tolist() == old
    assert all(p >= start - FLUSH for p in positions), "forgotten by then"


def test_rows_without_a_plan_have_no_totals() -> None:
    assert planner().flushes(None, [RowPart(0, -1, None, 0, 64, 0, None, None)]) == []


# -- a layer's cuts --------------------------------------------------------------------------------

KV_HEADS, HEADS, SIZE, OBSERVED = 2, 4, 32, 5


class Watcher(ScoringPolicy):
    """Scores by position, head and prompt; notes what it is shown."""

    name = "watcher"
    observation = OBSERVED
    wants_cumulative_attention = True
    table = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0)).float()

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.shown: list[ResidentView] = []

    @classmethod
    def worth(cls, positions: Tensor, prompts: Tensor) -> Tensor:
        """Distinct scores of positions ``[rows, kv_heads, n]``."""
        head = torch.arange(positions.shape[1])[:, None]
        return cls.table[positions.long() + 4096 * head + 8192 * (prompts[:, None, None] % 7)]

    def score(self, held: ResidentView) -> Tensor:
        self.shown.append(held)
        return self.worth(held.positions, held.num_prompt_tokens.long())


class Fails(Watcher):
    """The same, but it cannot say."""

    name = "fails"

    def score(self, held: ResidentView) -> Tensor:
        super().score(held)
        raise RuntimeError("no idea")


class Fickle(Watcher):
    """What it wants least it wants most the next time."""

    name = "fickle"

    def score(self, held: ResidentView) -> Tensor:
        return super().score(held) * (1 if len(self.shown) % 2 else -1)


def watcher(of: type[Watcher] = Watcher, **options: Any) -> Watcher:
    given = {"budget": LIMITS.budget, "sink": 4, "recent": 8, "interval": 64} | options
    engine = EngineView(BLOCK, layers=(LayerView(0, 1, KV_HEADS, HEADS, SIZE),))
    return of(of.Options.model_validate(given), engine)


def real_impl(dtype: torch.dtype) -> tuple[Any, Any]:
    """vLLM's own way into a CPU cache."""
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    isa = _get_attn_isa(dtype, BLOCK, SIZE, "auto")
    return impl, SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)


class Truth:
    """A request as it should be: what each KV head holds, by position."""

    def __init__(self, slot: int, prompt: int, total: int, blocks: list[int], dtype: torch.dtype):
        rng = torch.Generator().manual_seed(prompt)

        def some(heads: int) -> Tensor:
            return torch.randn(total, heads, SIZE, generator=rng).to(dtype)

        self.slot, self.prompt, self.blocks = slot, prompt, blocks
        self.key, self.value, self.query = some(KV_HEADS), some(KV_HEADS), some(HEADS)
        self.held: list[set[int]] = [set() for _ in range(KV_HEADS)]
        self.totals = torch.zeros(KV_HEADS, total)

    def attend(self, start: int, end: int) -> None:
        """Queries ``[start, end)`` pay attention to what is held."""
        group = HEADS // KV_HEADS
        for h, held in enumerate(self.held):
            held.update(range(start, end))
            where = torch.tensor(sorted(held))
            q = self.query[start:end, h * group : (h + 1) * group].float()
            logits = torch.einsum("qgd,kd->gqk", q, self.key[where, h].float()) * SIZE**-0.5
            hidden = where[None, :] > torch.arange(start, end)[:, None]
            paid = logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(1).mean(0)
            self.totals[h, where] += paid

    def cut(self, cut: Eviction, policy: Watcher, newest: bool = False) -> None:
        """The best of what the cut covers stay."""
        options = policy.options
        for h, held in enumerate(self.held):
            # Survivors of earlier cuts lie before the end too, whatever their position.
            covered = sorted(p for p in held if p < cut.end * BLOCK)
            where = torch.tensor(covered)[None, None].expand(1, KV_HEADS, -1)
            worth = Watcher.worth(where, torch.tensor([self.prompt]))[0, h].tolist()

            def rank(i: int, covered: Any = covered, worth: Any = worth) -> tuple[bool, float]:
                p = covered[i]
                always = p < options.sink or p >= cut.at - options.recent
                return always, float(p) if newest else worth[i]

            best = sorted(range(len(covered)), key=rank)[-cut.blocks * BLOCK :]
            stay = {covered[i] for i in best}
            held -= set(covered) - stay


class Layer:
    """One layer of a small model in which requests run and are cut."""

    def __init__(
        self,
        policy: Watcher,
        prompts: Sequence[int],
        total: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self.policy, self.total = policy, total
        self.kind = ScoringWorker(policy, ("x.yaml", "kvplug.sequence"))
        self.log = self.kind.log
        self.planner = planner(self.kind.ring)
        layer = policy.engine.layers[0]
        self.residents = LayerResidents(policy, layer, self.kind.ring, SIZE**-0.5, 0.0)
        self.evictions = LayerEvictions(self.residents, GROUP, self.log)
        width = -(-total // BLOCK) + 1
        rng = torch.Generator().manual_seed(seed)
        ids = 1 + torch.randperm((len(prompts) + 2) * width, generator=rng)
        self.own = ids[: (len(prompts) + 1) * width].view(-1, width).tolist()
        self.seed = seed
        self.start(prompts, dtype)
        self.cache = torch.randn(len(ids) + 1, KV_HEADS, BLOCK, 2 * SIZE, generator=rng).to(dtype)
        self.impl, self.layer = real_impl(dtype)
        self.residents.open(self.impl, self.layer, self.cache)
        self.pages = self.residents.pages

    def start(self, prompts: Sequence[int], dtype: torch.dtype) -> None:
        """New requests, in the slots and in the blocks of those before."""
        self.truths = [
            Truth(i, prompt, self.total, self.own[i], dtype)
            for i, prompt in enumerate([*prompts, 0])
        ]
        self.plans = [
            EvictionPlan(LIMITS, p, resizing(p) if self.seed % 2 else None) for p in prompts
        ]

    def run(self, choose: random.Random) -> None:
        """All requests to the end, in steps; the last one keeps everything."""
        done = [0] * len(self.truths)
        while min(done) < self.total:
            rows = []
            for i, truth in enumerate(self.truths):
                room = choose.choice([0, 1, choose.randrange(1, 160), self.total])
                end = min(self.total, done[i] + room)
                plan = self.plans[i] if i < len(self.plans) else None
                if end > done[i]:
                    rows.append(Row(truth.slot, done[i], end, plan, truth.blocks))
                done[i] = end
            if rows:
                self.step(rows)

    def step(self, rows: list[Row]) -> None:
        common = metadata(rows)
        own = plans(rows)
        parts = [(self.truths[r.slot], slice(r.start, r.end)) for r in rows]
        key, value, query = (
            torch.cat([getattr(truth, what)[part] for truth, part in parts])
            for what in ("key", "value", "query")
        )
        self.impl.do_kv_cache_update(self.layer, key, value, self.cache, common.slot_mapping)
        for segments in self.planner.parts(common, [r.slot for r in rows], own) or []:
            for s in segments:
                self.truths[rows[s.row].slot].attend(s.start, s.end)
            if self.policy.wants_cumulative_attention:
                for flush in self.planner.flushes(common, segments):
                    self.residents.flush(query, flush)
            remembered = self.planner.remembered(segments)
            if remembered is not None:
                self.residents.remember(query, *remembered)
            for decision in self.planner.decisions(common, segments):
                self.decide(decision, {rows[s.row].slot: s.eviction for s in segments})

    def decide(self, decision: Any, due: dict[int, Eviction | None]) -> None:
        before = self.cache.clone()
        positions, totals = self.sides()
        self.evictions.evict(decision)
        if self.log.failed is None:
            self.check_view(self.policy.shown[-1], decision)
        written = decision.resident.blocks[:, : decision.count // BLOCK].flatten()
        for slot in decision.slots:
            cut = due[slot]
            assert cut is not None
            self.truths[slot].cut(cut, self.policy)
            self.check_survivors(self.truths[slot], cut)
        others = torch.ones(len(self.cache), dtype=torch.bool)
        others[written] = False
        assert torch.equal(self.cache[others], before[others]), "a block of somebody else's"
        now = self.sides()
        assert torch.equal(now[0][others], positions[others])
        assert torch.equal(now[1][others], totals[others])
        allowed = {t.blocks[b] for t in self.truths[:-1] for b in range(LIMITS.protected, 1 << 10)
                   if b < len(t.blocks)}  # fmt: skip
        assert set(written.tolist()) <= allowed, "a block that others may read"

    def sides(self) -> tuple[Tensor, Tensor]:
        assert self.residents.positions is not None
        assert self.residents.cumulative is not None
        return self.residents.positions.clone(), self.residents.cumulative.clone()

    def check_view(self, view: ResidentView, decision: Any) -> None:
        """The policy was shown each token as it was written, wherever it lay."""
        assert view.num_tokens.tolist() == decision.num_tokens.tolist()
        assert view.queries is not None
        assert view.query_positions is not None
        assert view.cumulative_attention is not None
        for i, slot in enumerate(decision.slots):
            truth = self.truths[slot]
            assert int(view.num_prompt_tokens[i]) == truth.prompt
            for h in range(KV_HEADS):
                where = view.positions[i, h].long()
                assert len(where.unique()) == len(where)
                assert set(where.tolist()) == truth.held[h]
                assert torch.equal(view.keys[i, h], truth.key[where, h])
                assert torch.equal(view.values[i, h], truth.value[where, h])
                torch.testing.assert_close(
                    view.cumulative_attention[i, h], truth.totals[h, where], rtol=1e-4, atol=1e-4
                )
            at = int(view.num_tokens[i])
            assert view.query_positions[i].tolist() == list(range(at - OBSERVED, at))
            assert torch.equal(view.queries[i], truth.query[at - OBSERVED : at])

    def check_survivors(self, truth: Truth, cut: Eviction) -> None:
        """Each slot of the survivors' blocks holds one token, whole."""
        logical = Row(0, 0, 0, None).blocks(cut, cut.end * BLOCK)
        blocks = torch.tensor([truth.blocks[b] for b in logical])
        positions, totals = self.sides()
        keys, values = (self.pages.gather(which, blocks[None])[0] for which in (0, 1))
        for h in range(KV_HEADS):
            where = positions[blocks, h].flatten().long()
            covered = {p for p in truth.held[h] if p < cut.end * BLOCK}
            assert sorted(where.tolist()) == sorted(covered)
            assert torch.equal(keys[h], truth.key[where, h])
            assert torch.equal(values[h], truth.value[where, h])
            torch.testing.assert_close(
                totals[blocks, h].flatten(), truth.totals[h, where], rtol=1e-4, atol=1e-4
            )


def test_the_totals_of_a_chunk_may_be_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "MASS_ELEMENTS", 1)
    test_survivors_keep_their_bits_their_positions_and_their_totals(0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(4))
def test_survivors_keep_their_bits_their_positions_and_their_totals(
    seed: int, dtype: torch.dtype
) -> None:
    """Whatever the chunks; with seeds that are odd, budgets grow and shrink at every cut."""
    layer = Layer(watcher(), [150, 410, 90], 560, dtype, seed)
    layer.run(random.Random(seed))
    made = sum(len(plan.evictions) for plan in layer.plans)
    assert sum(len(view.num_tokens) for view in layer.policy.shown) == made > 12
    assert layer.log.failed is None
    assert layer.log.counts.fallbacks == 0
    layer.start([33, 151, 409], dtype)
    layer.run(random.Random(seed))
    made += sum(len(plan.evictions) for plan in layer.plans)
    assert sum(len(view.num_tokens) for view in layer.policy.shown) == made
    kept_all = layer.truths[-1]
    table = torch.tensor(kept_all.blocks)[None]
    found = layer.pages.gather(0, table)[0, :, : layer.total]
    assert torch.equal(found, kept_all.key.transpose(0, 1))


def test_rows_of_one_shape_are_cut_together_as_they_are_alone() -> None:
    def survivors(layer: Layer) -> list[list[set[int]]]:
        return [truth.held for truth in layer.truths[:-1]]

    together = Layer(watcher(), [200, 201, 202], 260)
    together.step([Row(i, 0, 260, together.plans[i], together.truths[i].blocks) for i in range(3)])
    assert len(together.policy.shown) < sum(len(p.evictions) for p in together.plans)
    alone = Layer(watcher(), [200, 201, 202], 260)
    for i in range(3):
        alone.step([Row(i, 0, 260, alone.plans[i], alone.truths[i].blocks)])
    assert survivors(together) == survivors(alone)


def test_a_policy_that_fails_is_retired_and_the_latest_survive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(
        "kvplug.hosts.vllm.worker.evictions.logger.error", lambda *a, **k: said.append(a)
    )
    policy = watcher(Fails)
    layer = Layer(policy, [200], 330)
    (truth, _), (plan,) = layer.truths, layer.plans
    common_check = Truth.cut
    monkeypatch.setattr(Truth, "cut", lambda own, cut, by: common_check(own, cut, by, newest=True))
    layer.step([Row(0, 0, 330, plan, truth.blocks)])
    assert len(plan.evictions) == 3
    assert len(policy.shown) == 1, "it is not asked again"
    assert layer.log.failed == "RuntimeError: no idea"
    assert layer.log.counts.fallbacks == 3
    assert len(said) == 1


def test_dropped_tokens_kept_in_host_memory_are_never_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is held and what is stored make up the text, each token once and bit exact; what came
    back for the sake of another head does not stay."""
    asked: list[Any] = []
    needed = SpanStore.needed

    def spy(*args: Any) -> Any:
        asked.append(needed(*args))
        return asked[-1]

    monkeypatch.setattr(SpanStore, "needed", spy)
    useless = 0
    policy = watcher(Fickle, on_demand=4096)
    layer = Layer(policy, [300], 560)

    def decide(decision: Any, due: dict[int, Eviction | None]) -> None:
        nonlocal useless
        truth, cut = layer.truths[0], due[0]
        assert cut is not None
        for one in decision.rows():
            layer.evictions.evict_with_recall(one)
        logical = Row(0, 0, 0, None).blocks(cut, cut.end * BLOCK)
        blocks = torch.tensor([truth.blocks[b] for b in logical])
        positions, _ = layer.sides()
        keys, values = (layer.pages.gather(which, blocks[None])[0] for which in (0, 1))
        stored = layer.evictions._stores[0].tokens
        assert stored is not None
        back = asked.pop()
        for h in range(KV_HEADS):
            where = positions[blocks, h].flatten().long()
            away = stored.positions[h].long()
            if back is not None:
                unneeded = back[0].positions[h][~back[1][h]].tolist()
                assert not set(where.tolist()) & set(unneeded)
                useless += len(unneeded)
            assert sorted([*where.tolist(), *away.tolist()]) == list(range(cut.end * BLOCK))
            assert torch.equal(keys[h], truth.key[where, h])
            assert torch.equal(values[h], truth.value[where, h])
            assert torch.equal(stored.keys[h], truth.key[away, h])
            assert torch.equal(stored.values[h], truth.value[away, h])

    layer.decide = decide  # type: ignore[method-assign]
    for prompt in (300, 90):
        layer.start([prompt], torch.float32)
        # No token of the second KV head is worth more than another, so it never needs one.
        layer.truths[0].query[:, HEADS // KV_HEADS :] = 0
        layer.run(random.Random(3))
        assert len(layer.plans[0].evictions) > 4
    assert layer.log.counts.recalled_tokens > 0
    assert useless, "no head took what it did not need"


def test_measurements_of_layers_are_added_up_by_slot_and_group() -> None:
    log = EvictionLog(watcher())

    def measure(slots: list[int], at: list[int], group: int, values: list[list[float]]) -> None:
        decision: Any = SimpleNamespace(slots=slots, at=at)
        log.measure(decision, group, torch.tensor(values))

    measure([3, 1], [64, 96], 0, [[1.0, 2.0], [3.0, 4.0]])
    measure([3], [64], 0, [[10.0, 20.0]])
    measure([3], [64], 1, [[7.0, 8.0]])
    log.counts.rows = 1
    report = log.take()
    assert report is not None and report.measured is not None
    rows = sorted(report.measured.tolist())
    assert rows == [[1, 0, 96, 1, 3, 4], [3, 0, 64, 2, 11, 22], [3, 1, 64, 1, 7, 8]]
    log.counts.rows = 1
    report = log.take()
    assert report is not None and report.measured is None


# -- the layer's steps -----------------------------------------------------------------------------


class StockBuilder:
    """Gives back the common metadata it is given, with room for more."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.made_with = (args, kwargs)

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(common=common, prefix=common_prefix_len, fast=fast_build)


def builder_of(kind: ScoringWorker, rows: list[Row], spec_: Any = None, **more: Any) -> Any:
    """A builder, and the step's rows as the scheduler sent them."""
    sent = StepRows()
    sent.begin(step_rows(rows))
    made = plugged_builder(StockBuilder, (kind,), sent)
    return made(spec_ or spec(), ["layer"], "a config", CPU, **more)


def a_kind() -> ScoringWorker:
    return ScoringWorker(watcher(), ("x.yaml", "kvplug.sequence"))


def test_the_builder_brings_a_step_into_phases() -> None:
    kind = a_kind()
    rows = [Row(0, 100, 460, EvictionPlan(LIMITS, 400)), Row(1, 20, 50, None)]
    common = metadata(rows)
    builder = builder_of(kind, rows, more=1)
    assert builder.made_with == ((spec(), ["layer"], "a config", CPU), {"more": 1})
    kind.plans = plans(rows)
    built = builder.build(64, common)
    phases = built.kvplug_phases
    assert built is phases[0].metadata
    assert len(phases) == 4
    assert torch.equal(torch.cat([p.tokens for p in phases]).sort().values, torch.arange(390))
    assert [len(p.decisions) for p in phases] == [1, 1, 1, 0]
    assert [len(p.flushes) for p in phases] == [1, 1, 1, 0]
    assert all(p.metadata.prefix == 0 for p in phases), "rows of a phase share no prefix"
    assert all(p.remember_from is not None for p in phases)
    kind.report(report := StepReport())
    assert report.sequence is not None
    assert (report.sequence.rows, report.sequence.evictions) == (5, 3)
    kind.report(report := StepReport())
    assert report.sequence is None, "reported once"


def test_the_builder_leaves_other_steps_alone() -> None:
    kind = a_kind()
    rows = [Row(0, 100, 460, None)]
    common = metadata(rows)
    built = builder_of(kind, rows).build(5, common, True)
    assert (built.common, built.prefix, built.fast) == (common, 5, True)
    assert built.common is common
    assert not hasattr(built, "kvplug_phases")
    kind.plans = {(GROUP, 0): RowPlan(5, None, ())}
    other = builder_of(kind, rows, SimpleNamespace(block_size=BLOCK))
    assert other.build(5, common).common is common


class StockImpl:
    """Attention that says which tokens it was asked about and what lies in the cache."""

    scale = SIZE**-0.5

    def __init__(self) -> None:
        self.calls: list[tuple[list[float], Tensor]] = []

    def do_kv_cache_update(self, layer: Any, *args: Any) -> None:
        real_impl(torch.float32)[0].do_kv_cache_update(layer, *args)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor,
        metadata: Any, output: Tensor, *more: Any,
    ) -> Tensor:  # fmt: skip
        self.calls.append((query[:, 0, 0].tolist(), cache.clone()))
        output.copy_(query * 2)
        return output


def impl_of(kind: ScoringWorker) -> Any:
    impl = object.__new__(plugged_impl(StockImpl, (kind,), lambda *args: StockImpl))
    StockImpl.__init__(impl)
    return impl


def test_each_phase_is_attended_after_the_cuts_before_it() -> None:
    kind = a_kind()
    impl = impl_of(kind)
    rows = [Row(0, 0, 300, EvictionPlan(LIMITS, 250)), Row(1, 20, 50, None)]
    common = metadata(rows)
    kind.plans = plans(rows)
    (first, second) = rows[0].row_plan().evictions  # type: ignore[union-attr]
    built = builder_of(kind, rows).build(0, common)
    _, layer = real_impl(torch.float32)
    layer.layer_name = "model.layers.0.self_attn.attn"
    cache = torch.randn(60, KV_HEADS, BLOCK, 2 * SIZE)
    query = torch.arange(330.0)[:, None, None].expand(330, HEADS, SIZE).contiguous() / 64
    key = torch.randn(330, KV_HEADS, SIZE)
    output = torch.full_like(query, -1)
    found = impl.forward(layer, query, key, key, cache, built, output)
    assert found is output
    assert torch.equal(output, query * 2)
    asked = [(torch.tensor(tokens) * 64).int().tolist() for tokens, _ in impl.calls]
    assert asked == [
        [*range(first.at), *range(300, 330)],
        list(range(first.at, second.at)),
        list(range(second.at, 300)),
    ]
    caches = [seen for _, seen in impl.calls] + [cache]
    for cut, before, after in zip((first, second), caches, caches[1:], strict=False):
        changed = (before != after).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert changed
        assert set(changed) <= {rows[0].table[b] for b in rows[0].blocks(cut, cut.end * BLOCK)}
    assert torch.equal(caches[2], caches[3])
    assert kind.layers[layer.layer_name] is kind.layer(impl, layer)


def test_metadata_without_phases_goes_to_stock_untouched() -> None:
    impl = impl_of(a_kind())
    query = torch.ones(3, HEADS, SIZE)
    output = torch.empty_like(query)
    found = impl.forward(
        SimpleNamespace(layer_name="layer"),
        query,
        query,
        query,
        torch.zeros(1),
        SimpleNamespace(),
        output,
    )
    assert found is output
    assert len(impl.calls) == 1
