"""A segment's measures as two Triton launches: partial sums by tile of tokens, then their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

TILE_BYTES = 16384
MAX_TILE = 64
# A float32 product runs outside the tensor cores, in registers: a wider tile spills.
MAX_QUERY_TILE = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}


@triton.jit
def _load(
    x, i_h, o_t, m_t, stride_n, stride_h, stride_d, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Vectors of the tokens ``o_t`` of one head, zero where ``m_t`` is not set."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + i_h * stride_h + o_t[:, None].to(tl.int64) * stride_n + o_d[None, :] * stride_d
    return tl.load(p_x, mask=m_t[:, None] & (o_d < HEAD_SIZE)[None, :], other=0)


@triton.jit(do_not_specialize=["n", "m", "c", "n_key_tiles", "n_tiles"])
def tile_stats_kernel(
    key,
    value,
    query,
    before,
    tile_sum,
    tile_lse,
    scale,
    n,
    m,
    c,
    n_key_tiles,
    n_tiles,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_bn,
    stride_bh,
    stride_bd,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program holds one tile of a head: the first ``n_key_tiles`` of the segment, the others
    of what came before. It writes the sums of a segment's tile, ``[heads, n_key_tiles, 4]``, and
    the log-sum-exp over its keys of every query, ``[heads, n_tiles, GROUP * m]``."""
    i_h = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_inside = i_t < n_key_tiles
    i_first = i_t * BLOCK_T
    if m_inside:
        o_t = i_first + tl.arange(0, BLOCK_T)
        m_t = o_t < n
        b_key = _load(key, i_h, o_t, m_t, stride_kn, stride_kh, stride_kd, HEAD_SIZE, BLOCK_D)
        b_wide = b_key.to(tl.float32)
        b_last = _load(
            key,
            i_h,
            tl.maximum(o_t - 1, 0),
            m_t & (o_t > 0),
            stride_kn,
            stride_kh,
            stride_kd,
            HEAD_SIZE,
            BLOCK_D,
        ).to(tl.float32)
        b_value = _load(
            value, i_h, o_t, m_t, stride_vn, stride_vh, stride_vd, HEAD_SIZE, BLOCK_D
        ).to(tl.float32)
        b_square = tl.sum(b_wide * b_wide, 1)
        b_lengths = tl.sqrt(b_square) * tl.sqrt(tl.sum(b_last * b_last, 1))
        b_cosine = tl.sum(b_wide * b_last, 1) / tl.where(b_lengths == 0, 1.0, b_lengths)
        b_value_square = tl.sum(b_value * b_value, 1)
        p_sum = tile_sum + (i_h * n_key_tiles + i_t) * 4
        tl.store(p_sum, tl.sum(b_square, 0))
        tl.store(p_sum + 1, tl.sum(b_value_square, 0))
        tl.store(p_sum + 2, tl.sum(tl.sqrt(b_value_square), 0))
        tl.store(p_sum + 3, tl.sum(b_cosine, 0))
    else:
        i_first = (i_t - n_key_tiles) * BLOCK_T
        o_t = i_first + tl.arange(0, BLOCK_T)
        m_t = o_t < c
        b_key = _load(before, i_h, o_t, m_t, stride_bn, stride_bh, stride_bd, HEAD_SIZE, BLOCK_D)
    if query is not None:
        if WIDEN:
            b_key = b_key.to(tl.float32)
        for i_g in range(GROUP):
            p_query = query + (i_h * GROUP + i_g) * stride_qh
            p_lse = tile_lse + ((i_h * n_tiles + i_t) * GROUP + i_g) * m
            for i_q in range(0, m, BLOCK_Q):
                o_q = i_q + tl.arange(0, BLOCK_Q)
                m_q = o_q < m
                p_q = p_query + o_d[:, None] * stride_qd + o_q[None, :].to(tl.int64) * stride_qn
                m_load = (o_d < HEAD_SIZE)[:, None] & m_q[None, :]
                b_query = tl.load(p_q, mask=m_load, other=0)
                if WIDEN:
                    b_query = b_query.to(tl.float32)
                b_logit = tl.dot(b_key, b_query, input_precision="ieee") * scale
                # Everything before the segment is seen.
                o_seen_to = tl.where(m_inside, n - m + o_q, 2147483647)
                m_seen = m_t[:, None] & (o_t[:, None] <= o_seen_to[None, :])
                b_logit = tl.where(m_seen, b_logit, float("-inf"))
                b_max = tl.max(b_logit, 0)
                b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
                b_sum = tl.sum(tl.exp(b_logit - b_safe[None, :]), 0)
                m_none = b_sum == 0
                b_lse = b_safe + tl.log(tl.where(m_none, 1.0, b_sum))
                tl.store(p_lse + o_q, tl.where(m_none, float("-inf"), b_lse), mask=m_q)


@triton.jit
def _merged(p_lse, i_low, i_high, o_q, m_q, N_QUERIES, BLOCK_N: tl.constexpr):
    """Log-sum-exp of queries ``o_q`` over the tiles from ``i_low`` on, below ``i_high``."""
    b_max = tl.where(m_q, float("-inf"), float("-inf"))
    b_sum = tl.where(m_q, 0.0, 0.0)
    for i_n in range(i_low, i_high, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_lse = (o_n < i_high)[:, None] & m_q[None, :]
        p_tile = p_lse + o_n[:, None].to(tl.int64) * N_QUERIES + o_q[None, :]
        b_lse = tl.load(p_tile, mask=m_lse, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_safe) + tl.sum(tl.exp(b_lse - b_safe[None, :]), 0)
        b_max = b_new
    m_none = b_sum == 0
    b_lse = b_max + tl.log(tl.where(m_none, 1.0, b_sum))
    return tl.where(m_none, float("-inf"), b_lse)


@triton.jit(do_not_specialize=["n", "n_queries", "n_key_tiles", "n_tiles"])
def merge_stats_kernel(
    tile_sum,
    tile_lse,
    out,
    n,
    n_queries,
    n_key_tiles,
    n_tiles,
    HEAD_SIZE: tl.constexpr,
    OUTGOING: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Each program writes the measures of one head, in the order of their columns."""
    i_h = tl.program_id(0).to(tl.int64)
    b_key = tl.zeros([BLOCK_N], tl.float32)
    b_value = tl.zeros([BLOCK_N], tl.float32)
    b_norm = tl.zeros([BLOCK_N], tl.float32)
    b_cosine = tl.zeros([BLOCK_N], tl.float32)
    for i_n in range(0, n_key_tiles, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < n_key_tiles
        p_sum = tile_sum + (i_h * n_key_tiles + o_n) * 4
        b_key += tl.load(p_sum, mask=m_n, other=0)
        b_value += tl.load(p_sum + 1, mask=m_n, other=0)
        b_norm += tl.load(p_sum + 2, mask=m_n, other=0)
        b_cosine += tl.load(p_sum + 3, mask=m_n, other=0)
    b_count = tl.zeros([], tl.float32) + n
    b_elements = b_count * HEAD_SIZE
    b_length = tl.sqrt(tl.sum(b_value, 0))
    b_root = tl.sqrt(b_count)
    b_alike = tl.sum(b_norm, 0) / tl.where(b_length == 0, 1.0, b_length)
    b_pairs = b_count - 1
    b_sparsity = (b_root - b_alike) / tl.where(b_pairs > 0, b_root - 1, float("nan"))
    b_sparsity = tl.where((b_length == 0) & (b_pairs > 0), 0.0, b_sparsity)
    p_out = out + i_h * 5
    tl.store(p_out, tl.sqrt(tl.sum(b_key, 0) / b_elements))
    tl.store(p_out + 1, b_length / tl.sqrt(b_elements))
    tl.store(p_out + 2, b_sparsity)
    tl.store(p_out + 3, tl.sum(b_cosine, 0) / tl.where(b_pairs > 0, b_pairs, float("nan")))
    b_share = tl.zeros([BLOCK_Q], tl.float32)
    if OUTGOING and BEFORE:
        p_lse = tile_lse + i_h * n_tiles * n_queries
        for i_q in range(0, n_queries, BLOCK_Q):
            o_q = i_q + tl.arange(0, BLOCK_Q)
            m_q = o_q < n_queries
            b_inside = _merged(p_lse, 0, n_key_tiles, o_q, m_q, n_queries, BLOCK_N)
            b_outside = _merged(p_lse, n_key_tiles, n_tiles, o_q, m_q, n_queries, BLOCK_N)
            b_share += tl.where(m_q, 1 / (1 + tl.exp(b_inside - b_outside)), 0.0)
    b_outgoing = tl.sum(b_share, 0) / n_queries
    if not OUTGOING:
        b_outgoing = b_outgoing * 0 + float("nan")
    tl.store(p_out + 4, b_outgoing)


@checked(check_arguments)
def segment_stats_triton(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    before: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.segment_stats.segment_stats`."""
    n, heads, head_size = key.shape
    if n == 0:
        return torch.full((heads, 5), float("nan"), device=key.device)
    m = query.shape[0] if query is not None else 0
    group = query.shape[1] // heads if query is not None else 1
    c = before.shape[0] if before is not None else 0
    # Without queries, or without anything before, no logit is needed.
    logits = m > 0 and c > 0
    block_d = max(triton.next_power_of_2(head_size), 16)
    block_t = min(TILE_BYTES // (block_d * key.element_size()), MAX_TILE)
    block_t = max(min(block_t, triton.next_power_of_2(n)), 16)
    n_key_tiles = triton.cdiv(n, block_t)
    n_tiles = n_key_tiles + (triton.cdiv(c, block_t) if logits else 0)
    n_queries = group * m
    tile_sum = key.new_empty((heads, n_key_tiles, 4), dtype=torch.float32)
    tile_lse = None
    if logits:
        tile_lse = key.new_empty((heads, n_tiles, n_queries), dtype=torch.float32)
    asked = query if logits else None
    # Without logits no program reads what came before.
    earlier = before if logits and before is not None else key
    out = key.new_empty((heads, 5), dtype=torch.float32)
    with torch.cuda.device_of(key):
        tile_stats_kernel[(heads, n_tiles)](
            key,
            value,
            asked,
            earlier,
            tile_sum,
            tile_lse,
            # A Python float: an int would become an integer argument and another compiled kernel.
            float(scale),
            n,
            m,
            c,
            n_key_tiles,
            n_tiles,
            *key.stride(),
            *value.stride(),
            *(asked.stride() if asked is not None else (0, 0, 0)),
            *earlier.stride(),
            GROUP=group,
            HEAD_SIZE=head_size,
            BLOCK_T=block_t,
            BLOCK_Q=min(max(triton.next_power_of_2(m), 16), MAX_QUERY_TILE[key.dtype]),
            BLOCK_D=block_d,
            # Triton's interpreter multiplies the bits of a bfloat16 matrix as if integers.
            WIDEN=triton.knobs.runtime.interpret and key.dtype == torch.bfloat16,
        )
        merge_stats_kernel[(heads,)](
            tile_sum,
            tile_lse,
            out,
            n,
            n_queries,
            n_key_tiles,
            n_tiles,
            HEAD_SIZE=head_size,
            OUTGOING=m > 0,
            BEFORE=c > 0,
            BLOCK_N=16,
            BLOCK_Q=min(max(triton.next_power_of_2(max(n_queries, 1)), 16), 64),
        )
    return out
