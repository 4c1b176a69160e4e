"""Attention mass as two Triton launches: log-sum-exp over a split of the keys, then the mass."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..splits import tokens_of_split
from ..tiles import cap_logits, load_tokens
from .naive import check_arguments

KEY_BYTES = 16384
"""Keys of a tile: three of them in flight beside the queries leave room for two programs on a
multiprocessor."""
MAX_TILE = 128
# A float32 product runs outside the tensor cores, in registers: a wider tile spills.
MAX_QUERIES = {torch.float32: 16, torch.float16: 256, torch.bfloat16: 256}
STAGES = 3
LOG2_E = 1.4426950408889634


@triton.jit
def _load_queries(
    query,
    query_positions,
    i_r,
    i_h,
    i_tile,
    n_resident,
    stride_qr,
    stride_qw,
    stride_qh,
    stride_pr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of the queries of one row and KV head, ``[BLOCK_G * BLOCK_W, BLOCK_D]``; the last
    position each of them sees, which of them exist, and which of those are no padding; their index
    among the row's. A tile's queries lie head by head."""
    o_q = tl.arange(0, BLOCK_G * BLOCK_W)
    n_windows: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    o_g = i_tile // n_windows * BLOCK_G + o_q // BLOCK_W
    o_w = i_tile % n_windows * BLOCK_W + o_q % BLOCK_W
    m_is = (o_g < GROUP) & (o_w < W)
    b_seen_by = n_resident - W + o_w
    if query_positions is not None:
        b_seen_by = tl.load(query_positions + i_r * stride_pr + o_w, mask=m_is, other=-1)
    m_q = m_is & (b_seen_by >= 0)
    o_d = tl.arange(0, BLOCK_D)
    p_query = query + i_r * stride_qr + (i_h * GROUP + o_g).to(tl.int64) * stride_qh
    p_query = p_query + o_w.to(tl.int64) * stride_qw
    m_query = m_q[:, None] & (o_d < HEAD_SIZE)[None, :]
    b_query = tl.load(p_query[:, None] + o_d[None, :], mask=m_query, other=0)
    if WIDEN:
        b_query = b_query.to(tl.float32)
    o_index = (i_h * GROUP + o_g) * W + o_w
    return b_query, b_seen_by, m_is, m_q, o_index


@triton.jit
def _load_keys(
    key_cache,
    p_table,
    key_positions,
    i_r,
    i_h,
    o_t,
    m_t,
    stride_cb,
    stride_ch,
    stride_ct,
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
        p_table,
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
def _scaled(b_logit, scale, softcap, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr):
    """Logits of products, times log2(e): weights are powers of two of them."""
    b_logit = b_logit * scale
    if SOFTCAP:
        b_logit = cap_logits(b_logit, softcap)
    return b_logit * LOG2_E


@triton.jit
def _merged(b_max, b_sum, b_more):
    """Running maximum and sum beside it, with more logits ``[queries, n]``."""
    b_new = tl.maximum(b_max, tl.max(b_more, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_more - b_safe[:, None]), 1)
    return b_new, b_sum


@triton.jit
def _log_sum(b_max, b_sum):
    """Base-2 log-sum-exp from a maximum and the sum beside it, -inf where nothing was summed."""
    m_any = b_sum > 0
    return tl.where(m_any, b_max + tl.log2(tl.where(m_any, b_sum, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["limit", "n_splits", "n_split", "stride_br"])
def split_lse_kernel(
    query,
    key_cache,
    block_table,
    lens,
    key_positions,
    query_positions,
    split_lse,
    scale,
    softcap,
    limit,
    n_splits,
    n_split,
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
    LOG2_E: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program reads ``n_split`` keys of a row and head, and writes the base-2 log-sum-exp over
    them of every query, ``[rows, n_splits, heads, W]``. Splits beyond the resident tokens stay
    unwritten."""
    i_p = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    i_first = i_s * n_split
    i_end = tl.minimum(i_first + n_split, n_resident)
    if i_first < n_resident:
        for i_tile in range(TILES):
            b_query, b_seen_by, m_is, m_q, o_index = _load_queries(
                query,
                query_positions,
                i_r,
                i_h,
                i_tile,
                n_resident,
                stride_qr,
                stride_qw,
                stride_qh,
                stride_pr,
                GROUP,
                W,
                HEAD_SIZE,
                BLOCK_G,
                BLOCK_W,
                BLOCK_D,
                WIDEN,
            )
            b_max = tl.full([BLOCK_G * BLOCK_W], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK_G * BLOCK_W], tl.float32)
            for i_t in tl.range(i_first, i_end, BLOCK_T, num_stages=STAGES):
                o_t = i_t + tl.arange(0, BLOCK_T)
                m_t = o_t < i_end
                b_key, b_position = _load_keys(
                    key_cache,
                    block_table + i_r * stride_br,
                    key_positions,
                    i_r,
                    i_h,
                    o_t,
                    m_t,
                    stride_cb,
                    stride_ch,
                    stride_ct,
                    stride_kr,
                    stride_kh,
                    BLOCK_SIZE,
                    HEAD_SIZE,
                    BLOCK_D,
                    WIDEN,
                )
                b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
                b_logit = _scaled(b_logit, scale, softcap, SOFTCAP, LOG2_E)
                m_seen = m_t[None, :] & m_q[:, None] & (b_position[None, :] <= b_seen_by[:, None])
                b_logit = tl.where(m_seen, b_logit, float("-inf"))
                b_max, b_sum = _merged(b_max, b_sum, b_logit)
            p_lse = split_lse + (i_r * n_splits + i_s) * (KV_HEADS * GROUP * W)
            tl.store(p_lse + o_index, _log_sum(b_max, b_sum), mask=m_is)


@triton.jit(do_not_specialize=["limit", "max_len", "n_splits", "n_split", "stride_br"])
def mass_kernel(
    query,
    key_cache,
    block_table,
    lens,
    key_positions,
    query_positions,
    split_lse,
    out,
    scale,
    softcap,
    limit,
    max_len,
    n_splits,
    n_split,
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
    MAX: tl.constexpr,
    LOG2_E: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program merges the splits of every query of a row and KV head, reads ``n_split`` keys
    again and sums the weights of the queries of each query head, or takes
    the largest."""
    i_p = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    N_QUERIES: tl.constexpr = KV_HEADS * GROUP * W
    n_windows: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    n_resident = tl.maximum(tl.minimum(tl.load(lens + i_r), limit), 0)
    n_live = (n_resident + n_split - 1) // n_split
    i_first = i_s * n_split
    i_end = tl.minimum(i_first + n_split, n_resident)
    i_zero = tl.maximum(i_first, n_resident) // BLOCK_T * BLOCK_T
    for i_tile in range(TILES):
        if n_windows > 1:
            # Another thread may have written the sums that this tile adds to.
            tl.debug_barrier()
        o_g = i_tile // n_windows * BLOCK_G + tl.arange(0, BLOCK_G)
        p_out = out + i_r * stride_or + (i_h * GROUP + o_g).to(tl.int64)[None, :] * stride_oh
        m_g = (o_g < GROUP)[None, :]
        if i_first < n_resident:
            b_query, b_seen_by, m_is, m_q, o_index = _load_queries(
                query,
                query_positions,
                i_r,
                i_h,
                i_tile,
                n_resident,
                stride_qr,
                stride_qw,
                stride_qh,
                stride_pr,
                GROUP,
                W,
                HEAD_SIZE,
                BLOCK_G,
                BLOCK_W,
                BLOCK_D,
                WIDEN,
            )
            b_max = tl.full([BLOCK_G * BLOCK_W], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK_G * BLOCK_W], tl.float32)
            p_lse = split_lse + i_r * n_splits * N_QUERIES + o_index
            for i_n in range(0, n_live, BLOCK_S):
                o_n = i_n + tl.arange(0, BLOCK_S)
                p_split = p_lse[:, None] + o_n[None, :].to(tl.int64) * N_QUERIES
                m_split = m_is[:, None] & (o_n < n_live)[None, :]
                b_lse = tl.load(p_split, mask=m_split, other=float("-inf"))
                b_max, b_sum = _merged(b_max, b_sum, b_lse)
            b_lse = _log_sum(b_max, b_sum)
            # Only queries that see nothing have -inf, and none of their keys is seen.
            b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
            for i_t in tl.range(i_first, i_end, BLOCK_T, num_stages=STAGES):
                o_t = i_t + tl.arange(0, BLOCK_T)
                m_t = o_t < i_end
                b_key, b_position = _load_keys(
                    key_cache,
                    block_table + i_r * stride_br,
                    key_positions,
                    i_r,
                    i_h,
                    o_t,
                    m_t,
                    stride_cb,
                    stride_ch,
                    stride_ct,
                    stride_kr,
                    stride_kh,
                    BLOCK_SIZE,
                    HEAD_SIZE,
                    BLOCK_D,
                    WIDEN,
                )
                b_logit = tl.dot(b_key, tl.trans(b_query), input_precision="ieee")
                b_logit = _scaled(b_logit, scale, softcap, SOFTCAP, LOG2_E) - b_lse[None, :]
                m_seen = m_t[:, None] & m_q[None, :] & (b_position[:, None] <= b_seen_by[None, :])
                b_weight = tl.exp2(tl.where(m_seen, b_logit, float("-inf")))
                b_weight = tl.reshape(b_weight, [BLOCK_T, BLOCK_G, BLOCK_W])
                m_out = (o_t < max_len)[:, None] & m_g
                m_more = m_out & (i_tile % n_windows > 0)
                if MAX:
                    b_mass = tl.max(b_weight, 2)
                    if n_windows > 1:
                        b_before = tl.load(p_out + o_t[:, None], mask=m_more, other=0)
                        b_mass = tl.maximum(b_mass, b_before)
                else:
                    b_mass = tl.sum(b_weight, 2)
                    if n_windows > 1:
                        b_mass += tl.load(p_out + o_t[:, None], mask=m_more, other=0)
                tl.store(p_out + o_t[:, None], b_mass, mask=m_out)
        if i_tile % n_windows == 0:
            for i_t in range(i_zero, tl.minimum(i_first + n_split, max_len), BLOCK_T):
                o_t = i_t + tl.arange(0, BLOCK_T)
                m_out = ((o_t >= n_resident) & (o_t < max_len))[:, None] & m_g
                tl.store(p_out + o_t[:, None], tl.zeros([BLOCK_T, BLOCK_G], tl.float32), mask=m_out)


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
    how: Literal["sum", "max"] = "sum",
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

    group = num_heads // kv_heads
    most = MAX_QUERIES[query.dtype]
    block_w = min(triton.next_power_of_2(w), most)
    block_g = max(min(triton.next_power_of_2(group), most // block_w), 16 // block_w, 1)
    tiles = triton.cdiv(group, block_g) * triton.cdiv(w, block_w)
    block_d = max(triton.next_power_of_2(head_size), 16)
    block_t = min(KEY_BYTES // (block_d * key_cache.element_size()), MAX_TILE)
    block_t = max(min(block_t, triton.next_power_of_2(max_len)), 16)
    n_split = tokens_of_split(rows * kv_heads, max_len, block_t, query.device)
    # The keys' splits, then those of the rest of the output, where there is nothing but zeros.
    n_splits = max(triton.cdiv(limit, n_split), 1)
    split_lse = query.new_empty((rows, n_splits, num_heads, w), dtype=torch.float32)
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
        "LOG2_E": LOG2_E,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "W": w,
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "TILES": tiles,
        "BLOCK_T": block_t,
        "BLOCK_G": block_g,
        "BLOCK_W": block_w,
        "BLOCK_D": block_d,
        "STAGES": STAGES,
        # Triton's interpreter multiplies the bits of a bfloat16 matrix as if they were integers.
        "WIDEN": triton.knobs.runtime.interpret and key_cache.dtype == torch.bfloat16,
        "num_warps": 8 if block_g * block_w > 128 else 4,
    }
    # Python floats: an int would become an integer argument and another compiled kernel.
    scale, softcap = float(scale), float(softcap)
    with torch.cuda.device_of(key_cache):
        split_lse_kernel[(rows * kv_heads, n_splits)](
            *inputs, split_lse, scale, softcap, limit, n_splits, n_split, *strides, **constants
        )
        mass_kernel[(rows * kv_heads, triton.cdiv(max_len, n_split))](
            *inputs,
            split_lse,
            out,
            scale,
            softcap,
            limit,
            max_len,
            n_splits,
            n_split,
            *strides,
            out.stride(0),
            out.stride(1),
            MAX=how == "max",
            BLOCK_S=16,
            **constants,
        )
    return out
