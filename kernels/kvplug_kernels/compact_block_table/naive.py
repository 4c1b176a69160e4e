"""The specification of block-table compaction: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import INT32, INTEGERS, check_separate, check_tensor, checked


def check_arguments(
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
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = block_table.device
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    if not -(2**31) <= null_block < 2**31:
        raise ValueError(f"null_block must fit int32, got {null_block}.")
    check_tensor("block_table", block_table, INT32, ("S", "W"), device)
    n_source, width = block_table.shape
    check_tensor("seq_lens", seq_lens, INT32, ("R" if rows is not None else n_source,), device)
    n_rows = seq_lens.shape[0]
    if rows is not None:
        check_tensor("rows", rows, INTEGERS, (n_rows,), device)
    if (gap_start is None) != (gap_end is None):
        missing = "gap_start" if gap_start is None else "gap_end"
        raise ValueError(f"{missing} must be given too: gap_start and gap_end go together.")
    if gap_start is not None and gap_end is not None:
        check_tensor("gap_start", gap_start, INT32, (n_rows,), device)
        check_tensor("gap_end", gap_end, INT32, (n_rows,), device)
    inputs = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "rows": rows,
        "gap_start": gap_start,
        "gap_end": gap_end,
    }
    if out_table is not None:
        check_tensor("out_table", out_table, INT32, (">=R", ">=W"), device)
        if out_table.shape[0] < n_rows or out_table.shape[1] < width:
            raise ValueError(
                f"out_table must be at least {n_rows} x {width}, got {tuple(out_table.shape)}."
            )
        check_separate("out_table", out_table, inputs)
    if out_lens is not None:
        check_tensor("out_lens", out_lens, INT32, (">=R",), device)
        if out_lens.shape[0] < n_rows:
            raise ValueError(
                f"out_lens must have at least {n_rows} entries, got {out_lens.shape[0]}."
            )
        check_separate("out_lens", out_lens, {**inputs, "out_table": out_table})


@checked(check_arguments)
def compact_block_table_naive(
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
    source = list(range(n_rows)) if rows is None else rows.tolist()
    starts = [0] * n_rows if gap_start is None else gap_start.tolist()
    ends = [0] * n_rows if gap_end is None else gap_end.tolist()
    table = block_table.tolist()

    new_table: list[list[int]] = []
    new_lens: list[int] = []
    for r, seq_len in enumerate(seq_lens.tolist()):
        n_live = min(max(-(-seq_len // block_size), 0), width)
        kept: list[int] = []
        for i in range(n_live):
            block = table[source[r]][i]
            in_gap = starts[r] <= i < ends[r]
            if block != null_block and not in_gap:
                kept.append(block)
        new_table.append(kept + [null_block] * (width - len(kept)))
        new_lens.append(seq_len - block_size * (n_live - len(kept)))

    if out_table is None:
        out_table = block_table.new_empty((n_rows, width))
    if out_lens is None:
        out_lens = seq_lens.new_empty((n_rows,))
    table_view, lens_view = out_table[:n_rows, :width], out_lens[:n_rows]
    table_view.copy_(torch.tensor(new_table, dtype=torch.int32).reshape(n_rows, width))
    lens_view.copy_(torch.tensor(new_lens, dtype=torch.int32))
    return table_view, lens_view
