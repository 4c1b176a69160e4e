"""Saving of segments out of pages, measured by their own last queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvplug.hosts.vllm.messages import ReuseReport, SaveOrder
from kvplug.hosts.vllm.worker.metadata import host_lengths
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.segments import LayerPages, stacked
from kvplug.hosts.vllm.worker.steps import BuildCall
from kvplug.reuse.file import SegmentHeader
from kvplug.reuse.measures import QUERIES, RunningScale, measures
from kvplug.reuse.memory import SegmentMemory
from kvplug_kernels.segment_stats import segment_stats

LOOKED_BACK = 2048
"""Tokens before a segment over which its attention is measured."""

ObservedQueries = tuple[str, int, int]
"""A segment, and the first and end of its last queries among the step's tokens."""


class SegmentSaver:
    """Reads segments out of pages and stores them.

    Attributes:
        layers: Pages of each layer, by layer name.
        watched: Segments the step completes, by slot of their request.
        queries: Last queries of watched segments, by segment and layer name.
        rank: This worker's rank.
        world: Ranks that share the layers.
    """

    def __init__(self) -> None:
        self.layers: Mapping[str, LayerPages] = {}
        self.watched: dict[int, list[SaveOrder]] = {}
        self.queries: dict[tuple[str, str], Tensor] = {}
        self.rank, self.world = 0, 1
        self._running = RunningScale()

    def begin(self) -> None:
        """Forget the segments of the step before, and their queries."""
        self.watched = {}
        self.queries.clear()

    def observed(self, call: BuildCall, rows: StepRows) -> list[ObservedQueries]:
        """Return the queries of a step to remember.

        Args:
            call: The call of a metadata builder.
            rows: The step's rows.
        """
        if not self.watched:
            return []
        common = call.common
        starts, lens = common.query_start_loc_cpu.tolist(), host_lengths(common).tolist()
        found = []
        for row, slot in self._rows_of(call, rows):
            length = lens[row]
            begun = length - (starts[row + 1] - starts[row])
            for save in self.watched.get(slot, ()):
                start = save.fingerprint.start
                last = min(start + save.fingerprint.length, length)
                first = max(last - QUERIES, begun, start)
                if first < last:
                    at = starts[row] - begun
                    found.append((save.segment, at + first, at + last))
        return found

    def _rows_of(self, call: BuildCall, rows: StepRows) -> list[tuple[int, int]]:
        """Rows of watched segments, and the slots of their requests as the scheduler has them."""
        if not rows.requests:
            slots = call.slots[: call.common.num_reqs].tolist()
            return [(row, slot) for row, slot in enumerate(slots) if slot in self.watched]
        if call.common.req_idx is None:
            return []
        return [(rows.named[slot].row, slot) for slot in self.watched if slot in rows.named]

    def save(self, order: SaveOrder, memory: SegmentMemory, report: ReuseReport) -> None:
        """Store one segment.

        Args:
            order: The segment.
            memory: Where it is stored.
            report: Where its measures go.
        """
        start = order.fingerprint.start
        end = start + order.fingerprint.length
        blocks = torch.from_numpy(order.blocks)
        planes: dict[str, list[Tensor]] = {}
        measured = []
        for name, pages in self.layers.items():
            read = pages.read(blocks, start, end)
            for plane, tensor in pages.stored(blocks, start, end, read).items():
                planes.setdefault(plane, []).append(tensor.cpu())
            measured.append(self._measure(name, pages, order, blocks, read))
        stats = torch.stack(measured)
        found = measures(stats, self._running)
        self._running.add(stats)
        made = {name: stacked(tensors) for name, tensors in planes.items()}
        header = SegmentHeader.of(
            order.segment,
            replace(order.fingerprint, measures=found),
            order.tokens,
            order.context,
            made,
            self.rank,
            self.world,
            order.session,
        )
        memory.put(header, made)
        report.saved[order.segment] = found
        report.counts[order.segment] = 1

    def _measure(
        self,
        name: str,
        pages: LayerPages,
        order: SaveOrder,
        blocks: Tensor,
        read: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Statistics of one layer of a segment, float32 ``[kv_heads, 5]``."""
        start = order.fingerprint.start
        query, before = self.queries.get((order.segment, name)), None
        if query is not None:
            before = pages.keys(blocks, max(0, start - LOOKED_BACK), start)
        return segment_stats(*read, query, before, pages.scale).cpu()
