"""Compact a paged KV cache in place, each head keeping tokens of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .vectorized import compact_kv_vectorized, plan_moves_vectorized

__all__ = ["compact_kv", "plan_moves"]


def plan_moves(keep: Tensor, count: int, *, out: Tensor | None = None) -> Tensor:
    """Plan which resident token each of the first ``count`` slots takes.

    A kept token that lies below ``count`` stays. The others fill, in ascending order, the slots
    below ``count`` whose tokens are not kept, in ascending order. So sources lie at or above
    ``count`` and destinations below it: the moves of a row and head are independent of each other.
    Nothing synchronises with the host on CUDA, so with ``out`` given the call can be captured in
    a CUDA graph.

    Args:
        keep: int32 ``[rows, kv_heads, count]``, indices of the resident tokens to keep, ascending
            and distinct along the last dimension, which is contiguous; the others have any
            strides. Rows of several layers are one call: fold the layers into ``rows``.
        count: tokens to keep.
        out: int32 ``[rows, kv_heads, count]``, last dimension contiguous.

    Returns:
        ``out``, or a new contiguous tensor of that shape: the index of the resident token that slot
        ``j`` takes, ``j`` where its own stays.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or ``out`` starts at
            the address of ``keep``.
    """
    if keep.is_cuda:
        from .kernel import plan_moves_triton

        return plan_moves_triton(keep, count, out=out)
    return plan_moves_vectorized(keep, count, out=out)


def compact_kv(
    caches: Sequence[Tensor],
    block_table: Tensor,
    keep: Tensor,
    *,
    count: int,
    out: Tensor | None = None,
) -> Tensor:
    """Move the kept tokens of every row and head into its first ``count`` slots, bit exact.

    Slot ``j`` of row ``r`` is ``(block_table[r, j // block_size], j % block_size)``. After the
    call it holds, in each head ``h``, the token that had index ``source[r, h, j]`` before,
    where ``source`` is :func:`plan_moves` of ``keep``. Slots from ``count`` on and everything else
    in the caches stay as they were. One launch plans and one launch moves for each cache.

    The caller guarantees that the first ``count`` slots of the rows lie in blocks that no other
    row uses and that the block table has a block for every index of ``keep``; neither is checked
    on the device. Nothing synchronises with the host on CUDA, so with ``out`` given the call can
    be captured in a CUDA graph.

    Args:
        caches: tensors ``[num_blocks, kv_heads, block_size, *content]`` of any dtype of 1, 2, 4
            or 8 bytes: pages of keys, of values, or data kept for each slot such as positions.
            The first three dimensions have any strides, the content is contiguous.
        block_table: int32 ``[rows, width]``.
        keep: int32 ``[rows, kv_heads, count]``, indices of the resident tokens to keep, ascending
            and distinct along the last dimension.
        count: tokens to keep, at most ``width * block_size``.
        out: int32 ``[rows, kv_heads, count]``, last dimension contiguous.

    Returns:
        ``source``, int32 ``[rows, kv_heads, count]``: ``out``, or a new tensor.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``count`` exceeds the
            block table, or ``out`` starts at the address of an input.
    """
    if keep.is_cuda:
        from .kernel import compact_kv_triton

        return compact_kv_triton(caches, block_table, keep, count=count, out=out)
    return compact_kv_vectorized(caches, block_table, keep, count=count, out=out)
