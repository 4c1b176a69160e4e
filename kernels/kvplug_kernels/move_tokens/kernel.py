"""Moving tokens as one Triton launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .layers import LayerCaches
from .naive import MAX_BESIDE, check_arguments

TILE_BYTES = 8192
MAX_WORD = 8
# Rows, layers and strides change from call to call: each value would be compiled again, in the
# middle of serving. What alignment allows is told by VECTOR instead.
SIZES = ("n_layers", "n_rows", "count", "stride_cb", "stride_ch", "stride_ct")
STRIDES = ("stride_br", "stride_sl", "stride_sr", "stride_sh")
BESIDE = ("ab", "ah", "var", "vah", "bb", "bh", "vbr", "vbh")


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *(f"stride_{s}" for s in BESIDE)])
def move_tokens_kernel(
    pointers,
    block_table,
    source,
    beside_a,
    values_a,
    beside_b,
    values_b,
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
    stride_ab,
    stride_ah,
    stride_var,
    stride_vah,
    stride_bb,
    stride_bh,
    stride_vbr,
    stride_vbh,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program fills BLOCK_R slots of one row and head of one cache, BLOCK_C words of WORD
    bytes at a time; of the first cache also what is kept beside them. Strides of the caches count
    units of VECTOR words. No slot is both read and written, in this program or another."""
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
    m_to = m_moves
    if beside_a is not None:
        m_to = m_j
    i_to = tl.load(p_table + o_j // BLOCK_SIZE, mask=m_to, other=0).to(tl.int64)
    m_first = m_j & (i_c == 0)
    if beside_a is not None:
        p_value = values_a + i_r * stride_var + i_h * stride_vah + b_t
        p_beside = beside_a + i_to * stride_ab + i_h * stride_ah + o_j % BLOCK_SIZE
        tl.store(p_beside, tl.load(p_value, mask=m_first, other=0), mask=m_first)
    if beside_b is not None:
        p_value = values_b + i_r * stride_vbr + i_h * stride_vbh + b_t
        p_beside = beside_b + i_to * stride_bb + i_h * stride_bh + o_j % BLOCK_SIZE
        tl.store(p_beside, tl.load(p_value, mask=m_first, other=0), mask=m_first)
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
def move_tokens_triton(
    caches: LayerCaches,
    block_table: Tensor,
    source: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Same contract as :func:`kvplug_kernels.move_tokens.move_tokens`."""
    _, heads, block_size, _ = caches.shape
    layers, rows, _, count = source.shape
    if source.numel() == 0 or (caches.content == 0 and not beside):
        return
    pairs: list[tuple[Tensor | None, Tensor | None]]
    pairs = [*beside, *[(None, None)] * (MAX_BESIDE - len(beside))]
    word = min(caches.unit, MAX_WORD)
    vector = caches.unit // word
    content = max(caches.content, 1) * vector
    tile = TILE_BYTES // word
    block_c = min(triton.next_power_of_2(content), tile)
    block_r = tile // block_c
    with torch.cuda.device_of(source):
        move_tokens_kernel[(len(caches.pages) * rows * heads, triton.cdiv(count, block_r))](
            caches.pointers,
            block_table,
            source,
            *pairs[0],
            *pairs[1],
            layers,
            rows,
            count,
            *caches.strides,
            block_table.stride(0),
            *source.stride()[:3],
            *(
                stride
                for pair in pairs
                for side in pair
                for stride in (side.stride()[:2] if side is not None else (0, 0))
            ),
            HEADS=heads,
            BLOCK_SIZE=block_size,
            CONTENT=content,
            WORD=word,
            VECTOR=vector,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
        )
