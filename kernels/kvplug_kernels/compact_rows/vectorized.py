"""Compacted rows in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments


@checked(check_arguments)
def compact_rows_vectorized(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    row_slots: Tensor,
    forces: Tensor,
    block_size: int,
    *,
    protected: int,
    out_table: Tensor,
    out_lens: Tensor,
    ring: int = 0,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.compact_rows.compact_rows`."""
    rows, width = block_table.shape
    table, lens = out_table[:rows, :width], out_lens[:rows]
    named = (row_slots >= 0) & (seq_lens > 0)
    force = forces.index_select(0, torch.where(named, row_slots, 0))
    first = seq_lens - (query_start[1:] - query_start[:-1])
    force = force.masked_fill_(~(named & (first >= force[:, 0]))[:, None], 0)
    kept, resume = force[:, 1], force[:, 2]
    torch.sub(seq_lens, (resume - kept) * block_size, out=lens)
    column = torch.arange(width, dtype=torch.int32, device=block_table.device)
    beyond = (resume - kept)[:, None] + column
    index = torch.where(column < kept[:, None], protected + column, beyond)
    live = (column < ((lens + block_size - 1) // block_size)[:, None]) & (index >= 0)
    live &= index < width
    if width > 0:
        shown = block_table.gather(1, index.clamp_(0, width - 1).long())
        table.copy_(shown.masked_fill_(~live, 0))
    if places is None:
        return table, lens
    dump = forces.shape[0] * ring
    if rows == 0:
        places.fill_(dump)
        return table, lens
    token = torch.arange(places.shape[0], dtype=torch.int32, device=places.device)
    row = torch.searchsorted(query_start[1:], token, right=True)
    inside = row < rows
    row.clamp_(max=rows - 1)
    left = query_start[1:][row] - token
    inside &= (left <= ring) & named[row]
    place = row_slots[row] * ring + (seq_lens[row] - left) % ring
    places.copy_(place.masked_fill_(~inside, dump))
    return table, lens
