"""Which tokens of each row and head survive an eviction, and where each of them goes."""

from __future__ import annotations

from torch import Tensor

from .vectorized import plan_survivors_vectorized

__all__ = ["plan_survivors"]


def plan_survivors(
    scores: Tensor,
    positions: Tensor,
    num_tokens: Tensor,
    *,
    candidates: int,
    count: int,
    sink: int,
    recent: int,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the ``count`` best of the first ``candidates`` tokens and plan their moves, at once.

    Tokens whose position is below ``sink``, or among the ``recent`` latest of the row's text, come
    before all others, whatever their scores. Infinite scores count as the largest and the smallest
    number there is, NaN as the smallest; among equal ones the lower index comes first. What is
    chosen is planned as :func:`kvplug_kernels.compact_kv.plan_moves` plans it: a survivor below
    ``count`` stays, the others fill the slots whose tokens go. The result is the same on every
    device and in every run. One launch on CUDA, nothing of which synchronises with the host.

    Args:
        scores: float32 ``[rows, heads, n]``, any strides with the last dimension contiguous. Rows
            of several layers are one call: fold the layers into ``rows``.
        positions: int32 of the shape of ``scores``, strides likewise.
        num_tokens: int32 ``[texts]``, tokens of each text, any stride; row ``r`` is of text ``r %
            texts``, as it is where layers are folded into rows.
        candidates: tokens that may go, at most ``n``; the others are not touched.
        count: survivors, at most ``candidates``.
        sink: leading positions of the text that come first.
        recent: latest positions of the text that come first.
        out: int32 ``[rows, heads, count]``, contiguous.

    Returns:
        The index of the token that each of the first ``count`` slots takes, its own where a token
        stays: ``out``, or a new tensor.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, a number is out of
            range, or ``out`` starts at the address of an input.
    """
    if scores.is_cuda:
        from .kernel import plan_survivors_triton

        implementation = plan_survivors_triton
    else:
        implementation = plan_survivors_vectorized
    return implementation(
        scores,
        positions,
        num_tokens,
        candidates=candidates,
        count=count,
        sink=sink,
        recent=recent,
        out=out,
    )
