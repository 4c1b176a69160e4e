"""The coded write as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..coding import CodedPage, Coding, unit_bits
from ..tiles import code_units
from .naive import check_arguments

TILE = 4096
"""Elements that a program codes at a time: 32 a thread."""
ROW = 1024
"""Elements of a part of its vectors: eight for each thread are 16 bytes."""
FEW_TOKENS = 64
"""Tokens up to which each has programs of its own where keys are grouped along tokens: those of
decoding requests, each in another group."""
WORDS = {16: torch.int16, 32: torch.int32}


@triton.jit
def clean(b_x):
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
    """The nearest codes, halves upwards."""
    b_code = tl.minimum(tl.maximum((b_x - b_zero) * b_inverse, 0.0), TOP)
    # Nothing is below 0.5 now, so that the conversion, which truncates, rounds down.
    return (b_code + 0.5).to(tl.int32)


@triton.jit
def _within(b_x):
    """Sums of the groups of ``[R, A, N, B, P]``, whose axes N and P lie within a group."""
    return tl.sum(tl.sum(b_x, 4), 2)


@triton.jit
def _spread(b_x):
    """A number of each group for each of its elements: ``[R, A, B]`` to ``[R, A, 1, B, 1]``."""
    return b_x[:, :, None, :, None]


@triton.jit
def affine_codes(b_x, m_x, GROUP: tl.constexpr, TOP: tl.constexpr, FIT: tl.constexpr):
    """Codes int32 of groups ``[R, A, N, B, P]``; their scales and zeros, float16 ``[R, A, B]``.
    Elements outside ``m_x``, if it is given, are in no group."""
    b_bottom, b_top = b_x, b_x
    if m_x is not None:
        b_bottom, b_top = tl.where(m_x, b_x, 65504.0), tl.where(m_x, b_x, -65504.0)
    # Adding 0 leaves no negative zero.
    b_low = tl.min(tl.min(b_bottom, 4), 2) + 0.0
    b_high = tl.max(tl.max(b_top, 4), 2) + 0.0
    b_scale, b_zero = _affine(b_low, b_high, TOP)
    b_code = _int_codes(b_x, _spread(_inverse(b_scale)), _spread(b_zero.to(tl.float32)), TOP)
    if FIT > 0:
        b_in = b_x
        if m_x is not None:
            b_in = tl.where(m_x, b_x, 0.0)
        b_mean = tl.div_rn(_within(b_in), tl.full(b_low.shape, GROUP * 1.0, tl.float32))
        b_off = b_in - _spread(b_mean)
        if m_x is not None:
            b_off = tl.where(m_x, b_off, 0.0)
        for _ in tl.static_range(FIT):
            b_c = _as_float(b_code)
            if m_x is not None:
                b_c = tl.where(m_x, b_c, 0.0)
            # Sums of codes and of their squares are whole numbers below 2**24.
            b_total = _within(b_c)
            b_middle = tl.div_rn(b_total, tl.full(b_low.shape, GROUP * 1.0, tl.float32))
            b_var = _within(b_c * b_c) - b_total * b_middle
            b_along = _within(b_c * b_off)
            b_step = tl.div_rn(b_along, tl.maximum(b_var, 1e-9))
            b_step = tl.minimum(tl.maximum(b_step, 0.0), 65504.0) + 0.0
            b_scale = tl.where(b_var > 0, b_step.to(tl.float16), b_scale)
            b_low = b_mean - b_scale.to(tl.float32) * b_middle
            b_low = tl.minimum(tl.maximum(b_low, -65504.0), 65504.0) + 0.0
            b_zero = tl.where(b_var > 0, b_low.to(tl.float16), b_zero)
            b_code = _int_codes(
                b_x, _spread(_inverse(b_scale)), _spread(b_zero.to(tl.float32)), TOP
            )
    return b_code, b_scale, b_zero


@triton.jit
def _as_float(b_code):
    """float32 of codes below 2**23, without the conversion, of which a GPU makes few at a time."""
    return (b_code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _middle(levels, AT: tl.constexpr):
    """The bound between a level and the next."""
    return (tl.load(levels + AT) + tl.load(levels + AT + 1)) * 0.5


@triton.jit
def _look_up_2(table, b_i):
    b_even, b_odd = tl.split(b_i)
    return tl.join(tl.load(table + b_even), tl.load(table + b_odd))


@triton.jit
def _look_up_4(table, b_i):
    b_even, b_odd = tl.split(tl.reshape(b_i, [b_i.shape[0], b_i.shape[1], 2, 2]))
    return tl.reshape(tl.join(_look_up_2(table, b_even), _look_up_2(table, b_odd)), b_i.shape)


@triton.jit
def _look_up_8(table, b_i):
    b_even, b_odd = tl.split(tl.reshape(b_i, [b_i.shape[0], b_i.shape[1], 4, 2]))
    return tl.reshape(tl.join(_look_up_4(table, b_even), _look_up_4(table, b_odd)), b_i.shape)


@triton.jit
def _look_up(table, b_i):
    """Entries of a table in memory by indices ``[R, BLOCK_N, PARTS]``, a load for each part: such
    loads are laid out among the threads as those of the elements are."""
    PARTS: tl.constexpr = b_i.shape[2]
    if PARTS == 1:
        return tl.load(table + b_i)
    elif PARTS == 2:
        return _look_up_2(table, b_i)
    elif PARTS == 4:
        return _look_up_4(table, b_i)
    elif PARTS == 8:
        return _look_up_8(table, b_i)
    else:
        b_even, b_odd = tl.split(tl.reshape(b_i, [b_i.shape[0], b_i.shape[1], 8, 2]))
        return tl.reshape(tl.join(_look_up_8(table, b_even), _look_up_8(table, b_odd)), b_i.shape)


@triton.jit
def _book_codes(b_x, m_x, levels, GROUP: tl.constexpr, BITS: tl.constexpr, FIT: tl.constexpr):
    """Codes int32 of groups ``[R, A, N, B, P]`` and their scales, float16 ``[R, A, B]``:
    comparisons halve the codebook until a pair of levels is left, which is loaded."""
    b_in = b_x
    if m_x is not None:
        b_in = tl.where(m_x, b_x, 0.0)
    b_square = _within(b_in * b_in)
    b_size = tl.sqrt_rn(tl.div_rn(b_square, tl.full(b_square.shape, GROUP * 1.0, tl.float32)))
    R: tl.constexpr = b_x.shape[0]
    PLAIN: tl.constexpr = [R, b_x.shape[1] * b_x.shape[2], b_x.shape[3] * b_x.shape[4]]
    HALF: tl.constexpr = 1 << (BITS - 1)
    QUARTER: tl.constexpr = HALF // 2
    b_half = _middle(levels, HALF - 1)
    if BITS > 2:
        b_quarter, b_three = _middle(levels, QUARTER - 1), _middle(levels, HALF + QUARTER - 1)
    if BITS > 3:
        b_1, b_3, b_5, b_7 = (
            _middle(levels, 1),
            _middle(levels, 5),
            _middle(levels, 9),
            _middle(levels, 13),
        )
    b_scale = b_size.to(tl.float16)
    b_code = tl.zeros(b_x.shape, tl.int32)
    for _ in tl.static_range(FIT + 1):
        b_inverse = tl.div_rn(1.0, tl.where(b_size > 0, b_size, 1.0))
        b_unit = b_x * _spread(b_inverse)
        m_half = b_unit > b_half
        b_pair = m_half.to(tl.int32)
        if BITS > 2:
            m_quarter = b_unit > tl.where(m_half, b_three, b_quarter)
            b_pair = b_pair * 2 + m_quarter.to(tl.int32)
        if BITS > 3:
            b_eighth = tl.where(
                m_half, tl.where(m_quarter, b_7, b_5), tl.where(m_quarter, b_3, b_1)
            )
            b_pair = b_pair * 2 + (b_unit > b_eighth).to(tl.int32)
        b_low = tl.reshape(_look_up(levels, tl.reshape(b_pair * 2, PLAIN)), b_x.shape)
        b_high = tl.reshape(_look_up(levels + 1, tl.reshape(b_pair * 2, PLAIN)), b_x.shape)
        m_last = b_unit > (b_low + b_high) * 0.5
        b_chosen = tl.where(m_last, b_high, b_low)
        b_code = b_pair * 2 + m_last.to(tl.int32)
        if m_x is not None:
            b_chosen = tl.where(m_x, b_chosen, 0.0)
        b_fit = tl.div_rn(_within(b_x * b_chosen), tl.maximum(_within(b_chosen * b_chosen), 1e-9))
        b_scale = (tl.minimum(tl.maximum(b_fit, 0.0), 65504.0) + 0.0).to(tl.float16)
        b_size = b_scale.to(tl.float32)
    return b_code, b_scale


@triton.jit
def float8_codes(b_x, m_x):
    """The same of e4m3."""
    b_size = tl.abs(b_x)
    if m_x is not None:
        b_size = tl.where(m_x, b_size, 0.0)
    b_high = tl.max(tl.max(b_size, 4), 2)
    b_scale = (b_high * (1.0 / 448.0)).to(tl.float16)
    # A negative zero would keep its sign.
    return _fp8_codes((b_x + 0.0) * _spread(_inverse(b_scale))), b_scale


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
def load_codes(p_unit, m_j, PARTS: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr):
    """Codes that `store_codes` stored, int32 ``[R, BLOCK_N, PARTS]``."""
    o_part = tl.arange(0, PARTS)[None, None, :]
    b_unit = tl.load(p_unit, mask=m_j, other=0).to(tl.int32)[:, :, None]
    if BITS == 3:
        b_next = tl.load(p_unit + N, mask=m_j, other=0).to(tl.int32)[:, :, None]
        b_high = tl.load(p_unit + 2 * N, mask=m_j, other=0).to(tl.int32)[:, :, None]
        b_low = tl.where(o_part % 2 == 0, b_unit, b_next) >> (2 * (o_part // 2))
        return (b_low & 3) | (((b_high >> o_part) & 1) << 2)
    else:
        return (b_unit >> (BITS * o_part)) & ((1 << BITS) - 1)


@triton.jit
def _load_part(p_x, m_x, AT: tl.constexpr):
    return tl.load(p_x + AT, mask=m_x, other=0.0)


@triton.jit
def _load_2(p_x, m_x, AT: tl.constexpr, STEP: tl.constexpr):
    return tl.join(_load_part(p_x, m_x, AT), _load_part(p_x, m_x, AT + STEP))


@triton.jit
def _load_4(p_x, m_x, AT: tl.constexpr, STEP: tl.constexpr):
    b_even = _load_2(p_x, m_x, AT, 2 * STEP)
    b_odd = _load_2(p_x, m_x, AT + STEP, 2 * STEP)
    return tl.reshape(tl.join(b_even, b_odd), [b_even.shape[0], b_even.shape[1], 4])


@triton.jit
def _load_8(p_x, m_x, AT: tl.constexpr, STEP: tl.constexpr):
    b_even = _load_4(p_x, m_x, AT, 2 * STEP)
    b_odd = _load_4(p_x, m_x, AT + STEP, 2 * STEP)
    return tl.reshape(tl.join(b_even, b_odd), [b_even.shape[0], b_even.shape[1], 8])


@triton.jit
def load_parts(p_x, m_x, N: tl.constexpr, PARTS: tl.constexpr):
    """Elements ``part * N`` behind ``p_x [R, BLOCK_N]``, ``[R, BLOCK_N, PARTS]``. The parts are
    loads of their own, so that a thread has all parts of its channels, whose codes share a unit."""
    if PARTS == 1:
        b_x = _load_part(p_x, m_x, 0)
        return tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 1])
    elif PARTS == 2:
        return _load_2(p_x, m_x, 0, N)
    elif PARTS == 4:
        return _load_4(p_x, m_x, 0, N)
    elif PARTS == 8:
        return _load_8(p_x, m_x, 0, N)
    else:
        b_even, b_odd = _load_8(p_x, m_x, 0, 2 * N), _load_8(p_x, m_x, N, 2 * N)
        return tl.reshape(tl.join(b_even, b_odd), [b_even.shape[0], b_even.shape[1], 16])


@triton.jit
def store_codes(p_units, b_code, m_j, BITS: tl.constexpr, N: tl.constexpr):
    """Pack the codes ``[R, BLOCK_N, PARTS]`` of elements ``part * N + j`` and store them from
    ``p_units [R, BLOCK_N]``, the addresses of units ``j``."""
    R: tl.constexpr = b_code.shape[0]
    BLOCK_N: tl.constexpr = b_code.shape[1]
    PARTS: tl.constexpr = b_code.shape[2]
    o_part = tl.arange(0, PARTS)[None, None, :]
    if BITS == 8:
        if PARTS == 4:
            b_first, b_second = tl.split(tl.reshape(b_code.to(tl.uint8), [R, BLOCK_N, 2, 2]))
            b_0, b_2 = tl.split(b_first)
            b_1, b_3 = tl.split(b_second)
            tl.store(p_units, b_0, mask=m_j)
            tl.store(p_units + N, b_1, mask=m_j)
            tl.store(p_units + 2 * N, b_2, mask=m_j)
            tl.store(p_units + 3 * N, b_3, mask=m_j)
        else:
            tl.static_assert(PARTS == 1)
            tl.store(p_units, tl.reshape(b_code, [R, BLOCK_N]).to(tl.uint8), mask=m_j)
    else:
        UNIT: tl.constexpr = p_units.dtype.element_ty
        if BITS == 3:
            b_pairs = (b_code & 3) << (2 * (o_part // 2))
            b_low, b_next = tl.split(tl.sum(tl.reshape(b_pairs, [R, BLOCK_N, PARTS // 2, 2]), 2))
            tl.store(p_units, b_low.to(UNIT), mask=m_j)
            tl.store(p_units + N, b_next.to(UNIT), mask=m_j)
            b_high = tl.sum((b_code >> 2) << o_part, 2)
            tl.store(p_units + 2 * N, b_high.to(UNIT), mask=m_j)
        else:
            tl.store(p_units, tl.sum(b_code << (BITS * o_part), 2).to(UNIT), mask=m_j)


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
    to unit ``j``, or to those that `store_codes` names."""
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
    # Without padding the mask is a row's, so that a thread's elements are loaded together.
    m_j = m_r[:, None] & (
        tl.full([1, BLOCK_N], True, tl.int1) if N == BLOCK_N else (o_j < N)[None, :]
    )
    if KIND == "plain":
        b_raw = _load_part(p_x[:, None] + o_j[None, :], m_j, 0)
        b_bits = b_raw.to(words.dtype.element_ty, bitcast=True)
        b_bits = tl.where(tl.abs(b_raw.to(tl.float32)) < float("inf"), b_bits, 0)
        if nonfinite is not None:
            n_bad = _count_bad(b_raw, m_j)
            tl.atomic_add(nonfinite, n_bad, mask=n_bad > 0)
        o_word = o_page // (BITS // 8) + CODES * BLOCK_SIZE // (BITS // 8) + i_t * INNER
        tl.store(words + o_word[:, None] + o_j[None, :], b_bits, mask=m_j)
    else:
        b_raw = load_parts(p_x[:, None] + OUTLIERS + o_j[None, :], m_j, N, PARTS)
        b_x = b_raw.to(tl.float32)
        # NaN, infinities and what is too large are seldom, and one sum shows that there are none.
        m_odd = ~(tl.sum(tl.sum(tl.abs(b_x), 2), 1) <= 65504.0)
        if tl.max(m_odd.to(tl.int32), 0) > 0:
            if nonfinite is not None:
                n_bad = _count_bad(b_raw, m_j[:, :, None])
                tl.atomic_add(nonfinite, n_bad, mask=n_bad > 0)
            b_x = clean(b_x)
        p_scale = halves + o_page // 2 + SCALE * BLOCK_SIZE // 2 + i_t * GROUPS
        p_zero = halves + o_page // 2 + ZERO * BLOCK_SIZE // 2 + i_t * GROUPS
        p_sum = halves + o_page // 2 + SUM * BLOCK_SIZE // 2 + i_t * GROUPS
        # Axes A and B count the groups; within one are runs of N channels and whole parts.
        A: tl.constexpr = 1 if GROUP % N == 0 else N // GROUP
        B: tl.constexpr = GROUPS if GROUP % N == 0 else PARTS
        FOLDS: tl.constexpr = GROUP % N == 0 or (N % GROUP == 0 and N == BLOCK_N)
        if FOLDS:
            SHAPE: tl.constexpr = [BLOCK_R, A, BLOCK_N // A, B, PARTS // B]
            m_x = None
            if N != BLOCK_N:
                m_x = tl.reshape((o_j < N)[None, :], [1, 1, BLOCK_N, 1, 1])
            b_in = tl.reshape(b_x, SHAPE)
            o_group = (tl.arange(0, A)[:, None] + tl.arange(0, B)[None, :] * A)[None, :, :]
            if KIND == "int":
                b_code, b_scale, b_zero = affine_codes(b_in, m_x, GROUP, (1 << BITS) - 1, FIT)
                b_zero = b_zero.to(tl.int16, bitcast=True)
                tl.store(p_zero[:, None, None] + o_group, b_zero, mask=m_r[:, None, None])
                if SUMS:
                    b_sum = b_code
                    if m_x is not None:
                        b_sum = tl.where(m_x, b_code, 0)
                    b_sum = _within(b_sum).to(tl.int16)
                    tl.store(p_sum[:, None, None] + o_group, b_sum, mask=m_r[:, None, None])
            elif KIND == "fp8":
                b_code, b_scale = float8_codes(b_in, m_x)
            else:
                b_code, b_scale = _book_codes(b_in, m_x, levels, GROUP, BITS, FIT)
            b_scale = b_scale.to(tl.int16, bitcast=True)
            tl.store(p_scale[:, None, None] + o_group, b_scale, mask=m_r[:, None, None])
            b_code = tl.reshape(b_code, [BLOCK_R, BLOCK_N, PARTS])
        else:
            # Groups that end within a run: one after another, the others' elements left out.
            b_in = tl.reshape(b_x, [BLOCK_R, 1, BLOCK_N, 1, PARTS])
            o_e = o_j[:, None] + tl.arange(0, PARTS)[None, :] * N
            m_e = (o_j < N)[:, None] & (o_e >= 0)
            b_code = tl.zeros([BLOCK_R, 1, BLOCK_N, 1, PARTS], tl.int32)
            for i_g in tl.static_range(GROUPS):
                m_x = tl.reshape(m_e & (o_e // GROUP == i_g), [1, 1, BLOCK_N, 1, PARTS])
                if KIND == "int":
                    b_coded, b_scale, b_zero = affine_codes(b_in, m_x, GROUP, (1 << BITS) - 1, FIT)
                    b_zero = tl.reshape(b_zero, [BLOCK_R]).to(tl.int16, bitcast=True)
                    tl.store(p_zero + i_g, b_zero, mask=m_r)
                    if SUMS:
                        b_sum = tl.reshape(_within(tl.where(m_x, b_coded, 0)), [BLOCK_R])
                        tl.store(p_sum + i_g, b_sum.to(tl.int16), mask=m_r)
                elif KIND == "fp8":
                    b_coded, b_scale = float8_codes(b_in, m_x)
                else:
                    b_coded, b_scale = _book_codes(b_in, m_x, levels, GROUP, BITS, FIT)
                b_scale = tl.reshape(b_scale, [BLOCK_R]).to(tl.int16, bitcast=True)
                tl.store(p_scale + i_g, b_scale, mask=m_r)
                b_code = tl.where(m_x, b_coded, b_code)
            b_code = tl.reshape(b_code, [BLOCK_R, BLOCK_N, PARTS])
        p_codes = pages + o_page + CODES * BLOCK_SIZE + i_t * (INNER * BITS // 8)
        p_units = code_units(p_codes, INNER, BITS)[:, None] + o_j[None, :]
        store_codes(p_units, b_code, m_j, BITS, N)

        if OUTLIERS > 0:
            o_o = tl.arange(0, BLOCK_O)
            m_o = m_r[:, None] & (o_o < OUTLIERS)[None, :]
            b_raw = tl.load(p_x[:, None] + o_o[None, :], mask=m_o, other=0.0)
            if nonfinite is not None:
                n_bad = _count_bad(b_raw, m_o)
                tl.atomic_add(nonfinite, n_bad, mask=n_bad > 0)
            b_o = tl.reshape(clean(b_raw), [BLOCK_R, 1, BLOCK_O, 1, 1])
            m_x = tl.reshape((o_o < OUTLIERS)[None, :], [1, 1, BLOCK_O, 1, 1])
            b_byte, b_scale, b_zero = affine_codes(b_o, m_x, OUTLIERS, 255, 0)
            p_byte = pages + o_page + OUTLIER_CODES * BLOCK_SIZE + i_t * OUTLIERS
            b_byte = tl.reshape(b_byte, [BLOCK_R, BLOCK_O]).to(tl.uint8)
            tl.store(p_byte[:, None] + o_o[None, :], b_byte, mask=m_o)
            p_half = halves + o_page // 2 + i_t
            b_scale = tl.reshape(b_scale, [BLOCK_R]).to(tl.int16, bitcast=True)
            b_zero = tl.reshape(b_zero, [BLOCK_R]).to(tl.int16, bitcast=True)
            tl.store(p_half + OUTLIER_SCALE * BLOCK_SIZE // 2, b_scale, mask=m_r)
            tl.store(p_half + OUTLIER_ZERO * BLOCK_SIZE // 2, b_zero, mask=m_r)


@triton.jit
def _anchor(b_x, b_scale, b_zero, m_opens, TOP: tl.constexpr):
    """Zeros, float16, with which elements lie on a code, where ``m_opens``."""
    b_code = _int_codes(b_x, _inverse(b_scale), b_zero.to(tl.float32), TOP).to(tl.float32)
    b_moved = b_x - b_scale.to(tl.float32) * b_code
    b_moved = tl.minimum(tl.maximum(b_moved, -65504.0), 65504.0) + 0.0
    return tl.where(m_opens, b_moved.to(tl.float16), b_zero)


@triton.jit
def _write_groups(
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
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """Code the groups of which a token among WINDOW is the first of this step, from all of their
    tokens so far, for BLOCK_H heads."""
    N: tl.constexpr = WIDTH // PARTS
    TOP: tl.constexpr = (1 << BITS) - 1
    TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    n_begin = i_p // TILES * WINDOW
    o_w = tl.arange(0, WINDOW)
    m_w = n_begin + o_w < n
    b_slot = tl.load(slots + n_begin + o_w, mask=m_w, other=-1).to(tl.int64)
    m_before = m_w & (n_begin + o_w > 0)
    b_before = tl.load(slots + n_begin + o_w - 1, mask=m_before, other=-1).to(tl.int64)
    # A negative slot is in no group, but -1 // GROUP would be one of those divided towards 0.
    m_first = (b_before < 0) | (b_before // GROUP != b_slot // GROUP)
    b_first = tl.where(m_first & (b_slot >= 0), o_w, WINDOW)

    o_c = tl.arange(0, BLOCK_H * BLOCK_N)
    i_h, o_j = (i_p % TILES) * BLOCK_H + o_c // BLOCK_N, o_c % BLOCK_N
    m_c = (i_h < HEADS) & (o_j < N)
    o_g = tl.arange(0, BLOCK_G)
    o_part = tl.arange(0, PARTS)[None, :] * N
    i_w = tl.min(b_first, 0)
    while i_w < WINDOW:
        i_n = n_begin + i_w
        n_slot = tl.load(slots + i_n).to(tl.int64)
        n_earlier = n_slot % GROUP
        i_x = i_n + o_g - n_earlier
        m_new = (o_g >= n_earlier) & (o_g < GROUP) & (i_x < n)
        b_at = tl.load(slots + i_x, mask=m_new, other=-1).to(tl.int64)
        m_new = m_new & (b_at == n_slot - n_earlier + o_g)
        m_live = (m_new | (o_g < n_earlier))[:, None] & m_c[None, :]
        n_start = n_slot % BLOCK_SIZE - n_earlier
        o_page = (n_slot // BLOCK_SIZE) * stride_pb + i_h * stride_ph
        p_units = code_units(pages + o_page + CODES * BLOCK_SIZE, N * PARTS, BITS) + o_j
        # Units of a token: N of one plane of the codes, or of its three.
        p_units = p_units[None, :] + ((n_start + o_g) * (N * (3 if BITS == 3 else 1)))[:, None]
        # Scales of a group lie behind one another, one per channel.
        p_half = halves + o_page // 2 + n_start * (2 * WIDTH // GROUP) // 2 + o_j
        p_scale = p_half[:, None] + SCALE * BLOCK_SIZE // 2 + o_part
        p_zero = p_half[:, None] + ZERO * BLOCK_SIZE // 2 + o_part
        m_e = tl.broadcast_to(m_c[:, None], [BLOCK_H * BLOCK_N, PARTS])

        p_x = key + (i_x * stride_xn)[:, None] + (i_h * stride_xh + o_j)[None, :]
        m_x = m_new[:, None] & m_c[None, :]
        b_raw = load_parts(p_x, m_x, N, PARTS)
        b_x = b_raw.to(tl.float32)
        m_odd = ~(tl.sum(tl.sum(tl.abs(b_x), 2), 1) <= 65504.0)
        if tl.max(m_odd.to(tl.int32), 0) > 0:
            if nonfinite is not None:
                n_bad = _count_bad(b_raw, m_x[:, :, None])
                tl.atomic_add(nonfinite, n_bad, mask=n_bad > 0)
            b_x = clean(b_x)
        if n_earlier > 0:
            n_kept = n_earlier * 0
            # The earlier tokens are all kept exact, or all read back.
            if recent is not None:
                n_ring_slot = tl.load(recent_slots + i_n).to(tl.int64)
                n_kept = tl.where(n_ring_slot >= 0, n_earlier, 0)
                p_r = recent + n_ring_slot * stride_rl + (i_h * stride_rh + o_j)[None, :]
                p_r = p_r + (((n_start + o_g) % RING) * stride_rt)[:, None]
                m_kept = (o_g < n_kept)[:, None] & m_c[None, :]
                b_kept = load_parts(p_r, m_kept, N, PARTS).to(tl.float32)
                b_x = tl.where(m_kept[:, :, None], b_kept, b_x)
            m_coded = ((o_g >= n_kept) & (o_g < n_earlier))[:, None] & m_c[None, :]
            b_code = load_codes(p_units, m_coded, PARTS, BITS, N)
            m_any = m_e & (n_kept < n_earlier)
            b_scale = tl.load(p_scale, mask=m_any, other=0).to(tl.float16, bitcast=True)
            b_zero = tl.load(p_zero, mask=m_any, other=0).to(tl.float16, bitcast=True)
            b_decoded = b_code.to(tl.float32) * b_scale.to(tl.float32)[None, :, :]
            b_decoded = b_decoded + b_zero.to(tl.float32)[None, :, :]
            b_x = clean(tl.where(m_coded[:, :, None], b_decoded, b_x))
            # No thread writes what another has yet to read.
            tl.debug_barrier()
        b_low = tl.min(tl.where(m_live[:, :, None], b_x, 65504.0), 0) + 0.0
        b_high = tl.max(tl.where(m_live[:, :, None], b_x, -65504.0), 0) + 0.0
        b_scale, b_zero = _affine(b_low, b_high, TOP)
        if ANCHORED:
            b_opening = tl.sum(tl.where((o_g == 0)[:, None, None], b_x, 0.0), 0)
            b_zero = _anchor(b_opening, b_scale, b_zero, n_start == 0, TOP)
        b_inverse, b_from = _inverse(b_scale), b_zero.to(tl.float32)
        b_code = _int_codes(b_x, b_inverse[None, :, :], b_from[None, :, :], TOP)
        store_codes(p_units, b_code, m_live, BITS, N)
        tl.store(p_scale, b_scale.to(tl.int16, bitcast=True), mask=m_e)
        tl.store(p_zero, b_zero.to(tl.int16, bitcast=True), mask=m_e)
        i_w = tl.min(tl.where(o_w > i_w, b_first, WINDOW), 0)


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
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    K_AXIS: tl.constexpr,
    K_ANCHORED: tl.constexpr,
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
            _write_groups(
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
                WINDOW,
                BLOCK_H,
                K_ANCHORED,
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
    # Elements that share a unit lie this many to a vector apart.
    plane_bits = {2: 2, 3: 1, 4: 4}.get(coding.bits)
    parts = unit_bits(coding.inner, coding.bits) // plane_bits if plane_bits else 1
    if coding.bits == 8 and coding.axis == "channels" and coding.inner % 32 == 0:
        parts = 4
    block_n = triton.next_power_of_2(coding.inner // parts)
    if coding.axis == "tokens":
        rows = triton.next_power_of_2(coding.group)
    else:
        # More than 32 elements a thread only where they are coded by few numbers.
        tile = TILE if coding.kind == "codebook" or coding.fit or coding.bits == 3 else 2 * TILE
        rows = max(min(ROW // block_n, tile // (block_n * parts)), 1)
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
    """The compile-time arguments of `quant_write_kernel`, but for ``RING`` and those of
    `group_constants`."""
    return {
        "HEADS": heads,
        "BLOCK_SIZE": block_size,
        "K_AXIS": layout.key.axis,
        "K_ANCHORED": layout.key.anchored,
        **_constants(layout, layout.key, "key"),
        **_constants(layout, layout.value, "value"),
    }


def group_constants(layout: CodedPage, heads: int, tokens: int) -> dict[str, int]:
    """Tokens whose groups a program looks for, and heads that it codes at a time."""
    if layout.key.axis != "tokens":
        return {"WINDOW": 1, "BLOCK_H": 1}
    group = triton.next_power_of_2(layout.key.group)
    at_once = TILE // (group * triton.next_power_of_2(layout.key.width))
    return {
        "WINDOW": 1 if tokens <= FEW_TOKENS else group,
        "BLOCK_H": max(min(at_once, triton.next_power_of_2(heads)), 1),
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
    groups = group_constants(layout, heads, n)
    if tokens:
        n_key = triton.cdiv(n, groups["WINDOW"]) * triton.cdiv(heads, groups["BLOCK_H"])
    else:
        n_key = triton.cdiv(pairs, int(constants["K_BLOCK_R"]))
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
            **groups,
            **constants,
            # A fused product and sum is rounded once, the specification's twice: reading codes back
            # would differ. Along channels only sums are fused, whose order is free anyway.
            enable_fp_fusion=not tokens,
        )
