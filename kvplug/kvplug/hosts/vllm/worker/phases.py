"""Splits a step's rows into phases at the positions where a scoring policy evicts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvplug.hosts.pruning import Cut, layout
from kvplug.hosts.vllm.messages import RowPlan
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker.state import tail_blocks, worker_state

FLUSH = 32
"""Queries collected before running totals are brought up to date."""


@dataclass
class Holding:
    """What some rows hold at one moment, the same number of tokens each.

    Attributes:
        blocks: Block ids in the order of held indices, ``[rows, n]`` int64.
        logical: Their numbers in the text, ``[rows, n]`` int64.
        mixed: Blocks before this logical number carry survivors, ``[rows]`` int64.
        tokens: Tokens held by each row.
    """

    blocks: Tensor
    logical: Tensor
    mixed: Tensor
    tokens: int


@dataclass
class Decision:
    """Rows that come to a cut with the same shape, decided together.

    Attributes:
        holding: What they hold.
        candidates: Held tokens the cut covers.
        count: Held tokens that survive.
        lanes: Lane of each row's request.
        num_tokens: Tokens of its text computed, ``[rows]`` int32.
        num_prompt_tokens: Tokens of its prompt, ``[rows]`` int32.
    """

    holding: Holding
    candidates: int
    count: int
    lanes: list[int]
    num_tokens: Tensor
    num_prompt_tokens: Tensor

    def rows(self) -> list[Decision]:
        """One decision a row."""
        held = self.holding
        return [
            Decision(
                Holding(
                    held.blocks[i : i + 1],
                    held.logical[i : i + 1],
                    held.mixed[i : i + 1],
                    held.tokens,
                ),
                self.candidates,
                self.count,
                [lane],
                self.num_tokens[i : i + 1],
                self.num_prompt_tokens[i : i + 1],
            )
            for i, lane in enumerate(self.lanes)
        ]


@dataclass
class Flush:
    """Rows whose latest queries are added to the running totals of what they hold.

    Attributes:
        holding: What they hold.
        remembered: Index into the layer's remembered queries of each query, ``[rows, n]``, or -1;
            None where all are fresh.
        fresh: Index into this step's tokens of each query, ``[rows, n]``, or -1.
        positions: Position of each query, ``[rows, n]`` int32.
    """

    holding: Holding
    remembered: Tensor | None
    fresh: Tensor
    positions: Tensor


@dataclass
class Phase:
    """Part of a step between two sets of cuts.

    Attributes:
        metadata: The backend's metadata for it.
        tokens: Its tokens among the step's, ``[n]`` int64, or None for all of them.
        remember_from: Tokens whose queries are remembered, ``[n]`` int64.
        remember_at: Where each is remembered.
        flushes: Running totals to bring up to date.
        decisions: Cuts to make after it.
    """

    metadata: Any
    tokens: Tensor | None
    remember_from: Tensor | None = None
    remember_at: Tensor | None = None
    flushes: list[Flush] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


@dataclass
class Segment:
    """One row in one phase: tokens ``[start, end)`` of its text."""

    row: int
    plan: RowPlan | None
    start: int
    end: int
    first_token: int
    state: Cut | None
    cut: Cut | None


class StepPlanner:
    """Turns a step's common metadata and the scheduler's plans into phases."""

    def __init__(self, spec: PrunedSpec, vllm_config: Any, device: torch.device):
        self.block_size = int(spec.block_size)
        self.shared = spec.limits.shared
        self.device = device
        self.state = worker_state(vllm_config)

    def segments(self, common: Any) -> list[list[Segment]] | None:
        """The rows of each phase, or None when no row was or will be cut."""
        plans = self.state.plans
        if not plans:
            return None
        rows, size = common.num_reqs, self.block_size
        lens = common.seq_lens[:rows].to(torch.int64)
        tails = tail_blocks(common.block_table_tensor[:rows], lens, size).tolist()
        ends, starts = lens.tolist(), common.query_start_loc_cpu[: rows + 1].tolist()
        phases: list[list[Segment]] = [[]]
        found = False
        for row in range(rows):
            end, first = ends[row], starts[row]
            start = end - (starts[row + 1] - first)
            plan = plans.get(tails[row]) if end > start else None
            if plan is None:
                phases[0].append(Segment(row, None, start, end, first, None, None))
                continue
            found = True
            state, at = plan.state, start
            for depth, cut in enumerate([*plan.cuts, None]):
                stop = cut.at if cut is not None else end
                if stop > at:
                    while len(phases) <= depth:
                        phases.append([])
                    token = first + at - start
                    phases[depth].append(Segment(row, plan, at, stop, token, state, cut))
                if cut is not None:
                    state, at = cut, stop
        if len(phases) > 1:
            phases[0] = [s for s in phases[0] if s.end > s.start]
        return phases if found else None

    def table(self, common: Any, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        """Block table and lengths of what each segment's queries see."""
        device, size = self.device, self.block_size
        kept = torch.tensor([s.state.kept if s.state else 0 for s in segments], device=device)
        resume = torch.tensor(
            [s.state.end - s.state.tail if s.state else 0 for s in segments], device=device
        )
        ends = torch.tensor([s.end for s in segments], device=device)
        rows = torch.tensor([s.row for s in segments], device=device)
        source = common.block_table_tensor[rows]
        width = source.shape[1]
        column = torch.arange(width, device=device)[None, :]
        index = torch.where(
            column < kept[:, None], self.shared + column, resume[:, None] + column - kept[:, None]
        )
        lens = (ends - (resume - kept) * size).to(torch.int32)
        live = column < ((lens + size - 1) // size)[:, None]
        table = source.gather(1, index.clamp(0, width - 1)) * live
        return table.to(torch.int32), lens

    def common_of(self, common: Any, segments: list[Segment], whole: bool) -> Any:
        """The common metadata of one phase."""
        table, lens = self.table(common, segments)
        lens_cpu = lens.cpu()
        if whole:
            return common.replace(
                seq_lens=lens,
                block_table_tensor=table,
                max_seq_len=int(lens_cpu.max()),
                seq_lens_cpu_upper_bound=lens_cpu,
                _num_computed_tokens_cache=None,
            )
        widths = torch.tensor([s.end - s.start for s in segments], dtype=torch.int32)
        query_start = torch.zeros(len(segments) + 1, dtype=torch.int32)
        torch.cumsum(widths, 0, out=query_start[1:])
        rows = torch.tensor([s.row for s in segments])
        prefilling = common.is_prefilling
        return common.replace(
            num_reqs=len(segments),
            num_actual_tokens=int(query_start[-1]),
            query_start_loc=query_start.to(self.device),
            query_start_loc_cpu=query_start,
            seq_lens=lens,
            block_table_tensor=table,
            max_query_len=int(widths.max()),
            max_seq_len=int(lens_cpu.max()),
            seq_lens_cpu_upper_bound=lens_cpu,
            is_prefilling=prefilling[rows] if prefilling is not None else None,
            req_idx=common.req_idx[rows.numpy()] if common.req_idx is not None else None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _holding(self, common: Any, segments: list[Segment], logical: list[list[int]]) -> Holding:
        rows = torch.tensor([s.row for s in segments], device=self.device)
        numbers = torch.tensor(logical, device=self.device)
        table = common.block_table_tensor[rows].long()
        mixed = torch.tensor([s.state.end if s.state else 0 for s in segments], device=self.device)
        return Holding(table.gather(1, numbers), numbers, mixed, 0)

    def decisions(self, common: Any, segments: list[Segment]) -> list[Decision]:
        """The cuts at the end of a phase, rows of one shape together."""
        shapes: dict[tuple[int, int, int], list[tuple[Segment, tuple[int, ...]]]]
        shapes = defaultdict(list)
        for s in segments:
            if s.cut is not None:
                found = layout(s.state, s.cut, self.shared, self.block_size)
                shapes[found.tokens, found.candidates, found.survivors].append((s, found.blocks))
        made = []
        for (tokens, candidates, survivors), members in shapes.items():
            own = [s for s, _ in members]
            holding = self._holding(common, own, [list(blocks) for _, blocks in members])
            holding.tokens = tokens
            plans = [s.plan for s in own if s.plan is not None]
            made.append(
                Decision(
                    holding,
                    candidates * self.block_size,
                    survivors * self.block_size,
                    [p.lane for p in plans],
                    torch.tensor([s.end for s in own], dtype=torch.int32, device=self.device),
                    torch.tensor([p.prompt for p in plans], dtype=torch.int32, device=self.device),
                )
            )
        return made

    def remembered(self, segments: list[Segment], ring: int) -> tuple[Tensor, Tensor] | None:
        """Which of a phase's tokens to remember the queries of, and where."""
        tokens: list[int] = []
        places: list[int] = []
        for s in segments:
            if s.plan is not None:
                for position in range(max(s.start, s.end - ring), s.end):
                    tokens.append(s.first_token + position - s.start)
                    places.append(s.plan.lane * ring + position % ring)
        if not tokens:
            return None
        return torch.tensor(tokens, device=self.device), torch.tensor(places, device=self.device)

    def flushes(self, common: Any, segments: list[Segment], ring: int) -> list[Flush]:
        """Running totals due at the end of a phase, rows of one shape together."""
        shapes: dict[tuple[int, int], list[tuple[Segment, int]]] = defaultdict(list)
        for s in segments:
            if s.plan is None:
                continue
            begin = max(s.start // FLUSH * FLUSH, s.state.at if s.state else 0)
            end = s.end if s.cut is not None else s.end // FLUSH * FLUSH
            if end > begin:
                resume = s.state.end - s.state.tail - s.state.kept if s.state else 0
                shapes[end - begin, end - resume * self.block_size].append((s, begin))
        made = []
        for (n, tokens), members in shapes.items():
            own = [s for s, _ in members]
            logical = []
            for s in own:
                filled = -(-(tokens) // self.block_size)
                kept, resume = (s.state.kept, s.state.end - s.state.tail) if s.state else (0, 0)
                logical.append(
                    [
                        *range(self.shared, self.shared + kept),
                        *range(resume, resume + filled - kept),
                    ]
                )
            holding = self._holding(common, own, logical)
            holding.tokens = tokens
            positions = [list(range(begin, begin + n)) for _, begin in members]
            lanes = [s.plan.lane if s.plan is not None else 0 for s in own]
            fresh = [
                [s.first_token + p - s.start if p >= s.start else -1 for p in row]
                for s, row in zip(own, positions, strict=True)
            ]
            old = [
                [lane * ring + p % ring if p < s.start else -1 for p in row]
                for s, lane, row in zip(own, lanes, positions, strict=True)
            ]
            made.append(
                Flush(
                    holding,
                    torch.tensor(old, device=self.device)
                    if any(i >= 0 for row in old for i in row)
                    else None,
                    torch.tensor(fresh, device=self.device),
                    torch.tensor(positions, dtype=torch.int32, device=self.device),
                )
            )
        return made
