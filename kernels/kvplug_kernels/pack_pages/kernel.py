"""Packing and its inverse as one Triton launch each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..coding import Coding
from ..move_tokens.layers import LayerCaches
from ..quant_write.kernel import affine_codes, clean, float8_codes, load_codes, store_codes
from ..quant_write.kernel import load_parts as load_runs
from ..tiles import code_units, e4m3_over_256
from .naive import check_arguments, parts_of
from .packed import Packed

TILE_BYTES = 8192
MAX_WORD = 8
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TILE = 4096
"""Elements that a program codes at a time."""
ROW = 1024
"""Elements of a part of its vectors: eight for each thread are 16 bytes."""
# Chunks, tokens and strides change from call to call: each value would be compiled again, in the
# middle of serving. What alignment allows is told by VECTOR instead.
SIZES = ("n_caches", "n_tokens", "stride_bc", "stride_cb", "stride_ch", "stride_ct")


@triton.jit
def _rows(
    blocks,
    n_caches,
    n_tokens,
    stride_bc,
    stride_cb,
    stride_ch,
    stride_ct,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Of BLOCK_R (token, head) pairs of one chunk and cache: which there are, the number of each in
    ``packed``, and the offset of its slot."""
    i_p = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_tokens * HEADS
    i_t, i_h = o_r // HEADS, o_r % HEADS
    p_block = blocks + i_p // n_caches * stride_bc + i_t // BLOCK_SIZE
    i_b = tl.load(p_block, mask=m_r, other=0).to(tl.int64)
    o_slot = i_b * stride_cb + i_h.to(tl.int64) * stride_ch
    o_slot += (i_t % BLOCK_SIZE).to(tl.int64) * stride_ct
    return m_r, i_p * n_tokens * HEADS + o_r, o_slot


@triton.jit(do_not_specialize=SIZES)
def pack_bytes_kernel(
    pointers,
    blocks,
    content,
    n_caches,
    n_tokens,
    stride_bc,
    stride_cb,
    stride_ch,
    stride_ct,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """Copy BLOCK_R slots' content of CONTENT words of WORD bytes. Strides of the caches count units
    of VECTOR words."""
    m_r, i_r, o_slot = _rows(
        blocks,
        n_caches,
        n_tokens,
        stride_bc,
        stride_cb,
        stride_ch,
        stride_ct,
        HEADS,
        BLOCK_SIZE,
        BLOCK_R,
    )
    i_cache = tl.load(pointers + tl.program_id(0) % n_caches)
    if WORD == 8:
        p_cache = i_cache.to(tl.pointer_type(tl.int64))
    elif WORD == 4:
        p_cache = i_cache.to(tl.pointer_type(tl.int32))
    elif WORD == 2:
        p_cache = i_cache.to(tl.pointer_type(tl.int16))
    else:
        p_cache = i_cache.to(tl.pointer_type(tl.int8))
    p_slot = tl.multiple_of(p_cache, WORD * VECTOR) + o_slot * VECTOR
    p_packed = content + i_r * CONTENT
    for i_w in range(0, CONTENT, BLOCK_C):
        o_w = i_w + tl.arange(0, BLOCK_C)
        m_w = m_r[:, None] & (o_w < CONTENT)[None, :]
        p_in, p_out = p_slot[:, None] + o_w[None, :], p_packed[:, None] + o_w[None, :]
        if UNPACK:
            p_in, p_out = p_out, p_in
        tl.store(p_out, tl.load(p_in, mask=m_w, other=0), mask=m_w)


@triton.jit(do_not_specialize=SIZES)
def pack_coded_kernel(
    pointers,
    blocks,
    content,
    scale,
    zero,
    n_caches,
    n_tokens,
    stride_bc,
    stride_cb,
    stride_ch,
    stride_ct,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNPACK: tl.constexpr,
):
    """Code BLOCK_R slots' vectors of WIDTH elements, or decode them. Element ``part * N + j`` of a
    vector is coded in unit ``j``. Strides of the caches count units of VECTOR elements."""
    N: tl.constexpr = WIDTH // PARTS
    GROUPS: tl.constexpr = WIDTH // GROUP
    # Axes A and B count the groups; within one are runs of N channels and whole parts.
    A: tl.constexpr = 1 if GROUP % N == 0 else N // GROUP
    B: tl.constexpr = GROUPS if GROUP % N == 0 else PARTS
    SHAPE: tl.constexpr = [BLOCK_R, A, BLOCK_N // A, B, PARTS // B]
    m_r, i_r, o_slot = _rows(
        blocks,
        n_caches,
        n_tokens,
        stride_bc,
        stride_cb,
        stride_ch,
        stride_ct,
        HEADS,
        BLOCK_SIZE,
        BLOCK_R,
    )
    BYTES: tl.constexpr = 4 if ELEMENT == "float32" else 2
    i_cache = tl.load(pointers + tl.program_id(0) % n_caches)
    if ELEMENT == "bfloat16":
        p_cache = i_cache.to(tl.pointer_type(tl.bfloat16))
    elif ELEMENT == "float16":
        p_cache = i_cache.to(tl.pointer_type(tl.float16))
    else:
        p_cache = i_cache.to(tl.pointer_type(tl.float32))
    p_slot = tl.multiple_of(p_cache, BYTES * VECTOR) + o_slot * VECTOR
    o_j = tl.arange(0, BLOCK_N)
    # Without padding the mask is a row's, so that a thread's elements are loaded together.
    m_j = m_r[:, None] & (
        tl.full([1, BLOCK_N], True, tl.int1) if N == BLOCK_N else (o_j < N)[None, :]
    )
    p_x = p_slot[:, None] + o_j[None, :]
    p_units = code_units(content + i_r * (WIDTH * BITS // 8), WIDTH, BITS)[:, None] + o_j[None, :]
    o_group = (tl.arange(0, A)[:, None] + tl.arange(0, B)[None, :] * A)[None, :, :]
    m_g = m_r[:, None, None]
    p_scale = (scale + i_r * GROUPS)[:, None, None] + o_group
    if UNPACK:
        b_scale = tl.load(p_scale, mask=m_g, other=0).to(tl.float16, bitcast=True).to(tl.float32)
        if KIND == "fp8":
            b_code = _load_bytes(p_units, m_j, N, PARTS)
            b_x = tl.reshape(e4m3_over_256(b_code).to(tl.float32) * 256.0, SHAPE)
            b_x = b_x * b_scale[:, :, None, :, None]
        else:
            if BITS == 8:
                b_code = _load_bytes(p_units, m_j, N, PARTS)
            else:
                b_code = load_codes(p_units, m_j, PARTS, BITS, N)
            p_zero = (zero + i_r * GROUPS)[:, None, None] + o_group
            b_zero = tl.load(p_zero, mask=m_g, other=0).to(tl.float16, bitcast=True)
            b_x = tl.reshape(b_code.to(tl.float32), SHAPE) * b_scale[:, :, None, :, None]
            b_x = b_x + b_zero.to(tl.float32)[:, :, None, :, None]
        b_x = tl.reshape(b_x, [BLOCK_R, BLOCK_N, PARTS])
        _store_runs(p_x, b_x, m_j, N)
    else:
        b_x = load_runs(p_x, m_j, N, PARTS).to(tl.float32)
        # NaN, infinities and what is too large are seldom, and one sum shows that there are none.
        m_odd = ~(tl.sum(tl.sum(tl.abs(b_x), 2), 1) <= 65504.0)
        if tl.max(m_odd.to(tl.int32), 0) > 0:
            b_x = clean(b_x)
        m_x = None
        if N != BLOCK_N:
            m_x = tl.reshape((o_j < N)[None, :], [1, 1, BLOCK_N, 1, 1])
        b_in = tl.reshape(b_x, SHAPE)
        if KIND == "fp8":
            b_code, b_scale = float8_codes(b_in, m_x)
        else:
            b_code, b_scale, b_zero = affine_codes(b_in, m_x, GROUP, (1 << BITS) - 1, 0)
            p_zero = (zero + i_r * GROUPS)[:, None, None] + o_group
            tl.store(p_zero, b_zero.to(tl.int16, bitcast=True), mask=m_g)
        tl.store(p_scale, b_scale.to(tl.int16, bitcast=True), mask=m_g)
        store_codes(p_units, tl.reshape(b_code, [BLOCK_R, BLOCK_N, PARTS]), m_j, BITS, N)


@triton.jit
def _load_bytes(p_units, m_j, N: tl.constexpr, PARTS: tl.constexpr):
    """Codes of a byte each, int32 ``[R, BLOCK_N, PARTS]``."""
    if PARTS == 1:
        b_code = tl.load(p_units, mask=m_j, other=0).to(tl.int32)
        return tl.reshape(b_code, [b_code.shape[0], b_code.shape[1], 1])
    else:
        tl.static_assert(PARTS == 4)
        b_even = tl.join(
            tl.load(p_units, mask=m_j, other=0), tl.load(p_units + 2 * N, mask=m_j, other=0)
        )
        b_odd = tl.join(
            tl.load(p_units + N, mask=m_j, other=0), tl.load(p_units + 3 * N, mask=m_j, other=0)
        )
        b_code = tl.reshape(tl.join(b_even, b_odd), [b_even.shape[0], b_even.shape[1], 4])
        return b_code.to(tl.int32)


@triton.jit
def _store_runs(p_x, b_x, m_j, N: tl.constexpr):
    """Store elements ``part * N`` behind ``p_x [R, BLOCK_N]`` of ``[R, BLOCK_N, PARTS]``; the
    inverse of `load_parts`."""
    R: tl.constexpr = b_x.shape[0]
    BLOCK_N: tl.constexpr = b_x.shape[1]
    PARTS: tl.constexpr = b_x.shape[2]
    if PARTS == 1:
        tl.store(p_x, tl.reshape(b_x, [R, BLOCK_N]).to(p_x.dtype.element_ty), mask=m_j)
    elif PARTS == 2:
        b_even, b_odd = tl.split(b_x)
        tl.store(p_x, b_even.to(p_x.dtype.element_ty), mask=m_j)
        tl.store(p_x + N, b_odd.to(p_x.dtype.element_ty), mask=m_j)
    else:
        tl.static_assert(PARTS == 4)
        b_even, b_odd = tl.split(tl.reshape(b_x, [R, BLOCK_N, 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        tl.store(p_x, b_0.to(p_x.dtype.element_ty), mask=m_j)
        tl.store(p_x + N, b_1.to(p_x.dtype.element_ty), mask=m_j)
        tl.store(p_x + 2 * N, b_2.to(p_x.dtype.element_ty), mask=m_j)
        tl.store(p_x + 3 * N, b_3.to(p_x.dtype.element_ty), mask=m_j)


def _launch(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None, unpack: bool
) -> None:
    chunks, n, tokens, heads, _ = packed.content.shape
    if packed.content.numel() == 0:
        return
    sizes = (n, tokens, blocks.stride(0), *caches.strides)
    shared: dict[str, Any] = {
        "HEADS": heads,
        "BLOCK_SIZE": caches.shape[2],
        "UNPACK": unpack,
    }
    if coding is None:
        word = min(caches.unit, MAX_WORD)
        vector = caches.unit // word
        content = caches.content * vector
        tile = TILE_BYTES // word
        block_c = min(triton.next_power_of_2(content), tile)
        block_r = tile // block_c
    else:
        parts = parts_of(coding)
        block_n = triton.next_power_of_2(coding.inner // parts)
        block_r = max(min(ROW // block_n, TILE // (block_n * parts)), 1)
    grid = (chunks * n, triton.cdiv(tokens * heads, block_r))
    with torch.cuda.device_of(blocks):
        if coding is None:
            pack_bytes_kernel[grid](
                caches.pointers,
                blocks,
                packed.content.view(WORDS[word]),
                *sizes,
                CONTENT=content,
                WORD=word,
                VECTOR=vector,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                **shared,
            )
            return
        assert packed.scale is not None
        element = caches.caches[0].dtype
        pack_coded_kernel[grid](
            caches.pointers,
            blocks,
            packed.content,
            packed.scale.view(torch.int16),
            packed.zero.view(torch.int16) if packed.zero is not None else None,
            *sizes,
            ELEMENT=str(element).removeprefix("torch."),
            VECTOR=caches.unit // element.itemsize,
            KIND=coding.kind,
            BITS=coding.bits,
            WIDTH=coding.width,
            GROUP=coding.group,
            PARTS=parts,
            BLOCK_N=block_n,
            BLOCK_R=block_r,
            # A fused product and sum is rounded once, the specification's twice.
            enable_fp_fusion=False,
            **shared,
        )


@checked(check_arguments)
def pack_pages_triton(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Same contract as :func:`kvplug_kernels.pack_pages.pack_pages`."""
    _launch(caches, blocks, packed, coding, unpack=False)


@checked(check_arguments)
def unpack_pages_triton(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Same contract as :func:`kvplug_kernels.pack_pages.unpack_pages`."""
    _launch(caches, blocks, packed, coding, unpack=True)
