"""Compacted windows in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments


@checked(check_arguments)
def compact_windows_vectorized(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    block_size: int,
    *,
    sink: int,
    window: int,
    out_table: Tensor,
    out_lens: Tensor,
    rows: Tensor | None = None,
    ends: Tensor | None = None,
    exempt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.compact_windows.compact_windows`."""
    width = block_table.shape[1]
    lens = seq_lens
    if rows is not None:
        lens, block_table = seq_lens.index_select(0, rows), block_table.index_select(0, rows)
        exempt = exempt.index_select(0, rows) if exempt is not None else None
    if ends is not None:
        lens = torch.where(ends > 0, ends, lens)
    table, shown = out_table[: lens.shape[0], :width], out_lens[: lens.shape[0]]
    first = (lens - (query_start[1:] - query_start[:-1])).clamp_(min=0)
    gap = (first // block_size - (window + sink)).clamp_(min=0)
    if exempt is not None:
        gap.masked_fill_(exempt, 0)
    torch.sub(lens, gap * block_size, out=shown)
    if width == 0:
        return table, shown
    column = torch.arange(width, dtype=torch.int32, device=block_table.device)
    source = torch.where(column < sink, column, column + gap[:, None])
    live = column < ((shown + (block_size - 1)) // block_size)[:, None]
    found = block_table.gather(1, source.clamp(max=width - 1).long())
    found.masked_fill_(source >= width, 0)
    table.copy_(torch.where(live, found, table))
    return table, shown
