"""The indices of the highest scores of each row and head, in ascending order."""

from __future__ import annotations

from torch import Tensor

from .vectorized import select_top_vectorized

__all__ = ["select_top"]


def select_top(
    scores: Tensor, count: int, lens: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Choose, for each row and head, the ``count`` resident tokens of the highest scores.

    ``out[r, h]`` lists their indices in ascending order. Among equal scores the lower index is
    chosen first; -0 equals 0 and NaN counts as -inf. Only the first ``lens[r]`` scores of a row
    take part. A row with fewer than ``count`` resident tokens keeps them all, followed by
    the indices that come after them, so that its result is ``0 .. count - 1``. The result is the
    same on every device and in every run. Nothing synchronises with the host on CUDA, so with
    ``out`` given the call can be captured in a CUDA graph.

    Args:
        scores: float32 ``[rows, heads, n]``, any strides with the last dimension contiguous; +inf
            keeps a token whatever the others score. Rows of several layers are one call: fold the
            layers into ``rows``.
        count: how many to keep, from 0 to ``n``.
        lens: int32 ``[rows]``, resident tokens of each row; ``n`` for every row without it.
        out: int32 ``[rows, heads, count]``, last dimension contiguous.

    Returns:
        ``out``, or a new contiguous tensor of that shape.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``count`` lies
            outside ``[0, n]``, or ``out`` starts at the address of an input.
    """
    if scores.is_cuda:
        from .kernel import select_top_triton

        return select_top_triton(scores, count, lens, out=out)
    return select_top_vectorized(scores, count, lens, out=out)
