"""Scores of resident tokens from their keys and values alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .naive import ALL, KEY_NORM, KEY_TO_MEAN, KEY_TO_PREVIOUS, VALUE_NORM
from .vectorized import key_scores_vectorized

__all__ = ["KEY_NORM", "KEY_TO_MEAN", "KEY_TO_PREVIOUS", "VALUE_NORM", "key_scores"]


def key_scores(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    which: Sequence[int] = ALL,
    out: Tensor | None = None,
) -> Tensor:
    """Score every resident token of a paged cache by norm and by cosine similarity, per head.

    ``out[i, r, h, t]`` is the score ``which[i]``, for resident token ``t`` of row ``r`` in the slot
    ``(block_table[r, t // block_size], t % block_size)``:

    - ``KEY_NORM`` and ``VALUE_NORM``: the L2 norm of its key and of its value (arXiv 2406.11430);
    - ``KEY_TO_MEAN``: the cosine between its key and the mean of the row's resident keys, each
      divided by its norm first (the anchor of KeyDiff, arXiv 2504.15364);
    - ``KEY_TO_PREVIOUS``: the cosine between its key and that of resident token ``t - 1``, 0 for
      the first.

    A cosine with a vector of norm 0 is 0, and so is every score beyond the resident tokens. Sums
    are float32, whatever the cache stores, and taken in an order that depends on the shapes alone.
    Lengths are clamped to ``width * block_size`` and to ``max_len``; the caller guarantees that the
    entries of the block table that hold a token are blocks, which is not checked on the device.
    Nothing synchronises with the host on CUDA, so with ``out`` given the call can be captured in a
    CUDA graph.

    Rows of several layers are one call where their pages are: see
    :class:`kvplug_kernels.paging.FoldedLayers`. Offsets are 64-bit, so pages may be any number of
    elements apart.

    Args:
        key_cache: float32, float16 or bfloat16 ``[num_blocks, kv_heads, block_size, head_size]``,
            any strides with the last dimension contiguous.
        value_cache: the same for values, of the dtype of ``key_cache``; its head size and strides
            may differ.
        block_table: int32 ``[rows, width]``.
        lens: int32 ``[rows]``, resident tokens of each row.
        which: the scores, distinct. Only what they need is read: keys once, once more for
            ``KEY_TO_MEAN``, and values for ``VALUE_NORM``.
        out: float32 ``[len(which), rows, kv_heads, max_len]``, last dimension contiguous.
            ``max_len`` is ``width * block_size`` without it.

    Returns:
        ``out``, or a new contiguous tensor of that shape.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or ``out`` starts at
            the address of an input.
    """
    if key_cache.is_cuda:
        from .kernel import key_scores_triton

        return key_scores_triton(key_cache, value_cache, block_table, lens, which=which, out=out)
    return key_scores_vectorized(key_cache, value_cache, block_table, lens, which=which, out=out)
