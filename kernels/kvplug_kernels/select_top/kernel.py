"""Selection as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

# At least one score a thread: no thread then counts the score of another.
MIN_CHUNK, MAX_CHUNK, NUM_WARPS = 256, 2048, 8
# A long row has a multiprocessor to itself.
LONG, LONG_CHUNK, LONG_WARPS = 16384, 4096, 32


@triton.jit
def _images(p_scores, o_t, n_resident):
    """Unsigned integers in the order of the scores: 0 beyond the resident tokens, which is below
    the image of -inf, and NaN as -inf."""
    b_score = tl.load(p_scores + o_t, mask=o_t < n_resident, other=0)
    # On the bits, so that no floating-point mode (such as flushing denormals) matters.
    b_bits = b_score.to(tl.uint32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    b_bits = tl.where(b_size > 0x7F800000, 0xFF800000, b_bits)
    b_bits = tl.where(b_size == 0, 0, b_bits)
    b_image = tl.where((b_bits >> 31) == 1, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
    return tl.where(o_t < n_resident, b_image, 0)


@triton.jit(do_not_specialize=["count", "n"])
def select_top_kernel(
    scores,
    lens,
    out,
    count,
    n,
    stride_sr,
    stride_sh,
    stride_or,
    stride_oh,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and head: four passes fix the lowest image that is kept, eight bits at
    a time from the top, and a fifth writes the indices in order."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    p_scores = scores + i_r * stride_sr + i_h * stride_sh
    p_out = out + i_r * stride_or + i_h * stride_oh
    n_resident = n
    if lens is not None:
        n_resident = tl.maximum(tl.minimum(tl.load(lens + i_r), n), 0)
    n_seen = tl.maximum(n_resident, count)

    o_bin = tl.arange(0, 256)
    b_lowest = tl.full([], 0, tl.uint32)
    # How many are still to be chosen among the images that begin with the bits fixed so far.
    n_missing = count
    for i_pass in tl.static_range(4):
        b_count = tl.zeros([256], tl.int32)
        for i_t in range(0, n_seen, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            b_image = _images(p_scores, o_t, n_resident)
            m_t = o_t < n_seen
            if i_pass > 0:
                m_t = m_t & ((b_image >> (32 - 8 * i_pass)) == b_lowest)
            b_bin = ((b_image >> (24 - 8 * i_pass)) & 255).to(tl.int32)
            b_count += tl.histogram(b_bin, 256, mask=m_t)
        b_from = tl.sum(b_count, 0) - tl.cumsum(b_count, 0) + b_count
        i_bin = tl.max(tl.where(b_from >= n_missing, o_bin, 0), 0)
        n_missing -= tl.sum(tl.where(o_bin > i_bin, b_count, 0), 0)
        b_lowest = (b_lowest << 8) | i_bin.to(tl.uint32)

    n_level = 0
    n_kept = 0
    for i_t in range(0, n_seen, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        b_image = _images(p_scores, o_t, n_resident)
        m_t = o_t < n_seen
        b_level = (m_t & (b_image == b_lowest)).to(tl.int32)
        o_level = n_level + tl.cumsum(b_level, 0) - b_level
        m_keep = m_t & ((b_image > b_lowest) | ((b_level == 1) & (o_level < n_missing)))
        b_keep = m_keep.to(tl.int32)
        o_out = n_kept + tl.cumsum(b_keep, 0) - b_keep
        tl.store(p_out + o_out, o_t, mask=m_keep)
        n_level += tl.sum(b_level, 0)
        n_kept += tl.sum(b_keep, 0)


@checked(check_arguments)
def select_top_triton(
    scores: Tensor, count: int, lens: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.select_top.select_top`."""
    rows, heads, n = scores.shape
    if out is None:
        out = scores.new_empty((rows, heads, count), dtype=torch.int32)
    if out.numel() > 0:
        long = n >= LONG
        chunk, warps = (LONG_CHUNK, LONG_WARPS) if long else (MAX_CHUNK, NUM_WARPS)
        with torch.cuda.device_of(scores):
            select_top_kernel[(rows * heads,)](
                scores,
                lens,
                out,
                count,
                n,
                scores.stride(0),
                scores.stride(1),
                out.stride(0),
                out.stride(1),
                HEADS=heads,
                BLOCK=min(max(triton.next_power_of_2(n), MIN_CHUNK), chunk),
                num_warps=warps,
            )
    return out
