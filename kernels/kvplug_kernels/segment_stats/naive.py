"""The specification of a segment's measures: legal arguments, then plain loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import FLOATS, check_tensor, checked

KEY_RMS, VALUE_RMS, SPARSITY, KEY_COSINE, OUTGOING = range(5)


def check_arguments(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    before: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_tensor("key", key, FLOATS, ("n", "heads", "head_size"), key.device, any_strides=True)
    n, heads, head_size = key.shape
    if heads < 1 or head_size < 1:
        raise ValueError(f"key must have heads of at least one element, got {tuple(key.shape)}.")
    dtype = (key.dtype,)
    check_tensor("value", value, dtype, (n, heads, head_size), key.device, any_strides=True)
    if query is not None:
        check_tensor(
            "query", query, dtype, ("m", "num_heads", head_size), key.device, any_strides=True
        )
        if query.shape[0] > n:
            raise ValueError(
                f"query must have at most the {n} tokens of key, got {query.shape[0]}."
            )
        if query.shape[1] < 1 or query.shape[1] % heads:
            raise ValueError(
                f"query must have a multiple of the {heads} heads of key, got {query.shape[1]}."
            )
    if before is not None:
        check_tensor("before", before, dtype, ("c", heads, head_size), key.device, any_strides=True)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")


@checked(check_arguments)
def segment_stats_naive(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    before: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.segment_stats.segment_stats`, in float64."""
    n, heads, head_size = key.shape
    found = [[math.nan] * 5 for _ in range(heads)]
    for h in range(heads if n else 0):
        k, v = key[:, h].double(), value[:, h].double()
        found[h][KEY_RMS] = math.sqrt(float(k.square().sum()) / (n * head_size))
        found[h][VALUE_RMS] = math.sqrt(float(v.square().sum()) / (n * head_size))
        if n > 1:
            found[h][SPARSITY] = _hoyer([float(token.norm()) for token in v])
            similarity = [_cosine(k[t], k[t - 1]) for t in range(1, n)]
            found[h][KEY_COSINE] = sum(similarity) / (n - 1)
        if query is not None and query.shape[0] > 0:
            found[h][OUTGOING] = _outgoing(k, query, before, h, scale)
    return torch.tensor(found, dtype=torch.float32, device=key.device)


def _hoyer(norms: list[float]) -> float:
    length = math.sqrt(sum(norm * norm for norm in norms))
    if length == 0:
        return 0.0
    root = math.sqrt(len(norms))
    return (root - sum(norms) / length) / (root - 1)


def _cosine(a: Tensor, b: Tensor) -> float:
    lengths = float(a.norm()) * float(b.norm())
    return float(a @ b) / lengths if lengths != 0 else 0.0


def _outgoing(k: Tensor, query: Tensor, before: Tensor | None, h: int, scale: float) -> float:
    (n, heads), m = (k.shape[0], query.shape[1]), query.shape[0]
    kv_heads = 1 if before is None else before.shape[1]
    if before is None or before.shape[0] == 0:
        return 0.0
    group = heads // kv_heads
    total = 0.0
    for g in range(h * group, (h + 1) * group):
        for j in range(m):
            seen = torch.cat([before[:, h].double(), k[: n - m + j + 1]])
            weights = (scale * (seen @ query[j, g].double())).softmax(0)
            total += float(weights[: before.shape[0]].sum())
    return total / (group * m)
