"""Block-table compaction as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

MAX_CHUNK = 1024


@triton.jit(do_not_specialize=["stride_table", "stride_out", "W", "block_size", "null_block"])
def compact_block_table_kernel(
    block_table,
    seq_lens,
    rows,
    gap_start,
    gap_end,
    out_table,
    out_lens,
    stride_table,
    stride_out,
    W,
    block_size,
    null_block,
    BLOCK: tl.constexpr,
):
    """One program per output row walks the live columns in chunks; the running count of kept
    entries plus a prefix sum inside the chunk is where each kept entry goes."""
    i_r = tl.program_id(0).to(tl.int64)
    i_s = i_r
    if rows is not None:
        i_s = tl.load(rows + i_r).to(tl.int64)
    p_table = block_table + i_s * stride_table
    p_out = out_table + i_r * stride_out

    b_len = tl.load(seq_lens + i_r).to(tl.int64)
    n_live = tl.maximum(tl.minimum((b_len + block_size - 1) // block_size, W), 0).to(tl.int32)
    if gap_start is not None:
        b_start = tl.load(gap_start + i_r)
        b_end = tl.load(gap_end + i_r)
    n_kept = 0
    for i_c in range(0, n_live, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        m_live = o_c < n_live
        b_block = tl.load(p_table + o_c, mask=m_live, other=null_block)
        m_keep = m_live & (b_block != null_block)
        if gap_start is not None:
            m_keep = m_keep & ((o_c < b_start) | (o_c >= b_end))
        b_keep = m_keep.to(tl.int32)
        o_out = n_kept + tl.cumsum(b_keep, 0) - 1
        tl.store(p_out + o_out, b_block, mask=m_keep)
        n_kept += tl.sum(b_keep, 0)

    for i_c in range(n_kept // BLOCK * BLOCK, W, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        m_null = (o_c >= n_kept) & (o_c < W)
        tl.store(p_out + o_c, tl.full([BLOCK], null_block, tl.int32), mask=m_null)
    n_dropped = (n_live - n_kept).to(tl.int64)
    tl.store(out_lens + i_r, (b_len - n_dropped * block_size).to(tl.int32))


@checked(check_arguments)
def compact_block_table_triton(
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
    if n_rows > 0:
        with torch.cuda.device_of(block_table):
            compact_block_table_kernel[(n_rows,)](
                block_table,
                seq_lens,
                rows,
                gap_start,
                gap_end,
                out_table,
                out_lens,
                block_table.stride(0),
                out_table.stride(0),
                width,
                block_size,
                null_block,
                BLOCK=min(triton.next_power_of_2(max(width, 1)), MAX_CHUNK),
            )
    return out_table[:n_rows, :width], out_lens[:n_rows]
