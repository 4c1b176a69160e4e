"""Key scores as one Triton launch, or two where similarity to the anchor is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from ..splits import tokens_of_split
from ..tiles import load_tokens
from .naive import ALL, KEY_NORM, KEY_TO_MEAN, KEY_TO_PREVIOUS, VALUE_NORM, check_arguments

TILE_ELEMENTS = 4096
MAX_TILE = 64
STAGES = 3
NOWHERE = -1
"""Place of a score that is not asked for."""


@triton.jit
def _inverse(b_square):
    """One over the roots, zero for zero."""
    return tl.where(b_square > 0, 1 / tl.sqrt(tl.where(b_square > 0, b_square, 1.0)), 0.0)


@triton.jit(do_not_specialize=["limit", "max_len", "n_splits", "n_split", "stride_br"])
def split_scores_kernel(
    key_cache,
    value_cache,
    block_table,
    lens,
    split_sum,
    out,
    limit,
    max_len,
    n_splits,
    n_split,
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
    KEY_TO_MEAN: tl.constexpr,
    KEY_TO_PREVIOUS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program scores ``n_split`` tokens of a row and head, all but similarity to the anchor,
    and where that is asked for writes the sum of their unit keys, ``[rows * heads, n_splits,
    HEAD_SIZE]``. The scores' places in ``out`` are negative where nobody asks for them."""
    i_p = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    i_first = i_s * n_split
    i_end = tl.minimum(i_first + n_split, max_len)
    o_d = tl.arange(0, BLOCK_D)
    p_table = block_table + i_r * stride_br
    p_row = out + i_r * stride_or + i_h * stride_oh
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_t in tl.range(i_first, i_end, BLOCK_T, num_stages=STAGES):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < n_resident
        m_out = o_t < max_len
        if KEY_NORM >= 0 or KEY_TO_MEAN >= 0 or KEY_TO_PREVIOUS >= 0:
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
            b_square = tl.sum(b_key * b_key, 1)
            if KEY_NORM >= 0:
                p_out = p_row + tl.full([], KEY_NORM, tl.int64) * stride_os
                tl.store(p_out + o_t, tl.sqrt(b_square), mask=m_out)
            if KEY_TO_MEAN >= 0:
                b_sum += tl.sum(b_key * _inverse(b_square)[:, None], 0)
            if KEY_TO_PREVIOUS >= 0:
                # All but the first come from a cache: they were read with the tile.
                b_last = load_tokens(
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
                b_cosine = tl.sum(b_key * b_last, 1) * _inverse(b_square)
                b_cosine = b_cosine * _inverse(tl.sum(b_last * b_last, 1))
                p_out = p_row + tl.full([], KEY_TO_PREVIOUS, tl.int64) * stride_os
                tl.store(p_out + o_t, b_cosine, mask=m_out)
        if VALUE_NORM >= 0:
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
            p_out = p_row + tl.full([], VALUE_NORM, tl.int64) * stride_os
            tl.store(p_out + o_t, tl.sqrt(tl.sum(b_value * b_value, 1)), mask=m_out)
    if KEY_TO_MEAN >= 0:
        p_sum = split_sum + (i_p * n_splits + i_s) * HEAD_SIZE + o_d
        tl.store(p_sum, b_sum, mask=o_d < HEAD_SIZE)


@triton.jit(do_not_specialize=["limit", "max_len", "n_splits", "n_split", "stride_br"])
def key_to_mean_kernel(
    key_cache,
    block_table,
    lens,
    split_sum,
    out,
    limit,
    max_len,
    n_splits,
    n_split,
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
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program adds the splits of a row and head up to the direction of its mean, and reads
    ``n_split`` of its keys again, against that."""
    i_p = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    n_resident = tl.minimum(tl.load(lens + i_r), limit)
    i_first = i_s * n_split
    i_end = tl.minimum(i_first + n_split, max_len)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    b_anchor = tl.zeros([BLOCK_D], tl.float32)
    for i_n in range(0, n_splits, BLOCK_S):
        o_n = i_n + tl.arange(0, BLOCK_S)
        p_sum = split_sum + (i_p * n_splits + o_n[:, None]) * HEAD_SIZE + o_d[None, :]
        m_sum = (o_n < n_splits)[:, None] & m_d[None, :]
        b_anchor += tl.sum(tl.load(p_sum, mask=m_sum, other=0), 0)
    b_anchor = b_anchor * _inverse(tl.sum(b_anchor * b_anchor, 0))
    p_out = out + i_r * stride_or + i_h * stride_oh
    p_out += tl.full([], KEY_TO_MEAN, tl.int64) * stride_os
    for i_t in tl.range(i_first, i_end, BLOCK_T, num_stages=STAGES):
        o_t = i_t + tl.arange(0, BLOCK_T)
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
        b_cosine = tl.sum(b_key * b_anchor[None, :], 1) * _inverse(tl.sum(b_key * b_key, 1))
        tl.store(p_out + o_t, b_cosine, mask=o_t < max_len)


@checked(check_arguments)
def key_scores_triton(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    which: Sequence[int] = ALL,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.key_scores.key_scores`."""
    _, kv_heads, block_size, head_size = key_cache.shape
    rows, width = block_table.shape
    if out is None:
        shape = (len(which), rows, kv_heads, width * block_size)
        out = key_cache.new_empty(shape, dtype=torch.float32)
    if out.numel() == 0:
        return out
    max_len = out.shape[3]
    limit = min(width * block_size, max_len)
    value_size = value_cache.shape[3]
    block_d, block_v = triton.next_power_of_2(head_size), triton.next_power_of_2(value_size)
    block_t = max(min(TILE_ELEMENTS // max(block_d, block_v), MAX_TILE), 1)
    n_split = tokens_of_split(rows * kv_heads, max_len, block_t, out.device)
    n_splits = triton.cdiv(max_len, n_split)
    place = {score: list(which).index(score) if score in which else NOWHERE for score in ALL}
    to_mean = place[KEY_TO_MEAN] != NOWHERE
    split_sum = out.new_empty((rows * kv_heads, n_splits, head_size)) if to_mean else None
    shared = {
        "KEY_TO_MEAN": place[KEY_TO_MEAN],
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "STAGES": STAGES,
    }
    with torch.cuda.device_of(key_cache):
        split_scores_kernel[(rows * kv_heads, n_splits)](
            key_cache,
            value_cache,
            block_table,
            lens,
            split_sum,
            out,
            limit,
            max_len,
            n_splits,
            n_split,
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
            *out.stride()[:3],
            KEY_NORM=place[KEY_NORM],
            VALUE_NORM=place[VALUE_NORM],
            KEY_TO_PREVIOUS=place[KEY_TO_PREVIOUS],
            VALUE_SIZE=value_size,
            BLOCK_V=block_v,
            **shared,
        )
        if to_mean:
            key_to_mean_kernel[(rows * kv_heads, n_splits)](
                key_cache,
                block_table,
                lens,
                split_sum,
                out,
                limit,
                max_len,
                n_splits,
                n_split,
                *key_cache.stride()[:3],
                block_table.stride(0),
                *out.stride()[:3],
                BLOCK_S=16,
                **shared,
            )
    return out
