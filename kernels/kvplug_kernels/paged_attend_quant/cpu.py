"""Attention over coded pages in compiled C++, and in vectorized torch where there is none."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..arguments import attention_outputs, checked
from ..coding import CodedPage
from ..cpu import compiled
from ..cpu.call import DTYPES, pointer, structure
from ..cpu.coded import coding_struct
from .naive import check_arguments
from .vectorized import paged_attend_quant_vectorized

AttendStruct = structure(
    "KVPlugAttend",
    "*key *value *key_levels *value_levels *query query_dtype query_by_token query_by_head *pages "
    "blocks by_block by_head block_size *table table_by_row table_width *lens *query_start rows "
    "tokens num_heads heads max_len threads %scale %softcap causal *out *lse",
)


@checked(check_arguments)
def paged_attend_quant_cpu(
    query: Tensor,
    pages: Tensor,
    layout: CodedPage,
    block_table: Tensor,
    lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    causal: bool,
    softcap: float = 0.0,
    integer: bool = False,
    max_query_len: int,
    max_len: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.paged_attend_quant.paged_attend_quant`.

    Tiles of codes become floats in the cache and are used at once, for all query heads of a KV
    head. Integer products are taken by torch.

    Raises:
        IndexError: A block of a row's tokens does not exist, or ``query_start`` is not ascending.
    """
    found = None if integer else compiled("paged_attend_quant")
    if found is None:
        return paged_attend_quant_vectorized(
            query,
            pages,
            layout,
            block_table,
            lens,
            query_start,
            scale,
            key_levels=key_levels,
            value_levels=value_levels,
            causal=causal,
            softcap=softcap,
            integer=integer,
            max_query_len=max_query_len,
            max_len=max_len,
            out=out,
            lse=lse,
        )
    out, lse = attention_outputs(query, layout.value.width, out, lse)
    tokens, num_heads, _ = query.shape
    blocks, heads, block_size, _ = pages.shape
    key = coding_struct(layout, "key_", query.dtype)
    value = coding_struct(layout, "value_", query.dtype)
    call = AttendStruct(
        ctypes.addressof(key),
        ctypes.addressof(value),
        pointer(key_levels),
        pointer(value_levels),
        query.data_ptr(),
        DTYPES[query.dtype],
        query.stride(0),
        query.stride(1),
        pages.data_ptr(),
        blocks,
        pages.stride(0),
        pages.stride(1),
        block_size,
        block_table.data_ptr(),
        block_table.stride(0),
        block_table.shape[1],
        lens.data_ptr(),
        query_start.data_ptr(),
        block_table.shape[0],
        tokens,
        num_heads,
        heads,
        max_len,
        torch.get_num_threads(),
        scale,
        softcap,
        causal,
        out.data_ptr(),
        lse.data_ptr(),
    )
    wrong = found.library.kvplug_paged_attend_quant(ctypes.byref(call))
    if wrong:
        raise IndexError(
            "block_table names a block that pages does not have."
            if wrong == 2
            else "query_start must be ascending from 0 to at most the number of queries."
        )
    return out, lse
