"""Pooling attention mass as one Triton launch."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments, empty_scores

CHUNK, NUM_WARPS = 1024, 8


@triton.jit
def _ones(b_bits):
    """How many bits of each word are set."""
    b_bits = b_bits.to(tl.uint32, bitcast=True)
    b_bits = b_bits - ((b_bits >> 1) & 0x55555555)
    b_bits = (b_bits & 0x33333333) + ((b_bits >> 2) & 0x33333333)
    b_bits = (b_bits + (b_bits >> 4)) & 0x0F0F0F0F
    return ((b_bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _below(o_position):
    """The bits of a word that are below a position's own."""
    return (tl.full([1], 1, tl.int32) << (o_position & 31)) - 1


@triton.jit
def _own_mass(
    p_mass,
    p_positions,
    o_t,
    m_t,
    i_since,
    b_queries,
    stride_mh,
    GROUP: tl.constexpr,
):
    """Mass of some tokens, 0 for the latest, and their positions."""
    b_mass = tl.load(p_mass + o_t, mask=m_t, other=0)
    for i_g in range(1, GROUP):
        b_mass += tl.load(p_mass + i_g * stride_mh + o_t, mask=m_t, other=0)
    b_position = tl.load(p_positions + o_t, mask=m_t, other=0)
    return tl.where(b_position >= i_since, 0.0, b_mass / GROUP / b_queries), b_position


@triton.jit(
    do_not_specialize=["latest_all", "n", "n_words", "n_queries", "stride_num", "stride_lt"]
)
def pool_mass_kernel(
    mass,
    positions,
    num_tokens,
    latest,
    query_positions,
    words,
    ranked,
    out,
    kept,
    latest_all,
    n,
    n_words,
    n_queries,
    stride_mr,
    stride_mh,
    stride_pr,
    stride_ph,
    stride_num,
    stride_lt,
    stride_qr,
    stride_qw,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KERNEL: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program per row and KV head. ``words [2, n_words]`` is a bit for each position that is
    resident and, for each word, how many there are before it: together the rank of a position
    among the resident ones, under which its mass lies in ``ranked [n]``."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    p_mass = mass + i_r * stride_mr + i_h * GROUP * stride_mh
    p_positions = positions + i_r * stride_pr + i_h * stride_ph
    p_out = out + i_p * n
    i_since = tl.load(num_tokens + i_r * stride_num)
    if latest is not None:
        i_since -= tl.load(latest + i_r * stride_lt)
    else:
        i_since -= latest_all
    b_queries = 1.0
    if query_positions is not None:
        b_seen = tl.zeros([BLOCK_Q], tl.int32)
        for i_q in range(0, n_queries, BLOCK_Q):
            o_q = i_q + tl.arange(0, BLOCK_Q)
            p_q = query_positions + i_r * stride_qr + o_q * stride_qw
            b_seen += (tl.load(p_q, mask=o_q < n_queries, other=-1) >= 0).to(tl.int32)
        b_queries = tl.maximum(tl.sum(b_seen, 0), 1).to(tl.float32)
    if KERNEL > 1:
        p_bits = words + i_p * 2 * n_words
        p_before = p_bits + n_words
        p_ranked = ranked + i_p * n
        for i_w in range(0, n_words, BLOCK):
            o_w = i_w + tl.arange(0, BLOCK)
            tl.store(p_bits + o_w, tl.zeros([BLOCK], tl.int32), mask=o_w < n_words)
        tl.debug_barrier()
        for i_t in range(0, n, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            b_position = tl.load(p_positions + o_t, mask=o_t < n, other=0)
            b_bit = tl.full([BLOCK], 1, tl.int32) << (b_position & 31)
            m_t = (o_t < n) & (b_position >= 0) & ((b_position >> 5) < n_words)
            tl.atomic_or(p_bits + (b_position >> 5), b_bit, mask=m_t, sem="relaxed")
        tl.debug_barrier()
        n_before = 0
        for i_w in range(0, n_words, BLOCK):
            o_w = i_w + tl.arange(0, BLOCK)
            b_ones = _ones(tl.load(p_bits + o_w, mask=o_w < n_words, other=0))
            b_before = n_before + tl.cumsum(b_ones, 0) - b_ones
            tl.store(p_before + o_w, b_before, mask=o_w < n_words)
            n_before += tl.sum(b_ones, 0)
        tl.debug_barrier()
        for i_t in range(0, n, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            b_mass, b_position = _own_mass(
                p_mass, p_positions, o_t, o_t < n, i_since, b_queries, stride_mh, GROUP
            )
            m_t = (o_t < n) & (b_position >= 0) & ((b_position >> 5) < n_words)
            b_bits = tl.load(p_bits + (b_position >> 5), mask=m_t, other=0)
            b_rank = tl.load(p_before + (b_position >> 5), mask=m_t, other=0)
            b_rank += _ones(b_bits & _below(b_position))
            tl.store(p_ranked + b_rank, b_mass, mask=m_t)
        tl.debug_barrier()
    for i_t in range(0, n, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = o_t < n
        if KERNEL > 1:
            b_position = tl.load(p_positions + o_t, mask=m_t, other=0)
            b_score = tl.zeros([BLOCK], tl.float32)
            for i_shift in range(KERNEL):
                o_at = b_position + i_shift - KERNEL // 2
                m_at = m_t & (o_at >= 0) & ((o_at >> 5) < n_words)
                b_bits = tl.load(p_bits + (o_at >> 5), mask=m_at, other=0)
                m_at = m_at & (((b_bits >> (o_at & 31)) & 1) == 1)
                b_rank = tl.load(p_before + (o_at >> 5), mask=m_at, other=0)
                b_rank += _ones(b_bits & _below(o_at))
                b_more = tl.load(p_ranked + b_rank, mask=m_at, other=0)
                if MAX:
                    b_score = tl.maximum(b_score, b_more)
                else:
                    b_score += b_more
            if not MAX:
                b_score = b_score / KERNEL
        else:
            b_score, b_position = _own_mass(
                p_mass, p_positions, o_t, m_t, i_since, b_queries, stride_mh, GROUP
            )
        b_score = tl.where(b_position >= i_since, kept, b_score)
        tl.store(p_out + o_t, b_score, mask=m_t)


@checked(check_arguments)
def pool_mass_triton(
    mass: Tensor,
    positions: Tensor,
    num_tokens: Tensor,
    *,
    latest: int | Tensor,
    longest: int,
    query_positions: Tensor | None = None,
    kernel: int = 1,
    how: Literal["mean", "max"] = "max",
    kept: float,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.pool_mass.pool_mass`."""
    rows, kv_heads, n = positions.shape
    if out is None:
        out = empty_scores(mass, positions)
    if out.numel() == 0:
        return out
    n_words = triton.cdiv(longest, 32)
    words = ranked = None
    if kernel > 1:
        words = positions.new_empty((rows * kv_heads, 2, n_words))
        ranked = mass.new_empty((rows * kv_heads, n))
    n_queries = query_positions.shape[1] if query_positions is not None else 0
    with torch.cuda.device_of(mass):
        pool_mass_kernel[(rows * kv_heads,)](
            mass,
            positions,
            num_tokens,
            latest if isinstance(latest, Tensor) else None,
            query_positions,
            words,
            ranked,
            out,
            float(kept),
            0 if isinstance(latest, Tensor) else latest,
            n,
            n_words,
            n_queries,
            mass.stride(0),
            mass.stride(1),
            positions.stride(0),
            positions.stride(1),
            num_tokens.stride(0),
            latest.stride(0) if isinstance(latest, Tensor) else 0,
            *(query_positions.stride() if query_positions is not None else (0, 0)),
            KV_HEADS=kv_heads,
            GROUP=mass.shape[1] // kv_heads,
            KERNEL=kernel,
            MAX=how == "max",
            BLOCK=min(max(triton.next_power_of_2(n), 32 * NUM_WARPS), CHUNK),
            BLOCK_Q=32,
            num_warps=NUM_WARPS,
        )
    return out
