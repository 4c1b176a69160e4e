"""Move tokens within the paged caches of many layers, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .layers import LayerCaches
from .vectorized import move_tokens_vectorized

__all__ = ["LayerCaches", "move_tokens"]


def move_tokens(
    caches: LayerCaches,
    block_table: Tensor,
    source: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Move tokens of every layer, row and head into its first slots in place, bit exact.

    Slot ``j`` of row ``r`` is ``(block_table[r, j // block_size], j % block_size)``. After the
    call it holds, in head ``h`` of a cache that follows ``source[l]``, the token that had index
    ``source[l, r, h, j]`` before. Where that is ``j`` itself nothing is read or written. Everything
    else in the caches stays as it was. One launch moves all caches.

    Caches of one layer may lie in several `LayerCaches` (keys and values, the planes of a
    format's page), or one after another in one: cache ``i`` follows ``source[i % num_layers]``, so
    the keys of all layers followed by the values of all layers take a ``source`` of ``num_layers``.

    What is kept for each slot beside the caches follows its token in the same launch: of each pair
    ``(pages, values)`` of ``beside``, ``pages`` holds in slot ``j`` of a row and head afterwards
    ``values[r, h, source[0, r, h, j]]``, whether the token moved or not.

    The caller guarantees that no slot is both read and written for one layer, row and head, as
    :func:`kvplug_kernels.compact_kv.plan_moves` does, that a block which receives tokens belongs
    to one row alone, and that the block table has a block for every index of ``source``; none is
    checked on the device. Nothing synchronises with the host on CUDA and nothing is allocated, so
    the call can be captured in a CUDA graph.

    Args:
        caches: the caches, opened once for many calls.
        block_table: int32 or int64 ``[rows, width]``, any row stride, columns contiguous.
        source: int32 ``[num_layers, rows, kv_heads, count]``, last dimension contiguous. The number
            of caches is a multiple of ``num_layers``.
        beside: at most two pairs, with a ``source`` of one layer: int32 or float32 ``[num_blocks,
            kv_heads, block_size]``, any strides with the last dimension contiguous, and values of
            the same dtype ``[rows, kv_heads, n]``, the last dimension contiguous, in resident
            order.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or ``count`` exceeds
            the block table.
    """
    if source.is_cuda:
        from .kernel import move_tokens_triton

        move_tokens_triton(caches, block_table, source, beside)
    else:
        move_tokens_vectorized(caches, block_table, source, beside)
