"""Exact attention and the merge in compiled C++, and in vectorized torch where there is none."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..arguments import attention_outputs, checked
from ..cpu import compiled
from ..cpu.call import DTYPES, pointer, structure
from .naive import check_exact, check_merge
from .vectorized import attend_exact_vectorized, merge_attention_vectorized

ExactStruct = structure(
    "KVPlugExact",
    "*query query_dtype query_by_token query_by_head *key *value key_by_token key_by_head "
    "value_by_token value_by_head *query_start rows tokens num_heads heads width *recent_key "
    "*recent_value recent_key_strides[3] recent_value_strides[3] *recent_slots *recent_lens slots "
    "recent_size threads %scale %softcap *out *lse",
)
MergeStruct = structure(
    "KVPlugMerge",
    "*out_a *lse_a *out_b *lse_b *out dtype pairs heads width out_by_token out_by_head threads",
)
Strides = ctypes.c_int64 * 3
NO_STRIDES = Strides()


@checked(check_exact)
def attend_exact_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    max_query_len: int,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_lens: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.attend_exact.attend_exact`.

    Raises:
        IndexError: A slot of recent tokens does not exist, or ``query_start`` is not ascending.
    """
    found = compiled("attend_exact")
    if found is None:
        return attend_exact_vectorized(
            query,
            key,
            value,
            query_start,
            scale,
            softcap=softcap,
            max_query_len=max_query_len,
            recent_key=recent_key,
            recent_value=recent_value,
            recent_slots=recent_slots,
            recent_lens=recent_lens,
            out=out,
            lse=lse,
        )
    tokens, num_heads, width = query.shape
    out, lse = attention_outputs(query, width, out, lse)
    slots, size, key_strides, value_strides = 0, 0, NO_STRIDES, NO_STRIDES
    if recent_key is not None and recent_value is not None:
        slots, size = recent_key.shape[:2]
        key_strides = Strides(*recent_key.stride()[:3])
        value_strides = Strides(*recent_value.stride()[:3])
    call = ExactStruct(
        query.data_ptr(),
        DTYPES[query.dtype],
        query.stride(0),
        query.stride(1),
        key.data_ptr(),
        value.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        query_start.data_ptr(),
        query_start.shape[0] - 1,
        tokens,
        num_heads,
        key.shape[1],
        width,
        pointer(recent_key),
        pointer(recent_value),
        key_strides,
        value_strides,
        pointer(recent_slots),
        pointer(recent_lens),
        slots,
        size,
        torch.get_num_threads(),
        scale,
        softcap,
        out.data_ptr(),
        lse.data_ptr(),
    )
    wrong = found.library.kvplug_attend_exact(ctypes.byref(call))
    if wrong:
        raise IndexError(
            "recent_slots names a slot that recent_key does not have."
            if wrong == 2
            else "query_start must be ascending from 0 to at most the number of queries."
        )
    return out, lse


@checked(check_merge)
def merge_attention_cpu(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.attend_exact.merge_attention`."""
    found = compiled("attend_exact")
    if found is None:
        return merge_attention_vectorized(out_a, lse_a, out_b, lse_b, out)
    tokens, heads, width = out.shape
    parts = [x.contiguous() for x in (out_a, lse_a, out_b, lse_b)]
    call = MergeStruct(
        *(part.data_ptr() for part in parts),
        out.data_ptr(),
        DTYPES[out.dtype],
        tokens * heads,
        heads,
        width,
        out.stride(0),
        out.stride(1),
        torch.get_num_threads(),
    )
    found.library.kvplug_merge_attention(ctypes.byref(call))
    return out
