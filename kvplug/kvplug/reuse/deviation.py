"""Finds the tokens of reused text that are most worth recomputing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def deviation(stale_key: Tensor, stale_value: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Measure how far each token's stored KV is from its recomputed KV in one layer.

    CacheBlend (arXiv 2405.16444) compares the second layer's: the first layer's K and V depend on
    the token alone, so computing one layer over the whole text gives the second's exactly, and
    tokens that deviate there tend to deviate in every layer.

    Args:
        stale_key: ``[n, kv_heads, head_size]`` as stored, re-rotated to where it is used.
        stale_value: As stored, of the same shape.
        key: As recomputed, of the same shape.
        value: As recomputed, of the same shape.

    Returns:
        float32 ``[n]``: the squared distance of the keys over the mean square norm of keys, plus
        the same of the values.
    """
    total = torch.zeros(len(key), device=key.device)
    for stale, true in ((stale_key, key), (stale_value, value)):
        true = true.float()
        distance = (stale.float() - true).square().sum((1, 2))
        total += distance / true.square().sum((1, 2)).mean().clamp_min(1e-30)
    return total


def most_deviating(deviations: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` tokens that deviate most, ascending, int64.

    Ties go to the earlier token; NaN counts as the largest.
    """
    ranked = torch.sort(deviations.nan_to_num(nan=torch.inf), descending=True, stable=True).indices
    return ranked[: max(count, 0)].sort().values


def spans(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Merge ascending positions into as few spans ``(start, end)`` as possible."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found
