"""Evictions in force, for vLLM's second model runner: what attention sees of each row.

That runner replays decode steps as CUDA graphs, builds metadata before it hands out directives, and
is one step ahead of the scheduler. So an eviction is made after the step that reaches it, and what
it left is written down by slot; the next build shows the compacted rows in buffers whose addresses
never change. A slot that passed to another request still holds the old eviction for one step, and
position tells: the new request starts before it. Order of work on the device is the order of the
stream alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug.hosts.pruning import Eviction
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.held import HeldMemory
from kvplug.hosts.vllm.worker.phases import Phase, StepPlanner
from kvplug.hosts.vllm.worker.steps import Build, BuildCall, Built, MetadataStep
from kvplug_kernels.compact_rows import compact_rows

NEVER = np.iinfo(np.int32).max
WIDTHS = 32
"""Widths of block tables are at most rounded up to multiples of it."""


class EvictionsInForce:
    """Evictions in force of one KV-cache group, by slot of the second runner.

    Args:
        num_slots: Slots of the runner.
        device: Device of the attention layers.
        held: The memory of their kind.
        group: Number of the group.
    """

    def __init__(self, num_slots: int, device: torch.device, held: HeldMemory, group: int):
        self._host = np.tile(np.array([NEVER, 0, 0, 0], dtype=np.int32), (num_slots, 1))
        shape = (num_slots, self._host.shape[1])
        self._device = held.take(("evictions", group), shape, torch.int32, device)
        self._device.copy_(metadata.to_device(self._host.copy(), device))
        self._requests: list[str | None] = [None] * num_slots
        self._changed = False

    def settle(self, slots: Sequence[int], requests: Sequence[str]) -> None:
        """Take the requests of a step's rows; a slot that changed hands has no eviction.

        Args:
            slots: Slot of each row.
            requests: Its request.
        """
        for slot, request in zip(slots, requests, strict=False):
            if self._requests[slot] != request:
                self._requests[slot] = request
                self.put(slot, None)

    def put(self, slot: int, eviction: Eviction | None) -> None:
        """Let an eviction be in force from the next step on; None for none."""
        row = (NEVER, 0, 0, 0)
        if eviction is not None:
            row = (eviction.at, eviction.kept, eviction.end - eviction.grown, 0)
        if tuple(self._host[slot]) != row:
            self._host[slot] = row
            self._changed = True

    def table(self) -> Tensor:
        """The evictions as `compact_rows` takes them, ``[num_slots, 4]`` int32; one address."""
        if self._changed:
            self._changed = False
            now = metadata.to_device(self._host.copy(), self._device.device)
            self._device.copy_(now, non_blocking=True)
        return self._device


def reserve_in_force(
    held: HeldMemory,
    group: int,
    *,
    num_slots: int,
    max_rows: int,
    max_tokens: int,
    width: int,
    device: torch.device,
) -> None:
    """Reserve what `EvictionsInForce` and one `InForce` of a KV-cache group take.

    Args:
        held: Where.
        group: Number of the group.
        num_slots: Slots of the runner.
        max_rows: Most rows of a step.
        max_tokens: Most tokens of a step; 0 where no queries are remembered.
        width: Most blocks of a row. vLLM rounds a block table's width up.
        device: Device of the attention layers.
    """
    held.reserve(("evictions", group), 4 * num_slots, torch.int32, device)
    held.reserve(("lens", group), max_rows, torch.int32, device)
    wide = -(-width // WIDTHS) * WIDTHS
    held.reserve(("table", group), max_rows * wide, torch.int32, device)
    if max_tokens:
        held.reserve(("places", group), max_tokens, torch.int64, device)


@dataclass(frozen=True)
class BuiltStep:
    """What a builder made for the step under way.

    Attributes:
        planner: Plans of its KV-cache group.
        evictions: Evictions in force there.
        built: The build.
    """

    planner: StepPlanner
    evictions: EvictionsInForce
    built: Built

    def put_phases(self, phases: Sequence[tuple[Any, Phase]]) -> None:
        """Attend the step in phases instead, which is never replayed as a whole.

        Args:
            phases: Common metadata of each phase, and the phase without its metadata.
        """
        for common, phase in phases:
            # A second build in a step: FlashAttention's builder has room for one schedule.
            phase.metadata = self.built.inner(replace(self.built.call.on(common), fast=True))
        self.built.made.kvplug_phases = [phase for _, phase in phases]


class InForce(MetadataStep):
    """Shows each row what its request still holds, and places its queries.

    Args:
        planner: Plans of the builder's KV-cache group.
        evictions: Evictions in force there.
        built: Takes what each builder made of the step under way, by its layers.
        max_rows: Most rows of a step, padding included.
        max_tokens: Most tokens of a step, padding included.
        num_slots: Slots of the runner.
        held: The memory of their kind.
        name: Number of the KV-cache group.
    """

    def __init__(
        self,
        planner: StepPlanner,
        evictions: EvictionsInForce,
        built: dict[tuple[str, ...], BuiltStep],
        *,
        max_rows: int,
        max_tokens: int,
        num_slots: int,
        held: HeldMemory,
        name: int,
    ):
        device = planner.device
        self._planner = planner
        self._evictions = evictions
        self._built = built
        self._max_rows = max_rows
        self._table = torch.zeros((0, 0), dtype=torch.int32, device=device)
        self._held, self._name = held, name
        self._lens = held.take(("lens", name), (max_rows,), torch.int32, device)
        self._places: Tensor | None = None
        if planner.ring:
            nowhere = num_slots * planner.ring
            self._places = held.take(("places", name), (max_tokens,), torch.int64, device)
            self._places.fill_(nowhere)

    def build(self, inner: Build, call: BuildCall) -> Any:
        common = call.common
        if common.req_idx is None:  # not the runner's own step: its buffers stay as they are
            return inner(call)
        made = inner(call.on(self._shown(call)))
        if self._places is not None:
            made.kvplug_places = self._places
        built = Built(inner, call, made)
        self._built[call.layers] = BuiltStep(self._planner, self._evictions, built)
        return made

    def _shown(self, call: BuildCall) -> Any:
        common = call.common
        source = common.block_table_tensor
        width = source.shape[1]
        # By the first build, which comes before any capture; all have the width of the longest.
        if self._table.shape[1] < width:
            shape = (self._max_rows, width)
            self._table = self._held.take(("table", self._name), shape, torch.int32, source.device)
        table, lens = compact_rows(
            source,
            common.seq_lens,
            common.query_start_loc,
            call.slots.to(torch.int32),
            self._evictions.table(),
            self._planner.block_size,
            protected=self._planner.protected,
            out_table=self._table,
            out_lens=self._lens,
            ring=self._planner.ring,
            places=self._places,
        )
        on_cpu = source.device.type == "cpu"
        return metadata.with_lengths(
            common,
            seq_lens=lens,
            block_table=table,
            # Upper bounds elsewhere; vLLM's CPU attention takes them as they are.
            max_seq_len=int(lens.max()) if on_cpu else common.max_seq_len,
            seq_lens_cpu=lens if on_cpu else common.seq_lens_cpu_upper_bound,
        )
