"""Compaction in Triton: one launch plans, one launch a cache moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import as_word_pages, check_arguments, check_plan_arguments

TILE_BYTES = 8192
MAX_CHUNK = 1024


@triton.jit
def _lower_bound(p_sorted, n, b_value, n_steps):
    """Count of the ``n`` ascending integers that lie below each value."""
    b_low = b_value * 0
    b_high = b_low + n
    for _ in range(n_steps):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_right = m_open & (tl.load(p_sorted + b_middle, mask=m_open, other=0) < b_value)
        b_low = tl.where(m_right, b_middle + 1, b_low)
        b_high = tl.where(m_right, b_high, b_middle)
    return b_low


@triton.jit(do_not_specialize=["count", "n_steps"])
def plan_moves_kernel(
    keep,
    out,
    count,
    stride_kr,
    stride_kh,
    stride_or,
    stride_oh,
    n_steps,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program plans BLOCK slots of one row and head. Slot ``j`` is the hole of number ``j``
    minus the kept tokens below it, and takes the mover of that number."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    p_keep = keep + i_r * stride_kr + i_h * stride_kh
    o_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < count
    b_below = _lower_bound(p_keep, count, o_j, n_steps)
    n_stay = _lower_bound(p_keep, count, tl.zeros([BLOCK], tl.int32) + count, n_steps)
    b_next = tl.load(p_keep + b_below, mask=m_j & (b_below < count), other=-1)
    o_mover = n_stay + o_j - b_below
    m_moves = m_j & (b_next != o_j) & (o_mover < count)
    b_source = tl.load(p_keep + o_mover, mask=m_moves, other=0)
    b_source = tl.where(m_moves, b_source, o_j)
    tl.store(out + i_r * stride_or + i_h * stride_oh + o_j, b_source, mask=m_j)


@triton.jit(do_not_specialize=["count", "stride_br"])
def move_kernel(
    cache,
    block_table,
    source,
    count,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_br,
    stride_sr,
    stride_sh,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program fills BLOCK_R slots of one row and head, BLOCK_C elements at a time. No slot is
    both read and written, in this program or another."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    o_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_j = o_j < count
    b_t = tl.load(source + i_r * stride_sr + i_h * stride_sh + o_j, mask=m_j, other=0)
    m_moves = m_j & (b_t != o_j)
    p_table = block_table + i_r * stride_br
    i_from = tl.load(p_table + b_t // BLOCK_SIZE, mask=m_moves, other=0).to(tl.int64)
    i_to = tl.load(p_table + o_j // BLOCK_SIZE, mask=m_moves, other=0).to(tl.int64)
    p_head = cache + i_h * stride_ch
    p_from = p_head + i_from * stride_cb + (b_t % BLOCK_SIZE).to(tl.int64) * stride_ct
    p_to = p_head + i_to * stride_cb + (o_j % BLOCK_SIZE).to(tl.int64) * stride_ct
    for i_c in range(0, CONTENT, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = m_moves[:, None] & (o_c < CONTENT)[None, :]
        b_content = tl.load(p_from[:, None] + o_c[None, :], mask=m_c, other=0)
        tl.store(p_to[:, None] + o_c[None, :], b_content, mask=m_c)


@checked(check_plan_arguments)
def plan_moves_triton(keep: Tensor, count: int, *, out: Tensor | None = None) -> Tensor:
    """Same contract as :func:`kvplug_kernels.compact_kv.plan_moves`."""
    if out is None:
        out = torch.empty_like(keep, memory_format=torch.contiguous_format)
    rows, heads, _ = keep.shape
    if out.numel() > 0:
        block = min(triton.next_power_of_2(count), MAX_CHUNK)
        with torch.cuda.device_of(keep):
            plan_moves_kernel[(rows * heads, triton.cdiv(count, block))](
                keep,
                out,
                count,
                keep.stride(0),
                keep.stride(1),
                out.stride(0),
                out.stride(1),
                count.bit_length(),
                HEADS=heads,
                BLOCK=block,
            )
    return out


@checked(check_arguments)
def compact_kv_triton(
    caches: Sequence[Tensor],
    block_table: Tensor,
    keep: Tensor,
    *,
    count: int,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.compact_kv.compact_kv`."""
    source = plan_moves_triton(keep, count, out=out)
    rows, heads, _ = keep.shape
    for cache in caches:
        pages = as_word_pages(cache)
        block_size, content = pages.shape[2:]
        if source.numel() == 0 or content == 0:
            continue
        tile = TILE_BYTES // pages.element_size()
        block_c = min(triton.next_power_of_2(content), tile)
        block_r = min(tile // block_c, triton.next_power_of_2(count))
        with torch.cuda.device_of(cache):
            move_kernel[(rows * heads, triton.cdiv(count, block_r))](
                pages,
                block_table,
                source,
                count,
                *pages.stride()[:3],
                block_table.stride(0),
                source.stride(0),
                source.stride(1),
                HEADS=heads,
                BLOCK_SIZE=block_size,
                CONTENT=content,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
            )
    return source
