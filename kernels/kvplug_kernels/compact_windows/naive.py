"""The specification of compacted windows: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import INT32, check_separate, check_tensor, checked

BOOL = (torch.bool,)


def check_arguments(
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
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = block_table.device
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    for name, blocks in (("sink", sink), ("window", window)):
        if blocks < 0:
            raise ValueError(f"{name} must be at least 0, got {blocks}.")
    check_tensor("block_table", block_table, INT32, ("S", "width"), device)
    n_source, width = block_table.shape
    check_tensor("seq_lens", seq_lens, INT32, (n_source,), device)
    n_rows = n_source
    if rows is not None:
        check_tensor("rows", rows, INT32, ("R",), device)
        n_rows = rows.shape[0]
    if ends is not None:
        if rows is None:
            raise ValueError("rows must be given with ends.")
        check_tensor("ends", ends, INT32, (n_rows,), device)
    check_tensor("query_start", query_start, INT32, (n_rows + 1,), device)
    if exempt is not None:
        check_tensor("exempt", exempt, BOOL, (n_source,), device)
    check_tensor("out_table", out_table, INT32, (">=R", ">=width"), device)
    if out_table.shape[0] < n_rows or out_table.shape[1] < width:
        raise ValueError(
            f"out_table must be at least {n_rows} x {width}, got {tuple(out_table.shape)}."
        )
    check_tensor("out_lens", out_lens, INT32, (">=R",), device)
    if out_lens.shape[0] < n_rows:
        raise ValueError(f"out_lens must have at least {n_rows} entries, got {out_lens.shape[0]}.")
    arguments = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "query_start": query_start,
        "rows": rows,
        "ends": ends,
        "exempt": exempt,
    }
    check_separate("out_table", out_table, arguments)
    check_separate("out_lens", out_lens, {**arguments, "out_table": out_table})


@checked(check_arguments)
def compact_windows_naive(
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
    table, lens, starts = block_table.tolist(), seq_lens.tolist(), query_start.tolist()
    sources = list(range(len(lens))) if rows is None else rows.tolist()
    limits = [0] * len(sources) if ends is None else ends.tolist()
    free = [False] * len(lens) if exempt is None else exempt.tolist()
    for r, (source, end) in enumerate(zip(sources, limits, strict=True)):
        n = end if end > 0 else lens[source]
        first = max(n - (starts[r + 1] - starts[r]), 0)
        gap = 0 if free[source] else max(first // block_size - window - sink, 0)
        shown = n - gap * block_size
        columns = range(min(-(-shown // block_size), width))
        found = [c if c < sink else c + gap for c in columns]
        blocks = [table[source][c] if c < width else 0 for c in found]
        out_table[r, : len(blocks)] = torch.tensor(
            blocks, dtype=torch.int32, device=block_table.device
        )
        out_lens[r] = shown
    return out_table[: len(sources), :width], out_lens[: len(sources)]
