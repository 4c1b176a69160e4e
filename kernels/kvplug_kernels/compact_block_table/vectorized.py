"""Block-table compaction in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments


@checked(check_arguments)
def compact_block_table_vectorized(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    *,
    rows: Tensor | None = None,
    gap_start: Tensor | None = None,
    gap_end: Tensor | None = None,
    null_block: int = 0,
    out_table: Tensor | None = None,
    out_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.compact_block_table.compact_block_table`."""
    n_rows, width = seq_lens.shape[0], block_table.shape[1]
    if out_table is None:
        out_table = block_table.new_empty((n_rows, width))
    if out_lens is None:
        out_lens = seq_lens.new_empty((n_rows,))
    table_view, lens_view = out_table[:n_rows, :width], out_lens[:n_rows]

    table = block_table if rows is None else block_table.index_select(0, rows)
    column = torch.arange(width, dtype=torch.int32, device=block_table.device)
    n_live = ((seq_lens.to(torch.int64) + (block_size - 1)) // block_size).clamp_(0, width)
    keep = (column < n_live[:, None]) & (table != null_block)
    if gap_start is not None and gap_end is not None:
        keep &= (column < gap_start[:, None]) | (column >= gap_end[:, None])

    # Kept entries take columns 0..n_kept-1 and the others the columns after them: each output
    # column is written exactly once, so the buffer needs no fill beforehand.
    count = keep.cumsum(dim=1, dtype=torch.int32)
    n_kept = keep.sum(dim=1, dtype=torch.int32)
    target = torch.where(keep, count - 1, n_kept[:, None] + column - count)
    table_view.scatter_(1, target.long(), table.masked_fill(~keep, null_block))
    lens_view.copy_(seq_lens - block_size * (n_live - n_kept))
    return table_view, lens_view
