"""Choosing survivors as one Triton launch."""

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
ALWAYS = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _digit(b_count, n_missing):
    """The highest bin from which on at least ``n_missing`` are counted, and how many are missing
    within it."""
    o_bin = tl.arange(0, 256)
    b_from = tl.sum(b_count, 0) - tl.cumsum(b_count, 0) + b_count
    i_bin = tl.max(tl.where(b_from >= n_missing, o_bin, 0), 0)
    return i_bin, n_missing - tl.sum(tl.where(o_bin > i_bin, b_count, 0), 0)


@triton.jit
def _kept(p_images, o_t, m_t, b_lowest, n_missing, n_level):
    """Which of some tokens survive, and how many with the lowest image there were up to them."""
    b_image = tl.load(p_images + o_t, mask=m_t, other=0).to(tl.uint32, bitcast=True)
    b_level = (m_t & (b_image == b_lowest)).to(tl.int32)
    o_level = n_level + tl.cumsum(b_level, 0) - b_level
    m_keep = m_t & ((b_image > b_lowest) | ((b_level == 1) & (o_level < n_missing)))
    return m_keep, n_level + tl.sum(b_level, 0)


@triton.jit(do_not_specialize=["candidates", "count", "sink", "recent", "n_texts", "stride_num"])
def plan_survivors_kernel(
    scores,
    positions,
    num_tokens,
    images,
    holes,
    out,
    candidates,
    count,
    sink,
    recent,
    n_texts,
    stride_sr,
    stride_sh,
    stride_pr,
    stride_ph,
    stride_num,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and head. Images are unsigned integers in the order of worth: a first
    pass writes them and counts their highest eight bits, three more fix the lowest one that is
    kept. Then the slots below ``count`` are walked: what stays, and holes by number. Then the
    candidates above, which fill them."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    p_scores = scores + i_r * stride_sr + i_h * stride_sh
    p_positions = positions + i_r * stride_pr + i_h * stride_ph
    p_images = images + i_p * candidates
    p_holes = holes + i_p * count
    p_out = out + i_p * count
    i_latest = tl.load(num_tokens + i_r % n_texts * stride_num) - recent
    b_count = tl.zeros([256], tl.int32)
    for i_t in range(0, candidates, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = o_t < candidates
        b_score = tl.load(p_scores + o_t, mask=m_t, other=0)
        b_position = tl.load(p_positions + o_t, mask=m_t, other=0)
        # On the bits, so that no floating-point mode (such as flushing denormals) matters.
        b_bits = b_score.to(tl.uint32, bitcast=True)
        b_size = b_bits & 0x7FFFFFFF
        b_bits = tl.where(b_size > 0x7F800000, 0xFF800000, b_bits)
        b_bits = tl.where(b_size == 0, 0, b_bits)
        # Infinities: as the largest number of their sign.
        b_bits = tl.where((b_bits & 0x7FFFFFFF) == 0x7F800000, b_bits - 1, b_bits)
        b_image = tl.where((b_bits >> 31) == 1, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
        m_always = (b_position < sink) | (b_position >= i_latest)
        b_image = tl.where(m_always, ALWAYS, b_image)
        tl.store(p_images + o_t, b_image.to(tl.int32, bitcast=True), mask=m_t)
        b_count += tl.histogram((b_image >> 24).to(tl.int32), 256, mask=m_t)
    # How many are still to be chosen among the images that begin with the bits fixed so far.
    i_bin, n_missing = _digit(b_count, count)
    b_lowest = i_bin.to(tl.uint32)
    tl.debug_barrier()
    for i_pass in tl.static_range(1, 4):
        b_count = tl.zeros([256], tl.int32)
        for i_t in range(0, candidates, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            m_t = o_t < candidates
            b_image = tl.load(p_images + o_t, mask=m_t, other=0).to(tl.uint32, bitcast=True)
            m_t = m_t & ((b_image >> (32 - 8 * i_pass)) == b_lowest)
            b_bin = ((b_image >> (24 - 8 * i_pass)) & 255).to(tl.int32)
            b_count += tl.histogram(b_bin, 256, mask=m_t)
        i_bin, n_missing = _digit(b_count, n_missing)
        b_lowest = (b_lowest << 8) | i_bin.to(tl.uint32)

    n_level = 0
    n_holes = 0
    for i_t in range(0, count, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = o_t < count
        m_keep, n_level = _kept(p_images, o_t, m_t, b_lowest, n_missing, n_level)
        b_hole = (m_t & (m_keep == 0)).to(tl.int32)
        o_hole = n_holes + tl.cumsum(b_hole, 0) - b_hole
        tl.store(p_out + o_t, o_t, mask=m_keep)
        tl.store(p_holes + o_hole, o_t, mask=b_hole == 1)
        n_holes += tl.sum(b_hole, 0)
    tl.debug_barrier()
    n_moved = 0
    for i_t in range(count, candidates, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = o_t < candidates
        m_keep, n_level = _kept(p_images, o_t, m_t, b_lowest, n_missing, n_level)
        b_keep = m_keep.to(tl.int32)
        o_hole = n_moved + tl.cumsum(b_keep, 0) - b_keep
        b_hole = tl.load(p_holes + o_hole, mask=m_keep, other=0)
        tl.store(p_out + b_hole, o_t, mask=m_keep)
        n_moved += tl.sum(b_keep, 0)


@checked(check_arguments)
def plan_survivors_triton(
    scores: Tensor,
    positions: Tensor,
    num_tokens: Tensor,
    *,
    candidates: int,
    count: int,
    sink: int,
    recent: int,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.plan_survivors.plan_survivors`."""
    rows, heads, _ = scores.shape
    if out is None:
        out = positions.new_empty((rows, heads, count))
    if out.numel() > 0:
        images = positions.new_empty((rows, heads, candidates))
        holes = positions.new_empty((rows, heads, count))
        long = candidates >= LONG
        chunk, warps = (LONG_CHUNK, LONG_WARPS) if long else (MAX_CHUNK, NUM_WARPS)
        with torch.cuda.device_of(scores):
            plan_survivors_kernel[(rows * heads,)](
                scores,
                positions,
                num_tokens,
                images,
                holes,
                out,
                candidates,
                count,
                sink,
                recent,
                len(num_tokens),
                scores.stride(0),
                scores.stride(1),
                positions.stride(0),
                positions.stride(1),
                num_tokens.stride(0),
                HEADS=heads,
                BLOCK=min(max(triton.next_power_of_2(candidates), MIN_CHUNK), chunk),
                num_warps=warps,
            )
    return out
