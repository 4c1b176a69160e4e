"""Scores from attention mass: mean over query heads, pooled over the text, the latest kept."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .vectorized import pool_mass_vectorized

__all__ = ["pool_mass"]


def pool_mass(
    mass: Tensor,
    positions: Tensor,
    num_tokens: Tensor,
    *,
    latest: int | Tensor,
    longest: int,
    query_positions: Tensor | None = None,
    kernel: int = 1,
    how: Literal["mean", "max"] = "max",
    kept: float,
    out: Tensor | None = None,
) -> Tensor:
    """Score resident tokens by the attention they receive, as SnapKV does (arXiv 2404.14469).

    The mass of a token is the mean over the query heads of its group, divided by the number of
    queries in ``query_positions`` that are not negative, at least 1. The latest tokens of a text
    count as mass 0 and score ``kept``. A score is the mean or the largest of the ``kernel`` masses
    around a token in the text; what is not resident, or beyond an end of the text, counts as 0.
    Sums are float32. One launch on CUDA, nothing of which synchronises with the host.

    Args:
        mass: float32 ``[rows, num_heads, n]``, at least 0, the last dimension contiguous.
        positions: int32 ``[rows, kv_heads, n]``, position of each token in the text, distinct
            within a row and head, at least 0, the last dimension contiguous. ``num_heads`` is a
            multiple of ``kv_heads``.
        num_tokens: int32 ``[rows]``, tokens of each row's text, any stride.
        latest: tokens at the end of a text that are kept: a number, or int32 ``[rows]``.
        longest: a number that no position reaches. It bounds memory: 1/4 byte for each.
        query_positions: int32 ``[rows, w]``, any strides; None divides by nothing.
        kernel: tokens pooled, odd: the token and as many to either side.
        how: mean or largest of them.
        kept: score of the latest tokens.
        out: float32 ``[rows, kv_heads, n]``, contiguous.

    Returns:
        ``out``, or a new tensor.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``num_heads`` is no
            multiple of ``kv_heads``, ``kernel`` is even, or ``out`` starts at the address of an
            input.
    """
    if mass.is_cuda:
        from .kernel import pool_mass_triton

        implementation = pool_mass_triton
    else:
        implementation = pool_mass_vectorized
    return implementation(
        mass,
        positions,
        num_tokens,
        latest=latest,
        longest=longest,
        query_positions=query_positions,
        kernel=kernel,
        how=how,
        kept=kept,
        out=out,
    )
