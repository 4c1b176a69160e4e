"""Attention mass as three Triton launches: log-sum-exp by tile, over the tiles, then the mass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..tiles import cap_logits, load_tokens
from .naive import check_arguments

TILE_BYTES = 32768
MAX_TILE = 128
# A float32 product runs outside the tensor cores, in registers: a wider tile spills.
MAX_WINDOW_TILE = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}


@triton.jit
def _load_keys(
    key_cache,
    block_table,
    key_positions,
    i_r,
    i_h,
    o_t,
    m_t,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_br,
    stride_kr,
    stride_kh,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Keys of the resident tokens ``o_t`` of one row and head, zero where ``m_t`` is not set, and
    their text positions."""
    b_key = load_tokens(
        key_cache,
        block_table + i_r * stride_br,
        i_h,
        o_t,
        m_t,
        stride_cb,
        stride_ch,
        stride_ct,
        BLOCK_SIZE,
        HEAD_SIZE,
        BLOCK_D,
    )
    if WIDEN:
        b_key = b_key.to(tl.float32)
    b_position = o_t
    if key_positions is not None:
        p_position = key_positions + i_r * stride_kr + i_h * stride_kh
        b_position = tl.load(p_position + o_t, mask=m_t, other=0)
    return b_key, b_position


@triton.jit
def _window_logits(
    b_key,
    b_position,
    m_t,
    p_query,
    query_positions,
    i_r,
    o_w,
    n_resident,
    stride_qw,
    stride_pr,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Logits ``[keys, queries]`` of a tile of keys against the queries ``o_w`` of one head's
    window, which of them are visible, and which queries are no padding."""
    m_w = o_w < W
    b_seen_by = n_resident - W + o_w
    if query_positions is not None:
        b_seen_by = tl.load(query_positions + i_r * stride_pr + o_w, mask=m_w, other=-1)
    m_q = m_w & (b_seen_by >= 0)
    o_d = tl.arange(0, BLOCK_D)
    m_query = (o_d < HEAD_SIZE)[:, None] & m_q[None, :]
    p_query = p_query + o_w[None, :].to(tl.int64) * stride_qw + o_d[:, None]
    b_query = tl.load(p_query, mask=m_query, other=0)
    if WIDEN:
        b_query = b_query.to(tl.float32)
    b_logit = tl.dot(b_key, b_query, input_precision="ieee") * scale
    if SOFTCAP:
        b_logit = cap_logits(b_logit, softcap)
    m_seen = m_t[:, None] & m_q[None, :] & (b_position[:, None] <= b_seen_by[None, :])
    return b_logit, m_seen, m_q


@triton.jit
def _log_sum(b_max, b_sum):
    """Log-sum-exp from a maximum and the sum beside it, -inf where nothing was summed."""
    m_any = b_sum > 0
    return tl.where(m_any, b_max + tl.log(tl.where(m_any, b_sum, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["limit", "n_tiles", "stride_br"])
def tile_lse_kernel(
    query,
    key_cache,
    block_table,
    lens,
    key_positions,
    query_positions,
    tile_lse,
    scale,
    softcap,
    limit,
    n_tiles,
    stride_qr,
    stride_qw,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_br,
    stride_kr,
    stride_kh,
    stride_pr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program holds one tile of keys of a row and head, and writes the log-sum-exp over it
    of every query, ``[rows, n_tiles, heads, W]``. Tiles beyond the resident tokens stay
    unwritten."""
    i_p = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    if i_t * BLOCK_T < n_resident:
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < n_resident
        b_key, b_position = _load_keys(
            key_cache,
            block_table,
            key_positions,
            i_r,
            i_h,
            o_t,
            m_t,
            stride_cb,
            stride_ch,
            stride_ct,
            stride_br,
            stride_kr,
            stride_kh,
            BLOCK_SIZE,
            HEAD_SIZE,
            BLOCK_D,
            WIDEN,
        )
        for i_g in range(GROUP):
            i_q = i_h * GROUP + i_g
            p_query = query + i_r * stride_qr + i_q * stride_qh
            p_lse = tile_lse + ((i_r * n_tiles + i_t) * (KV_HEADS * GROUP) + i_q) * W
            for i_w in range(0, W, BLOCK_W):
                o_w = i_w + tl.arange(0, BLOCK_W)
                b_logit, m_seen, _ = _window_logits(
                    b_key,
                    b_position,
                    m_t,
                    p_query,
                    query_positions,
                    i_r,
                    o_w,
                    n_resident,
                    stride_qw,
                    stride_pr,
                    scale,
                    softcap,
                    SOFTCAP,
                    W,
                    HEAD_SIZE,
                    BLOCK_D,
                    WIDEN,
                )
                b_logit = tl.where(m_seen, b_logit, float("-inf"))
                b_max = tl.max(b_logit, 0)
                b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
                b_sum = tl.sum(tl.exp(b_logit - b_max[None, :]), 0)
                tl.store(p_lse + o_w, _log_sum(b_max, b_sum), mask=o_w < W)


@triton.jit(do_not_specialize=["limit", "n_tiles", "n_blocks"])
def merge_lse_kernel(
    tile_lse,
    lens,
    lse,
    limit,
    n_tiles,
    n_blocks,
    N_QUERIES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Each program merges the tiles' log-sum-exps of BLOCK_Q queries of one row."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_b = i_p // n_blocks, i_p % n_blocks
    o_q = i_b * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < N_QUERIES
    n_resident = tl.maximum(tl.minimum(tl.load(lens + i_r), limit), 0)
    n_live = (n_resident + BLOCK_T - 1) // BLOCK_T
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    for i_n in range(0, n_live, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        p_lse = tile_lse + (i_r * n_tiles + o_n[:, None]) * N_QUERIES + o_q[None, :]
        m_lse = (o_n < n_live)[:, None] & m_q[None, :]
        b_lse = tl.load(p_lse, mask=m_lse, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_safe) + tl.sum(tl.exp(b_lse - b_safe[None, :]), 0)
        b_max = b_new
    tl.store(lse + i_r * N_QUERIES + o_q, _log_sum(b_max, b_sum), mask=m_q)


@triton.jit(do_not_specialize=["limit", "max_len", "stride_br"])
def mass_kernel(
    query,
    key_cache,
    block_table,
    lens,
    key_positions,
    query_positions,
    lse,
    out,
    scale,
    softcap,
    limit,
    max_len,
    stride_qr,
    stride_qw,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_br,
    stride_kr,
    stride_kh,
    stride_pr,
    stride_or,
    stride_oh,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program holds one tile of keys of a row and head, and sums the weights of the queries
    of each query head that reads it."""
    i_p = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_out = o_t < max_len
    p_out = out + i_r * stride_or + o_t
    if i_t * BLOCK_T < n_resident:
        m_t = o_t < n_resident
        b_key, b_position = _load_keys(
            key_cache,
            block_table,
            key_positions,
            i_r,
            i_h,
            o_t,
            m_t,
            stride_cb,
            stride_ch,
            stride_ct,
            stride_br,
            stride_kr,
            stride_kh,
            BLOCK_SIZE,
            HEAD_SIZE,
            BLOCK_D,
            WIDEN,
        )
        for i_g in range(GROUP):
            i_q = i_h * GROUP + i_g
            p_query = query + i_r * stride_qr + i_q * stride_qh
            p_lse = lse + (i_r * (KV_HEADS * GROUP) + i_q) * W
            b_mass = tl.zeros([BLOCK_T], tl.float32)
            for i_w in range(0, W, BLOCK_W):
                o_w = i_w + tl.arange(0, BLOCK_W)
                b_logit, m_seen, m_q = _window_logits(
                    b_key,
                    b_position,
                    m_t,
                    p_query,
                    query_positions,
                    i_r,
                    o_w,
                    n_resident,
                    stride_qw,
                    stride_pr,
                    scale,
                    softcap,
                    SOFTCAP,
                    W,
                    HEAD_SIZE,
                    BLOCK_D,
                    WIDEN,
                )
                b_lse = tl.load(p_lse + o_w, mask=m_q, other=0)
                # Only queries that see nothing have -inf, and none of their keys is seen.
                b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
                b_logit = tl.where(m_seen, b_logit - b_lse[None, :], float("-inf"))
                b_mass += tl.sum(tl.exp(b_logit), 1)
            tl.store(p_out + i_q * stride_oh, b_mass, mask=m_out)
    else:
        for i_g in range(GROUP):
            i_q = i_h * GROUP + i_g
            tl.store(p_out + i_q * stride_oh, tl.zeros([BLOCK_T], tl.float32), mask=m_out)


@checked(check_arguments)
def attention_mass_triton(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.attention_mass.attention_mass`."""
    rows, w, num_heads, head_size = query.shape
    _, kv_heads, block_size, _ = key_cache.shape
    capacity = block_table.shape[1] * block_size
    if out is None:
        out = query.new_empty((rows, num_heads, capacity), dtype=torch.float32)
    max_len = out.shape[2]
    limit = min(capacity, max_len)
    if w == 0:
        out.zero_()
    if out.numel() == 0 or w == 0:
        return out

    block_d = max(triton.next_power_of_2(head_size), 16)
    block_t = min(TILE_BYTES // (block_d * key_cache.element_size()), MAX_TILE)
    block_t = max(min(block_t, triton.next_power_of_2(max_len)), 16)
    n_tiles = max(triton.cdiv(limit, block_t), 1)
    n_queries = num_heads * w
    block_q = min(triton.next_power_of_2(n_queries), 64)
    n_blocks = triton.cdiv(n_queries, block_q)
    tile_lse = query.new_empty((rows, n_tiles, num_heads, w), dtype=torch.float32)
    lse = query.new_empty((rows, num_heads, w), dtype=torch.float32)
    strides = (
        *query.stride()[:3],
        *key_cache.stride()[:3],
        block_table.stride(0),
        *((0, 0) if key_positions is None else key_positions.stride()[:2]),
        0 if query_positions is None else query_positions.stride(0),
    )
    inputs = (query, key_cache, block_table, lens, key_positions, query_positions)
    constants = {
        "SOFTCAP": softcap > 0,
        "KV_HEADS": kv_heads,
        "GROUP": num_heads // kv_heads,
        "W": w,
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "BLOCK_T": block_t,
        "BLOCK_W": max(min(triton.next_power_of_2(w), MAX_WINDOW_TILE[query.dtype]), 16),
        "BLOCK_D": block_d,
        # Triton's interpreter multiplies the bits of a bfloat16 matrix as if they were integers.
        "WIDEN": triton.knobs.runtime.interpret and key_cache.dtype == torch.bfloat16,
    }
    # Python floats: an int would become an integer argument and another compiled kernel.
    scale, softcap = float(scale), float(softcap)
    with torch.cuda.device_of(key_cache):
        tile_lse_kernel[(rows * kv_heads, n_tiles)](
            *inputs, tile_lse, scale, softcap, limit, n_tiles, *strides, **constants
        )
        merge_lse_kernel[(rows * n_blocks,)](
            tile_lse,
            lens,
            lse,
            limit,
            n_tiles,
            n_blocks,
            N_QUERIES=n_queries,
            BLOCK_T=block_t,
            BLOCK_N=16,
            BLOCK_Q=block_q,
        )
        mass_kernel[(rows * kv_heads, triton.cdiv(max_len, block_t))](
            *inputs,
            lse,
            out,
            scale,
            softcap,
            limit,
            max_len,
            *strides,
            out.stride(0),
            out.stride(1),
            **constants,
        )
    return out
