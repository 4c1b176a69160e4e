"""Attention over coded pages as two Triton launches: partial sums by split, then their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import attention_outputs, checked
from ..coding import KINDS, CodedPage, Coding
from ..splits import multiprocessors
from ..tiles import cap_logits, e4m3_over_256, element_codes
from .naive import WEIGHT_TILE, check_arguments
from .planes import attend_planes, planes_fit

MAX_SPLITS = 64
WAVES = 4
"""Programs wanted for each multiprocessor: as many as hide each other's waits for memory."""
INT = tl.constexpr(0)
FP8 = tl.constexpr(1)
CODEBOOK = tl.constexpr(2)
PLAIN = tl.constexpr(3)


@triton.jit
def _numbers(b_code, levels, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers that codes stand for before scale and zero; 8-bit ``int`` codes less 128, to be
    signed."""
    if KIND == FP8:
        return e4m3_over_256(b_code).to(DTYPE)
    elif KIND == CODEBOOK:
        # A few dozen bytes that every program reads: they stay in the nearest cache.
        return tl.load(levels + b_code).to(DTYPE)
    elif BITS == 8:
        return (b_code - 128).to(tl.int8).to(DTYPE)
    else:
        return b_code.to(tl.int8).to(DTYPE)


@triton.jit
def _affine(
    p_at,
    m,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Scale and zero of `_numbers`; ``p_at`` is where they lie within their planes."""
    b_scale = tl.load(p_at + BLOCK_SIZE * SCALE // 2, mask=m, other=0).to(tl.float32)
    b_zero = tl.zeros_like(b_scale)
    if KIND == INT:
        b_zero = tl.load(p_at + BLOCK_SIZE * ZERO // 2, mask=m, other=0).to(tl.float32)
        if BITS == 8:
            b_zero += 128 * b_scale
    elif KIND == FP8:
        b_scale *= 256
    return b_scale, b_zero


@triton.jit
def _vectors(
    p_page,
    p_halves,
    p_elements,
    levels,
    o_t,
    m_t,
    o_d,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    OUTLIER_CODES: tl.constexpr,
    OUTLIER_SCALE: tl.constexpr,
    OUTLIER_ZERO: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Decoded vectors ``[tokens, channels]`` of places ``o_t`` of pages, in registers. Zero where
    ``m_t`` is not set and beyond the width."""
    m_d = (o_d < WIDTH)[None, :]
    if KIND == PLAIN:
        UNIT: tl.constexpr = BITS // 8
        p_at = p_elements + BLOCK_SIZE * CODES // UNIT + o_t * WIDTH
        return tl.load(p_at[:, None] + o_d[None, :], mask=m_t[:, None] & m_d, other=0).to(DTYPE)
    else:
        INNER: tl.constexpr = WIDTH - OUTLIERS
        m_in = m_d & (o_d >= OUTLIERS)[None, :]
        o_in = tl.maximum(o_d - OUTLIERS, 0)[None, :]
        m = m_t[:, None] & m_in
        p_codes = p_page + BLOCK_SIZE * CODES + o_t * (INNER * BITS // 8)
        b_number = _numbers(
            element_codes(p_codes[:, None], o_in, m, INNER, BITS), levels, KIND, BITS, tl.float32
        )
        if TOKENS:
            # The scales of a group of tokens lie behind one another, one for each channel.
            o_first = o_t // GROUP * GROUP * (WIDTH // GROUP)
            p_at = p_halves[:, None] + o_first[:, None] + o_in
        else:
            p_at = p_halves[:, None] + o_t[:, None] * (INNER // GROUP) + o_in // GROUP
        b_scale, b_zero = _affine(p_at, m, SCALE, ZERO, KIND, BITS, BLOCK_SIZE)
        b_x = tl.where(m, b_number * b_scale + b_zero, 0.0)
        if OUTLIERS > 0:
            m_out = m_t[:, None] & (o_d < OUTLIERS)[None, :]
            p_out = p_page + BLOCK_SIZE * OUTLIER_CODES + o_t * OUTLIERS
            b_out = tl.load(p_out[:, None] + o_d[None, :], mask=m_out, other=0).to(tl.float32)
            p_own = p_halves + o_t
            b_step, b_low = _affine(p_own, m_t, OUTLIER_SCALE, OUTLIER_ZERO, INT, 4, BLOCK_SIZE)
            b_x = tl.where(m_out, b_out * b_step[:, None] + b_low[:, None], b_x)
        return b_x.to(DTYPE)


@triton.jit
def _dot_int(b_a, b_b, GROUPS: tl.constexpr):
    """Exact int32 products of 8-bit integers, ``[groups, m, k]`` with ``[groups, k, n]``."""
    if GROUPS == 1:
        A: tl.constexpr = b_a.shape
        B: tl.constexpr = b_b.shape
        b_flat = tl.dot(
            tl.reshape(b_a, [A[1], A[2]]), tl.reshape(b_b, [B[1], B[2]]), out_dtype=tl.int32
        )
        return tl.reshape(b_flat, [1, A[1], B[2]])
    else:
        return tl.dot(b_a, b_b, out_dtype=tl.int32)


@triton.jit(do_not_specialize=["limit", "stride_br"])
def attend_kernel(
    query,
    pages,
    halves,
    key_elements,
    value_elements,
    key_levels,
    value_levels,
    block_table,
    lens,
    query_start,
    partial,
    partial_lse,
    scale,
    softcap,
    limit,
    stride_qt,
    stride_qh,
    stride_pb,
    stride_ph,
    stride_hb,
    stride_hh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_br,
    HEADS: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    K_KIND: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_OUTLIERS: tl.constexpr,
    K_CODES: tl.constexpr,
    K_SCALE: tl.constexpr,
    K_ZERO: tl.constexpr,
    K_SUM: tl.constexpr,
    K_OUTLIER_CODES: tl.constexpr,
    K_OUTLIER_SCALE: tl.constexpr,
    K_OUTLIER_ZERO: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_BITS: tl.constexpr,
    V_KIND: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_OUTLIERS: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_ZERO: tl.constexpr,
    V_OUTLIER_CODES: tl.constexpr,
    V_OUTLIER_SCALE: tl.constexpr,
    V_OUTLIER_ZERO: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTEGER: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUPS_K: tl.constexpr,
    GROUPS_V: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Each program attends a tile of one row's queries of the heads that read one stored head to
    one split of the row's tokens, and writes its normalized sum and log-sum-exp.

    ``K_CODES`` and the like are offsets of fields. ``BLOCK_K`` and ``BLOCK_V`` are what channels
    are padded to: those of a vector, or of a group where products are integer; ``GROUPS_K`` and
    ``GROUPS_V`` are the groups, padded.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    i_s = tl.program_id(2)
    DTYPE: tl.constexpr = tl.float32 if WIDEN else query.dtype.element_ty
    K_FOLD: tl.constexpr = not K_TOKENS and K_KIND != PLAIN and K_GROUP == K_WIDTH
    V_FOLD: tl.constexpr = V_KIND != PLAIN and V_GROUP == V_WIDTH

    n_resident = tl.maximum(tl.minimum(tl.load(lens + i_r), limit), 0)
    i_first = tl.load(query_start + i_r)
    n_query = tl.load(query_start + i_r + 1) - i_first
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_query = o_m // QUERY_GROUP
    m_m = o_query < n_query
    o_token = (i_first + o_query).to(tl.int64)
    o_head = i_h * QUERY_GROUP + o_m % QUERY_GROUP
    b_seen = tl.zeros([BLOCK_M], tl.int32) + n_resident
    if CAUSAL:
        b_seen = n_resident - n_query + o_query + 1
    b_seen = tl.where(m_m, b_seen, 0)

    p_query = query + o_token * stride_qt + o_head * stride_qh
    if INTEGER:
        o_kg = tl.arange(0, GROUPS_K)
        o_kd = tl.arange(0, BLOCK_K)
        m_kc = (o_kg < K_WIDTH // K_GROUP)[:, None] & (o_kd < K_GROUP)[None, :]
        o_kc = o_kg[:, None] * K_GROUP + o_kd[None, :]
        # [groups, queries, channels of a group]
        m_q = m_m[None, :, None] & m_kc[:, None, :]
        b_wide = tl.load(p_query[None, :, None] + o_kc[:, None, :], mask=m_q, other=0)
        b_wide = b_wide.to(tl.float32)
        b_q_zero = tl.min(tl.where(m_q, b_wide, float("inf")), 2)
        b_q_top = tl.max(tl.where(m_q, b_wide, float("-inf")), 2)
        # Neither a least number nor an integer code is NaN on a GPU.
        b_q_nan = tl.max((b_wide != b_wide).to(tl.int32), 2)
        b_q_zero = tl.where(b_q_nan > 0, float("nan"), b_q_zero)
        m_qg = m_m[None, :] & (o_kg < K_WIDTH // K_GROUP)[:, None]
        b_q_zero = tl.where(m_qg, b_q_zero, 0.0)
        b_q_scale = tl.where(m_qg, (b_q_top - b_q_zero) / 255, 0.0)
        b_inverse = tl.where(b_q_scale > 0, 1 / tl.where(b_q_scale > 0, b_q_scale, 1.0), 0.0)
        b_q_code = tl.floor((b_wide - b_q_zero[:, :, None]) * b_inverse[:, :, None] + 0.5)
        b_q_code = tl.minimum(tl.maximum(b_q_code, 0.0), 255.0).to(tl.int32) - 128
        b_q_code = tl.where(m_q, b_q_code, 0)
        b_q_zero += 128 * b_q_scale
        b_q_sum = tl.sum(b_q_code, 2).to(tl.float32)
        # What meets the keys' zeros: sq sum(cq) + n zq.
        b_q_offset = b_q_scale * b_q_sum + K_GROUP * b_q_zero
        b_query = b_q_code.to(tl.int8)
    else:
        o_k = tl.arange(0, BLOCK_K)
        m_q = m_m[:, None] & (o_k < K_WIDTH)[None, :]
        b_query = tl.load(p_query[:, None] + o_k[None, :], mask=m_q, other=0).to(DTYPE)
        b_q_sum = tl.sum(b_query.to(tl.float32), 1)

    o_v = tl.arange(0, BLOCK_V)
    if INTEGER:
        o_vg = tl.arange(0, GROUPS_V)
        m_vc = (o_vg < V_WIDTH // V_GROUP)[:, None] & (o_v < V_GROUP)[None, :]
        o_vc = o_vg[:, None] * V_GROUP + o_v[None, :]
        b_sum = tl.zeros([GROUPS_V, BLOCK_M, BLOCK_V], tl.float32)
    else:
        b_sum = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_norm = tl.zeros([BLOCK_M], tl.float32)

    # Splits begin at multiples of the tile, where tiles of integer weights begin too.
    n_chunk = (n_resident + SPLITS * BLOCK_T - 1) // (SPLITS * BLOCK_T) * BLOCK_T
    n_end = tl.minimum((i_s + 1) * n_chunk, tl.max(b_seen, 0))
    for i_t in range(i_s * n_chunk, n_end, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < n_resident
        p_table = block_table + i_r * stride_br + o_t // BLOCK_SIZE
        i_b = tl.load(p_table, mask=m_t, other=0).to(tl.int64)
        o_in = o_t % BLOCK_SIZE
        p_page = pages + i_b * stride_pb + i_h * stride_ph
        p_halves = halves + i_b * stride_hb + i_h * stride_hh

        if INTEGER:
            KG: tl.constexpr = K_WIDTH // K_GROUP
            # [groups, channels of a group, tokens]
            m_k = m_kc[:, :, None] & m_t[None, None, :]
            p_codes = p_page + BLOCK_SIZE * K_CODES + o_in * (K_WIDTH * K_BITS // 8)
            b_code = element_codes(p_codes[None, None, :], o_kc[:, :, None], m_k, K_WIDTH, K_BITS)
            if K_BITS == 8:
                b_code = tl.where(m_k, b_code - 128, 0)
            p_own = p_halves[None, :] + o_in[None, :] * KG + o_kg[:, None]
            m_own = m_t[None, :] & (o_kg < KG)[:, None]
            b_scale, b_zero = _affine(p_own, m_own, K_SCALE, K_ZERO, INT, K_BITS, BLOCK_SIZE)
            if K_SUM >= 0:
                b_half = tl.load(p_own + BLOCK_SIZE * K_SUM // 2, mask=m_own, other=0)
                b_total = b_half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
                if K_BITS == 8:
                    b_total -= 128 * K_GROUP
            else:
                b_total = tl.sum(b_code, 1)
            b_int = _dot_int(b_query, b_code.to(tl.int8), GROUPS_K)
            b_term = b_q_scale[:, :, None] * b_int.to(tl.float32)
            b_term += b_q_zero[:, :, None] * b_total.to(tl.float32)[:, None, :]
            b_term = b_term * b_scale[:, None, :] + b_q_offset[:, :, None] * b_zero[:, None, :]
            b_logit = tl.sum(b_term, 0)
        elif K_FOLD:
            m_k = m_t[:, None] & (o_k < K_WIDTH)[None, :]
            p_codes = p_page + BLOCK_SIZE * K_CODES + o_in * (K_WIDTH * K_BITS // 8)
            b_code = element_codes(p_codes[:, None], o_k[None, :], m_k, K_WIDTH, K_BITS)
            b_key = _numbers(b_code, key_levels, K_KIND, K_BITS, DTYPE)
            b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
            b_scale, b_zero = _affine(
                p_halves + o_in, m_t, K_SCALE, K_ZERO, K_KIND, K_BITS, BLOCK_SIZE
            )
            b_logit = b_logit * b_scale[None, :] + b_q_sum[:, None] * b_zero[None, :]
        else:
            b_key = _vectors(
                p_page,
                p_halves,
                key_elements + i_b * stride_kb + i_h * stride_kh,
                key_levels,
                o_in,
                m_t,
                o_k,
                K_WIDTH,
                K_BITS,
                K_KIND,
                K_GROUP,
                K_TOKENS,
                K_OUTLIERS,
                K_CODES,
                K_SCALE,
                K_ZERO,
                K_OUTLIER_CODES,
                K_OUTLIER_SCALE,
                K_OUTLIER_ZERO,
                BLOCK_SIZE,
                DTYPE,
            )
            b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")

        b_logit = b_logit * scale
        if SOFTCAP:
            b_logit = cap_logits(b_logit, softcap)
        b_logit = tl.where(o_t[None, :] < b_seen[:, None], b_logit, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_logit, 1))
        # A query that has seen nothing yet has no maximum to take off.
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_weight = tl.exp(b_logit - b_base[:, None])
        b_shrink = tl.exp(b_max - b_base)
        b_norm = b_norm * b_shrink + tl.sum(b_weight, 1)
        b_max = b_top

        if INTEGER:
            VG: tl.constexpr = V_WIDTH // V_GROUP
            V_MIDDLE: tl.constexpr = 1 << (V_BITS - 1)
            # [groups, tokens, channels of a group]
            m_v = m_vc[:, None, :] & m_t[None, :, None]
            p_codes = p_page + BLOCK_SIZE * V_CODES + o_in * (V_WIDTH * V_BITS // 8)
            b_v_code = element_codes(p_codes[None, :, None], o_vc[:, None, :], m_v, V_WIDTH, V_BITS)
            b_v_code = tl.where(m_v, b_v_code - V_MIDDLE, 0)
            p_own = p_halves[None, :] + o_in[None, :] * VG + o_vg[:, None]
            m_own = m_t[None, :] & (o_vg < VG)[:, None]
            b_v_scale, b_v_zero = _affine(p_own, m_own, V_SCALE, V_ZERO, INT, V_BITS, BLOCK_SIZE)
            if V_BITS < 8:
                b_v_zero += V_MIDDLE * b_v_scale
            b_scaled = b_weight[None, :, :] * b_v_scale[:, None, :]
            b_step = tl.max(b_scaled, 2) / 255
            # The inverse of a subnormal step is infinite; such weights are nothing.
            m_step = b_step > 1e-38
            b_w_inverse = tl.where(m_step, 1 / tl.where(m_step, b_step, 1.0), 0.0)
            b_w = tl.floor(b_scaled * b_w_inverse[:, :, None] + 0.5).to(tl.int32) - 128
            b_v_int = _dot_int(b_w.to(tl.int8), b_v_code.to(tl.int8), GROUPS_V)
            b_v_int += 128 * tl.sum(b_v_code, 1)[:, None, :]
            b_low_sum = tl.sum(b_weight[None, :, :] * b_v_zero[:, None, :], 2)
            b_sum = b_sum * b_shrink[None, :, None] + b_step[:, :, None] * b_v_int.to(tl.float32)
            b_sum += b_low_sum[:, :, None]
        elif V_FOLD:
            b_scale, b_zero = _affine(
                p_halves + o_in, m_t, V_SCALE, V_ZERO, V_KIND, V_BITS, BLOCK_SIZE
            )
            b_low_sum = tl.sum(b_weight * b_zero[None, :], 1)[:, None]
            b_scaled = (b_weight * b_scale[None, :]).to(DTYPE)
            b_sum = b_sum * b_shrink[:, None] + b_low_sum
            m_v = m_t[:, None] & (o_v < V_WIDTH)[None, :]
            p_codes = p_page + BLOCK_SIZE * V_CODES + o_in * (V_WIDTH * V_BITS // 8)
            b_code = element_codes(p_codes[:, None], o_v[None, :], m_v, V_WIDTH, V_BITS)
            b_value = _numbers(b_code, value_levels, V_KIND, V_BITS, DTYPE)
            b_sum = tl.dot(b_scaled, b_value, b_sum, input_precision="ieee")
        else:
            b_value = _vectors(
                p_page,
                p_halves,
                value_elements + i_b * stride_vb + i_h * stride_vh,
                value_levels,
                o_in,
                m_t,
                o_v,
                V_WIDTH,
                V_BITS,
                V_KIND,
                V_GROUP,
                False,
                V_OUTLIERS,
                V_CODES,
                V_SCALE,
                V_ZERO,
                V_OUTLIER_CODES,
                V_OUTLIER_SCALE,
                V_OUTLIER_ZERO,
                BLOCK_SIZE,
                DTYPE,
            )
            b_sum = b_sum * b_shrink[:, None]
            b_sum = tl.dot(b_weight.to(DTYPE), b_value, b_sum, input_precision="ieee")

    m_any = b_norm != 0  # NaN is a norm, too
    b_norm = tl.where(m_any, b_norm, 1.0)
    o_part = (o_token * (HEADS * QUERY_GROUP) + o_head) * SPLITS + i_s
    b_lse = tl.where(m_any, b_max + tl.log(b_norm), float("-inf"))
    tl.store(partial_lse + o_part, b_lse, mask=m_m)
    p_out = partial + o_part * V_WIDTH
    if INTEGER:
        m_out = m_m[None, :, None] & m_vc[:, None, :]
        p_out = p_out[None, :, None] + o_vc[:, None, :]
        tl.store(p_out, b_sum / b_norm[None, :, None], mask=m_out)
    else:
        m_out = m_m[:, None] & (o_v < V_WIDTH)[None, :]
        tl.store(p_out[:, None] + o_v[None, :], b_sum / b_norm[:, None], mask=m_out)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def merge_splits_kernel(
    partial,
    partial_lse,
    query_start,
    out,
    lse,
    n_rows,
    n_splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program merges some channels of the splits of one token and head, ``BLOCK_S`` at a time;
    tokens behind the last row's, which no split has written, get 0 and -inf."""
    i_p = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    n_written = tl.where(i_p // HEADS < tl.load(query_start + n_rows), n_splits, 0)
    top = tl.full([], float("-inf"), tl.float32)
    norm = tl.zeros([], tl.float32)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    for i_s in range(0, n_written, BLOCK_S):
        m_s = i_s + o_s < n_written
        o_part = i_p * n_splits + i_s + o_s
        b_lse = tl.load(partial_lse + o_part, mask=m_s, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(b_lse, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        b_weight = tl.exp(b_lse - base)
        shrink = tl.exp(top - base)
        m_part = (b_lse != float("-inf"))[:, None] & m_d[None, :]
        b_part = tl.load(partial + o_part[:, None] * WIDTH + o_d[None, :], mask=m_part, other=0)
        b_out = b_out * shrink + tl.sum(b_part * b_weight[:, None], 0)
        norm = norm * shrink + tl.sum(b_weight, 0)
        top = new_top
    m_any = norm != 0
    norm = tl.where(m_any, norm, 1.0)
    tl.store(out + i_p * WIDTH + o_d, b_out / norm, mask=m_d)
    if tl.program_id(1) == 0:
        tl.store(lse + i_p, tl.where(m_any, top + tl.log(norm), float("-inf")))


def merge_splits(
    partial: Tensor,
    partial_lse: Tensor,
    query_start: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge the normalized sums of each token and head.

    Args:
        partial: float32 ``[num_tokens, num_heads, splits, width]``.
        partial_lse: float32 ``[num_tokens, num_heads, splits]``.
        query_start: int32 ``[rows + 1]``, of which the last is the number of tokens in rows.
        out: float32 ``[num_tokens, num_heads, width]``, written.
        lse: float32 ``[num_tokens, num_heads]``, written.
    """
    tokens, num_heads, splits, width = partial.shape
    block_d = min(triton.next_power_of_2(width), 64)
    with torch.cuda.device_of(partial):
        merge_splits_kernel[(tokens * num_heads, triton.cdiv(width, block_d))](
            partial,
            partial_lse,
            query_start,
            out,
            lse,
            query_start.shape[0] - 1,
            splits,
            HEADS=num_heads,
            WIDTH=width,
            BLOCK_S=min(triton.next_power_of_2(splits), 32),
            BLOCK_D=block_d,
        )


def field_offsets(layout: CodedPage, side: str, coding: Coding) -> dict[str, int | bool]:
    """The constants of `attend_kernel` that describe K or V; -1 for a field that is not there."""
    at = {
        field.name.removeprefix(f"{side}_"): field.offset
        for field in layout.fields
        if field.name.startswith(f"{side}_")
    }
    found: dict[str, int | bool] = {
        "WIDTH": coding.width,
        "BITS": coding.bits,
        "KIND": KINDS[coding.kind],
        "GROUP": coding.group,
        "OUTLIERS": coding.outliers,
    }
    names = ["codes", "scale", "zero", "outlier_codes", "outlier_scale", "outlier_zero"]
    if side == "key":
        names.append("sum")
        found["TOKENS"] = coding.axis == "tokens"
    found |= {name.upper(): at.get(name, -1) for name in names}
    return {f"{side[0].upper()}_{name}": value for name, value in found.items()}


def tiles(coding: Coding, integer: bool) -> tuple[int, int]:
    """Padded sizes of channels and of groups."""
    if integer:
        # A product of 8-bit integers takes 32 of them at least.
        return max(triton.next_power_of_2(coding.group), 32), triton.next_power_of_2(coding.groups)
    return max(triton.next_power_of_2(coding.width), 16), 1


def token_tile(block_k: int, block_v: int, integer: bool, wide: bool) -> int:
    """Tokens of a step. A float32 product runs outside the tensor cores, in registers."""
    if integer:
        return WEIGHT_TILE
    return max(16, min(32 if wide else 64, 8192 // max(block_k, block_v)))


@checked(check_arguments)
def paged_attend_quant_triton(
    query: Tensor,
    pages: Tensor,
    layout: CodedPage,
    block_table: Tensor,
    lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    causal: bool,
    softcap: float = 0.0,
    integer: bool = False,
    max_query_len: int,
    max_len: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.paged_attend_quant.paged_attend_quant`."""
    tokens, num_heads, _ = query.shape
    _, heads, block_size, _ = pages.shape
    rows, width = block_table.shape
    key, value = layout.key, layout.value
    out, lse = attention_outputs(query, value.width, out, lse)
    limit = min(width * block_size, max_len)
    if tokens == 0:
        return out, lse
    if rows == 0 or max_query_len == 0 or limit == 0 or pages.shape[0] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return out, lse

    wide = query.dtype == torch.float32
    group = num_heads // heads
    if planes_fit(layout, query, block_size, integer):
        partial, partial_lse = attend_planes(
            query,
            pages,
            layout,
            block_table,
            lens,
            query_start,
            scale,
            causal=causal,
            softcap=softcap,
            integer=integer,
            max_query_len=max_query_len,
            limit=limit,
        )
        merge_splits(partial, partial_lse, query_start, out, lse)
        return out, lse
    n_queries = max_query_len * group
    block_m = min(max(triton.next_power_of_2(n_queries), 16), 16 if wide else 64)
    block_k, groups_k = tiles(key, integer)
    block_v, groups_v = tiles(value, integer)
    block_t = token_tile(block_k, block_v, integer, wide)
    q_tiles = triton.cdiv(n_queries, block_m)
    programs = rows * heads * q_tiles
    wanted = triton.cdiv(WAVES * multiprocessors(pages.device), programs)
    most = max(1, min(wanted, triton.cdiv(limit, 4 * block_t), MAX_SPLITS))
    # Rows come and go: each number of splits would be compiled again, in the middle of serving.
    splits = 1 << (most.bit_length() - 1)

    halves = pages.view(torch.float16)
    elements = {
        side: pages.view(torch.float32 if coding.bits == 32 else query.dtype)
        if coding.kind == "plain"
        else halves
        for side, coding in (("key", key), ("value", value))
    }
    partial = query.new_empty((tokens, num_heads, splits, value.width), dtype=torch.float32)
    partial_lse = query.new_empty((tokens, num_heads, splits), dtype=torch.float32)
    # Narrow levels: those of four bytes would be copied to shared memory one by one.
    levels = [lse if x is None else x.to(query.dtype) for x in (key_levels, value_levels)]
    with torch.cuda.device_of(pages):
        attend_kernel[(rows * heads, q_tiles, splits)](
            query,
            pages,
            halves,
            elements["key"],
            elements["value"],
            *levels,
            block_table,
            lens,
            query_start,
            partial,
            partial_lse,
            # Python floats: an int would become an integer argument and another compiled kernel.
            float(scale),
            float(softcap),
            limit,
            *query.stride()[:2],
            *pages.stride()[:2],
            *halves.stride()[:2],
            *elements["key"].stride()[:2],
            *elements["value"].stride()[:2],
            block_table.stride(0),
            HEADS=heads,
            QUERY_GROUP=group,
            BLOCK_SIZE=block_size,
            **field_offsets(layout, "key", key),
            **field_offsets(layout, "value", value),
            CAUSAL=causal,
            SOFTCAP=softcap > 0,
            INTEGER=integer,
            SPLITS=splits,
            BLOCK_M=block_m,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            GROUPS_K=groups_k,
            GROUPS_V=groups_v,
            # Triton's interpreter multiplies the bits of a bfloat16 matrix as integers.
            WIDEN=triton.knobs.runtime.interpret and query.dtype == torch.bfloat16,
            num_warps=8 if integer or block_m > 16 else 4,
        )
    merge_splits(partial, partial_lse, query_start, out, lse)
    return out, lse
