"""Slot gather as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .naive import as_words, check_arguments

TILE_BYTES = 8192


@triton.jit(do_not_specialize=["n_rows"])
def gather_slots_kernel(
    cache,
    slots,
    out,
    n_rows,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_on,
    stride_oh,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program copies BLOCK_R (slot, head) pairs, BLOCK_C elements of content at a time."""
    i_p = tl.program_id(0).to(tl.int64)
    o_r = i_p * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    i_n = o_r // HEADS
    i_h = o_r % HEADS
    b_slot = tl.load(slots + i_n, mask=m_r, other=-1).to(tl.int64)
    m_live = b_slot >= 0
    b_slot = tl.where(m_live, b_slot, 0)
    i_b = b_slot // BLOCK_SIZE
    i_t = b_slot % BLOCK_SIZE
    p_cache = cache + i_b * stride_cb + i_h * stride_ch + i_t * stride_ct
    p_out = out + i_n * stride_on + i_h * stride_oh
    for i_c in range(0, CONTENT, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < CONTENT
        b_content = tl.load(
            p_cache[:, None] + o_c[None, :], mask=m_live[:, None] & m_c[None, :], other=0
        )
        tl.store(p_out[:, None] + o_c[None, :], b_content, mask=m_r[:, None] & m_c[None, :])


def gather_slots_triton(cache: Tensor, slots: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Same contract as :func:`kvplug_kernels.gather_slots.gather_slots`."""
    check_arguments(cache, slots, out)
    _, num_heads, block_size, content = cache.shape
    if out is None:
        out = cache.new_empty((slots.shape[0], num_heads, content))
    words, out_words = as_words(cache), as_words(out)
    n_rows = slots.shape[0] * num_heads
    if out.numel() > 0:
        tile = TILE_BYTES // cache.element_size()
        block_c = min(triton.next_power_of_2(content), tile)
        block_r = tile // block_c
        with torch.cuda.device_of(cache):
            gather_slots_kernel[(triton.cdiv(n_rows, block_r),)](
                words,
                slots,
                out_words,
                n_rows,
                words.stride(0),
                words.stride(1),
                words.stride(2),
                out_words.stride(0),
                out_words.stride(1),
                HEADS=num_heads,
                BLOCK_SIZE=block_size,
                CONTENT=content,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
            )
    return out
