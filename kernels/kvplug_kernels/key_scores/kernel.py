"""Key scores as three Triton launches: scores within a tile, the anchor, similarity to the
anchor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..tiles import load_tokens
from .naive import KEY_NORM, KEY_TO_MEAN, KEY_TO_PREVIOUS, VALUE_NORM, check_arguments

TILE_ELEMENTS = 8192
MAX_TILE = 64


@triton.jit
def _unit(b_token):
    """Each vector divided by its norm, zero where that is zero, and the norms."""
    b_norm = tl.sqrt(tl.sum(b_token * b_token, 1))
    b_scale = tl.where(b_norm > 0, b_norm, 1.0)
    return b_token / b_scale[:, None], b_norm


@triton.jit(do_not_specialize=["limit", "max_len", "n_tiles", "stride_br"])
def tile_scores_kernel(
    key_cache,
    value_cache,
    block_table,
    lens,
    tile_sum,
    out,
    limit,
    max_len,
    n_tiles,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_br,
    stride_os,
    stride_or,
    stride_oh,
    KEY_NORM: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    KEY_TO_PREVIOUS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Each program scores one tile of tokens of a row and head, all but similarity to the anchor,
    and writes the sum of the tile's unit keys, ``[rows * heads, n_tiles, HEAD_SIZE]``."""
    i_p = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < n_resident
    p_table = block_table + i_r * stride_br
    b_key = load_tokens(
        key_cache,
        p_table,
        i_h,
        o_t,
        m_t,
        stride_kb,
        stride_kh,
        stride_kt,
        BLOCK_SIZE,
        HEAD_SIZE,
        BLOCK_D,
    ).to(tl.float32)
    b_unit, b_key_norm = _unit(b_key)
    if i_t * BLOCK_T < n_resident:
        p_sum = tile_sum + (i_p * n_tiles + i_t) * HEAD_SIZE + o_d
        tl.store(p_sum, tl.sum(b_unit, 0), mask=o_d < HEAD_SIZE)
    b_previous = load_tokens(
        key_cache,
        p_table,
        i_h,
        tl.maximum(o_t - 1, 0),
        m_t & (o_t > 0),
        stride_kb,
        stride_kh,
        stride_kt,
        BLOCK_SIZE,
        HEAD_SIZE,
        BLOCK_D,
    ).to(tl.float32)
    b_unit_previous, _ = _unit(b_previous)
    b_value = load_tokens(
        value_cache,
        p_table,
        i_h,
        o_t,
        m_t,
        stride_vb,
        stride_vh,
        stride_vt,
        BLOCK_SIZE,
        VALUE_SIZE,
        BLOCK_V,
    ).to(tl.float32)
    b_value_norm = tl.sqrt(tl.sum(b_value * b_value, 1))
    p_out = out + i_r * stride_or + i_h * stride_oh + o_t
    m_out = o_t < max_len
    b_similarity = tl.sum(b_unit * b_unit_previous, 1)
    tl.store(p_out + tl.full([], KEY_NORM, tl.int64) * stride_os, b_key_norm, mask=m_out)
    tl.store(p_out + tl.full([], VALUE_NORM, tl.int64) * stride_os, b_value_norm, mask=m_out)
    tl.store(p_out + tl.full([], KEY_TO_PREVIOUS, tl.int64) * stride_os, b_similarity, mask=m_out)


@triton.jit(do_not_specialize=["limit", "n_tiles"])
def anchor_kernel(
    tile_sum,
    lens,
    anchor,
    limit,
    n_tiles,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program adds the tiles of one row and head up to the direction of its mean."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    n_resident = tl.maximum(tl.minimum(tl.load(lens + i_p // KV_HEADS), limit), 0)
    n_live = (n_resident + BLOCK_T - 1) // BLOCK_T
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_n in range(0, n_live, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        p_sum = tile_sum + (i_p * n_tiles + o_n[:, None]) * HEAD_SIZE + o_d[None, :]
        m_sum = (o_n < n_live)[:, None] & (o_d < HEAD_SIZE)[None, :]
        b_sum += tl.sum(tl.load(p_sum, mask=m_sum, other=0), 0)
    b_norm = tl.sqrt(tl.sum(b_sum * b_sum, 0))
    b_sum = b_sum / tl.where(b_norm > 0, b_norm, 1.0)
    tl.store(anchor + i_p * HEAD_SIZE + o_d, b_sum, mask=o_d < HEAD_SIZE)


@triton.jit(do_not_specialize=["limit", "max_len", "stride_br"])
def key_to_mean_kernel(
    key_cache,
    block_table,
    lens,
    anchor,
    out,
    limit,
    max_len,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_br,
    stride_os,
    stride_or,
    stride_oh,
    KEY_TO_MEAN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program reads one tile of keys of a row and head again, against the anchor."""
    i_p = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    b_key = load_tokens(
        key_cache,
        block_table + i_r * stride_br,
        i_h,
        o_t,
        o_t < n_resident,
        stride_kb,
        stride_kh,
        stride_kt,
        BLOCK_SIZE,
        HEAD_SIZE,
        BLOCK_D,
    ).to(tl.float32)
    b_unit, _ = _unit(b_key)
    b_anchor = tl.load(anchor + i_p * HEAD_SIZE + o_d, mask=o_d < HEAD_SIZE, other=0)
    p_out = out + i_r * stride_or + i_h * stride_oh + o_t
    p_out += tl.full([], KEY_TO_MEAN, tl.int64) * stride_os
    tl.store(p_out, tl.sum(b_unit * b_anchor[None, :], 1), mask=o_t < max_len)


@checked(check_arguments)
def key_scores_triton(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.key_scores.key_scores`."""
    _, kv_heads, block_size, head_size = key_cache.shape
    rows, width = block_table.shape
    if out is None:
        shape = (4, rows, kv_heads, width * block_size)
        out = key_cache.new_empty(shape, dtype=torch.float32)
    if out.numel() == 0:
        return out
    max_len = out.shape[3]
    limit = min(width * block_size, max_len)
    value_size = value_cache.shape[3]
    block_d, block_v = triton.next_power_of_2(head_size), triton.next_power_of_2(value_size)
    block_t = max(min(TILE_ELEMENTS // max(block_d, block_v), MAX_TILE), 1)
    n_tiles = triton.cdiv(max_len, block_t)
    tile_sum = out.new_empty((rows * kv_heads, n_tiles, head_size))
    anchor = out.new_empty((rows * kv_heads, head_size))
    shared = {
        "KV_HEADS": kv_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
    }
    with torch.cuda.device_of(key_cache):
        tile_scores_kernel[(rows * kv_heads, n_tiles)](
            key_cache,
            value_cache,
            block_table,
            lens,
            tile_sum,
            out,
            limit,
            max_len,
            n_tiles,
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
            *out.stride()[:3],
            KEY_NORM=KEY_NORM,
            VALUE_NORM=VALUE_NORM,
            KEY_TO_PREVIOUS=KEY_TO_PREVIOUS,
            BLOCK_SIZE=block_size,
            VALUE_SIZE=value_size,
            BLOCK_V=block_v,
            **shared,
        )
        anchor_kernel[(rows * kv_heads,)](
            tile_sum, lens, anchor, limit, n_tiles, BLOCK_N=16, **shared
        )
        key_to_mean_kernel[(rows * kv_heads, n_tiles)](
            key_cache,
            block_table,
            lens,
            anchor,
            out,
            limit,
            max_len,
            *key_cache.stride()[:3],
            block_table.stride(0),
            *out.stride()[:3],
            KEY_TO_MEAN=KEY_TO_MEAN,
            BLOCK_SIZE=block_size,
            **shared,
        )
    return out
