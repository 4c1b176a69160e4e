"""Whose row a row is, and metadata of other rows than the runner's."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvplug.contract import EngineView, LayerView
from kvplug.hosts.vllm.messages import FormatDirectives, StepDirectives
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.format import FormatLog, FormatTokens, FormatWorker, TokenSlots
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.steps import BuildCall, RowSlots
from kvplug_policies.format.int8 import Int8

BLOCK = 16
CPU = torch.device("cpu")


def rows_of(*pairs: tuple[int, int]) -> StepRows:
    rows = StepRows()
    rows.begin(np.array(pairs, dtype=np.int32))
    return rows


def some_step(seed: int) -> CommonAttentionMetadata:
    """A step of several requests as the runner makes it."""
    choose = random.Random(seed)
    n = choose.randrange(1, 6)
    lens = torch.tensor([choose.randrange(1, 200) for _ in range(n)], dtype=torch.int32)
    widths = [choose.randrange(1, int(length) + 1) for length in lens]
    starts = torch.tensor([0, *np.cumsum(widths)], dtype=torch.int32)
    width = 200 // BLOCK + 1
    blocks = choose.sample(range(1, 500), n * width)
    table = torch.tensor(blocks, dtype=torch.int32).view(n, width)
    positions = [
        (i, p) for i, w in enumerate(widths) for p in range(int(lens[i]) - w, int(lens[i]))
    ]
    slots = [int(table[i, p // BLOCK]) * BLOCK + p % BLOCK for i, p in positions]
    made = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lens,
        num_reqs=n,
        num_actual_tokens=sum(widths),
        max_query_len=max(widths),
        max_seq_len=int(lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
        is_prefilling=torch.tensor([w > 1 for w in widths]),
        seq_lens_cpu_upper_bound=lens.clone(),
        req_idx=np.arange(n) + 100,
    )
    # What vLLM keeps of the step in private fields.
    made.compute_num_computed_tokens()
    return made


# -- slots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_row_has_the_slot_of_the_block_it_writes_last(seed: int) -> None:
    common = some_step(seed)
    last = [
        int(t[(int(n) - 1) // BLOCK])
        for t, n in zip(common.block_table_tensor, common.seq_lens, strict=True)
    ]
    slots = random.Random(seed).sample(range(50), len(last))
    pairs = list(zip(last, slots, strict=True))
    random.Random(seed).shuffle(pairs)
    rows = rows_of(*pairs, (900, 51))
    found = rows.slots_of(common.block_table_tensor, common.seq_lens, BLOCK)
    assert found.dtype == torch.int64
    assert found.tolist() == slots
    assert rows.num_slots == 52


def test_rows_that_were_not_sent_are_unknown_and_so_is_padding() -> None:
    table = torch.tensor([[3, 4], [5, 6], [3, 4]], dtype=torch.int32)
    lens = torch.tensor([17, 17, 0], dtype=torch.int32)
    rows = rows_of((4, 7), (3, 8))
    assert rows.slots_of(table, lens, BLOCK).tolist() == [7, -1, -1]
    with rows.hidden():
        assert rows.slots_of(table, lens, BLOCK).tolist() == [-1, -1, -1]
    assert rows.slots_of(table, lens, BLOCK).tolist() == [7, -1, -1]
    rows.begin(None)
    assert rows.slots_of(table, lens, BLOCK).tolist() == [-1, -1, -1]
    assert rows.num_slots == 9, "slots that were there stay in use on the worker"


def test_a_row_whose_drafts_were_rejected_is_found_by_the_block_before() -> None:
    """Its length is known on the device only; the scheduler sends each block it may write last."""
    table = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    rows = rows_of((4, 2), (5, 2))
    for length in (33, 32, 31):
        lens = torch.tensor([length], dtype=torch.int32)
        assert rows.slots_of(table, lens, BLOCK).tolist() == [2]


def test_slots_are_looked_up_once_and_only_if_asked() -> None:
    asked: list[Any] = []

    class Counting(StepRows):
        def slots_of(self, *args: Any) -> torch.Tensor:
            asked.append(args)
            return super().slots_of(*args)

    rows = Counting()
    rows.begin(np.array([(1, 0)], dtype=np.int32))
    common = some_step(0)
    call = BuildCall(common, 0, False, RowSlots(rows, common, BLOCK))
    assert not asked
    other = call.on(some_step(1))
    assert other.slots is call.slots, "of the rows at the head of the chain"
    assert len(asked) == 1


# -- metadata of other rows ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_some_rows_of_a_step_are_a_step_of_their_own(seed: int) -> None:
    common = some_step(seed)
    rows = random.Random(seed).sample(
        range(common.num_reqs), random.Random(seed).randrange(1, common.num_reqs + 1)
    )
    part, tokens = metadata.select_rows(common, rows)
    starts = common.query_start_loc.tolist()
    expected = [t for row in rows for t in range(starts[row], starts[row + 1])]
    assert tokens.tolist() == expected
    assert part.slot_mapping.tolist() == common.slot_mapping[expected].tolist()
    assert part.num_reqs == len(rows)
    assert part.num_actual_tokens == len(expected)
    assert part.seq_lens.tolist() == common.seq_lens[rows].tolist()
    assert part.seq_lens_cpu_upper_bound.tolist() == part.seq_lens.tolist()
    assert part.block_table_tensor.tolist() == common.block_table_tensor[rows].tolist()
    widths = [starts[row + 1] - starts[row] for row in rows]
    assert part.query_start_loc.tolist() == [0, *np.cumsum(widths)]
    assert part.query_start_loc_cpu.tolist() == part.query_start_loc.tolist()
    assert part.max_query_len == max(widths)
    assert part.max_seq_len == int(part.seq_lens.max())
    assert part.req_idx.tolist() == [100 + row for row in rows]
    assert part.is_prefilling.tolist() == common.is_prefilling[rows].tolist()
    computed = part.compute_num_computed_tokens().tolist()
    assert computed == [n - w for n, w in zip(part.seq_lens.tolist(), widths, strict=True)]


def test_spans_of_a_text_are_rows_that_see_the_text_up_to_their_end() -> None:
    slots = torch.arange(12)
    made = metadata.of_spans([(4, 9), (20, 27)], torch.tensor([7, 8]), slots)
    assert made.query_start_loc.tolist() == made.query_start_loc_cpu.tolist() == [0, 5, 12]
    assert made.seq_lens.tolist() == made.seq_lens_cpu_upper_bound.tolist() == [9, 27]
    assert made.block_table_tensor.tolist() == [[7, 8], [7, 8]]
    assert (made.num_reqs, made.num_actual_tokens) == (2, 12)
    assert (made.max_query_len, made.max_seq_len) == (7, 27)
    assert made.slot_mapping is slots


# -- a format that treats requests apart -----------------------------------------------------------


class Apart(Int8):
    """Keeps four recent tokens, and stores requests in two ways."""

    def recent(self, layer: LayerView) -> int:
        return 4

    def assignments(self) -> tuple[str, ...]:
        return ("one", "other")


def apart() -> Apart:
    layers = (LayerView(0, 1, 1, 2, 64, "float32"),)
    return Apart(Apart.Options(), EngineView(block_size=BLOCK, layers=layers))


def step_of(starts: list[int]) -> Any:
    """Three rows, the last of which nobody knows."""
    widths = [b - a for a, b in itertools.pairwise(starts)]
    return SimpleNamespace(
        num_reqs=3,
        num_actual_tokens=starts[-1],
        max_query_len=max(widths),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([20, 32, 5], dtype=torch.int32),
        block_table_tensor=torch.tensor([[3, 4], [5, 6], [9, 0]], dtype=torch.int32),
        slot_mapping=torch.arange(100, 115),
    )


def tokens_of(kind: FormatWorker, common: Any, step: FormatTokens | None = None) -> TokenSlots:
    """Build metadata of a step, and return the slots of its tokens."""
    step = step or FormatTokens(kind, BLOCK, 15, CPU)
    call = BuildCall(common, 0, False, RowSlots(kind.rows, common, BLOCK))
    assert step.build(lambda inner: inner.common, call) is common
    assert step.current is not None
    return step.current


def test_tokens_have_the_slot_and_assignment_of_their_request() -> None:
    rows = rows_of((4, 7), (6, 3))
    kind = FormatWorker(apart(), ("x.yaml", "kvplug.format"), rows)
    assert kind.apart and kind.recent_sizes == [4] and kind.assignments is not None
    assignments = np.array([[7, 1], [3, 0]], dtype=np.int32)
    kind.begin(StepDirectives(format=FormatDirectives(assignments)))
    common = step_of([0, 6, 8, 9])
    common.slot_mapping[7] = -1
    found = tokens_of(kind, common)
    assert found.slots.tolist() == [7] * 6 + [3] * 2 + [-1] * 7
    assert kind.assignments.of(found.slots[:8]).tolist() == [1] * 6 + [0] * 2
    ring = [1 + 7 * 4 + slot % 4 for slot in range(102, 106)] + [1 + 3 * 4 + 106 % 4]
    assert found.places[4].tolist() == [0, 0, *ring] + [0] * 8, "the last four of known requests"


def test_a_decode_step_writes_to_the_buffers_of_the_step_before() -> None:
    """A graph reads the slots of its tokens where they were when it was captured."""
    rows = rows_of((4, 7), (6, 3))
    kind = FormatWorker(apart(), ("x.yaml", "kvplug.format"), rows, max_requests=8)
    step = FormatTokens(kind, BLOCK, 15, CPU)
    before = tokens_of(kind, step_of([0, 6, 8, 9]), step)
    after = tokens_of(kind, step_of([0, 1, 2, 2]), step)
    assert after.slots.data_ptr() == before.slots.data_ptr()
    assert after.places[4].data_ptr() == before.places[4].data_ptr()
    assert after.slots.tolist() == [7, 3] + [-1] * 13
    assert after.places[4].tolist() == [1 + 7 * 4, 1 + 3 * 4 + 1] + [0] * 13


def test_forwards_that_are_not_the_steps_leave_its_slots_alone() -> None:
    rows = rows_of((4, 7), (6, 3))
    kind = FormatWorker(apart(), ("x.yaml", "kvplug.format"), rows, max_requests=8)
    step = FormatTokens(kind, BLOCK, 15, CPU)
    own = tokens_of(kind, step_of([0, 1, 2, 2]), step)
    with rows.hidden():
        call = BuildCall(step_of([0, 6, 8, 9]), 0, False, RowSlots(rows, None, BLOCK))
        step.build(lambda inner: inner.common, call)
    assert step.current is None
    assert own.slots.tolist() == [7, 3] + [-1] * 13
    assert kind.log.tokens == 2


@pytest.mark.parametrize("slots", [None, 8], ids=["first-runner", "second-runner"])
def test_assignments_reach_the_worker(slots: int | None) -> None:
    """The first runner's are sent with every step, under its own slots; the second's once, and the
    runner's slot is found by the row that the directives name."""
    rows = StepRows()
    kind = FormatWorker(apart(), ("x.yaml", "kvplug.format"), rows, slots)
    assert kind.assignments is not None
    asked = torch.tensor([5, 2, -1, 0])
    before = kind.assignments.of(asked[1:]) if slots else None
    directives = StepDirectives(format=FormatDirectives(np.array([[5, 1], [2, 0]], np.int32)))
    rows.begin(None, {"a": 5, "b": 2})
    kind.begin(directives)
    if slots:
        rows.see(np.array([2, 6]))
        rows.name(["a", "b"])
    kind.load(directives)
    found = kind.assignments.of(asked).tolist()
    assert found == ([0, 1, 0, 0] if slots else [1, 0, 0, 0])
    assert before is None or before.tolist() == [0, 0, 0]
    kind.begin(StepDirectives())
    kind.load(StepDirectives())
    assert kind.assignments.of(asked).tolist() == found, "they are kept until the slot is given on"


def test_tokens_of_a_step_are_counted_once_per_layer() -> None:
    """By the builder: where a graph is replayed, no layer's Python runs. Builds that no step ends
    with, as those of a capture, do not count."""
    kind = FormatWorker(apart(), ("x.yaml", "kvplug.format"), rows_of((4, 7)), max_requests=8)
    kind.layers.update({"0": None, "1": None})  # type: ignore[dict-item]
    step = FormatTokens(kind, BLOCK, 15, CPU)
    tokens_of(kind, step_of([0, 6, 8, 9]), step)
    tokens_of(kind, step_of([0, 1, 2, 2]), step)
    kind.end(StepDirectives())
    kind.end(StepDirectives())
    assert kind.log.counts.tokens == 2 * 2


def test_a_block_that_is_written_anew_is_no_longer_missing() -> None:
    kind = FormatWorker(apart(), ("x.yaml", "kvplug.format"), rows_of((4, 7)))
    kind.log.unwritten |= {13, 25}
    common = step_of([0, 1, 2, 2])
    common.slot_mapping[:3] = torch.tensor([13 * BLOCK, 25 * BLOCK + 1, -1])
    tokens_of(kind, common)
    assert kind.log.unwritten == {25}


class _Counting:
    """A format that counts how often it was asked."""

    name, asked = "counting", 0

    def counters(self) -> dict[str, float]:
        self.asked += 1
        return {"asked": float(self.asked)}

    def signals(self) -> None:
        return None


def test_counters_are_read_now_and_then_where_they_have_to_be_waited_for() -> None:
    reported = {}
    for waits in (False, True):
        log = FormatLog(_Counting())  # type: ignore[arg-type]
        log.waits = waits
        reported[waits] = []
        for _ in range(130):
            log.counts.tokens = 1
            report = log.take()
            assert report is not None
            reported[waits].append(report.counters)
        assert log.take() is None, "nothing happened since"
    assert reported[False] == [{"asked": float(i + 1)} for i in range(130)]
    assert [i for i, one in enumerate(reported[True]) if one] == [0, 64, 128]
