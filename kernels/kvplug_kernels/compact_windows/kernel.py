"""Compacted windows as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

MAX_CHUNK = 1024
# They change from step to step: each value would be compiled again, in the middle of serving.
SIZES = ("width", "sink", "window", "stride_table", "stride_out")


@triton.jit(do_not_specialize=SIZES)
def compact_windows_kernel(
    block_table,
    seq_lens,
    query_start,
    rows,
    ends,
    exempt,
    out_table,
    out_lens,
    width,
    sink,
    window,
    stride_table,
    stride_out,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per output row walks the live columns in chunks."""
    i_r = tl.program_id(0).to(tl.int64)
    i_s = i_r
    if rows is not None:
        i_s = tl.load(rows + i_r).to(tl.int64)
    n_seq = tl.load(seq_lens + i_s)
    if ends is not None:
        b_end = tl.load(ends + i_r)
        n_seq = tl.where(b_end > 0, b_end, n_seq)
    n_query = tl.load(query_start + i_r + 1) - tl.load(query_start + i_r)
    i_first = tl.maximum(n_seq - n_query, 0) // BLOCK_SIZE
    n_gap = tl.maximum(i_first - window - sink, 0)
    if exempt is not None:
        n_gap = tl.where(tl.load(exempt + i_s), 0, n_gap)
    n_shown = n_seq - n_gap * BLOCK_SIZE
    tl.store(out_lens + i_r, n_shown)
    n_live = tl.minimum((n_shown + BLOCK_SIZE - 1) // BLOCK_SIZE, width)
    for i_c in range(0, n_live, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        o_source = tl.where(o_c < sink, o_c, o_c + n_gap)
        m_live = o_c < n_live
        b_block = tl.load(
            block_table + i_s * stride_table + o_source, mask=m_live & (o_source < width), other=0
        )
        tl.store(out_table + i_r * stride_out + o_c, b_block, mask=m_live)


@checked(check_arguments)
def compact_windows_triton(
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
    n_rows = block_table.shape[0] if rows is None else rows.shape[0]
    if n_rows > 0:
        with torch.cuda.device_of(block_table):
            compact_windows_kernel[(n_rows,)](
                block_table,
                seq_lens,
                query_start,
                rows,
                ends,
                exempt,
                out_table,
                out_lens,
                width,
                sink,
                window,
                block_table.stride(0),
                out_table.stride(0),
                BLOCK_SIZE=block_size,
                BLOCK=min(triton.next_power_of_2(max(width, 1)), MAX_CHUNK),
            )
    return out_table[:n_rows, :width], out_lens[:n_rows]
