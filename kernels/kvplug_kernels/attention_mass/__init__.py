"""Attention that the last queries of a request pay to each of its resident tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .vectorized import attention_mass_vectorized

__all__ = ["attention_mass"]


def attention_mass(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    softcap: float = 0.0,
    how: Literal["sum", "max"] = "sum",
    out: Tensor | None = None,
) -> Tensor:
    """Sum the attention weights of an observation window over the keys of a paged cache.

    ``out[r, h, t]`` is the sum over the ``w`` queries of row ``r`` and query head ``h`` of the
    softmax weight of resident token ``t``: the score of SnapKV (arXiv 2404.14469) before pooling
    and, with a growing window, of H2O (arXiv 2306.14048). Resident token ``t`` of row ``r`` lies in
    the slot ``(block_table[r, t // block_size], t % block_size)``; query head ``h`` reads the keys
    of head ``h // (num_heads // kv_heads)``. A logit is ``scale * q . k``, or ``softcap *
    tanh(scale * q . k / softcap)`` when ``softcap`` is positive.

    A key is visible to a query when its position is at most the query's. Without positions the
    stored order is the text order and the queries are the last ``w`` resident tokens. A query of
    negative position is padding; it contributes nothing, and neither does a query that sees no
    key. The mass beyond the resident tokens is 0. With ``how`` "max" it is the largest weight that
    a token receives from one of the queries, instead of the sum.

    The softmax is exact: the log-sum-exp of each query comes first, then the weights. Logits and
    sums are float32, whatever the cache stores; the CPU path holds at most 64 MB of logits at a
    time and the GPU path none in memory. Lengths are clamped to ``width * block_size`` and to
    ``max_len``; the caller guarantees that the entries of the block table that hold a token are
    blocks, which is not checked on the device. Nothing synchronises with the host on CUDA, so
    with ``out`` given the call can be captured in a CUDA graph.

    Rows of several layers are one call where their pages are: see
    :class:`kvplug_kernels.paging.FoldedLayers`. Offsets are 64-bit, so pages may be any number of
    elements apart.

    Args:
        query: float32, float16 or bfloat16 ``[rows, w, num_heads, head_size]``, the last ``w``
            queries of each row in text order, rotated like the keys.
        key_cache: ``[num_blocks, kv_heads, block_size, head_size]`` of the dtype of ``query``,
            any strides with the last dimension contiguous.
        block_table: int32 ``[rows, width]``.
        lens: int32 ``[rows]``, resident tokens of each row.
        scale: factor of the logits, finite.
        key_positions: int32 ``[rows, kv_heads, max_len]``, text position of each resident token of
            each head. Given with ``query_positions``.
        query_positions: int32 ``[rows, w]``, text position of each query.
        softcap: bound of the logits, 0 for none.
        how: "sum" or "max" over the queries.
        out: float32 ``[rows, num_heads, max_len]``, last dimension contiguous. ``max_len`` is
            ``width * block_size`` without it.

    Returns:
        ``out``, or a new contiguous tensor of that shape.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``num_heads`` is no
            multiple of ``kv_heads``, ``scale`` is not finite, ``softcap`` is negative,
            ``how`` is neither, positions are given for one side only, or ``out`` starts at the
            address of an input.
    """
    if key_cache.is_cuda:
        from .kernel import attention_mass_triton

        implementation = attention_mass_triton
    else:
        implementation = attention_mass_vectorized
    return implementation(
        query,
        key_cache,
        block_table,
        lens,
        scale,
        key_positions=key_positions,
        query_positions=query_positions,
        softcap=softcap,
        how=how,
        out=out,
    )
