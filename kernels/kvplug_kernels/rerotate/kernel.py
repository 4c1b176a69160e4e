"""The rotation in place as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..coding import CodedPage
from ..quant_write.kernel import kernel_constants, write_vectors
from ..tiles import e4m3_over_256, element_codes
from .naive import check_arguments, check_coded_arguments, cos_sin, plain_keys

TILE = 2048
"""Pairs of a tile."""

PROGRAMS = 1024
"""Programs from which on more of them would hide no more waits: each then takes more heads."""


@triton.jit(do_not_specialize=["n_slots"])
def rerotate_kernel(
    keys,
    slots,
    cosine,
    sine,
    n_slots,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_cn,
    HEADS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ONE_SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Each program rotates the keys of BLOCK_R slots in HEADS_AT_ONCE heads by one set of
    cosines."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_first = tl.program_id(1) * HEADS_AT_ONCE
    m_r = i_n < n_slots
    b_slot = tl.load(slots + i_n, mask=m_r, other=-1).to(tl.int64)
    m_r = m_r & (b_slot >= 0)
    b_slot = tl.where(m_r, b_slot, 0)
    o_p = tl.arange(0, BLOCK_P)
    m = m_r[:, None] & (o_p < PAIRS)[None, :]
    if ONE_SHIFT:
        b_cosine = tl.load(cosine + o_p, mask=o_p < PAIRS, other=1.0)[None, :]
        b_sine = tl.load(sine + o_p, mask=o_p < PAIRS, other=0.0)[None, :]
    else:
        o_angle = i_n[:, None] * stride_cn + o_p[None, :]
        b_cosine = tl.load(cosine + o_angle, mask=m, other=1.0)
        b_sine = tl.load(sine + o_angle, mask=m, other=0.0)
    p_slot = keys + (b_slot // BLOCK_SIZE) * stride_kb + (b_slot % BLOCK_SIZE) * stride_kt
    for i_h in range(i_first, tl.minimum(i_first + HEADS_AT_ONCE, HEADS)):
        p_key = p_slot + tl.cast(i_h, tl.int64) * stride_kh
        if INTERLEAVED:
            p_a = p_key[:, None] + 2 * o_p[None, :]
            p_b = p_a + 1
        else:
            p_a = p_key[:, None] + o_p[None, :]
            p_b = p_a + PAIRS
        b_a = tl.load(p_a, mask=m, other=0.0).to(tl.float32)
        b_b = tl.load(p_b, mask=m, other=0.0).to(tl.float32)
        b_rotated = b_a * b_cosine - b_b * b_sine
        tl.store(p_a, b_rotated.to(keys.dtype.element_ty), mask=m)
        b_rotated = b_b * b_cosine + b_a * b_sine
        tl.store(p_b, b_rotated.to(keys.dtype.element_ty), mask=m)


@triton.jit
def _decode(
    pages,
    halves,
    levels,
    o_page,
    i_t,
    m_r,
    o_d,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    OUTLIER_CODES: tl.constexpr,
    OUTLIER_SCALE: tl.constexpr,
    OUTLIER_ZERO: tl.constexpr,
):
    """Elements ``o_d [1, D]`` of the keys of some slots, float32 ``[R, D]``, as the specification
    rounds them."""
    m_in = m_r & (o_d >= OUTLIERS) & (o_d < OUTLIERS + INNER)
    o_in = tl.minimum(tl.maximum(o_d - OUTLIERS, 0), INNER - 1)
    p_codes = pages + o_page + CODES * BLOCK_SIZE + i_t * (INNER * BITS // 8)
    b_code = element_codes(p_codes, o_in, m_in, INNER, BITS)
    p_scale = halves + o_page // 2 + SCALE * BLOCK_SIZE // 2 + i_t * (INNER // GROUP)
    b_scale = tl.load(p_scale + o_in // GROUP, mask=m_in, other=0)
    b_scale = b_scale.to(tl.float16, bitcast=True).to(tl.float32)
    if KIND == "fp8":
        # Both factors are off by a power of two, so the product is the same.
        b_x = e4m3_over_256(b_code).to(tl.float32) * (b_scale * 256)
    elif KIND == "codebook":
        b_x = tl.load(levels + b_code, mask=m_in, other=0.0) * b_scale
    else:
        p_zero = halves + o_page // 2 + ZERO * BLOCK_SIZE // 2 + i_t * (INNER // GROUP)
        b_zero = tl.load(p_zero + o_in // GROUP, mask=m_in, other=0)
        b_x = b_code.to(tl.float32) * b_scale + b_zero.to(tl.float16, bitcast=True).to(tl.float32)
    if OUTLIERS > 0:
        m_out = m_r & (o_d < OUTLIERS)
        p_codes = pages + o_page + OUTLIER_CODES * BLOCK_SIZE + i_t * OUTLIERS
        b_code = tl.load(p_codes + o_d, mask=m_out, other=0).to(tl.float32)
        p_own = halves + o_page // 2 + i_t
        b_scale = tl.load(p_own + OUTLIER_SCALE * BLOCK_SIZE // 2, mask=m_r, other=0)
        b_zero = tl.load(p_own + OUTLIER_ZERO * BLOCK_SIZE // 2, mask=m_r, other=0)
        b_scale = b_scale.to(tl.float16, bitcast=True).to(tl.float32)
        b_zero = b_zero.to(tl.float16, bitcast=True).to(tl.float32)
        b_x = tl.where(m_out, b_code * b_scale + b_zero, b_x)
    return b_x


@triton.jit(do_not_specialize=["n_rows"])
def rerotate_coded_kernel(
    pages,
    halves,
    slots,
    cosine,
    sine,
    levels,
    rotated,
    n_rows,
    stride_pb,
    stride_ph,
    stride_cn,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
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
    BLOCK_D: tl.constexpr,
):
    """Each program decodes and rotates the keys of BLOCK_R (slot, head) pairs, lays them out in
    ``rotated [n, HEADS, width]``, which stays in its cache, and codes them from there."""
    WIDTH: tl.constexpr = K_INNER + K_OUTLIERS
    i_p = tl.program_id(0).to(tl.int64)
    o_r = i_p * K_BLOCK_R + tl.arange(0, K_BLOCK_R)
    m_r = o_r < n_rows
    i_n, i_h = o_r // HEADS, o_r % HEADS
    b_slot = tl.load(slots + i_n, mask=m_r, other=-1).to(tl.int64)
    m_live = (m_r & (b_slot >= 0))[:, None]
    b_slot = tl.where(m_r & (b_slot >= 0), b_slot, 0)
    i_t = (b_slot % BLOCK_SIZE)[:, None]
    o_page = ((b_slot // BLOCK_SIZE) * stride_pb + i_h * stride_ph)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_rotates = o_d < 2 * PAIRS
    if INTERLEAVED:
        o_pair = o_d // 2
        m_first = o_d % 2 == 0
        o_other = tl.where(m_rotates, tl.where(m_first, o_d + 1, o_d - 1), o_d)
    else:
        o_pair = o_d % PAIRS
        m_first = o_d < PAIRS
        o_other = tl.where(m_rotates, tl.where(m_first, o_d + PAIRS, o_d - PAIRS), o_d)
    b_x = _decode(
        pages,
        halves,
        levels,
        o_page,
        i_t,
        m_live,
        o_d,
        BLOCK_SIZE,
        K_KIND,
        K_BITS,
        K_INNER,
        K_GROUP,
        K_OUTLIERS,
        K_CODES,
        K_SCALE,
        K_ZERO,
        K_OUTLIER_CODES,
        K_OUTLIER_SCALE,
        K_OUTLIER_ZERO,
    )
    b_other = _decode(
        pages,
        halves,
        levels,
        o_page,
        i_t,
        m_live,
        o_other,
        BLOCK_SIZE,
        K_KIND,
        K_BITS,
        K_INNER,
        K_GROUP,
        K_OUTLIERS,
        K_CODES,
        K_SCALE,
        K_ZERO,
        K_OUTLIER_CODES,
        K_OUTLIER_SCALE,
        K_OUTLIER_ZERO,
    )
    m_load = m_live & m_rotates
    o_angle = i_n[:, None] * stride_cn + o_pair
    b_cosine = tl.load(cosine + o_angle, mask=m_load, other=1.0)
    b_sine = tl.load(sine + o_angle, mask=m_load, other=0.0)
    b_cross = b_other * b_sine
    b_x = tl.where(m_rotates, b_x * b_cosine + tl.where(m_first, -b_cross, b_cross), b_x)
    p_rotated = rotated + o_r[:, None] * WIDTH + o_d
    tl.store(p_rotated, b_x, mask=m_live & (o_d < WIDTH))
    # All codes are read, and all rotated keys laid out, before a thread writes codes.
    tl.debug_barrier()
    write_vectors(
        rotated,
        pages,
        halves,
        None,
        slots,
        levels,
        None,
        i_p,
        n_rows,
        HEADS * WIDTH,
        WIDTH,
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


def _still(slots: Tensor, shift: int | Tensor) -> Tensor:
    """The slots, with those that do not move as padding."""
    return slots.masked_fill(shift == 0, -1) if isinstance(shift, Tensor) else slots


@checked(check_arguments)
def rerotate_triton(
    keys: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Same contract as :func:`kvplug_kernels.rerotate.rerotate`."""
    heads, pairs = keys.shape[1], frequencies.shape[0]
    n_slots = slots.shape[0]
    if n_slots * heads == 0 or pairs == 0 or (not isinstance(shift, Tensor) and shift == 0):
        return
    cosine, sine = cos_sin(shift, frequencies)
    block_p = triton.next_power_of_2(pairs)
    block_r = min(max(TILE // block_p, 1), triton.next_power_of_2(n_slots))
    blocks = triton.cdiv(n_slots, block_r)
    at_once = triton.cdiv(heads, min(max(PROGRAMS // blocks, 1), heads))
    with torch.cuda.device_of(keys):
        rerotate_kernel[(blocks, triton.cdiv(heads, at_once))](
            keys,
            _still(slots, shift),
            cosine,
            sine,
            n_slots,
            *keys.stride()[:3],
            cosine.stride(0) if isinstance(shift, Tensor) else 0,
            HEADS=heads,
            HEADS_AT_ONCE=at_once,
            BLOCK_SIZE=keys.shape[2],
            PAIRS=pairs,
            INTERLEAVED=interleaved,
            ONE_SHIFT=not isinstance(shift, Tensor),
            BLOCK_R=block_r,
            BLOCK_P=block_p,
        )


def key_constants(layout: CodedPage, heads: int, block_size: int) -> dict[str, int | str | bool]:
    """The compile-time arguments of `rerotate_coded_kernel` that a layout decides: its keys are
    grouped along channels."""
    along_tokens = ("K_AXIS", "K_ANCHORED")
    return {
        name: value
        for name, value in kernel_constants(layout, heads, block_size).items()
        if not name.startswith("V_") and name not in along_tokens
    }


@checked(check_coded_arguments)
def rerotate_coded_triton(
    pages: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    layout: CodedPage,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
    key_levels: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Same contract as :func:`kvplug_kernels.rerotate.rerotate_coded`."""
    coding, heads, size = layout.key, pages.shape[1], pages.shape[2]
    if pages.numel() == 0:
        return
    if coding.kind == "plain" and dtype is not None:
        keys = plain_keys(pages, layout, dtype)
        rerotate_triton(keys, slots, shift, frequencies, interleaved=interleaved)
        return
    n_rows, pairs = slots.shape[0] * heads, frequencies.shape[0]
    if n_rows == 0 or pairs == 0 or (not isinstance(shift, Tensor) and shift == 0):
        return
    constants = key_constants(layout, heads, size)
    cosine, sine = cos_sin(shift, frequencies)
    rotated = pages.new_empty((slots.shape[0], heads, coding.width), dtype=torch.float32)
    with torch.cuda.device_of(pages):
        rerotate_coded_kernel[(triton.cdiv(n_rows, int(constants["K_BLOCK_R"])),)](
            pages,
            pages.view(torch.int16),
            _still(slots, shift),
            cosine,
            sine,
            key_levels if coding.kind == "codebook" else None,
            rotated,
            n_rows,
            pages.stride(0),
            pages.stride(1),
            cosine.stride(0) if isinstance(shift, Tensor) else 0,
            PAIRS=pairs,
            INTERLEAVED=interleaved,
            BLOCK_D=triton.next_power_of_2(coding.width),
            **constants,
            # A fused product and sum is rounded once, the specification's twice.
            enable_fp_fusion=False,
        )
