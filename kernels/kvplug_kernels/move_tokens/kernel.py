"""Moving tokens as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .layers import LayerCaches
from .naive import check_arguments

TILE_BYTES = 8192
MAX_WORD = 8
# Rows, layers and strides change from call to call: each value would be compiled again, in the
# middle of serving. What alignment allows is told by VECTOR instead.
SIZES = ("n_layers", "n_rows", "count", "stride_cb", "stride_ch", "stride_ct")
STRIDES = ("stride_br", "stride_sl", "stride_sr", "stride_sh")


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def move_tokens_kernel(
    pointers,
    block_table,
    source,
    n_layers,
    n_rows,
    count,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_br,
    stride_sl,
    stride_sr,
    stride_sh,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program fills BLOCK_R slots of one row and head of one cache, BLOCK_C words of WORD
    bytes at a time. Strides count units of VECTOR words. No slot is both read and written, in this
    program or another."""
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % HEADS
    i_r = i_p // HEADS % n_rows
    i_c = i_p // HEADS // n_rows
    o_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_j = o_j < count
    p_source = source + i_c % n_layers * stride_sl + i_r * stride_sr + i_h * stride_sh
    b_t = tl.load(p_source + o_j, mask=m_j, other=0)
    m_moves = m_j & (b_t != o_j)
    p_table = block_table + i_r * stride_br
    i_from = tl.load(p_table + b_t // BLOCK_SIZE, mask=m_moves, other=0).to(tl.int64)
    i_to = tl.load(p_table + o_j // BLOCK_SIZE, mask=m_moves, other=0).to(tl.int64)
    i_cache = tl.load(pointers + i_c)
    if WORD == 8:
        p_cache = i_cache.to(tl.pointer_type(tl.int64))
    elif WORD == 4:
        p_cache = i_cache.to(tl.pointer_type(tl.int32))
    elif WORD == 2:
        p_cache = i_cache.to(tl.pointer_type(tl.int16))
    else:
        p_cache = i_cache.to(tl.pointer_type(tl.int8))
    p_head = tl.multiple_of(p_cache, WORD * VECTOR) + i_h * stride_ch * VECTOR
    o_from = i_from * stride_cb + (b_t % BLOCK_SIZE).to(tl.int64) * stride_ct
    o_to = i_to * stride_cb + (o_j % BLOCK_SIZE).to(tl.int64) * stride_ct
    p_from = p_head + o_from * VECTOR
    p_to = p_head + o_to * VECTOR
    for i_w in range(0, CONTENT, BLOCK_C):
        o_w = i_w + tl.arange(0, BLOCK_C)
        m_w = m_moves[:, None] & (o_w < CONTENT)[None, :]
        b_content = tl.load(p_from[:, None] + o_w[None, :], mask=m_w, other=0)
        tl.store(p_to[:, None] + o_w[None, :], b_content, mask=m_w)


@checked(check_arguments)
def move_tokens_triton(caches: LayerCaches, block_table: Tensor, source: Tensor) -> None:
    """Same contract as :func:`kvplug_kernels.move_tokens.move_tokens`."""
    _, heads, block_size, _ = caches.shape
    layers, rows, _, count = source.shape
    if source.numel() == 0 or caches.content == 0:
        return
    word = min(caches.unit, MAX_WORD)
    vector = caches.unit // word
    content = caches.content * vector
    tile = TILE_BYTES // word
    block_c = min(triton.next_power_of_2(content), tile)
    block_r = tile // block_c
    with torch.cuda.device_of(source):
        move_tokens_kernel[(len(caches.pages) * rows * heads, triton.cdiv(count, block_r))](
            caches.pointers,
            block_table,
            source,
            layers,
            rows,
            count,
            *caches.strides,
            block_table.stride(0),
            *source.stride()[:3],
            HEADS=heads,
            BLOCK_SIZE=block_size,
            CONTENT=content,
            WORD=word,
            VECTOR=vector,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
        )
