"""Compacted rows as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

MAX_CHUNK = 1024
# They change from step to step: each value would be compiled again, in the middle of serving.
SIZES = ("n_rows", "width", "n_tokens", "dump", "protected", "stride_table", "stride_out")


@triton.jit(do_not_specialize=SIZES)
def compact_rows_kernel(
    block_table,
    seq_lens,
    query_start,
    row_slots,
    forces,
    out_table,
    out_lens,
    places,
    n_rows,
    width,
    n_tokens,
    dump,
    protected,
    stride_table,
    stride_out,
    BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program shows BLOCK columns of one row and places its share of the row's queries; those
    of one row more place the queries behind the last row."""
    i_r = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1) * BLOCK
    step = tl.num_programs(1) * BLOCK
    o_c = i_c + tl.arange(0, BLOCK)
    if i_r < n_rows:
        n_seq = tl.load(seq_lens + i_r)
        i_start = tl.load(query_start + i_r)
        i_end = tl.load(query_start + i_r + 1)
        i_slot = tl.load(row_slots + i_r)
        named = (n_seq > 0) & (i_slot >= 0)
        p_force = forces + i_slot.to(tl.int64) * 4
        at = tl.load(p_force, mask=named, other=0)
        live = named & (n_seq - (i_end - i_start) >= at)
        n_kept = tl.load(p_force + 1, mask=live, other=0)
        i_resume = tl.load(p_force + 2, mask=live, other=0)
        n_shown = n_seq - (i_resume - n_kept) * BLOCK_SIZE
        if i_c == 0:
            tl.store(out_lens + i_r, n_shown)
        o_source = tl.where(o_c < n_kept, protected + o_c, i_resume - n_kept + o_c)
        m_live = (o_c < (n_shown + BLOCK_SIZE - 1) // BLOCK_SIZE) & (o_c < width)
        m_live = m_live & (o_source >= 0) & (o_source < width)
        b_block = tl.load(block_table + i_r * stride_table + o_source, mask=m_live, other=0)
        tl.store(out_table + i_r * stride_out + o_c, b_block, mask=o_c < width)
        if RING > 0:
            for i_t in range(i_start + i_c, i_end, step):
                o_t = i_t + tl.arange(0, BLOCK)
                b_place = i_slot * RING + (n_seq - (i_end - o_t)) % RING
                b_place = tl.where(named & (o_t >= i_end - RING), b_place, dump)
                tl.store(places + o_t, b_place, mask=(o_t < i_end) & (o_t < n_tokens))
    elif RING > 0:
        for i_t in range(tl.load(query_start + n_rows) + i_c, n_tokens, step):
            o_t = i_t + tl.arange(0, BLOCK)
            tl.store(places + o_t, tl.zeros([BLOCK], tl.int32) + dump, mask=o_t < n_tokens)


@checked(check_arguments)
def compact_rows_triton(
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
    block = min(triton.next_power_of_2(max(width, 1)), MAX_CHUNK)
    programs = rows + (1 if places is not None else 0)
    if programs > 0:
        with torch.cuda.device_of(block_table):
            compact_rows_kernel[(programs, max(triton.cdiv(width, block), 1))](
                block_table,
                seq_lens,
                query_start,
                row_slots,
                forces,
                out_table,
                out_lens,
                places,
                rows,
                width,
                0 if places is None else places.shape[0],
                forces.shape[0] * ring,
                protected,
                block_table.stride(0),
                out_table.stride(0),
                BLOCK_SIZE=block_size,
                RING=ring,
                BLOCK=block,
            )
    return out_table[:rows, :width], out_lens[:rows]
