"""Attention over coded pages on tensor cores, whose operands are unpacked in registers.

A token's codes are loaded as the halfwords they are packed in (`kvplug_kernels.coding.pack`) and
change their layout as such. The codes at one position of all halfwords, a plane, are then a matrix
of float16 numbers by one operation for two of them: the code's bits under the exponent that makes
their lowest bit 1 and the number ``offset + code``. Products are of planes with the query's
channels of that plane; offsets, scales and zeros are taken to the logits and the weights.

Tokens are the rows of both products and query heads their columns, eight or more: a group of query
heads fills what it would leave empty of the rows. A program of decode is one warp, which exchanges
nothing with others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..coding import CodedPage, Coding, unit_bits
from ..splits import multiprocessors
from ..tiles import cap_logits
from .naive import WEIGHT_TILE

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_UNIT = tl.constexpr(2.0**-24)
"""Smallest positive float16."""
WEIGHT_TOP = tl.constexpr(2.0**14)
"""What a weight of 1 becomes where values have the largest scale, of float16's 65,504."""


PTX_8 = tl.constexpr("""
prmt.b32 $0, $2, 0x64646464, 0x4240;
prmt.b32 $1, $2, 0x64646464, 0x4341;
""")
PTX_4 = tl.constexpr("""{
.reg .b32 low, high;
shl.b32 low, $4, 2;
shr.u32 high, $4, 6;
lop3.b32 $0, low, 0x003C003C, 0x5C005C00, 0xEA;
lop3.b32 $1, low, 0x03C003C0, 0x4C004C00, 0xEA;
lop3.b32 $2, high, 0x003C003C, 0x5C005C00, 0xEA;
lop3.b32 $3, high, 0x03C003C0, 0x4C004C00, 0xEA;
}""")
PTX_2 = tl.constexpr("""{
.reg .b32 low, high;
shl.b32 low, $8, 2;
shr.u32 high, $8, 6;
lop3.b32 $0, low, 0x000C000C, 0x5C005C00, 0xEA;
lop3.b32 $1, low, 0x00300030, 0x54005400, 0xEA;
lop3.b32 $2, low, 0x00C000C0, 0x4C004C00, 0xEA;
lop3.b32 $3, low, 0x03000300, 0x44004400, 0xEA;
lop3.b32 $4, high, 0x000C000C, 0x5C005C00, 0xEA;
lop3.b32 $5, high, 0x00300030, 0x54005400, 0xEA;
lop3.b32 $6, high, 0x00C000C0, 0x4C004C00, 0xEA;
lop3.b32 $7, high, 0x03000300, 0x44004400, 0xEA;
}""")


@triton.jit
def plane_offset(PLANE: tl.constexpr, BITS: tl.constexpr):
    """What `unpack_planes` adds to the codes of a plane."""
    if BITS == 8:
        return 1024.0
    elif BITS == 4:
        return 256.0 if PLANE % 2 == 0 else 16.0
    elif PLANE % 4 == 0:
        return 256.0
    elif PLANE % 4 == 1:
        return 64.0
    else:
        return 16.0 if PLANE % 4 == 2 else 4.0


@triton.jit
def _plane(b_half, MASK: tl.constexpr, EXPONENT: tl.constexpr):
    return ((b_half & MASK) | EXPONENT).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def unpack_planes(b_half, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Planes of halfwords, int16: ``16 / BITS`` matrices of float16 numbers ``offset + code``.

    Codes of 2 and 4 bits are shifted to bit 2 and above, by one shift for the lower and one for
    the upper half of the planes. An offset is then at most 17 times the largest code of 4 bits, so
    that sums of products keep their digits. ``INTERPRETED`` does to one halfword what the
    instructions do to a pair of them.
    """
    b_low, b_high = b_half << 2, b_half >> 6
    if INTERPRETED:
        if BITS == 8:
            return (_plane(b_half, 0xFF, 0x6400), _plane(b_half >> 8, 0xFF, 0x6400))
        elif BITS == 4:
            return (
                _plane(b_low, 0x3C, 0x5C00),
                _plane(b_low, 0x3C0, 0x4C00),
                _plane(b_high, 0x3C, 0x5C00),
                _plane(b_high, 0x3C0, 0x4C00),
            )
        else:
            return (
                _plane(b_low, 0xC, 0x5C00),
                _plane(b_low, 0x30, 0x5400),
                _plane(b_low, 0xC0, 0x4C00),
                _plane(b_low, 0x300, 0x4400),
                _plane(b_high, 0xC, 0x5C00),
                _plane(b_high, 0x30, 0x5400),
                _plane(b_high, 0xC0, 0x4C00),
                _plane(b_high, 0x300, 0x4400),
            )
    elif BITS == 8:
        return tl.inline_asm_elementwise(
            PTX_8, "=r,=r,r", [b_half], (tl.float16,) * 2, is_pure=True, pack=2
        )
    elif BITS == 4:
        return tl.inline_asm_elementwise(
            PTX_4, "=r,=r,=r,=r,r", [b_half], (tl.float16,) * 4, is_pure=True, pack=2
        )
    else:
        constraints: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r"
        return tl.inline_asm_elementwise(
            PTX_2, constraints, [b_half], (tl.float16,) * 8, is_pure=True, pack=2
        )


@triton.jit
def _channels(o_u, PLANE: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Channels whose codes are at position ``PLANE`` of halfwords ``o_u``."""
    if BITS == 8:
        return 2 * o_u + PLANE
    else:
        return PLANE * UNITS + o_u


@triton.jit
def _power_of_two(b_x):
    """The largest power of two that is not above positive numbers, as its float32 bits."""
    return b_x.to(tl.int32, bitcast=True) & 0x7F800000


@triton.jit
def _inverse(b_bits):
    """1 over powers of two, given and returned as their bits; of 2**127, 2**-126."""
    return tl.maximum((254 << 23) - b_bits, 1 << 23)


@triton.jit
def _per_token(
    pages_at,
    b_ids,
    o_in,
    i_h,
    stride_pb,
    stride_ph,
    FIELD: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A field of two bytes, as float16, of the tokens of a tile: a vector for each group of
    channels. ``b_ids`` are the tile's blocks, ``o_in`` the places in a block."""
    p_page = pages_at + b_ids.to(tl.int64) * stride_pb + i_h * stride_ph
    p_field = (p_page + BLOCK_SIZE * FIELD).to(tl.pointer_type(tl.float16), bitcast=True)
    p_token = p_field[:, None] + (o_in * GROUPS)[None, :]
    found = ()
    for g in tl.static_range(GROUPS):
        found = found + (tl.reshape(tl.load(p_token + g), [BLOCK_T]),)
    return found


@triton.jit(do_not_specialize=["limit", "n_splits", "stride_br"])
def attend_planes_kernel(
    query,
    pages,
    block_table,
    lens,
    query_start,
    partial,
    partial_lse,
    scale,
    softcap,
    limit,
    n_splits,
    stride_qt,
    stride_qh,
    stride_pb,
    stride_ph,
    stride_br,
    HEADS: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_CODES: tl.constexpr,
    K_SCALE: tl.constexpr,
    K_ZERO: tl.constexpr,
    K_SUM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_ZERO: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Each program attends a tile of one row's queries of the heads that read one stored head to
    one split of the row's tokens, and writes its normalized sum and log-sum-exp.

    ``K_CODES`` and the like are offsets of fields. ``BLOCK_K`` and ``BLOCK_V`` are the halfwords of
    a vector, padded. A tile of ``BLOCK_T`` tokens is whole blocks or lies in one.

    Keys with scales along tokens become float16 numbers in the operand's registers; ``K_TOKENS`` is
    the tokens of a group, which has its tiles to itself, 0 otherwise.

    Integer products are of the query's codes, and of the weights' in a tile, as float16: integers
    of which every sum is below 2**24, and so exact in float32.
    """
    K_PLANES: tl.constexpr = 16 // K_BITS
    V_PLANES: tl.constexpr = 16 // V_BITS
    K_UNITS: tl.constexpr = K_WIDTH * K_BITS // 16
    V_UNITS: tl.constexpr = V_WIDTH * V_BITS // 16
    V_MIDDLE: tl.constexpr = 1 << (V_BITS - 1)
    V_SHIFT: tl.constexpr = V_MIDDLE if INTEGER else 0
    SPAN: tl.constexpr = min(BLOCK_T, BLOCK_SIZE)
    BLOCKS: tl.constexpr = BLOCK_T // SPAN
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    i_s = tl.program_id(2)

    n_resident = tl.maximum(tl.minimum(tl.load(lens + i_r), limit), 0)
    i_first = tl.load(query_start + i_r)
    n_query = tl.load(query_start + i_r + 1) - i_first
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_query = o_n // QUERY_GROUP
    m_n = o_query < n_query
    o_token = (i_first + o_query).to(tl.int64)
    o_head = i_h * QUERY_GROUP + o_n % QUERY_GROUP
    b_seen = tl.zeros([BLOCK_N], tl.int32) + n_resident
    if CAUSAL:
        b_seen = n_resident - n_query + o_query + 1
    b_seen = tl.where(m_n, b_seen, 0)

    # Queries as float16 whose largest element is 2**8 to 2**9: what they were times a power of two.
    p_query = query + o_token * stride_qt + o_head * stride_qh
    o_k = tl.arange(0, BLOCK_K)
    m_q = (o_k < K_UNITS)[:, None] & m_n[None, :]
    b_top = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(K_PLANES):
        o_c = _channels(o_k, i, K_BITS, K_UNITS)
        b_q = tl.load(p_query[None, :] + o_c[:, None], mask=m_q, other=0).to(tl.float32)
        b_top = tl.maximum(b_top, tl.max(tl.abs(b_q), 0))
    b_unit = _power_of_two(tl.where(b_top > 0, b_top, 1.0))
    b_q_unit = b_unit.to(tl.float32, bitcast=True) * 2.0**-8
    if INTEGER:
        b_q_unit = tl.full([BLOCK_N], 1.0, tl.float32)
    b_unit = _inverse(b_unit).to(tl.float32, bitcast=True) * 2.0**8
    queries = ()
    sums = ()
    starts = ()
    q_scales = ()
    q_zeros = ()
    for g in tl.static_range(K_GROUPS):
        if INTEGER:
            b_q_zero = tl.full([BLOCK_N], float("inf"), tl.float32)
            b_q_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
            for j in tl.static_range(g * K_PLANES // K_GROUPS, (g + 1) * K_PLANES // K_GROUPS):
                o_c = _channels(o_k, j, K_BITS, K_UNITS)
                b_q = tl.load(p_query[None, :] + o_c[:, None], mask=m_q, other=0).to(tl.float32)
                b_q_zero = tl.minimum(b_q_zero, tl.min(tl.where(m_q, b_q, float("inf")), 0))
                b_q_top = tl.maximum(b_q_top, tl.max(tl.where(m_q, b_q, float("-inf")), 0))
            b_q_zero = tl.where(m_n, b_q_zero, 0.0)
            b_q_scale = tl.where(m_n, (b_q_top - b_q_zero) / 255, 0.0)
            m_scale = b_q_scale > 0
            b_inverse = tl.where(m_scale, 1 / tl.where(m_scale, b_q_scale, 1.0), 0.0)
        b_q_sum = tl.zeros([BLOCK_N], tl.float32)
        b_start = tl.zeros([BLOCK_N], tl.float32)
        for j in tl.static_range(g * K_PLANES // K_GROUPS, (g + 1) * K_PLANES // K_GROUPS):
            o_c = _channels(o_k, j, K_BITS, K_UNITS)
            b_q = tl.load(p_query[None, :] + o_c[:, None], mask=m_q, other=0).to(tl.float32)
            if INTEGER:
                b_q = tl.floor((b_q - b_q_zero[None, :]) * b_inverse[None, :] + 0.5)
                b_q = tl.maximum(b_q, 0.0, propagate_nan=tl.PropagateNan.ALL)
                b_q = tl.minimum(b_q, 255.0, propagate_nan=tl.PropagateNan.ALL) - 128
                b_q = tl.where(m_q, b_q, 0.0).to(tl.float16)
            else:
                b_q = (b_q * b_unit[None, :]).to(tl.float16)
            b_plane_sum = tl.sum(b_q.to(tl.float32), 0)
            b_q_sum += b_plane_sum
            if not K_TOKENS:
                b_start -= plane_offset(j, K_BITS) * b_plane_sum
            queries = queries + (b_q,)
        if INTEGER:
            b_q_zero += 128 * b_q_scale
            # What meets the keys' zeros: sq sum(cq) + n zq.
            b_q_sum = b_q_scale * b_q_sum + (K_WIDTH // K_GROUPS) * b_q_zero
            q_scales = q_scales + (b_q_scale,)
            q_zeros = q_zeros + (b_q_zero,)
        sums = sums + (b_q_sum,)
        starts = starts + (tl.zeros([BLOCK_T, BLOCK_N], tl.float32) + b_start[None, :],)

    o_v = tl.arange(0, BLOCK_V)
    found = ()
    for _ in tl.static_range(V_PLANES):
        found = found + (tl.zeros([BLOCK_V, BLOCK_N], tl.float32),)
    # Of each group of channels: the sum of weights as they were multiplied, and that of the zeros.
    weights = ()
    lows = ()
    for _ in tl.static_range(V_GROUPS):
        weights = weights + (tl.zeros([BLOCK_N], tl.float32),)
        lows = lows + (tl.zeros([BLOCK_N], tl.float32),)
    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_norm = tl.zeros([BLOCK_N], tl.float32)
    # A power of two that no scale of the values is above; sums are in units of it.
    v_unit = LEAST_UNIT
    # Logits are in units of the queries' and of log 2, but for those that are capped.
    factor = scale if SOFTCAP else scale * LOG2E

    n_chunk = (n_resident + n_splits * BLOCK_T - 1) // (n_splits * BLOCK_T) * BLOCK_T
    n_begin = i_s * n_chunk
    n_end = tl.minimum(n_begin + n_chunk, tl.max(b_seen, 0))
    p_table = block_table + i_r * stride_br
    o_b = tl.arange(0, BLOCKS)
    o_span = tl.arange(0, SPAN)
    o_tile = tl.arange(0, BLOCK_T)
    n_blocks = (n_end + BLOCK_SIZE - 1) // BLOCK_SIZE
    # Scales are a tile ahead, and the blocks they lie in another one.
    i_b = n_begin // BLOCK_SIZE + o_b
    b_ids = tl.load(p_table + i_b, mask=i_b < n_blocks, other=0)
    o_in = n_begin % BLOCK_SIZE + o_span
    next_ks, next_kz = (), ()
    if not K_TOKENS:
        next_ks = _per_token(
            pages, b_ids, o_in, i_h, stride_pb, stride_ph, K_SCALE, K_GROUPS, BLOCK_SIZE, BLOCK_T
        )
        next_kz = _per_token(
            pages, b_ids, o_in, i_h, stride_pb, stride_ph, K_ZERO, K_GROUPS, BLOCK_SIZE, BLOCK_T
        )
    next_sums = next_kz
    if INTEGER:
        next_sums = _per_token(
            pages, b_ids, o_in, i_h, stride_pb, stride_ph, K_SUM, K_GROUPS, BLOCK_SIZE, BLOCK_T
        )
    next_vs = _per_token(
        pages, b_ids, o_in, i_h, stride_pb, stride_ph, V_SCALE, V_GROUPS, BLOCK_SIZE, BLOCK_T
    )
    next_vz = _per_token(
        pages, b_ids, o_in, i_h, stride_pb, stride_ph, V_ZERO, V_GROUPS, BLOCK_SIZE, BLOCK_T
    )
    i_b = (n_begin + BLOCK_T) // BLOCK_SIZE + o_b
    b_ids = tl.load(p_table + i_b, mask=i_b < n_blocks, other=0)
    for i_t in range(n_begin, n_end, BLOCK_T):
        b_ks, b_kz, b_vs, b_vz = next_ks, next_kz, next_vs, next_vz
        b_sums = next_sums
        o_t = i_t + o_tile
        m_t = o_t < n_resident
        i_block = i_t // BLOCK_SIZE + o_tile // BLOCK_SIZE
        b_block = tl.load(p_table + i_block, mask=i_block < n_blocks, other=0)
        o_page = b_block.to(tl.uint32).to(tl.int64) * stride_pb
        o_place = o_tile % SPAN
        if BLOCK_T < BLOCK_SIZE:
            o_place += i_t % BLOCK_SIZE
        p_page = pages + i_h * stride_ph + o_page
        p_key = p_page + (BLOCK_SIZE * K_CODES + o_place * (2 * K_UNITS))
        p_key = p_key.to(tl.pointer_type(tl.int16), bitcast=True)[:, None] + o_k[None, :]
        if BLOCK_K == K_UNITS:
            b_key = tl.load(p_key)
        else:
            b_key = tl.load(p_key, mask=(o_k < K_UNITS)[None, :], other=0)
        o_in = (i_t + BLOCK_T) % BLOCK_SIZE + o_span
        if not K_TOKENS:
            next_ks = _per_token(
                pages,
                b_ids,
                o_in,
                i_h,
                stride_pb,
                stride_ph,
                K_SCALE,
                K_GROUPS,
                BLOCK_SIZE,
                BLOCK_T,
            )
            next_kz = _per_token(
                pages, b_ids, o_in, i_h, stride_pb, stride_ph, K_ZERO, K_GROUPS, BLOCK_SIZE, BLOCK_T
            )
        next_sums = next_kz
        if INTEGER:
            next_sums = _per_token(
                pages, b_ids, o_in, i_h, stride_pb, stride_ph, K_SUM, K_GROUPS, BLOCK_SIZE, BLOCK_T
            )
        next_vs = _per_token(
            pages, b_ids, o_in, i_h, stride_pb, stride_ph, V_SCALE, V_GROUPS, BLOCK_SIZE, BLOCK_T
        )
        next_vz = _per_token(
            pages, b_ids, o_in, i_h, stride_pb, stride_ph, V_ZERO, V_GROUPS, BLOCK_SIZE, BLOCK_T
        )
        i_b = (i_t + 2 * BLOCK_T) // BLOCK_SIZE + o_b
        b_ids = tl.load(p_table + i_b, mask=i_b < n_blocks, other=0)

        keys = unpack_planes(b_key, K_BITS, INTERPRETED)
        if K_TOKENS:
            i_own = tl.load(p_table + i_t // BLOCK_SIZE).to(tl.uint32).to(tl.int64)
            o_group = i_t % BLOCK_SIZE // K_TOKENS * (2 * K_WIDTH)
            p_group = pages + i_h * stride_ph + i_own * stride_pb + o_group
            p_step = (p_group + BLOCK_SIZE * K_SCALE).to(tl.pointer_type(tl.float16), bitcast=True)
            p_low = (p_group + BLOCK_SIZE * K_ZERO).to(tl.pointer_type(tl.float16), bitcast=True)
            m_own = (o_k < K_UNITS)[None, :]
            b_product = starts[0]
            for j in tl.static_range(K_PLANES):
                o_own = _channels(o_k, j, K_BITS, K_UNITS)[None, :]
                b_key_step = tl.load(p_step + o_own, mask=m_own, other=0)
                b_key_low = tl.load(p_low + o_own, mask=m_own, other=0)
                b_plane = (keys[j] - plane_offset(j, K_BITS)) * b_key_step + b_key_low
                b_product = tl.dot(b_plane.to(tl.float16), queries[j], b_product)
            b_logit = b_product * factor
        else:
            b_logit = sums[0][None, :] * (b_kz[0].to(tl.float32) * factor)[:, None]
            for g in tl.static_range(1, K_GROUPS):
                b_logit += sums[g][None, :] * (b_kz[g].to(tl.float32) * factor)[:, None]
            for g in tl.static_range(K_GROUPS):
                b_product = starts[g]
                for j in tl.static_range(g * K_PLANES // K_GROUPS, (g + 1) * K_PLANES // K_GROUPS):
                    b_product = tl.dot(keys[j], queries[j], b_product)
                if INTEGER:
                    b_total = b_sums[g].to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
                    b_product = b_product * q_scales[g][None, :]
                    b_product += q_zeros[g][None, :] * b_total.to(tl.float32)[:, None]
                b_logit += b_product * (b_ks[g].to(tl.float32) * factor)[:, None]
        if SOFTCAP:
            b_logit = cap_logits(b_logit * b_q_unit[None, :], softcap) * LOG2E
        if CAUSAL:
            b_logit = tl.where(o_t[:, None] < b_seen[None, :], b_logit, float("-inf"))
        else:
            b_logit = tl.where(m_t[:, None], b_logit, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_logit, 0))
        # A query that has seen nothing yet has no maximum to take off.
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        if SOFTCAP:
            b_weight = tl.exp2(b_logit - b_base[None, :])
            b_shrink = tl.exp2(b_max - b_base)
        else:
            b_weight = tl.exp2(b_logit * b_q_unit[None, :] - (b_base * b_q_unit)[None, :])
            b_shrink = tl.exp2((b_max - b_base) * b_q_unit)
        b_max = b_top
        b_norm = b_norm * b_shrink + tl.sum(b_weight, 0)

        if not INTEGER:
            top = LEAST_UNIT
            for g in tl.static_range(V_GROUPS):
                b_scale = tl.where(m_t, b_vs[g].to(tl.float32), 0.0)
                top = tl.maximum(top, tl.max(b_scale, 0))
            bits = _power_of_two(top)
            unit = tl.maximum(v_unit, 2 * bits.to(tl.float32, bitcast=True))
            inverse = _inverse(_power_of_two(unit)).to(tl.float32, bitcast=True)
            b_shrink_sum = b_shrink * (v_unit * inverse)
            v_unit = unit
        p_value = p_page + (BLOCK_SIZE * V_CODES + o_place * (2 * V_UNITS))
        p_value = p_value.to(tl.pointer_type(tl.int16), bitcast=True)[None, :] + o_v[:, None]
        # Loaded with channels first, so that no operation lies between it and its operand.
        if BLOCK_V == V_UNITS:
            b_value = tl.load(p_value)
        else:
            b_value = tl.load(p_value, mask=(o_v < V_UNITS)[:, None], other=0)
        values = unpack_planes(b_value, V_BITS, INTERPRETED)
        new_found = ()
        new_weights = ()
        new_lows = ()
        for g in tl.static_range(V_GROUPS):
            b_zero = tl.where(m_t, b_vz[g].to(tl.float32), 0.0)
            if INTEGER:
                b_scale = tl.where(m_t, b_vs[g].to(tl.float32), 0.0)
                b_zero += V_MIDDLE * b_scale
                b_scaled = b_weight * b_scale[:, None]
                b_step = tl.max(b_scaled, 0) / 255
                # The inverse of a subnormal step is infinite; such weights are nothing.
                m_step = b_step > 1.2e-38
                b_inverse = tl.where(m_step, 1 / tl.where(m_step, b_step, 1.0), 0.0)
                b_scaled = tl.floor(b_scaled * b_inverse[None, :] + 0.5).to(tl.float16)
            else:
                b_scale = tl.where(m_t, b_vs[g].to(tl.float32) * (inverse * WEIGHT_TOP), 0.0)
                b_scaled = (b_weight * b_scale[:, None]).to(tl.float16)
            b_low = tl.sum(b_weight * b_zero[:, None], 0)
            new_lows = new_lows + (lows[g] * b_shrink + b_low,)
            b_sum = tl.sum(b_scaled.to(tl.float32), 0)
            if INTEGER:
                new_weights = new_weights + (weights[g] * b_shrink + b_step * b_sum,)
            else:
                new_weights = new_weights + (weights[g] * b_shrink_sum + b_sum,)
            for j in tl.static_range(g * V_PLANES // V_GROUPS, (g + 1) * V_PLANES // V_GROUPS):
                if INTEGER:
                    b_product = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
                    b_product = tl.dot(values[j], b_scaled, b_product) * b_step[None, :]
                    new_found = new_found + (found[j] * b_shrink[None, :] + b_product,)
                else:
                    b_before = found[j] * b_shrink_sum[None, :]
                    new_found = new_found + (tl.dot(values[j], b_scaled, b_before),)
        found = new_found
        weights = new_weights
        lows = new_lows

    m_any = b_norm != 0  # NaN is a norm, too
    b_norm = tl.where(m_any, b_norm, 1.0)
    o_part = (o_token * (HEADS * QUERY_GROUP) + o_head) * n_splits + i_s
    if not SOFTCAP:
        b_max = b_max * b_q_unit
    b_lse = tl.where(m_any, (b_max + tl.log2(b_norm)) / LOG2E, float("-inf"))
    tl.store(partial_lse + o_part, b_lse, mask=m_n)
    p_out = partial + o_part * V_WIDTH
    m_out = (o_v < V_UNITS)[:, None] & m_n[None, :]
    for g in tl.static_range(V_GROUPS):
        for j in tl.static_range(g * V_PLANES // V_GROUPS, (g + 1) * V_PLANES // V_GROUPS):
            b_sum = found[j] - (plane_offset(j, V_BITS) + V_SHIFT) * weights[g][None, :]
            if INTEGER:
                b_sum += lows[g][None, :]
            else:
                b_sum = b_sum * (v_unit * (1.0 / WEIGHT_TOP)) + lows[g][None, :]
            o_c = _channels(o_v, j, V_BITS, V_UNITS)
            tl.store(p_out[None, :] + o_c[:, None], b_sum / b_norm[None, :], mask=m_out)


RESIDENT = 8
"""Warps that a multiprocessor holds at a time, by their registers."""
MAX_SPLITS = 256


def _coding_fits(coding: Coding) -> bool:
    if coding.kind != "int" or coding.bits == 3 or coding.outliers:
        return False
    if coding.axis == "tokens" and coding.group % 16:
        return False
    planes, units = 16 // coding.bits, coding.width * coding.bits // 16
    whole = (
        coding.width % 2 == 0 if coding.bits == 8 else unit_bits(coding.width, coding.bits) == 16
    )
    # A group is whole planes; neighbouring channels of 8 bits are in the same halfword.
    grouped = coding.groups == 1 or (coding.bits < 8 and planes % coding.groups == 0)
    return whole and grouped and 8 <= units <= 128


def planes_fit(layout: CodedPage, query: Tensor, block_size: int, integer: bool) -> bool:
    """Whether `attend_planes` serves a layout: ``int`` codes of 2, 4 or 8 bits without outliers,
    that fill halfwords, in groups of channels that are whole planes or (keys) of a multiple of 16
    tokens; 16-bit queries; and blocks of a multiple of 16 tokens. Integer products: of 2 and 4
    bits, with sums of the keys' codes, and of tiles that are whole blocks or parts of one."""
    codings = _coding_fits(layout.key) and _coding_fits(layout.value)
    if integer:
        # Products with codes of 8 bits and their offsets may be above 2**24.
        narrow = max(layout.key.bits, layout.value.bits) < 8
        whole = WEIGHT_TILE % block_size == 0 or block_size % WEIGHT_TILE == 0
        codings = codings and narrow and layout.key.sums and whole
    return codings and query.element_size() == 2 and block_size % 16 == 0


def plane_constants(layout: CodedPage) -> dict[str, int]:
    """The constants of `attend_planes_kernel` that describe K and V."""
    found: dict[str, int] = {}
    for side, coding in (("key", layout.key), ("value", layout.value)):
        own = {
            "WIDTH": coding.width,
            "BITS": coding.bits,
            "GROUPS": coding.groups,
            **({"TOKENS": coding.group if coding.axis == "tokens" else 0} if side == "key" else {}),
            **{n.upper(): layout.field(f"{side}_{n}").offset for n in ("codes", "scale", "zero")},
        }
        if side == "key":
            own["SUM"] = layout.field("key_sum").offset if coding.sums else -1
        found |= {f"{side[0].upper()}_{name}": number for name, number in own.items()}
        units = coding.width * coding.bits // 16
        found[f"BLOCK_{side[0].upper()}"] = max(triton.next_power_of_2(units), 16)
    return found


def plane_tile(layout: CodedPage, block_size: int, columns: int, integer: bool) -> int:
    """Tokens of a step: whole blocks or a part of one, and no more than registers hold."""
    if integer:
        return WEIGHT_TILE
    narrow = columns <= 8 and layout.key.bits < 8 and layout.value.bits < 8
    grouped = max(layout.key.groups, layout.value.groups) > 1
    most = 64 if narrow and not grouped else 32
    if layout.key.axis == "tokens":
        most = min(32, layout.key.group & -layout.key.group)
    return next(
        t for t in (64, 32, 16) if t <= most and (t % block_size == 0 or block_size % t == 0)
    )


def count_splits(programs: int, slots: int, most: int) -> int:
    """Splits of each row's tokens: all programs at once where they are fewer than ``slots``, else
    what leaves the fewest slots without work at the end."""
    if programs <= slots:
        return max(1, min(slots // programs, most))

    def idle(splits: int) -> tuple[float, int]:
        waves = -(-programs * splits // slots)
        return waves * slots / (programs * splits), splits

    return min(range(1, min(4, most) + 1), key=idle)


def attend_planes(
    query: Tensor,
    pages: Tensor,
    layout: CodedPage,
    block_table: Tensor,
    lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    causal: bool,
    softcap: float,
    integer: bool,
    max_query_len: int,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Attend to each split of the rows' tokens; arguments as in
    :func:`kvplug_kernels.paged_attend_quant.paged_attend_quant`, the most tokens of a row in
    ``limit``.

    Returns:
        float32 ``[num_tokens, num_heads, splits, width]``, normalized, and the log-sum-exp
        ``[num_tokens, num_heads, splits]``; of tokens behind the last row's, nothing.
    """
    tokens, num_heads, _ = query.shape
    _, heads, block_size, _ = pages.shape
    rows = block_table.shape[0]
    group = num_heads // heads
    columns = max_query_len * group
    block_n = min(max(triton.next_power_of_2(columns), 8), 64)
    # Each warp has sixteen columns of its own, eight where there are no more.
    warps = max(block_n // 16, 1)
    block_t = plane_tile(layout, block_size, block_n, integer)
    n_tiles = triton.cdiv(columns, block_n)
    slots = max(RESIDENT // warps, 1) * multiprocessors(pages.device)
    most = min(triton.cdiv(limit, 4 * block_t), MAX_SPLITS)
    splits = count_splits(rows * heads * n_tiles, slots, most)
    shape = (tokens, num_heads, splits)
    partial = query.new_empty((*shape, layout.value.width), dtype=torch.float32)
    partial_lse = query.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(pages):
        attend_planes_kernel[(rows * heads, n_tiles, splits)](
            query,
            pages,
            block_table,
            lens,
            query_start,
            partial,
            partial_lse,
            # Python floats: an int would become an integer argument and another compiled kernel.
            float(scale),
            float(softcap),
            limit,
            splits,
            *query.stride()[:2],
            *pages.stride()[:2],
            block_table.stride(0),
            HEADS=heads,
            QUERY_GROUP=group,
            BLOCK_SIZE=block_size,
            **plane_constants(layout),
            # One query of a row sees all its tokens either way.
            CAUSAL=causal and max_query_len > 1,
            SOFTCAP=softcap > 0,
            INTEGER=integer,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=warps,
            # The table, then the pages it names: two steps ahead of the products.
            num_stages=5,
        )
    return partial, partial_lse
