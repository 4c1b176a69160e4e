"""Triton functions that the kernels of several operations call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tokens(
    cache,
    p_table,
    i_h,
    o_t,
    m_t,
    stride_b,
    stride_h,
    stride_t,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Vectors of the resident tokens ``o_t`` of one row and head, ``[tokens, BLOCK_D]`` of the
    dtype of the cache, zero where ``m_t`` is not set."""
    o_d = tl.arange(0, BLOCK_D)
    i_b = tl.load(p_table + o_t // BLOCK_SIZE, mask=m_t, other=0).to(tl.int64)
    p_token = cache + i_b * stride_b + i_h * stride_h + (o_t % BLOCK_SIZE).to(tl.int64) * stride_t
    m_token = m_t[:, None] & (o_d < HEAD_SIZE)[None, :]
    return tl.load(p_token[:, None] + o_d[None, :], mask=m_token, other=0)


@triton.jit
def cap_logits(b_logit, softcap):
    """``softcap * tanh(logit / softcap)``."""
    b_x = b_logit / softcap
    b_decay = tl.exp(-2 * tl.abs(b_x))
    b_tanh = (1 - b_decay) / (1 + b_decay)
    return softcap * tl.where(b_x < 0, -b_tanh, b_tanh)


@triton.jit
def code_units(p_codes, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Pointers to bytes as pointers to the units that WIDTH codes are packed in; see
    `coding.unit_bits`."""
    if BITS < 8 and WIDTH * (1 if BITS == 3 else BITS) % 16 == 0:
        return p_codes.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        return p_codes


@triton.jit
def element_codes(p_codes, o_d, m, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes of channels ``o_d`` of tokens whose bytes begin at ``p_codes``, int32, 0 where ``m`` is
    not set. A unit is loaded for each code it holds; all but the first come from a cache."""
    if BITS == 8:
        b_code = tl.load(p_codes + o_d, mask=m, other=0).to(tl.int32)
    else:
        p_units = code_units(p_codes, WIDTH, BITS)
        UNIT: tl.constexpr = p_units.dtype.element_ty.primitive_bitwidth
        if BITS == 3:
            LOW: tl.constexpr = WIDTH * 2 // UNIT
            HIGH: tl.constexpr = WIDTH // UNIT
            b_low = tl.load(p_units + o_d % LOW, mask=m, other=0).to(tl.int32)
            b_high = tl.load(p_units + LOW + o_d % HIGH, mask=m, other=0).to(tl.int32)
            b_code = ((b_low >> (o_d // LOW * 2)) & 3) | ((b_high >> (o_d // HIGH) & 1) << 2)
        else:
            UNITS: tl.constexpr = WIDTH * BITS // UNIT
            b_unit = tl.load(p_units + o_d % UNITS, mask=m, other=0).to(tl.int32)
            b_code = (b_unit >> (o_d // UNITS * BITS)) & ((1 << BITS) - 1)
    return b_code


@triton.jit
def e4m3_over_256(b_code):
    """e4m3 numbers over 256 as float16: the bits differ in their place and the bias alone."""
    b_bits = ((b_code & 0x80) << 8) | ((b_code & 0x7F) << 7)
    return b_bits.to(tl.int16).to(tl.float16, bitcast=True)
