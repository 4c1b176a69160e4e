"""Exact attention among the tokens of one step, and the merge, as one Triton launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import attention_outputs, checked
from ..tiles import cap_logits
from .naive import check_exact, check_merge

MERGE_TILE = 16


@triton.jit
def _step(
    b_query,
    p_key,
    p_value,
    m_t,
    m_seen,
    b_max,
    b_norm,
    b_sum,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Take a tile of keys and values into the running softmax."""
    o_d = tl.arange(0, BLOCK_D)
    m = m_t[:, None] & (o_d < HEAD_SIZE)[None, :]
    b_key = tl.load(p_key[:, None] + o_d[None, :], mask=m, other=0).to(DTYPE)
    b_value = tl.load(p_value[:, None] + o_d[None, :], mask=m, other=0).to(DTYPE)
    b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
    if SOFTCAP:
        b_logit = cap_logits(b_logit, softcap)
    b_logit = tl.where(m_seen, b_logit, float("-inf"))
    b_top = tl.maximum(b_max, tl.max(b_logit, 1))
    # A query that has seen nothing yet has no maximum to take off.
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_weight = tl.exp(b_logit - b_base[:, None])
    b_shrink = tl.exp(b_max - b_base)
    b_norm = b_norm * b_shrink + tl.sum(b_weight, 1)
    b_sum = b_sum * b_shrink[:, None]
    b_sum = tl.dot(b_weight.to(DTYPE), b_value, b_sum, input_precision="ieee")
    return b_top, b_norm, b_sum


@triton.jit(do_not_specialize=["recent_size", "n_tokens"])
def attend_exact_kernel(
    query,
    key,
    value,
    query_start,
    recent_key,
    recent_value,
    recent_slots,
    recent_lens,
    out,
    lse,
    scale,
    softcap,
    recent_size,
    n_tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_rkl,
    stride_rkt,
    stride_rkh,
    stride_rvl,
    stride_rvt,
    stride_rvh,
    KV_HEADS: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    RECENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program attends a tile of one row's queries of the heads that read one KV head. The last
    row's first also fill in the tokens behind it, which see nothing."""
    DTYPE: tl.constexpr = tl.float32 if WIDEN else query.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    i_first = tl.load(query_start + i_r).to(tl.int64)
    n_query = (tl.load(query_start + i_r + 1) - i_first).to(tl.int32)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_query = o_m // QUERY_GROUP
    m_m = o_query < n_query
    o_token = i_first + o_query
    o_head = i_h * QUERY_GROUP + o_m % QUERY_GROUP
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_m[:, None] & (o_d < HEAD_SIZE)[None, :]
    p_query = query + o_token * stride_qt + o_head * stride_qh
    b_query = tl.load(p_query[:, None] + o_d[None, :], mask=m_q, other=0).to(DTYPE)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_norm = tl.zeros([BLOCK_M], tl.float32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_last = tl.where(m_m, o_query, -1)
    n_end = tl.max(b_last, 0) + 1
    if RECENT:
        n_recent = tl.minimum(tl.load(recent_lens + i_r), recent_size)
        i_slot = tl.load(recent_slots + i_r).to(tl.int64)
        p_key = recent_key + i_slot * stride_rkl + i_h * stride_rkh
        p_value = recent_value + i_slot * stride_rvl + i_h * stride_rvh
        # A tile without queries has nothing to read.
        n_recent = tl.where(n_end > 0, n_recent, 0)
        for i_t in range(0, n_recent, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = o_t < n_recent
            b_max, b_norm, b_sum = _step(
                b_query,
                p_key + o_t * stride_rkt,
                p_value + o_t * stride_rvt,
                m_t,
                m_m[:, None] & m_t[None, :],
                b_max,
                b_norm,
                b_sum,
                scale,
                softcap,
                SOFTCAP,
                HEAD_SIZE,
                BLOCK_D,
                DTYPE,
            )
    p_own_key = key + i_first * stride_kt + i_h * stride_kh
    p_own_value = value + i_first * stride_vt + i_h * stride_vh
    for i_t in range(0, n_end, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        b_max, b_norm, b_sum = _step(
            b_query,
            p_own_key + o_t.to(tl.int64) * stride_kt,
            p_own_value + o_t.to(tl.int64) * stride_vt,
            o_t < n_query,
            o_t[None, :] <= b_last[:, None],
            b_max,
            b_norm,
            b_sum,
            scale,
            softcap,
            SOFTCAP,
            HEAD_SIZE,
            BLOCK_D,
            DTYPE,
        )
    m_any = b_norm != 0  # NaN is a norm, too
    b_norm = tl.where(m_any, b_norm, 1.0)
    o_out = o_token * (KV_HEADS * QUERY_GROUP) + o_head
    b_lse = tl.where(m_any, b_max + tl.log(b_norm), float("-inf"))
    tl.store(lse + o_out, b_lse, mask=m_m)
    p_out = out + o_out[:, None] * HEAD_SIZE + o_d[None, :]
    tl.store(p_out, b_sum / b_norm[:, None], mask=m_q)

    n_rows = tl.num_programs(0) // KV_HEADS
    if (i_r == n_rows - 1) & (tl.program_id(1) == 0):
        o_g = tl.arange(0, BLOCK_G)
        m_g = o_g < QUERY_GROUP
        m_rest = m_g[:, None] & (o_d < HEAD_SIZE)[None, :]
        for i_t in range(tl.load(query_start + n_rows), n_tokens):
            o_rest = ((tl.zeros([BLOCK_G], tl.int64) + i_t) * KV_HEADS + i_h) * QUERY_GROUP + o_g
            tl.store(lse + o_rest, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=m_g)
            p_rest = out + o_rest[:, None] * HEAD_SIZE + o_d[None, :]
            tl.store(p_rest, tl.zeros([BLOCK_G, BLOCK_D], tl.float32), mask=m_rest)


@triton.jit(do_not_specialize=["n_pairs"])
def merge_attention_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    n_pairs,
    stride_at,
    stride_ah,
    stride_lat,
    stride_lah,
    stride_bt,
    stride_bh,
    stride_lbt,
    stride_lbh,
    stride_ot,
    stride_oh,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program merges a tile of tokens and heads."""
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    m_p = o_p < n_pairs
    o_token, o_head = o_p // HEADS, o_p % HEADS
    p_lse_a = lse_a + o_token * stride_lat + o_head * stride_lah
    p_lse_b = lse_b + o_token * stride_lbt + o_head * stride_lbh
    b_lse_a = tl.load(p_lse_a, mask=m_p, other=float("-inf"))
    b_lse_b = tl.load(p_lse_b, mask=m_p, other=float("-inf"))
    b_top = tl.maximum(b_lse_a, b_lse_b)
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_a, b_b = tl.exp(b_lse_a - b_base), tl.exp(b_lse_b - b_base)
    b_norm = b_a + b_b
    b_norm = tl.where(b_norm > 0, b_norm, 1.0)
    m = m_p[:, None] & (o_d < HEAD_SIZE)[None, :]
    p_a = out_a + o_token * stride_at + o_head * stride_ah
    p_b = out_b + o_token * stride_bt + o_head * stride_bh
    b_out_a = tl.load(p_a[:, None] + o_d[None, :], mask=m & (b_a > 0)[:, None], other=0)
    b_out_b = tl.load(p_b[:, None] + o_d[None, :], mask=m & (b_b > 0)[:, None], other=0)
    b_out = b_out_a * (b_a / b_norm)[:, None] + b_out_b * (b_b / b_norm)[:, None]
    p_out = out + o_token * stride_ot + o_head * stride_oh
    tl.store(p_out[:, None] + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m)


@checked(check_exact)
def attend_exact_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    max_query_len: int,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_lens: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.attend_exact.attend_exact`."""
    tokens, num_heads, head_size = query.shape
    kv_heads, rows = key.shape[1], query_start.shape[0] - 1
    out, lse = attention_outputs(query, head_size, out, lse)
    if tokens == 0 or rows == 0 or max_query_len == 0 or head_size == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return out, lse
    wide = query.dtype == torch.float32
    group = num_heads // kv_heads
    block_d = max(triton.next_power_of_2(head_size), 16)
    n_queries = max_query_len * group
    block_m = min(max(triton.next_power_of_2(n_queries), 16), 16 if wide else 64)
    size = 0 if recent_key is None else recent_key.shape[1]
    longest = max(max_query_len, size)
    block_t = min(max(triton.next_power_of_2(longest), 16), 32 if wide or block_d > 128 else 64)
    old_key = key if recent_key is None else recent_key
    old_value = value if recent_value is None else recent_value
    has_recent = size > 0 and old_key.shape[0] > 0
    with torch.cuda.device_of(query):
        attend_exact_kernel[(rows * kv_heads, triton.cdiv(n_queries, block_m))](
            query,
            key,
            value,
            query_start,
            old_key,
            old_value,
            query_start if recent_slots is None else recent_slots,
            query_start if recent_lens is None else recent_lens,
            out,
            lse,
            # Python floats: an int would become an integer argument and another compiled kernel.
            float(scale),
            float(softcap),
            size,
            tokens,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *(old_key.stride()[:3] if has_recent else (0, 0, 0)),
            *(old_value.stride()[:3] if has_recent else (0, 0, 0)),
            KV_HEADS=kv_heads,
            QUERY_GROUP=group,
            HEAD_SIZE=head_size,
            RECENT=has_recent,
            SOFTCAP=softcap > 0,
            BLOCK_M=block_m,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_G=triton.next_power_of_2(group),
            # Triton's interpreter multiplies the bits of a bfloat16 matrix as integers.
            WIDEN=triton.knobs.runtime.interpret and query.dtype == torch.bfloat16,
        )
    return out, lse


@checked(check_merge)
def merge_attention_triton(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.attend_exact.merge_attention`."""
    tokens, num_heads, head_size = out.shape
    pairs = tokens * num_heads
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):
        merge_attention_kernel[(triton.cdiv(pairs, MERGE_TILE),)](
            out_a,
            lse_a,
            out_b,
            lse_b,
            out,
            pairs,
            *out_a.stride()[:2],
            *lse_a.stride(),
            *out_b.stride()[:2],
            *lse_b.stride(),
            *out.stride()[:2],
            HEADS=num_heads,
            HEAD_SIZE=head_size,
            BLOCK_P=MERGE_TILE,
            BLOCK_D=triton.next_power_of_2(head_size),
        )
    return out
