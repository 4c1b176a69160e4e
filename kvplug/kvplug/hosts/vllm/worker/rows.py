"""Slots of attention rows: which request each row of a step's metadata belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def last_blocks(table: Tensor, seq_lens: Tensor, block_size: int) -> Tensor:
    """The block each row writes last, ``[rows]`` int64.

    Args:
        table: Block table, ``[rows, max_blocks]``.
        seq_lens: Tokens of each row, ``[rows]``.
        block_size: Tokens per block.
    """
    last = ((seq_lens - 1).clamp_min(0) // block_size).to(torch.int64)
    return table.gather(1, last[:, None])[:, 0].to(torch.int64)


@dataclass(frozen=True)
class NamedRow:
    """A row of the step whose request the scheduler's directives name.

    Attributes:
        row: The row.
        runner_slot: Slot of its request in vLLM's second model runner.
    """

    row: int
    runner_slot: int


class StepRows:
    """Maps the rows of a step's attention metadata to the slots of their requests.

    On vLLM's first model runner slots are the scheduler's, known before metadata is built. A block
    that is being written belongs to one request alone, so the block a row writes last names its
    request; the scheduler sends these blocks with every step.

    The second runner builds metadata before it hands out directives. There slots are its own
    (``CommonAttentionMetadata.req_idx``), and directives, which name requests by the scheduler's
    slots, are matched with rows afterwards, by `name`.

    Attributes:
        num_slots: Slots in use so far: one more than the largest that was seen.
        requests: Request of each row, in the order of the rows; second runner, from `name` on.
        named: Row of each slot of the scheduler's that the directives name; likewise.
        runner_slots: Slot of each row in the second runner, from its build on.
    """

    def __init__(self) -> None:
        self.num_slots = 0
        self.requests: list[str] = []
        self.named: dict[int, NamedRow] = {}
        self._names: dict[str, int] = {}
        self.runner_slots: list[int] = []
        self._rows: Tensor | None = None
        self._on: dict[torch.device, Tensor] = {}
        self._hidden = False

    def begin(
        self, rows: npt.NDArray[np.int32] | None, names: dict[str, int] | None = None
    ) -> None:
        """Take the rows of a step.

        Args:
            rows: Last block and slot of each, ``[n, 2]``, or None.
            names: Scheduler's slot of each request that the directives name.
        """
        self._on = {}
        self._names = names or {}
        self.requests, self.named = [], {}
        if rows is None or not len(rows):
            self._rows = None
            return
        ordered = rows[np.argsort(rows[:, 0], kind="stable")]
        self._rows = torch.from_numpy(ordered.astype(np.int64).T.copy())
        self.num_slots = max(self.num_slots, 1 + int(rows[:, 1].max()))

    @property
    def by_block(self) -> bool:
        """True if the scheduler named the step's rows by the blocks they write last."""
        return self._rows is not None

    def see(self, runner_slots: npt.NDArray[Any]) -> None:
        """Take note of the second runner's slots of a step's rows, ``[rows]``, as it builds."""
        self.runner_slots = runner_slots.tolist()
        self.num_slots = max(self.num_slots, 1 + max(self.runner_slots, default=-1))

    def name(self, requests: Sequence[str]) -> None:
        """Take the requests of a step's rows, in order, once the second runner tells them."""
        self.requests = list(requests)
        slots = self._names
        self.named = {
            slots[request]: NamedRow(row, self.runner_slots[row])
            for row, request in enumerate(requests)
            if request in slots
        }

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave every row unknown within: for forwards that are not the step's own."""
        self._hidden = True
        try:
            yield
        finally:
            self._hidden = False

    @property
    def hides(self) -> bool:
        """True within `hidden`."""
        return self._hidden

    def slots_of(self, table: Tensor, seq_lens: Tensor, block_size: int) -> Tensor:
        """Slots of some rows, ``[rows]`` int64 on the table's device; -1 where unknown.

        Does not wait for the device.

        Args:
            table: Block table, ``[rows, max_blocks]``.
            seq_lens: Tokens of each row, ``[rows]``; 0 for padding.
            block_size: Tokens per block.
        """
        if self._rows is None or self._hidden:
            return torch.full_like(seq_lens, -1, dtype=torch.int64)
        device = table.device
        if device not in self._on:
            self._on[device] = self._rows.to(device, non_blocking=True)
        blocks, slots = self._on[device]
        last = last_blocks(table, seq_lens, block_size)
        at = torch.searchsorted(blocks, last).clamp_max(len(blocks) - 1)
        return torch.where((blocks[at] == last) & (seq_lens > 0), slots[at], -1)
