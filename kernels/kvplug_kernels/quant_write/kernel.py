"""The coded write as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..coding import CodedPage, Coding
from .naive import check_arguments

TILE = 1024
"""Elements of the vectors that a program codes."""
GROUP_TILE = 4096
"""Elements of a group of tokens that a program holds at a time."""
WORDS = {16: torch.int16, 32: torch.int32}


@triton.jit
def _clean(b_x):
    """float32 without NaN, infinities, numbers beyond float16's and negative zeros."""
    b_x = b_x.to(tl.float32)
    b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)
    return tl.minimum(tl.maximum(b_x, -65504.0), 65504.0) + 0.0


@triton.jit
def _count_bad(b_x, m):
    """Count of NaN and infinite elements, int64."""
    m_bad = m & ~(tl.abs(b_x.to(tl.float32)) < float("inf"))
    return tl.sum(m_bad.to(tl.int32)).to(tl.int64)


@triton.jit
def _inverse(b_scale):
    b_step = b_scale.to(tl.float32)
    return tl.where(b_step > 0, tl.div_rn(1.0, tl.where(b_step > 0, b_step, 1.0)), 0.0)


@triton.jit
def _affine(b_low, b_high, TOP: tl.constexpr):
    """Scale and zero, float16."""
    b_zero = b_low.to(tl.float16)
    b_range = tl.maximum(b_high - b_zero.to(tl.float32), 0.0)
    return (b_range * (1.0 / TOP)).to(tl.float16), b_zero


@triton.jit
def _int_codes(b_x, b_inverse, b_zero, TOP: tl.constexpr):
    b_code = tl.floor((b_x - b_zero) * b_inverse + 0.5)
    return tl.minimum(tl.maximum(b_code, 0.0), TOP).to(tl.int32)


@triton.jit
def _fit_affine(b_x, b_coded, b_scale, b_zero, m_g, GROUP: tl.constexpr):
    """Scale and zero, float16 ``[R]``, that fit the codes of one group of each row best."""
    b_c = tl.where(m_g, b_coded.to(tl.float32), 0.0)
    b_x = tl.where(m_g, b_x, 0.0)
    b_middle = tl.div_rn(tl.sum(tl.sum(b_c, 2), 1), GROUP * 1.0)
    b_mean = tl.div_rn(tl.sum(tl.sum(b_x, 2), 1), GROUP * 1.0)
    b_c = tl.where(m_g, b_c - b_middle[:, None, None], 0.0)
    b_off = tl.where(m_g, b_x - b_mean[:, None, None], 0.0)
    b_spread = tl.sum(tl.sum(b_c * b_c, 2), 1)
    b_along = tl.sum(tl.sum(b_c * b_off, 2), 1)
    b_step = tl.div_rn(b_along, tl.maximum(b_spread, 1e-9))
    b_step = tl.minimum(tl.maximum(b_step, 0.0), 65504.0) + 0.0
    b_scale = tl.where(b_spread > 0, b_step.to(tl.float16), b_scale)
    b_low = b_mean - b_scale.to(tl.float32) * b_middle
    b_low = tl.minimum(tl.maximum(b_low, -65504.0), 65504.0) + 0.0
    return b_scale, tl.where(b_spread > 0, b_low.to(tl.float16), b_zero)


@triton.jit
def _fp8_codes(b_x):
    """The bits of e4m3, ties to even, of float32 of magnitude 448 at most: not every GPU that
    Triton compiles for has the conversion, and neither has its interpreter."""
    b_x = tl.minimum(tl.maximum(b_x, -448.0), 448.0)
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes count steps of 2**-9; adding 2**23 rounds to whole ones.
    b_small = (tl.abs(b_x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    b_code = tl.where(b_size < (121 << 23), b_small, b_normal)
    return b_code | ((b_bits >> 24) & 0x80)


@triton.jit
def _store_codes(p_codes, b_code, o_j, m_j, BITS: tl.constexpr, N: tl.constexpr):
    """Pack the codes ``[R, PARTS, BLOCK_N]`` of elements ``part * N + o_j`` and store them behind
    ``p_codes [R]``."""
    R: tl.constexpr = b_code.shape[0]
    PARTS: tl.constexpr = b_code.shape[1]
    BLOCK_N: tl.constexpr = b_code.shape[2]
    o_part = tl.arange(0, PARTS)[None, :, None]
    if BITS == 3:
        b_pairs = (b_code & 3) << (2 * (o_part // 2))
        b_low = tl.sum(tl.reshape(b_pairs, [R, 4, 2, BLOCK_N]), 1)
        p_low = p_codes[:, None, None] + tl.arange(0, 2)[None, :, None] * N + o_j[None, None, :]
        tl.store(p_low, b_low.to(tl.uint8), mask=m_j[:, None, :])
        b_high = tl.sum((b_code >> 2) << o_part, 1)
        tl.store(p_codes[:, None] + 2 * N + o_j[None, :], b_high.to(tl.uint8), mask=m_j)
    else:
        b_byte = tl.sum(b_code << (BITS * o_part), 1)
        tl.store(p_codes[:, None] + o_j[None, :], b_byte.to(tl.uint8), mask=m_j)


@triton.jit
def _load_codes(p_codes, o_j, m_j, PARTS: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr):
    """Codes that `_store_codes` stored, int32 ``[R, PARTS, BLOCK_N]``."""
    o_part = tl.arange(0, PARTS)[None, :, None]
    o_byte = tl.zeros([1, PARTS, 1], tl.int32) + o_j[None, None, :]
    p_byte = p_codes[:, None, None] + o_byte
    m_byte = m_j[:, None, :]
    if BITS == 3:
        b_low = tl.load(p_byte + (o_part % 2) * N, mask=m_byte, other=0).to(tl.int32)
        b_high = tl.load(p_byte + 2 * N, mask=m_byte, other=0).to(tl.int32)
        return ((b_low >> (2 * (o_part // 2))) & 3) | (((b_high >> o_part) & 1) << 2)
    else:
        b_byte = tl.load(p_byte, mask=m_byte, other=0).to(tl.int32)
        return (b_byte >> (BITS * o_part)) & ((1 << BITS) - 1)


@triton.jit
def write_vectors(
    x,
    pages,
    halves,
    words,
    slots,
    levels,
    nonfinite,
    i_p,
    n_rows,
    stride_xn,
    stride_xh,
    stride_pb,
    stride_ph,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    SUMS: tl.constexpr,
    FIT: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    SUM: tl.constexpr,
    OUTLIER_CODES: tl.constexpr,
    OUTLIER_SCALE: tl.constexpr,
    OUTLIER_ZERO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Code BLOCK_R (token, head) pairs, and store them. Element ``part * N + j`` of a vector goes
    to byte ``j``, or to those that `_store_codes` names."""
    N: tl.constexpr = INNER // PARTS
    GROUPS: tl.constexpr = INNER // GROUP
    o_r = i_p * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    i_n, i_h = o_r // HEADS, o_r % HEADS
    b_slot = tl.load(slots + i_n, mask=m_r, other=-1).to(tl.int64)
    m_r = m_r & (b_slot >= 0)
    b_slot = tl.where(m_r, b_slot, 0)
    i_t = b_slot % BLOCK_SIZE
    # Bytes, and a whole number of float32: pages are aligned.
    o_page = (b_slot // BLOCK_SIZE) * stride_pb + i_h * stride_ph
    p_x = x + i_n * stride_xn + i_h * stride_xh

    o_j = tl.arange(0, BLOCK_N)
    o_e = tl.arange(0, PARTS)[:, None] * N + o_j[None, :]
    m_j = m_r[:, None] & (o_j < N)[None, :]
    m_e = m_r[:, None, None] & (o_j < N)[None, None, :] & (o_e >= 0)[None, :, :]
    b_raw = tl.load(p_x[:, None, None] + OUTLIERS + o_e[None, :, :], mask=m_e, other=0.0)
    n_bad = _count_bad(b_raw, m_e)

    if KIND == "plain":
        b_bits = b_raw.to(words.dtype.element_ty, bitcast=True)
        b_bits = tl.where(tl.abs(b_raw.to(tl.float32)) < float("inf"), b_bits, 0)
        o_word = o_page // (BITS // 8) + CODES * BLOCK_SIZE // (BITS // 8) + i_t * INNER
        tl.store(words + o_word[:, None, None] + o_e[None, :, :], b_bits, mask=m_e)
    else:
        b_x = _clean(b_raw)
        o_group = o_e // GROUP
        p_scale = halves + o_page // 2 + SCALE * BLOCK_SIZE // 2 + i_t * GROUPS
        if KIND == "int":
            TOP: tl.constexpr = (1 << BITS) - 1
            p_zero = halves + o_page // 2 + ZERO * BLOCK_SIZE // 2 + i_t * GROUPS
            p_sum = halves + o_page // 2 + SUM * BLOCK_SIZE // 2 + i_t * GROUPS
            b_code = tl.zeros([BLOCK_R, PARTS, BLOCK_N], tl.int32)
            for i_g in tl.static_range(GROUPS):
                m_g = m_e & (o_group == i_g)[None, :, :]
                b_low = tl.min(tl.min(tl.where(m_g, b_x, 65504.0), 2), 1)
                b_high = tl.max(tl.max(tl.where(m_g, b_x, -65504.0), 2), 1)
                b_scale, b_zero = _affine(b_low, b_high, TOP)
                b_coded = _int_codes(
                    b_x,
                    _inverse(b_scale)[:, None, None],
                    b_zero.to(tl.float32)[:, None, None],
                    TOP,
                )
                for _ in tl.static_range(FIT):
                    b_scale, b_zero = _fit_affine(b_x, b_coded, b_scale, b_zero, m_g, GROUP)
                    b_coded = _int_codes(
                        b_x,
                        _inverse(b_scale)[:, None, None],
                        b_zero.to(tl.float32)[:, None, None],
                        TOP,
                    )
                b_code = tl.where(m_g, b_coded, b_code)
                tl.store(p_scale + i_g, b_scale.to(tl.int16, bitcast=True), mask=m_r)
                tl.store(p_zero + i_g, b_zero.to(tl.int16, bitcast=True), mask=m_r)
                if SUMS:
                    b_sum = tl.sum(tl.sum(tl.where(m_g, b_coded, 0), 2), 1)
                    tl.store(p_sum + i_g, b_sum.to(tl.int16), mask=m_r)
        elif KIND == "fp8":
            b_code = tl.zeros([BLOCK_R, PARTS, BLOCK_N], tl.int32)
            for i_g in tl.static_range(GROUPS):
                m_g = m_e & (o_group == i_g)[None, :, :]
                b_high = tl.max(tl.max(tl.where(m_g, tl.abs(b_x), 0.0), 2), 1)
                b_scale = (b_high * (1.0 / 448.0)).to(tl.float16)
                b_coded = _fp8_codes(b_x * _inverse(b_scale)[:, None, None])
                b_code = tl.where(m_g, b_coded, b_code)
                tl.store(p_scale + i_g, b_scale.to(tl.int16, bitcast=True), mask=m_r)
        else:
            b_code = tl.zeros([BLOCK_R, PARTS, BLOCK_N], tl.int32)
            for i_g in tl.static_range(GROUPS):
                m_g = m_e & (o_group == i_g)[None, :, :]
                b_square = tl.sum(tl.sum(tl.where(m_g, b_x * b_x, 0.0), 2), 1)
                b_size = tl.sqrt_rn(tl.div_rn(b_square, GROUP * 1.0))
                b_coded = tl.zeros([BLOCK_R, PARTS, BLOCK_N], tl.int32)
                b_fit = tl.zeros([BLOCK_R], tl.float32)
                for _ in tl.static_range(FIT + 1):
                    b_size = tl.where(b_size > 0, b_size, 1.0)
                    b_unit = tl.div_rn(b_x, tl.broadcast_to(b_size[:, None, None], b_x.shape))
                    b_level = tl.load(levels)
                    b_chosen = tl.zeros([BLOCK_R, PARTS, BLOCK_N], tl.float32) + b_level
                    b_coded = tl.zeros([BLOCK_R, PARTS, BLOCK_N], tl.int32)
                    for i_l in tl.static_range(1, 1 << BITS):
                        b_next = tl.load(levels + i_l)
                        m_above = b_unit > (b_next + b_level) * 0.5
                        b_chosen = tl.where(m_above, b_next, b_chosen)
                        b_coded += m_above.to(tl.int32)
                        b_level = b_next
                    b_along = tl.sum(tl.sum(tl.where(m_g, b_x * b_chosen, 0.0), 2), 1)
                    b_norm = tl.sum(tl.sum(tl.where(m_g, b_chosen * b_chosen, 0.0), 2), 1)
                    b_fit = tl.div_rn(b_along, tl.maximum(b_norm, 1e-9))
                    b_fit = tl.minimum(tl.maximum(b_fit, 0.0), 65504.0) + 0.0
                    b_size = b_fit.to(tl.float16).to(tl.float32)
                b_code = tl.where(m_g, b_coded, b_code)
                b_scale = b_fit.to(tl.float16).to(tl.int16, bitcast=True)
                tl.store(p_scale + i_g, b_scale, mask=m_r)
        p_codes = pages + o_page + CODES * BLOCK_SIZE + i_t * (INNER * BITS // 8)
        _store_codes(p_codes, b_code, o_j, m_j, BITS, N)

        if OUTLIERS > 0:
            o_o = tl.arange(0, BLOCK_O)
            m_o = m_r[:, None] & (o_o < OUTLIERS)[None, :]
            b_raw = tl.load(p_x[:, None] + o_o[None, :], mask=m_o, other=0.0)
            n_bad += _count_bad(b_raw, m_o)
            b_o = _clean(b_raw)
            b_low = tl.min(tl.where(m_o, b_o, 65504.0), 1)
            b_high = tl.max(tl.where(m_o, b_o, -65504.0), 1)
            b_scale, b_zero = _affine(b_low, b_high, 255)
            b_byte = _int_codes(
                b_o, _inverse(b_scale)[:, None], b_zero.to(tl.float32)[:, None], 255
            )
            p_byte = pages + o_page + OUTLIER_CODES * BLOCK_SIZE + i_t * OUTLIERS
            tl.store(p_byte[:, None] + o_o[None, :], b_byte.to(tl.uint8), mask=m_o)
            p_half = halves + o_page // 2 + i_t
            b_scale, b_zero = (
                b_scale.to(tl.int16, bitcast=True),
                b_zero.to(tl.int16, bitcast=True),
            )
            tl.store(p_half + OUTLIER_SCALE * BLOCK_SIZE // 2, b_scale, mask=m_r)
            tl.store(p_half + OUTLIER_ZERO * BLOCK_SIZE // 2, b_zero, mask=m_r)
    if nonfinite is not None:
        tl.atomic_add(nonfinite, n_bad, mask=n_bad > 0)


@triton.jit
def _write_group(
    key,
    pages,
    halves,
    slots,
    recent_slots,
    recent,
    nonfinite,
    i_p,
    n,
    stride_xn,
    stride_xh,
    stride_pb,
    stride_ph,
    stride_rl,
    stride_rt,
    stride_rh,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    RING: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Code the group of one (token, head) pair from all of its tokens so far, if the token is the
    group's first of this step."""
    N: tl.constexpr = WIDTH // PARTS
    TOP: tl.constexpr = (1 << BITS) - 1
    i_n, i_h = i_p // HEADS, i_p % HEADS
    n_slot = tl.load(slots + i_n).to(tl.int64)
    n_before = tl.load(slots + i_n - 1, mask=i_n > 0, other=-1).to(tl.int64)
    # A negative slot is in no group, but -1 // GROUP would be one of those divided towards 0.
    m_first = (n_before < 0) | (n_before // GROUP != n_slot // GROUP)
    if (n_slot >= 0) & m_first:
        n_earlier = n_slot % GROUP
        o_g = tl.arange(0, BLOCK_G)
        i_x = i_n + o_g - n_earlier
        m_new = (o_g >= n_earlier) & (o_g < GROUP) & (i_x < n)
        b_slot = tl.load(slots + i_x, mask=m_new, other=-1).to(tl.int64)
        m_new = m_new & (b_slot == n_slot - n_earlier + o_g)
        m_live = m_new | (o_g < n_earlier)
        n_start = n_slot % BLOCK_SIZE - n_earlier
        n_page = (n_slot // BLOCK_SIZE) * stride_pb + i_h * stride_ph
        n_ring_slot = n_slot
        n_kept = n_earlier * 0
        if recent is not None:
            n_ring_slot = tl.load(recent_slots + i_n).to(tl.int64)
            n_kept = tl.where(n_ring_slot >= 0, n_earlier, 0)
        # The earlier tokens are all kept exact, or all read back.
        m_kept = o_g < n_kept
        m_coded = (o_g >= n_kept) & (o_g < n_earlier)
        p_x = key + i_x * stride_xn + i_h * stride_xh
        p_codes = pages + n_page + CODES * BLOCK_SIZE + (n_start + o_g) * (WIDTH * BITS // 8)
        # Scales of a group lie behind one another, one per channel.
        p_scale = halves + n_page // 2 + (SCALE * BLOCK_SIZE + n_start * (2 * WIDTH // GROUP)) // 2
        p_zero = halves + n_page // 2 + (ZERO * BLOCK_SIZE + n_start * (2 * WIDTH // GROUP)) // 2
        n_bad = tl.zeros([], tl.int64)
        for i_c in range(0, N, BLOCK_N):
            o_j = i_c + tl.arange(0, BLOCK_N)
            m_n = o_j < N
            o_e = tl.arange(0, PARTS)[:, None] * N + o_j[None, :]
            m_e = m_n[None, :] & (o_e >= 0)
            m_x = m_new[:, None, None] & m_e[None, :, :]
            b_raw = tl.load(p_x[:, None, None] + o_e[None, :, :], mask=m_x, other=0.0)
            n_bad += _count_bad(b_raw, m_x)
            b_x = b_raw.to(tl.float32)
            if recent is not None:
                p_r = recent + n_ring_slot * stride_rl + ((n_start + o_g) % RING) * stride_rt
                p_r = p_r + i_h * stride_rh
                m_x = m_kept[:, None, None] & m_e[None, :, :]
                b_r = tl.load(p_r[:, None, None] + o_e[None, :, :], mask=m_x, other=0.0)
                b_x = tl.where(m_x, b_r.to(tl.float32), b_x)
            b_code = _load_codes(p_codes, o_j, m_coded[:, None] & m_n[None, :], PARTS, BITS, N)
            m_x = m_coded[:, None, None] & m_e[None, :, :]
            m_any = m_e & (o_e < (n_earlier - n_kept) * WIDTH)
            b_scale = tl.load(p_scale + o_e, mask=m_any, other=0)
            b_zero = tl.load(p_zero + o_e, mask=m_any, other=0)
            b_scale = b_scale.to(tl.float16, bitcast=True).to(tl.float32)
            b_zero = b_zero.to(tl.float16, bitcast=True).to(tl.float32)
            b_decoded = b_code.to(tl.float32) * b_scale[None, :, :] + b_zero[None, :, :]
            b_x = _clean(tl.where(m_x, b_decoded, b_x))
            m_x = m_live[:, None, None] & m_e[None, :, :]
            b_low = tl.min(tl.where(m_x, b_x, 65504.0), 0)
            b_high = tl.max(tl.where(m_x, b_x, -65504.0), 0)
            b_scale, b_zero = _affine(b_low, b_high, TOP)
            b_code = _int_codes(
                b_x, _inverse(b_scale)[None, :, :], b_zero.to(tl.float32)[None, :, :], TOP
            )
            # No thread writes what another has yet to read.
            tl.debug_barrier()
            _store_codes(p_codes, b_code, o_j, m_live[:, None] & m_n[None, :], BITS, N)
            tl.store(p_scale + o_e, b_scale.to(tl.int16, bitcast=True), mask=m_e)
            tl.store(p_zero + o_e, b_zero.to(tl.int16, bitcast=True), mask=m_e)
        if nonfinite is not None:
            tl.atomic_add(nonfinite, n_bad, mask=n_bad > 0)


@triton.jit(do_not_specialize=["n", "n_key"])
def quant_write_kernel(
    key,
    value,
    pages,
    halves,
    key_words,
    value_words,
    slots,
    recent_slots,
    recent,
    key_levels,
    value_levels,
    nonfinite,
    n,
    n_key,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_pb,
    stride_ph,
    stride_rl,
    stride_rt,
    stride_rh,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr,
    K_AXIS: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_INNER: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_OUTLIERS: tl.constexpr,
    K_SUMS: tl.constexpr,
    K_FIT: tl.constexpr,
    K_CODES: tl.constexpr,
    K_SCALE: tl.constexpr,
    K_ZERO: tl.constexpr,
    K_SUM: tl.constexpr,
    K_OUTLIER_CODES: tl.constexpr,
    K_OUTLIER_SCALE: tl.constexpr,
    K_OUTLIER_ZERO: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_BLOCK_N: tl.constexpr,
    K_BLOCK_O: tl.constexpr,
    K_BLOCK_R: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_INNER: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_OUTLIERS: tl.constexpr,
    V_SUMS: tl.constexpr,
    V_FIT: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_ZERO: tl.constexpr,
    V_SUM: tl.constexpr,
    V_OUTLIER_CODES: tl.constexpr,
    V_OUTLIER_SCALE: tl.constexpr,
    V_OUTLIER_ZERO: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_BLOCK_N: tl.constexpr,
    V_BLOCK_O: tl.constexpr,
    V_BLOCK_R: tl.constexpr,
):
    """The first ``n_key`` programs write keys, the others values."""
    i_p = tl.program_id(0).to(tl.int64)
    if i_p < n_key:
        if K_AXIS == "tokens":
            _write_group(
                key,
                pages,
                halves,
                slots,
                recent_slots,
                recent,
                nonfinite,
                i_p,
                n,
                stride_kn,
                stride_kh,
                stride_pb,
                stride_ph,
                stride_rl,
                stride_rt,
                stride_rh,
                HEADS,
                BLOCK_SIZE,
                K_BITS,
                K_INNER,
                K_GROUP,
                K_CODES,
                K_SCALE,
                K_ZERO,
                RING,
                K_PARTS,
                K_BLOCK_N,
                K_BLOCK_R,
            )
        else:
            write_vectors(
                key,
                pages,
                halves,
                key_words,
                slots,
                key_levels,
                nonfinite,
                i_p,
                n * HEADS,
                stride_kn,
                stride_kh,
                stride_pb,
                stride_ph,
                HEADS,
                BLOCK_SIZE,
                K_KIND,
                K_BITS,
                K_INNER,
                K_GROUP,
                K_OUTLIERS,
                K_SUMS,
                K_FIT,
                K_CODES,
                K_SCALE,
                K_ZERO,
                K_SUM,
                K_OUTLIER_CODES,
                K_OUTLIER_SCALE,
                K_OUTLIER_ZERO,
                K_PARTS,
                K_BLOCK_N,
                K_BLOCK_O,
                K_BLOCK_R,
            )
    else:
        write_vectors(
            value,
            pages,
            halves,
            value_words,
            slots,
            value_levels,
            nonfinite,
            i_p - n_key,
            n * HEADS,
            stride_vn,
            stride_vh,
            stride_pb,
            stride_ph,
            HEADS,
            BLOCK_SIZE,
            V_KIND,
            V_BITS,
            V_INNER,
            V_GROUP,
            V_OUTLIERS,
            V_SUMS,
            V_FIT,
            V_CODES,
            V_SCALE,
            V_ZERO,
            V_SUM,
            V_OUTLIER_CODES,
            V_OUTLIER_SCALE,
            V_OUTLIER_ZERO,
            V_PARTS,
            V_BLOCK_N,
            V_BLOCK_O,
            V_BLOCK_R,
        )


def _constants(layout: CodedPage, coding: Coding, side: str) -> dict[str, int | str | bool]:
    """Compile-time arguments of the kernel for K (``key``) or V (``value``)."""
    # Elements that share a byte lie this many to a vector apart.
    parts = {2: 4, 3: 8, 4: 2}.get(coding.bits, 1)
    block_n = triton.next_power_of_2(coding.inner // parts)
    if coding.axis == "tokens":
        rows = triton.next_power_of_2(coding.group)
        block_n = min(block_n, max(GROUP_TILE // (rows * parts), 16))
    else:
        rows = max(TILE // (block_n * parts), 1)
    found = {
        "KIND": coding.kind,
        "BITS": coding.bits,
        "INNER": coding.inner,
        "GROUP": coding.group,
        "OUTLIERS": coding.outliers,
        "SUMS": coding.sums,
        "FIT": coding.fit,
        "PARTS": parts,
        "BLOCK_N": block_n,
        "BLOCK_O": triton.next_power_of_2(max(coding.outliers, 1)),
        "BLOCK_R": rows,
    }
    offsets = {field.name: field.offset for field in layout.fields}
    for name in ("codes", "scale", "zero", "sum", "outlier_codes", "outlier_scale", "outlier_zero"):
        found[name.upper()] = offsets.get(f"{side}_{name}", 0)
    return {f"{side[0].upper()}_{name}": value for name, value in found.items()}


def kernel_constants(layout: CodedPage, heads: int, block_size: int) -> dict[str, int | str | bool]:
    """The compile-time arguments of `quant_write_kernel`, but for ``RING``."""
    return {
        "HEADS": heads,
        "BLOCK_SIZE": block_size,
        "K_AXIS": layout.key.axis,
        **_constants(layout, layout.key, "key"),
        **_constants(layout, layout.value, "value"),
    }


@checked(check_arguments)
def quant_write_triton(
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    slots: Tensor,
    layout: CodedPage,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_key: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Same contract as :func:`kvplug_kernels.quant_write.quant_write`."""
    n, heads = key.shape[:2]
    if n * heads == 0:
        return
    tokens = layout.key.axis == "tokens"
    ring = recent_key if tokens else None
    constants = kernel_constants(layout, heads, pages.shape[2])
    pairs = n * heads
    n_key = pairs if tokens else triton.cdiv(pairs, int(constants["K_BLOCK_R"]))
    n_value = triton.cdiv(pairs, int(constants["V_BLOCK_R"]))
    words = [
        pages.view(WORDS[coding.bits]) if coding.kind == "plain" else None
        for coding in (layout.key, layout.value)
    ]
    with torch.cuda.device_of(pages):
        quant_write_kernel[(n_key + n_value,)](
            key,
            value,
            pages,
            pages.view(torch.int16),
            *words,
            slots,
            recent_slots if ring is not None else None,
            ring,
            key_levels if layout.key.kind == "codebook" else None,
            value_levels if layout.value.kind == "codebook" else None,
            nonfinite,
            n,
            n_key,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            pages.stride(0),
            pages.stride(1),
            *(ring.stride()[:3] if ring is not None else (0, 0, 0)),
            RING=ring.shape[1] if ring is not None else 1,
            **constants,
            # A fused product and sum is rounded once, the specification's twice.
            enable_fp_fusion=False,
        )
