"""Slots of attention rows: which request each row of a step's metadata belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


class StepRows:
    """Maps the rows of a step's attention metadata to the slots of their requests.

    A block that is being written belongs to one request alone, so the block a row writes last
    names its request. The scheduler sends these blocks with every step.

    Attributes:
        num_slots: Slots in use so far: one more than the largest that was sent.
    """

    def __init__(self) -> None:
        self.num_slots = 0
        self._rows: Tensor | None = None
        self._on: dict[torch.device, Tensor] = {}
        self._hidden = False

    def begin(self, rows: npt.NDArray[np.int32] | None) -> None:
        """Take the rows of a step: last block and slot, ``[n, 2]``, or None."""
        self._on = {}
        if rows is None or not len(rows):
            self._rows = None
            return
        ordered = rows[np.argsort(rows[:, 0], kind="stable")]
        self._rows = torch.from_numpy(ordered.astype(np.int64).T.copy())
        self.num_slots = max(self.num_slots, 1 + int(rows[:, 1].max()))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave every row unknown within: for forwards that are not the step's own."""
        self._hidden = True
        try:
            yield
        finally:
            self._hidden = False

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
