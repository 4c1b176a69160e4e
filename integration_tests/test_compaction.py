"""What the compacted metadata means to attention, against a reference that knows no compaction.

The reference says for every query token, by its own position alone, which tokens it may see, as a
list of slots (physical block times block size plus offset). The metadata says the same through
rows: attention walks a row's block table, its queries aligned to the end of the row's length. Both
lists must be equal, in order.
"""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from no_sync import Accelerator
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvplug.hosts.vllm.messages import SequenceDirectives, StepDirectives
from kvplug.hosts.vllm.spec import WindowedSpec
from kvplug.hosts.vllm.worker.composition import plugged_builder
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state
from kvplug.hosts.vllm.worker.steps import BuildCall, RowSlots
from kvplug.hosts.vllm.worker.window import Compaction, WindowWorker

Visible = list[int]
CPU = torch.device("cpu")


def config(engine: str = "an engine", drafts: int = 0, max_num_seqs: int = 16) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id=engine),
        num_speculative_tokens=drafts,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


def spec(block: int, sink: int, window: int) -> WindowedSpec:
    """Sink and window in blocks."""
    return WindowedSpec(
        block_size=block,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        sink_tokens=sink * block,
        window_tokens=window * block,
        exact_tokens=(sink + window + 1) * block,
        in_flight_tokens=64,
        max_tokens=1 << 16,
    )


ON_DEVICE = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")


class Compactor:
    """One group's compaction, with the rows and directives of the step; on a stand-in for an
    accelerator, it must never wait for it."""

    def __init__(self, block: int, sink: int, window: int, drafts: int, accelerator: bool):
        self.block = block
        self.rows = StepRows()
        self.kind = a_kind(self.rows)
        self.accelerator = Accelerator() if accelerator else None
        with self.on_device():
            device = self.accelerator.device if self.accelerator else CPU
            own = spec(block, sink, window)
            self.step = Compaction(self.kind, own, config(drafts=drafts), device)
        self.compact = self.step._compact

    def on_device(self, *commons: CommonAttentionMetadata) -> Any:
        if self.accelerator is None:
            return nullcontext()
        self.accelerator.put(*(getattr(c, name) for c in commons for name in ON_DEVICE))
        return self.accelerator.no_sync()

    def __call__(self, common: CommonAttentionMetadata, fast: bool = False) -> Any:
        with self.on_device(common):
            slots = RowSlots(self.rows, common, self.block)
            return self.step.build(lambda call: call.common, BuildCall(common, 0, fast, slots))

    def send(self, common: CommonAttentionMetadata, rows: list[Row]) -> None:
        """What the scheduler says of a step: the slot of each row, and the exempt ones."""
        last = [(row.length - 1) // self.block for row in rows]
        blocks = [int(common.block_table_tensor[i, block]) for i, block in enumerate(last)]
        slots = [3 * i + 2 for i in range(len(rows))]
        directives = StepDirectives(
            np.array(list(zip(blocks, slots, strict=True)), dtype=np.int32),
            SequenceDirectives(
                exempt=np.array(
                    [slot for slot, row in zip(slots, rows, strict=True) if row.exempt],
                    dtype=np.int32,
                )
            ),
        )
        self.rows.begin(directives.rows)
        self.kind.begin(directives)


def a_kind(rows: StepRows | None = None) -> WindowWorker:
    policy: Any = SimpleNamespace(name="a policy", engine=SimpleNamespace(layers=()))
    return WindowWorker(policy, ("x.yaml", "kvplug.sequence"), rows or StepRows())


def compactor(
    block: int, sink: int, window: int, *, drafts: int = 0, accelerator: bool = False
) -> Compactor:
    return Compactor(block, sink, window, drafts, accelerator)


@dataclass
class Row:
    """A request in a step: tokens so far, of which the last ``queries`` are being computed."""

    length: int
    queries: int
    exempt: bool = False
    drafts_rejected: int = 0


def metadata(
    rows: list[Row], block: int, sink: int, window: int, nulls: random.Random | None = None
) -> CommonAttentionMetadata:
    """A step's metadata as the runner makes it; freed entries are stale ids, or null."""
    width = max(-(-r.length // block) for r in rows) + 2
    table = torch.arange(1, len(rows) * width + 1, dtype=torch.int32).view(len(rows), width)
    table = table[:, torch.randperm(width, generator=torch.Generator().manual_seed(width))]
    table = table.contiguous()
    for i, row in enumerate(rows):
        if nulls is not None and nulls.random() < 0.5 and not row.exempt:
            settled = (row.length - row.queries) // block
            table[i, sink : max(sink, settled - window)] = 0
    lengths = [r.length for r in rows]
    queries = torch.tensor([r.queries for r in rows])
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = torch.cumsum(queries, 0)
    total = int(queries.sum())
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(rows),
        num_actual_tokens=total,
        max_query_len=int(queries.max()),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.arange(total),
        is_prefilling=torch.tensor([r.queries > 1 for r in rows]),
        seq_lens_cpu_upper_bound=torch.tensor(
            [r.length + r.drafts_rejected for r in rows], dtype=torch.int32
        ),
        req_idx=np.arange(len(rows)) + 100,
    )


def expected(
    common: CommonAttentionMetadata,
    rows: list[Row],
    block: int,
    sink: int,
    window: int,
    whole_rows_up_to: int = 0,
) -> list[Visible]:
    """Per query token, what it may see.

    Args:
        whole_rows_up_to: Rows of at most so many queries see what their first query sees and all
            after it.
    """
    found = []
    table = common.block_table_tensor.numpy()
    for i, row in enumerate(rows):
        first = row.length - row.queries
        token = np.arange(row.length)
        slots = table[i, token // block] * block + token % block
        for position in range(first, row.length):
            rule = first if row.queries <= whole_rows_up_to else position
            oldest = 0 if row.exempt else rule // block - window
            seen = (token <= position) & ((token // block < sink) | (token // block >= oldest))
            found.append(slots[seen].tolist())
    return found


def meaning(common: CommonAttentionMetadata, block: int) -> list[Visible]:
    """Per query token, what causal attention over the metadata sees."""
    found = []
    table = common.block_table_tensor.numpy()
    for row in range(common.num_reqs):
        length = int(common.seq_lens[row])
        queries = int(common.query_start_loc[row + 1] - common.query_start_loc[row])
        ids = table[row, : -(-length // block)]
        slots = (ids[:, None] * block + np.arange(block)).ravel()[:length].tolist()
        found += [slots[: length - queries + query + 1] for query in range(queries)]
    return found


def check(common: CommonAttentionMetadata, cpu: bool = True) -> None:
    """The fields agree with each other."""
    assert common.num_reqs == len(common.seq_lens) == len(common.block_table_tensor)
    assert len(common.query_start_loc) == len(common.query_start_loc_cpu) == common.num_reqs + 1
    assert common.query_start_loc.tolist() == common.query_start_loc_cpu.tolist()
    assert common.seq_lens.dtype == common.block_table_tensor.dtype == torch.int32
    assert common.query_start_loc.dtype == common.query_start_loc_cpu.dtype == torch.int32
    queries = common.query_start_loc[1:] - common.query_start_loc[:-1]
    assert int(common.query_start_loc[-1]) == common.num_actual_tokens
    assert common.max_query_len == int(queries.max())
    assert bool((queries <= common.seq_lens).all())
    assert common.max_seq_len >= int(common.seq_lens.max())
    assert common.seq_lens_cpu_upper_bound is not None
    assert bool((common.seq_lens_cpu_upper_bound >= common.seq_lens).all())
    if cpu:
        assert common.seq_lens_cpu_upper_bound.device.type == "cpu"
    assert len(common.is_prefilling) == len(common.req_idx) == common.num_reqs
    assert common.compute_num_computed_tokens().tolist() == (common.seq_lens - queries).tolist()


def some_rows(choose: random.Random, kind: str, block: int) -> list[Row]:
    longest = 12 * block
    rows = []
    for _ in range(choose.randrange(1, 7)):
        length = choose.randrange(1, longest)
        shape = choose.choice(["decode", "chunk", "prompt"]) if kind == "mixed" else kind
        if shape == "decode":
            queries = 1
        elif shape == "chunk":
            queries = choose.randrange(1, min(length, 5 * block) + 1)
        elif shape == "edges":
            length = max(1, length // block * block + choose.choice([-1, 0, 1]))
            queries = min(length, choose.choice([1, 2, block - 1, block, block + 1, 2 * block]))
        else:
            queries = length
        rows.append(Row(length, queries))
    if choose.random() < 0.3:
        rows.append(Row(1, 1))
    choose.shuffle(rows)
    return rows


def snapshot(common: CommonAttentionMetadata) -> dict[str, Any]:
    return {f.name: copy.deepcopy(getattr(common, f.name)) for f in fields(common)}


def same(before: dict[str, Any], common: CommonAttentionMetadata) -> bool:
    for name, value in before.items():
        now = getattr(common, name)
        if isinstance(value, torch.Tensor | np.ndarray):
            if not (value == now).all() or value.shape != now.shape:
                return False
        elif value != now:
            return False
    return True


WINDOWS = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (2, 0), (2, 3), (1, 6)]
KINDS = ["decode", "chunk", "prompt", "edges", "mixed"]


# -- what is seen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [16, 32, 128])
def test_every_query_sees_what_its_position_entitles_it_to(block: int, kind: str) -> None:
    choose = random.Random(f"{block} {kind}")
    hidden = 0
    for sink, window in WINDOWS:
        compact = compactor(block, sink, window)
        for _ in range(8 if block < 128 else 2):
            rows = some_rows(choose, kind, block)
            common = metadata(rows, block, sink, window, choose)
            before = snapshot(common)
            result = compact(common)
            assert meaning(result, block) == expected(common, rows, block, sink, window), rows
            assert same(before, common), "the runner's own metadata was written to"
            check(result)
            hidden += result is not common
    assert hidden > 5, "the batches hid nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_exempt_rows_see_everything_beside_rows_that_do_not(kind: str) -> None:
    block = 16
    choose = random.Random(kind)
    seen = 0
    for sink, window in WINDOWS:
        compact = compactor(block, sink, window)
        for _ in range(12):
            rows = some_rows(choose, kind, block)
            for row in rows:
                row.exempt = choose.random() < 0.4
            common = metadata(rows, block, sink, window, choose)
            compact.send(common, rows)
            before = snapshot(common)
            result = compact(common)
            assert meaning(result, block) == expected(common, rows, block, sink, window), rows
            assert same(before, common)
            check(result)
            seen += any(r.exempt and r.length > compact.compact.exact_tokens for r in rows)
    assert seen > 20, "no exempt row was long enough to matter"


def test_exempt_rows_are_forgotten_when_the_scheduler_names_none() -> None:
    rows = [Row(200, 1, exempt=True)]
    common = metadata(rows, 16, 1, 1)
    compact = compactor(16, 1, 1)
    compact.send(common, rows)
    assert int(compact(common).seq_lens[0]) == 200
    compact.kind.begin(StepDirectives())
    assert int(compact(common).seq_lens[0]) == 200 - (12 - 1 - 1) * 16


def test_an_exempt_row_is_not_split() -> None:
    rows = [Row(160, 160, exempt=True), Row(96, 96)]
    common = metadata(rows, 16, 1, 1)
    compact = compactor(16, 1, 1)
    compact.send(common, rows)
    assert compact(common).req_idx.tolist() == [100, 101, 101, 101, 101]


def test_the_cut_of_a_prompt_into_chunks_changes_nothing() -> None:
    block, sink, window, length = 16, 1, 2, 171
    compact = compactor(block, sink, window)
    whole = metadata([Row(length, length)], block, sink, window)
    at_once = meaning(compact(whole), block)
    for chunk in (1, 7, 16, 33, 100):
        pieces: list[Visible] = []
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            common = metadata([Row(end, end - start)], block, sink, window)
            common.block_table_tensor = whole.block_table_tensor
            pieces += meaning(compact(common), block)
        assert pieces == at_once, chunk


@pytest.mark.parametrize("queries", [1, 16, 48])
def test_the_very_same_metadata_comes_back_when_nothing_is_hidden(queries: int) -> None:
    block, sink, window = 16, 1, 1
    compact = compactor(block, sink, window)
    common = metadata([Row(3 * block, queries), Row(1, 1)], block, sink, window)
    assert compact(common) is common
    assert compact.kind.counts.rows == 0
    over = metadata([Row(3 * block + 1, 1), Row(1, 1)], block, sink, window)
    assert compact(over) is not over


def test_rows_are_split_only_where_windows_differ() -> None:
    """Blocks that see everything stay one row; each block beyond them is a row of its own."""
    block, sink, window = 16, 1, 1
    compact = compactor(block, sink, window)
    result = compact(metadata([Row(6 * block, 6 * block), Row(40, 1)], block, sink, window))
    queries = (result.query_start_loc[1:] - result.query_start_loc[:-1]).tolist()
    assert queries == [3 * block, block, block, block, 1]
    assert result.seq_lens.tolist() == [48, 48, 48, 48, 40]
    assert result.req_idx.tolist() == [100, 100, 100, 100, 101]
    assert result.is_prefilling.tolist() == [True, True, True, True, False]
    assert result.max_query_len == 48
    assert result.num_actual_tokens == 97


def test_what_has_nothing_to_do_with_rows_is_passed_on() -> None:
    common = metadata([Row(200, 60)], 16, 1, 1)
    result = compactor(16, 1, 1)(common)
    assert result.slot_mapping is common.slot_mapping
    assert result.causal is common.causal


@pytest.mark.parametrize("queries", [1, 60])
def test_caches_of_the_old_metadata_are_not_taken_over(queries: int) -> None:
    common = metadata([Row(200, queries)], 16, 1, 1)
    assert common.compute_num_computed_tokens().tolist() == [200 - queries]
    check(compactor(16, 1, 1)(common))


def test_optional_fields_may_be_missing() -> None:
    rows = [Row(200, 60), Row(100, 1)]
    common = metadata(rows, 16, 1, 1).replace(
        is_prefilling=None, req_idx=None, seq_lens_cpu_upper_bound=None
    )
    result = compactor(16, 1, 1)(common)
    assert result.is_prefilling is None and result.req_idx is None
    assert meaning(result, 16) == expected(common, rows, 16, 1, 1)


# -- counters, buffers, engines --------------------------------------------------------------------


def test_rows_are_counted() -> None:
    compact = compactor(16, 1, 1)
    compact(metadata([Row(200, 1), Row(100, 1)], 16, 1, 1))
    assert (compact.kind.counts.rows, compact.kind.counts.split_rows) == (2, 0)
    compact(metadata([Row(96, 96), Row(100, 1)], 16, 1, 1))
    assert (compact.kind.counts.rows, compact.kind.counts.split_rows) == (2 + 5, 3)


@pytest.mark.parametrize("accelerator", [False, True])
def test_whole_rows_stay_in_the_same_buffers(accelerator: bool) -> None:
    """A captured CUDA graph replays over these addresses."""
    compact = compactor(16, 1, 1, accelerator=accelerator)
    many = compact(metadata([Row(200, 1)] * 5, 16, 1, 1))
    few = compact(metadata([Row(199, 1), Row(90, 1)], 16, 1, 1))
    assert few.block_table_tensor.data_ptr() == many.block_table_tensor.data_ptr()
    assert few.seq_lens.data_ptr() == many.seq_lens.data_ptr()
    most = compact(metadata([Row(200, 1)] * 16, 16, 1, 1))
    assert most.block_table_tensor.data_ptr() == many.block_table_tensor.data_ptr()


@pytest.mark.parametrize("accelerator", [False, True])
def test_the_buffers_are_there_from_the_start(accelerator: bool) -> None:
    """As large as the engine's limits, so no step moves them; rows beyond have their own."""
    compact = compactor(16, 1, 1, accelerator=accelerator)
    buffer = compact.compact._table.data_ptr()
    for rows in ([Row(90, 1)], [Row(900, 1)] * 16, [Row(300, 1)] * 20):
        common = metadata(rows, 16, 1, 1)
        result = compact(common)
        assert meaning(result, 16) == expected(common, rows, 16, 1, 1)
        assert (result.block_table_tensor.data_ptr() == buffer) == (len(rows) <= 16)
    assert compact.compact._table.data_ptr() == buffer


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("other", ["chunk", "fast"])
def test_other_builds_leave_what_a_graph_reads(other: str, accelerator: bool) -> None:
    """Of a step with a chunk that is split, or of a forward inside the step."""
    compact = compactor(16, 1, 1, accelerator=accelerator)
    rows = [Row(200, 1), Row(90, 1)]
    common = metadata(rows, 16, 1, 1)
    result = compact(common)
    chunk = metadata([Row(150, 60 if other == "chunk" else 1), Row(300, 1)], 16, 1, 1)
    again = compact(chunk, fast=other == "fast")
    assert again.block_table_tensor.data_ptr() != result.block_table_tensor.data_ptr()
    assert meaning(result, 16) == expected(common, rows, 16, 1, 1)


@pytest.mark.parametrize(
    ("length", "exempt", "longest"), [(700, 0, 48), (700, 1, 700), (40, 0, 40)]
)
def test_the_longest_row_is_the_windows_on_an_accelerator(
    length: int, exempt: int, longest: int
) -> None:
    """A block of the sink, one of the window, and that of the query itself."""
    compact = compactor(16, 1, 1, accelerator=True)
    rows = [Row(length, 1, exempt=bool(exempt)), Row(30, 1)]
    common = metadata(rows, 16, 1, 1)
    compact.send(common, rows)
    result = compact(common)
    assert result.max_seq_len == longest
    assert (result.seq_lens_cpu_upper_bound >= result.seq_lens).all()


def test_a_graph_is_captured_for_the_longest_text() -> None:
    """It is replayed for requests that keep everything too."""
    compact = compactor(16, 1, 1, accelerator=True)
    common = metadata([Row(1, 1)] * 4, 16, 1, 1).replace(max_seq_len=1 << 16)
    result = compact(common)
    assert result.max_seq_len == 1 << 16
    assert result.block_table_tensor.shape == common.block_table_tensor.shape


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_graph_replays_on_the_metadata_it_was_captured_with(accelerator: bool) -> None:
    """What later steps build is thrown away; all that counts is what they wrote."""
    block, sink, window = 16, 1, 2
    compact = compactor(block, sink, window, accelerator=accelerator)
    longest = 1 << 16
    table = torch.zeros((8, 40), dtype=torch.int32)
    dummies = metadata([Row(1, 1)] * 8, block, sink, window)
    dummies = dummies.replace(max_seq_len=longest, block_table_tensor=table)
    captured = compact(dummies)
    choose = random.Random(0)
    for _ in range(20):
        rows = [Row(choose.randrange(1, 300), 1) for _ in range(choose.randrange(1, 9))]
        if choose.random() < 0.3:
            compact(metadata([Row(200, 90), Row(40, 1)], block, sink, window))
        common = padded(metadata(rows, block, sink, window), 8 - len(rows))
        if not compact.compact.shortens(common):
            continue
        compact(common)
        # The runner's own buffers are the same in every step.
        replayed = captured.replace(query_start_loc=common.query_start_loc)
        want = expected(common, rows, block, sink, window)
        assert meaning(replayed, block) == want, rows


def test_engines_in_one_process_share_nothing() -> None:
    rows = [Row(200, 1, exempt=True)]
    common = metadata(rows, 16, 1, 1)
    mine, other = compactor(16, 1, 1), compactor(16, 1, 1)
    mine.send(common, rows)
    assert int(mine(common).seq_lens[0]) == 200
    assert int(other(common).seq_lens[0]) < 200
    other(common)
    assert (mine.kind.counts.rows, other.kind.counts.rows) == (1, 2)


def test_an_engine_has_one_state_until_it_is_dropped() -> None:
    own, other = config(), config("another engine")
    before = worker_state(own)
    assert worker_state(own) is before is not worker_state(other)
    drop_worker_state(config())
    assert worker_state(own) is before, "another engine that was given the same id"
    drop_worker_state(own)
    assert worker_state(own) is not before
    again = worker_state(config())
    assert again is not worker_state(own), "the first one's start had failed"
    drop_worker_state(own)
    drop_worker_state(own)
    drop_worker_state(other)


# -- the accelerator's way, on CPU tensors ---------------------------------------------------------


def padded(common: CommonAttentionMetadata, rows: int) -> CommonAttentionMetadata:
    """Rows of nothing at the end, as vLLM pads a batch to the size of a CUDA graph."""

    def longer(tensor: torch.Tensor, value: int = 0) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), value)])

    total = common.num_actual_tokens
    return common.replace(
        num_reqs=common.num_reqs + rows,
        query_start_loc=longer(common.query_start_loc, total),
        query_start_loc_cpu=longer(common.query_start_loc_cpu, total),
        seq_lens=longer(common.seq_lens),
        seq_lens_cpu_upper_bound=longer(common.seq_lens_cpu_upper_bound),
        block_table_tensor=longer(common.block_table_tensor),
        is_prefilling=longer(common.is_prefilling),
        req_idx=np.concatenate([common.req_idx, np.zeros(rows, dtype=np.int64)]),
    )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_sees_the_same(kind: str, padding: int) -> None:
    block = 16
    choose = random.Random(f"{kind} {padding}")
    for sink, window in WINDOWS:
        compact = compactor(block, sink, window, accelerator=True)
        for _ in range(10):
            rows = some_rows(choose, kind, block)
            for row in rows:
                row.exempt = choose.random() < 0.2
            plain = metadata(rows, block, sink, window, choose)
            compact.send(plain, rows)
            common = padded(plain, padding) if padding else plain
            before = snapshot(common)
            result = compact(common)
            assert meaning(result, block) == expected(plain, rows, block, sink, window), rows
            assert same(before, common)
            check(result)


@pytest.mark.parametrize("drafts", [1, 4])
def test_draft_rows_on_an_accelerator_see_what_their_first_query_sees(drafts: int) -> None:
    """Their true length is known on the device only, so they are never split."""
    block = 16
    choose = random.Random(drafts)
    for sink, window in WINDOWS:
        compact = compactor(block, sink, window, drafts=drafts, accelerator=True)
        for _ in range(20):
            rows = [
                Row(length, min(length, 1 + choose.randrange(drafts + 1)))
                for length in choose.sample(range(1, 200), 5)
            ]
            if choose.random() < 0.5:
                rows.append(Row(150, 100))
            common = metadata(rows, block, sink, window, choose)
            result = compact(common)
            want = expected(common, rows, block, sink, window, whole_rows_up_to=1 + drafts)
            assert meaning(result, block) == want, rows
            check(result)


def test_an_optimistic_length_on_the_host_changes_no_draft_row() -> None:
    """With async speculative decoding the host counts drafts that the device has rejected."""
    block, sink, window, drafts = 16, 1, 2, 3
    compact = compactor(block, sink, window, drafts=drafts, accelerator=True)
    choose = random.Random(0)
    for prefill in (False, True):
        for _ in range(60):
            rows = [
                Row(choose.randrange(5, 200), 1 + drafts, drafts_rejected=choose.randrange(4))
                for _ in range(4)
            ]
            rows += [Row(150, 100)] * prefill
            common = metadata(rows, block, sink, window)
            result = compact(common)
            want = expected(common, rows, block, sink, window, whole_rows_up_to=1 + drafts)
            assert meaning(result, block) == want, rows


def test_on_an_accelerator_the_buffers_are_written_even_if_nothing_is_hidden() -> None:
    """A captured CUDA graph reads them."""
    compact = compactor(16, 1, 1, accelerator=True)
    common = metadata([Row(20, 1), Row(3, 1)], 16, 1, 1)
    result = compact(common)
    assert result is not common
    assert result.seq_lens.data_ptr() == compact.compact._lens.data_ptr()
    assert result.seq_lens.tolist() == [20, 3]
    assert result.max_seq_len == common.max_seq_len
    assert result.seq_lens_cpu_upper_bound is common.seq_lens_cpu_upper_bound


# -- the second model runner -----------------------------------------------------------------------


def second_runners_step(
    compact: Compactor, rows: list[Row], common: CommonAttentionMetadata
) -> CommonAttentionMetadata:
    """It builds, then learns whose the rows are, and which of them keep everything."""
    compact.rows.begin(None)
    compact.rows.see(common.req_idx)
    result: CommonAttentionMetadata = compact(common)
    names = {str(i): 7 * i for i, row in enumerate(rows) if row.exempt}
    directives = StepDirectives(
        sequence=SequenceDirectives(exempt=np.array([*names.values()], dtype=np.int32))
        if names
        else None
    )
    compact.rows.begin(None, names)
    with compact.on_device(common, result):
        compact.kind.begin(directives)
        compact.rows.name([str(i) for i in range(len(rows))])
        compact.kind.load(directives)
    return result


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_runner_builds_again_for_exempt_rows(kind: str, accelerator: bool) -> None:
    block = 16
    choose = random.Random(kind)
    seen = 0
    for sink, window in WINDOWS:
        compact = compactor(block, sink, window, accelerator=accelerator)
        compact.kind._compactions.add(compact.step)
        for _ in range(4):
            rows = some_rows(choose, kind, block)
            for row in rows:
                row.exempt = choose.random() < 0.4
            common = metadata(rows, block, sink, window, choose)
            before = snapshot(common)
            result = second_runners_step(compact, rows, common)
            assert meaning(result, block) == expected(common, rows, block, sink, window), rows
            assert same(before, common)
            check(result)
            compact.kind.end(StepDirectives())
            seen += any(r.exempt and r.length > compact.compact.exact_tokens for r in rows)
    assert seen > 10, "no exempt row was long enough to matter"


@pytest.mark.parametrize("accelerator", [False, True])
def test_rows_that_keep_everything_are_in_the_buffers_a_graph_reads(accelerator: bool) -> None:
    compact = compactor(16, 1, 1, accelerator=accelerator)
    compact.kind._compactions.add(compact.step)
    rows = [Row(200, 1, exempt=True), Row(150, 1)]
    result = second_runners_step(compact, rows, metadata(rows, 16, 1, 1))
    assert result.block_table_tensor.data_ptr() == compact.compact._table.data_ptr()
    assert compact.compact._lens[:2].tolist() == [200, 150 - 7 * 16]
    assert compact.kind.counts.rows == 2, "built twice, and one step"
    compact.kind.end(StepDirectives())
    again = compact(metadata(rows, 16, 1, 1))
    assert again.seq_lens.tolist() == [200 - 10 * 16, 150 - 7 * 16]


# -- the builder -----------------------------------------------------------------------------------


class StockBuilder:
    """Records what a stock builder is given."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.made_with = (args, kwargs)

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        self.built_with = (common_prefix_len, common, fast_build)
        return "what stock builds"


def builder_of(*args: Any, **kwargs: Any) -> Any:
    return plugged_builder(StockBuilder, (a_kind(),), StepRows())(*args, **kwargs)


def test_the_builder_gives_stock_the_compacted_metadata() -> None:
    windowed, layers, vllm_config = spec(16, 1, 1), ["layer"], config()
    builder = builder_of(windowed, layers, vllm_config, CPU, table_width=9)
    assert builder.made_with == ((windowed, layers, vllm_config, CPU), {"table_width": 9})
    rows = [Row(200, 60)]
    common = metadata(rows, 16, 1, 1)
    assert builder.build(0, common, True) == "what stock builds"
    prefix, given, fast = builder.built_with
    assert (prefix, fast) == (0, True)
    assert meaning(given, 16) == expected(common, rows, 16, 1, 1)


def test_the_builder_leaves_other_specs_alone() -> None:
    builder = builder_of(SimpleNamespace(block_size=16), ["layer"], SimpleNamespace(), CPU)
    common = metadata([Row(200, 60)], 16, 1, 1)
    builder.build(0, common)
    assert builder.built_with == (0, common, False)
    assert builder.built_with[1] is common


def test_the_bounds_hold_when_the_host_is_optimistic() -> None:
    compact = compactor(16, 1, 2, drafts=3, accelerator=True)
    rows = [Row(98, 4, drafts_rejected=3), Row(90, 20)]
    result = compact(metadata(rows, 16, 1, 2))
    assert (result.seq_lens_cpu_upper_bound >= result.seq_lens).all()
    assert result.max_seq_len >= int(result.seq_lens.max())


def test_the_common_prefix_is_common_after_compaction() -> None:
    builder = builder_of(spec(16, 1, 1), ["layer"], config(), CPU)
    common = metadata([Row(200, 1), Row(40, 1)], 16, 1, 1)
    common.block_table_tensor[1, :2] = common.block_table_tensor[0, :2]
    builder.build(32, common)
    prefix, given, _ = builder.built_with
    n = prefix // 16
    assert (given.block_table_tensor[:, :n] == given.block_table_tensor[0, :n]).all()
