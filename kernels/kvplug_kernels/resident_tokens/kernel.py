"""Laying out resident tokens as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import LatestQueries, LayerSlice, ResidentTokens, check_arguments, empty_result

MAX_TILE = 1024
QUERY_TILE = 2048
# They change from call to call: each value would be compiled again, in the middle of serving.
SIZES = ("n_rows", "n_blocks", "n_tiles", "count", "first_layer", "n_all")
STRIDES = (
    "stride_br",
    "stride_rows",
    "stride_lr",
    "stride_mixed",
    "stride_places",
    "stride_ends",
    "stride_begins",
)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def resident_tokens_kernel(
    block_table,
    rows,
    logical,
    mixed,
    stored,
    totals,
    queries,
    starts,
    places,
    ends,
    begins,
    out_table,
    out_positions,
    out_lens,
    out_totals,
    out_queries,
    out_query_positions,
    n_rows,
    n_blocks,
    n_tiles,
    count,
    first_layer,
    n_all,
    stride_br,
    stride_rows,
    stride_lr,
    stride_mixed,
    stride_sb,
    stride_sh,
    stride_tb,
    stride_th,
    stride_places,
    stride_ends,
    stride_begins,
    BLOCK_STEP: tl.constexpr,
    LAYER_STEP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERY_SIZE: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Each program lays out one tile of the tokens of a row in a layer, in all KV heads, or copies
    one of its queries."""
    i_p = tl.program_id(0).to(tl.int64)
    i_x = tl.program_id(1)
    i_r = i_p % n_rows
    i_layer = first_layer + i_p // n_rows
    if i_x < n_tiles:
        o_t = i_x * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < count
        o_b = o_t // BLOCK_SIZE
        o_slot = o_t % BLOCK_SIZE
        i_request = tl.load(rows + i_r * stride_rows).to(tl.int64)
        b_logical = tl.load(logical + i_r * stride_lr + o_b, mask=m_t, other=0)
        p_table = block_table + i_request * stride_br
        b_block = tl.load(p_table + b_logical, mask=m_t, other=0).to(tl.int64)
        b_block = b_block * BLOCK_STEP + i_layer * LAYER_STEP
        m_moved = m_t & (b_logical < tl.load(mixed + i_r * stride_mixed))
        b_plain = b_logical * BLOCK_SIZE + o_slot
        if i_x == 0:
            tl.store(out_lens + i_p, count)
        for i_copy in tl.static_range(COPIES):
            p_block = out_table + (i_copy * n_all + i_p) * n_blocks + o_b
            tl.store(p_block, b_block.to(tl.int32), mask=m_t & (o_slot == 0))
        for i_h in range(KV_HEADS):
            p_stored = stored + b_block * stride_sb + i_h * stride_sh + o_slot
            b_position = tl.load(p_stored, mask=m_moved, other=0)
            b_position = tl.where(m_moved, b_position, b_plain)
            o_out = (i_p * KV_HEADS + i_h) * count + o_t
            n_out = (n_all * KV_HEADS).to(tl.int64) * count
            for i_copy in tl.static_range(COPIES):
                tl.store(out_positions + i_copy * n_out + o_out, b_position, mask=m_t)
            if totals is not None:
                p_total = totals + b_block * stride_tb + i_h * stride_th + o_slot
                b_total = tl.load(p_total, mask=m_t, other=0)
                for i_copy in tl.static_range(COPIES):
                    tl.store(out_totals + i_copy * n_out + o_out, b_total, mask=m_t)
    elif queries is not None:
        i_w = i_x - n_tiles
        i_position = tl.load(ends + i_r * stride_ends) - WINDOW + i_w
        i_place = (i_position % RING + RING) % RING
        i_query = tl.load(starts + i_layer) + tl.load(places + i_r * stride_places) + i_place
        p_out = out_queries + (i_p * WINDOW + i_w) * QUERY_SIZE
        for i_e in range(0, QUERY_SIZE, BLOCK_Q):
            o_e = i_e + tl.arange(0, BLOCK_Q)
            m_e = o_e < QUERY_SIZE
            b_query = tl.load(queries + i_query * QUERY_SIZE + o_e, mask=m_e, other=0)
            tl.store(p_out + o_e, b_query, mask=m_e)
        i_position = tl.maximum(i_position, -1)
        if begins is not None:
            i_begin = tl.load(begins + i_r * stride_begins)
            i_position = tl.where(i_position < i_begin, -1, i_position)
        tl.store(out_query_positions + i_p * WINDOW + i_w, i_position)


@checked(check_arguments)
def resident_tokens_triton(
    block_table: Tensor,
    rows: Tensor,
    logical: Tensor,
    mixed: Tensor,
    stored: Tensor,
    layers: LayerSlice,
    *,
    count: int,
    totals: Tensor | None = None,
    latest: LatestQueries | None = None,
) -> ResidentTokens:
    """Same contract as :func:`kvplug_kernels.resident_tokens.resident_tokens`."""
    made = empty_result(rows, logical, stored, layers, count, totals, latest)
    n_all, n_blocks = made.table.shape[1:]
    if n_all == 0 or count == 0:
        return made
    block_t = min(triton.next_power_of_2(count), MAX_TILE)
    n_tiles = triton.cdiv(count, block_t)
    begins = latest.begins if latest is not None else None
    window = latest.window if latest is not None else 0
    query_size = latest.queries.shape[1:].numel() if latest is not None else 1
    with torch.cuda.device_of(block_table):
        resident_tokens_kernel[(n_all, n_tiles + window)](
            block_table,
            rows,
            logical,
            mixed,
            stored,
            totals,
            latest.queries if latest is not None else None,
            latest.starts if latest is not None else None,
            latest.places if latest is not None else None,
            latest.ends if latest is not None else None,
            begins,
            made.table,
            made.positions,
            made.lens,
            made.totals,
            made.queries,
            made.query_positions,
            rows.shape[0],
            n_blocks,
            n_tiles,
            count,
            layers.first,
            n_all,
            block_table.stride(0),
            rows.stride(0),
            logical.stride(0),
            mixed.stride(0),
            *stored.stride()[:2],
            *(totals.stride()[:2] if totals is not None else (0, 0)),
            latest.places.stride(0) if latest is not None else 0,
            latest.ends.stride(0) if latest is not None else 0,
            begins.stride(0) if begins is not None else 0,
            BLOCK_STEP=layers.block_step,
            LAYER_STEP=layers.layer_step,
            KV_HEADS=stored.shape[1],
            BLOCK_SIZE=stored.shape[2],
            RING=latest.ring if latest is not None else 1,
            WINDOW=window,
            QUERY_SIZE=query_size,
            COPIES=made.table.shape[0],
            BLOCK_T=block_t,
            BLOCK_Q=min(triton.next_power_of_2(query_size), QUERY_TILE),
        )
    return made
