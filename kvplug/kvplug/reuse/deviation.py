"""Which tokens of reused text are worth computing anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def deviation(stale_key: Tensor, stale_value: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """How far each token's stored KV is from what its text gives in one layer.

    CacheBlend (arXiv 2405.16444) compares the second layer's: the first layer's K and V depend on
    the token alone, so one layer over the whole text gives the second's exactly, and tokens that
    deviate there tend to deviate in every layer.

    Args:
        stale_key: ``[n, kv_heads, head_size]`` as stored, rotated to where it is used.
        stale_value: The same shape.
        key: As computed.
        value: As computed.

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
    """Indices of the ``count`` tokens that deviate most, ascending, int64.

    Ties go to the earlier token, and NaN counts as the largest.
    """
    ranked = torch.sort(deviations.nan_to_num(nan=torch.inf), descending=True, stable=True).indices
    return ranked[: max(count, 0)].sort().values


def spans(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending positions as the fewest runs ``(start, end)``."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found
