"""Stability measures of a run of tokens, taken while its keys and values are at hand."""

from __future__ import annotations

from torch import Tensor

from .naive import KEY_COSINE, KEY_RMS, OUTGOING, SPARSITY, VALUE_RMS
from .vectorized import segment_stats_vectorized

__all__ = ["KEY_COSINE", "KEY_RMS", "OUTGOING", "SPARSITY", "VALUE_RMS", "segment_stats"]


def segment_stats(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    before: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Measure a segment: how large its keys and values are, how they are spread over its tokens,
    and how much it leans on what came before it.

    The columns of the result, each head by itself:

    * ``KEY_RMS``, ``VALUE_RMS``: root mean square over tokens and elements.
    * ``SPARSITY``: Hoyer's measure (JMLR 2004) of the norms ``v`` of the ``n`` values,
      ``(sqrt(n) - sum(v) / norm(v)) / (sqrt(n) - 1)``: 0 where all are alike, 1 where one token
      has all; 0 where all values are 0, NaN for one token.
    * ``KEY_COSINE``: mean cosine of neighbouring keys, 0 for a pair with a key of norm 0; NaN for
      one token.
    * ``OUTGOING``: share of the softmax mass that the segment's last ``m`` tokens put on the keys
      ``before`` it; they see those, and the segment causally. Mean over these queries and the
      query heads that read the head. NaN without queries, 0 with queries and nothing before.

    Without any token all columns are NaN, and NaN in an input stays in the columns of its head.
    Sums are float32. Two launches on CUDA, nothing of which synchronises with the host.

    Args:
        key: float32, float16 or bfloat16 ``[n, heads, head_size]``, any strides.
        value: The same shape and dtype.
        query: Queries of the last ``m <= n`` tokens ``[m, num_heads, head_size]`` in the dtype of
            ``key``, rotated like the keys; query head ``h`` reads head ``h // (num_heads //
            heads)``.
        before: Keys of what came before ``[c, heads, head_size]`` in the dtype of ``key``. Not
            read without queries.
        scale: Factor of the logits, finite.

    Returns:
        float32 ``[heads, 5]``.

    Raises:
        ValueError: an argument has the wrong dtype, shape or device, ``num_heads`` is no multiple
            of ``heads``, there are more queries than tokens, or ``scale`` is not finite.
    """
    if key.is_cuda:
        from .kernel import segment_stats_triton

        return segment_stats_triton(key, value, query, before, scale)
    return segment_stats_vectorized(key, value, query, before, scale)
