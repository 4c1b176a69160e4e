"""The specification of block-table compaction: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor


def _check_tensor(
    name: str, tensor: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {allowed}, got {tensor.dtype}.")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like block_table, got {tensor.device}.")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}."
        )


def check_arguments(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    rows: Tensor | None,
    gap_start: Tensor | None,
    gap_end: Tensor | None,
    null_block: int,
    out_table: Tensor | None,
    out_lens: Tensor | None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = block_table.device
    int32 = (torch.int32,)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    if not -(2**31) <= null_block < 2**31:
        raise ValueError(f"null_block must fit int32, got {null_block}.")
    _check_tensor("block_table", block_table, 2, int32, device)
    _check_tensor("seq_lens", seq_lens, 1, int32, device)
    n_source, width = block_table.shape
    n_rows = seq_lens.shape[0]
    if rows is None:
        if n_source != n_rows:
            raise ValueError(
                f"seq_lens must have one entry per row of block_table when rows is not given, "
                f"got {n_rows} for {n_source} rows."
            )
    else:
        _check_tensor("rows", rows, 1, (torch.int32, torch.int64), device)
    if (gap_start is None) != (gap_end is None):
        missing = "gap_start" if gap_start is None else "gap_end"
        raise ValueError(f"gap_start and gap_end go together, but {missing} was not given.")
    if gap_start is not None and gap_end is not None:
        _check_tensor("gap_start", gap_start, 1, int32, device)
        _check_tensor("gap_end", gap_end, 1, int32, device)

    inputs = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "rows": rows,
        "gap_start": gap_start,
        "gap_end": gap_end,
    }
    for name in ("rows", "gap_start", "gap_end"):
        tensor = inputs[name]
        if tensor is not None and tensor.shape[0] != n_rows:
            raise ValueError(
                f"{name} must have one entry per entry of seq_lens ({n_rows}), "
                f"got {tensor.shape[0]}."
            )

    if out_table is not None:
        _check_tensor("out_table", out_table, 2, int32, device)
        if out_table.shape[0] < n_rows or out_table.shape[1] < width:
            raise ValueError(
                f"out_table must be at least {n_rows} x {width}, "
                f"got shape {tuple(out_table.shape)}."
            )
    if out_lens is not None:
        _check_tensor("out_lens", out_lens, 1, int32, device)
        if out_lens.shape[0] < n_rows:
            raise ValueError(
                f"out_lens must have at least {n_rows} entries, got {out_lens.shape[0]}."
            )
    for out_name, out in (("out_table", out_table), ("out_lens", out_lens)):
        if out is None or out.numel() == 0:
            continue
        for name, tensor in (*inputs.items(), ("out_table", out_table)):
            if (
                tensor is not None
                and name != out_name
                and tensor.numel() > 0
                and tensor.data_ptr() == out.data_ptr()
            ):
                raise ValueError(f"{out_name} must not share memory with {name}.")


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
    check_arguments(
        block_table, seq_lens, block_size, rows, gap_start, gap_end, null_block, out_table, out_lens
    )
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
