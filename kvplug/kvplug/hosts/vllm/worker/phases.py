"""Splits a step's rows into phases at the positions where a scoring policy evicts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug.hosts.pruning import FLUSH, Eviction, layout
from kvplug.hosts.vllm.messages import Plans, RowPlan
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug_kernels.resident_tokens import LatestQueries, LayerSlice

ONE_LAYER = LayerSlice(0, 1, 1, 0)


@dataclass
class ResidentBlocks:
    """Resident blocks of some rows at one moment, the same number of tokens each.

    Attributes:
        table: The runner's block table, ``[requests, width]`` int32.
        requests: Row of it, ``[rows]`` int32.
        logical: Numbers in the text of each row's blocks, in the order of resident indices,
            ``[rows, n]`` int32.
        mixed: Blocks before this logical number carry survivors, ``[rows]`` int32.
        tokens: Resident tokens of each row.
        layers: Layers whose blocks are numbered as one; rows are those of each of them in turn.
    """

    table: Tensor
    requests: Tensor
    logical: Tensor
    mixed: Tensor
    tokens: int
    layers: LayerSlice = ONE_LAYER

    @property
    def blocks(self) -> Tensor:
        """Block ids, ``[layers * rows, n]`` int64: several operations on the device."""
        own = self.table[self.requests.long()].gather(1, self.logical.long()).long()
        first, number = self.layers.first, self.layers.num_layers
        layer = torch.arange(first, first + number, device=own.device)[:, None, None]
        return (own * self.layers.block_step + layer * self.layers.layer_step).flatten(0, 1)

    @property
    def rows(self) -> int:
        """Rows, of all layers."""
        return len(self.logical) * self.layers.num_layers


@dataclass
class EvictionDecision:
    """Rows that reach an eviction of the same shape, decided together.

    Attributes:
        resident: Their resident blocks.
        candidates: Resident tokens the eviction covers.
        count: Resident tokens that survive.
        slots: The scheduler's slot of each row's request.
        at: Tokens of its text computed.
        num_tokens: The same, ``[texts]`` int32: a text's rows, one a layer, share its entry.
        shown_num_tokens: The same by row, ``[rows]`` int32, to be shown to a policy.
        num_prompt_tokens: Tokens of its prompt, ``[rows]`` int32, likewise.
        rings: Index of its first place among the remembered queries of a layer, ``[texts]``
            int32.
        starts: Where a layer's remembered queries start, by layer, ``[>= layers]`` int64; None
            where there is one layer, at 0.
    """

    resident: ResidentBlocks
    candidates: int
    count: int
    slots: list[int]
    at: list[int]
    num_tokens: Tensor
    shown_num_tokens: Tensor
    num_prompt_tokens: Tensor
    rings: Tensor
    starts: Tensor | None = None

    def rows(self) -> list[EvictionDecision]:
        """Split into one decision per row, of one layer."""
        resident, texts = self.resident, len(self.num_tokens)
        layers = resident.layers
        made = []
        for i, slot in enumerate(self.slots):
            text = slice(i % texts, i % texts + 1)
            made.append(
                EvictionDecision(
                    ResidentBlocks(
                        resident.table,
                        resident.requests[text],
                        resident.logical[text],
                        resident.mixed[text],
                        resident.tokens,
                        replace(layers, first=layers.first + i // texts, num_layers=1),
                    ),
                    self.candidates,
                    self.count,
                    [slot],
                    self.at[i : i + 1],
                    self.num_tokens[text],
                    self.shown_num_tokens[i : i + 1],
                    self.num_prompt_tokens[i : i + 1],
                    self.rings[text],
                    self.starts,
                )
            )
        return made

    def latest(self, queries: Tensor, ring: int, window: int) -> LatestQueries:
        """Name the latest queries of each row.

        Args:
            queries: Remembered queries, ``[n, num_heads, head_size]``.
            ring: Queries remembered of a row in a layer.
            window: How many of them.
        """
        return LatestQueries(
            queries, _starts(self.starts, queries), self.rings, self.num_tokens, ring, window
        )


def _starts(starts: Tensor | None, queries: Tensor) -> Tensor:
    if starts is not None:
        return starts
    return torch.zeros(1, dtype=torch.int64, device=queries.device)


@dataclass
class AttentionFlush:
    """Rows whose latest queries are added to the cumulative attention of their resident tokens.

    Attributes:
        resident: Their resident blocks.
        remembered: Index into the layer's remembered queries of each query, ``[rows, n]``, or -1;
            None where all are fresh, or `settled`.
        fresh: Index into this step's tokens of each query, ``[rows, n]``, or -1; None where all are
            remembered.
        positions: Position of each query, ``[rows, n]`` int32; None where `settled`. The resident
            tokens at the same positions, the last ones, received nothing before.
        new: Queries of each row.
        settled: The queries, all of them remembered, by position: the first and the one after the
            last, and the index of the row's first place among those of a layer, ``[texts, 3]``
            int32; None where they are named one by one.
        starts: As those of a decision.
    """

    resident: ResidentBlocks
    remembered: Tensor | None
    fresh: Tensor | None
    positions: Tensor | None
    new: int
    settled: Tensor | None = None
    starts: Tensor | None = None

    def latest(self, queries: Tensor, ring: int) -> LatestQueries:
        """Name the queries of a settled flush; see `EvictionDecision.latest`."""
        assert self.settled is not None
        begins, ends, places = self.settled.unbind(1)
        starts = _starts(self.starts, queries)
        return LatestQueries(queries, starts, places, ends, ring, FLUSH, begins)


@dataclass
class Phase:
    """Part of a step between two sets of evictions.

    Attributes:
        metadata: The backend's metadata for it.
        tokens: Its tokens among the step's, ``[n]`` int64, or None for all of them.
        rows: Rows that it has.
        remember_from: Tokens whose queries are remembered, ``[n]`` int64.
        remember_at: Where each is remembered.
        flushes: Cumulative attention to bring up to date.
        decisions: Evictions to make after it.
    """

    metadata: Any
    tokens: Tensor | None
    rows: int = 0
    remember_from: Tensor | None = None
    remember_at: Tensor | None = None
    flushes: list[AttentionFlush] = field(default_factory=list)
    decisions: list[EvictionDecision] = field(default_factory=list)


@dataclass
class RowPart:
    """One row in one phase: tokens ``[start, end)`` of its text.

    Attributes:
        row: The row.
        slot: The scheduler's slot of its request; -1 without a plan.
        plan: Its plan, or None.
        start: First token.
        end: Token after the last.
        first_token: First token among the step's.
        state: The eviction in force, or None.
        eviction: The eviction at ``end``, or None.
        ring: Slot of its request among those with remembered queries.
    """

    row: int
    slot: int
    plan: RowPlan | None
    start: int
    end: int
    first_token: int
    state: Eviction | None
    eviction: Eviction | None
    ring: int = -1


class StepPlanner:
    """Turns a step's common metadata and the scheduler's plans into phases.

    Args:
        spec: Spec of the KV-cache group.
        group: Group number of the policy: the index of the spec's share.
        ring: Queries remembered per request.
        device: Device of the tensors.

    Attributes:
        layers: Most layers that are decided together.
    """

    def __init__(self, spec: PrunedSpec, group: int, ring: int, device: torch.device):
        self.layers = 1
        self.ring = ring
        self.block_size = int(spec.block_size)
        self.protected = spec.limits.protected
        self.group = group
        self.device = device

    def parts(
        self,
        common: Any,
        slots: list[int],
        plans: Plans,
        rings: list[int] | None = None,
    ) -> list[list[RowPart]] | None:
        """Return the rows of each phase, or None where no row has a plan.

        Args:
            common: vLLM's common metadata.
            slots: The scheduler's slot of each row, -1 where unknown.
            plans: The step's plans.
            rings: Slot of each row among those with remembered queries; None for the scheduler's.
        """
        # Exact without draft tokens, and of those no policy that evicts by score has any.
        ends = metadata.host_lengths(common)[: common.num_reqs].tolist()
        rings = slots if rings is None else rings
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        phases: list[list[RowPart]] = [[]]
        found = False
        for row, (end, slot) in enumerate(zip(ends, slots, strict=False)):
            first = starts[row]
            start = end - (starts[row + 1] - first)
            plan = plans.get((self.group, slot)) if end > start else None
            if plan is None:
                phases[0].append(RowPart(row, -1, None, start, end, first, None, None))
                continue
            found = True
            state, at = plan.state, start
            for depth, eviction in enumerate([*plan.evictions, None]):
                stop = eviction.at if eviction is not None else end
                if stop > at:
                    while len(phases) <= depth:
                        phases.append([])
                    token = first + at - start
                    phases[depth].append(
                        RowPart(row, slot, plan, at, stop, token, state, eviction, rings[row])
                    )
                if eviction is not None:
                    state, at = eviction, stop
        if len(phases) > 1:
            phases[0] = [part for part in phases[0] if part.end > part.start]
        return phases if found else None

    def table(self, common: Any, parts: list[RowPart]) -> tuple[Tensor, Tensor]:
        """Return the block table and lengths of what each part's queries see."""
        device, size = self.device, self.block_size
        kept = to_device([s.state.kept if s.state else 0 for s in parts], device)
        resume = to_device([s.state.end - s.state.grown if s.state else 0 for s in parts], device)
        ends = to_device([s.end for s in parts], device)
        rows = to_device([s.row for s in parts], device)
        source = common.block_table_tensor[rows]
        width = source.shape[1]
        column = torch.arange(width, device=device)[None, :]
        index = torch.where(
            column < kept[:, None],
            self.protected + column,
            resume[:, None] + column - kept[:, None],
        )
        lens = (ends - (resume - kept) * size).to(torch.int32)
        live = column < ((lens + size - 1) // size)[:, None]
        table = source.gather(1, index.clamp(0, width - 1)) * live
        return table.to(torch.int32), lens

    def common_of(self, common: Any, parts: list[RowPart], whole: bool) -> Any:
        """Return the common metadata of one phase; ``whole`` if it is the only one."""
        table, lens = self.table(common, parts)
        size = self.block_size
        hidden = [(s.state.end - s.state.blocks) * size if s.state else 0 for s in parts]
        lens_cpu = torch.tensor(
            [s.end - n for s, n in zip(parts, hidden, strict=True)], dtype=torch.int32
        )
        longest = int(lens_cpu.max())
        if whole:
            return metadata.with_lengths(
                common,
                seq_lens=lens,
                block_table=table,
                max_seq_len=longest,
                seq_lens_cpu=lens_cpu,
            )
        return metadata.with_rows(
            common,
            torch.tensor([s.row for s in parts]),
            query_start=metadata.query_starts(torch.tensor([s.end - s.start for s in parts])),
            seq_lens=lens,
            block_table=table,
            max_seq_len=longest,
            seq_lens_cpu=lens_cpu,
        )

    def _packed(
        self,
        common: Any,
        parts: list[RowPart],
        logical: list[list[int]],
        tokens: int,
        more: list[list[int]],
        by_row: list[list[int]],
    ) -> tuple[ResidentBlocks, Tensor, list[Tensor]]:
        """Copy what is to be known of some rows to the device, all at once.

        Args:
            common: vLLM's common metadata.
            parts: The rows.
            logical: Logical blocks of each, in resident order.
            tokens: Resident tokens of each.
            more: Further numbers of each.
            by_row: Numbers of each that are repeated for every layer, layer by layer.

        Returns:
            Their blocks; the further numbers, ``[rows, n]`` int32; the repeated ones, ``[layers *
            rows]`` int32 each.
        """
        mixed = [s.state.end if s.state else 0 for s in parts]
        own = [
            [s.row, m, *numbers, *blocks]
            for s, m, numbers, blocks in zip(parts, mixed, more, logical, strict=True)
        ]
        head = np.array(own, dtype=np.int32)
        tail = [np.tile(np.array(numbers, dtype=np.int32), self.layers) for numbers in by_row]
        flat = to_device(np.concatenate([head.ravel(), *tail]), self.device)
        columns = flat[: head.size].view(head.shape)
        repeated = list(flat[head.size :].view(len(by_row), -1)) if by_row else []
        first = 2 + (len(more[0]) if more else 0)
        resident = ResidentBlocks(
            common.block_table_tensor, columns[:, 0], columns[:, first:], columns[:, 1], tokens
        )
        return resident, columns[:, 2:first], repeated

    def decisions(self, common: Any, parts: list[RowPart]) -> list[EvictionDecision]:
        """Return the evictions at the end of a phase, rows of one shape together."""
        shapes: dict[tuple[int, int, int], list[tuple[RowPart, tuple[int, ...]]]]
        shapes = defaultdict(list)
        for s in parts:
            if s.eviction is not None:
                found = layout(s.state, s.eviction, self.protected, self.block_size)
                shapes[found.tokens, found.candidates, found.survivors].append((s, found.blocks))
        made = []
        for (tokens, candidates, survivors), members in shapes.items():
            own = [s for s, _ in members]
            prompts = [s.plan.prompt for s in own if s.plan is not None]
            ends = [s.end for s in own]
            resident, numbers, (shown, shown_prompts) = self._packed(
                common,
                own,
                [list(blocks) for _, blocks in members],
                tokens,
                [[s.end, s.ring * self.ring] for s in own],
                [ends, prompts],
            )
            made.append(
                EvictionDecision(
                    resident,
                    candidates * self.block_size,
                    survivors * self.block_size,
                    [s.slot for s in own],
                    ends,
                    numbers[:, 0],
                    shown,
                    shown_prompts,
                    numbers[:, 1],
                )
            )
        return made

    def remembered(self, parts: list[RowPart]) -> tuple[Tensor, Tensor] | None:
        """Return the tokens of a phase whose queries to remember, and where; None for none."""
        ring = self.ring
        tokens: list[int] = []
        places: list[int] = []
        for s in parts:
            if s.plan is not None:
                for position in range(max(s.start, s.end - ring), s.end):
                    tokens.append(s.first_token + position - s.start)
                    places.append(s.ring * ring + position % ring)
        if not tokens:
            return None
        return to_device(tokens, self.device), to_device(places, self.device)

    def flushes(
        self, common: Any, parts: list[RowPart], settled: bool = False
    ) -> list[AttentionFlush]:
        """Return the cumulative attention due at the end of a phase, rows of one shape together.

        Args:
            common: vLLM's common metadata.
            parts: Rows of the phase.
            settled: True once the queries of the step are remembered too.
        """
        ring = self.ring
        shapes: dict[tuple[int, int], list[tuple[RowPart, int]]] = defaultdict(list)
        for s in parts:
            if s.plan is None:
                continue
            begin = max(s.start // FLUSH * FLUSH, s.state.at if s.state else 0)
            end = s.end if s.eviction is not None else s.end // FLUSH * FLUSH
            if end > begin:
                resume = s.state.end - s.state.grown - s.state.kept if s.state else 0
                shapes[end - begin, end - resume * self.block_size].append((s, begin))
        made = []
        for (n, tokens), members in shapes.items():
            own = [s for s, _ in members]
            logical = []
            for s in own:
                filled = -(-(tokens) // self.block_size)
                kept, resume = (s.state.kept, s.state.end - s.state.grown) if s.state else (0, 0)
                logical.append(
                    [
                        *range(self.protected, self.protected + kept),
                        *range(resume, resume + filled - kept),
                    ]
                )
            numbers = [[begin, begin + n, s.ring * ring] for s, begin in members]
            resident, queries, _ = self._packed(common, own, logical, tokens, numbers, [])
            if settled and n <= min(FLUSH, ring):
                made.append(AttentionFlush(resident, None, None, None, n, queries))
                continue
            positions = [list(range(begin, begin + n)) for _, begin in members]
            fresh = [
                [s.first_token + p - s.start if p >= s.start else -1 for p in row]
                for s, row in zip(own, positions, strict=True)
            ]
            old = [
                [s.ring * ring + p % ring if settled or p < s.start else -1 for p in row]
                for s, row in zip(own, positions, strict=True)
            ]
            made.append(
                AttentionFlush(
                    resident,
                    to_device(old, self.device)
                    if any(i >= 0 for row in old for i in row)
                    else None,
                    None if settled else to_device(fresh, self.device),
                    to_device(positions, self.device, torch.int32),
                    n,
                )
            )
        return made
