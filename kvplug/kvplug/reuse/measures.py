"""Stability measures of a segment, from the statistics of `kvplug_kernels.segment_stats`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvplug_kernels.segment_stats import KEY_COSINE, KEY_RMS, OUTGOING, SPARSITY, VALUE_RMS

QUERIES = 16
"""Last tokens of a segment whose queries show how much it attends to the text before it."""


class RunningScale:
    """Running mean of the RMS of a model's keys and values, per layer and head, over segments.

    Args:
        half_life: Segments after which a segment's weight is halved.
    """

    def __init__(self, half_life: float = 1024.0):
        self._keep = 0.5 ** (1 / half_life)
        self._weight = 0.0
        self._sum: Tensor | None = None

    def add(self, stats: Tensor) -> None:
        """Add a segment's statistics, float32 ``[layers, heads, 5]``; ignored if not finite."""
        rms = stats[..., [KEY_RMS, VALUE_RMS]].double().cpu()
        if not torch.isfinite(rms).all():
            return
        before = 0.0 if self._sum is None else self._sum * self._keep
        self._sum = before + rms
        self._weight = self._weight * self._keep + 1.0

    @property
    def mean(self) -> Tensor | None:
        """Mean RMS of keys and of values, float64 ``[layers, heads, 2]``; None without segments."""
        return None if self._sum is None else self._sum / self._weight


def measures(stats: Tensor, running: RunningScale) -> dict[str, float]:
    """Compute the measures that a fingerprint holds.

    Args:
        stats: Statistics of a segment in all layers, float32 ``[layers, heads, 5]``.
        running: Of the model; may include this segment or not.

    Returns:
        ``k_drift`` and ``v_drift``, the mean over layers and heads of ``|rms / running - 1|``;
        ``sparsity``, ``key_cosine`` and ``outgoing``, means over layers and heads. Measures that
        are unknown or not finite are left out.
    """
    found: dict[str, float] = {}
    mean, rows = running.mean, stats.double().cpu()
    if mean is not None:
        drift = (rows[..., [KEY_RMS, VALUE_RMS]] / mean.clamp_min(1e-30) - 1).abs()
        k_drift, v_drift = drift.mean((0, 1)).tolist()
        found |= {"k_drift": k_drift, "v_drift": v_drift}
    for name, column in (
        ("sparsity", SPARSITY),
        ("key_cosine", KEY_COSINE),
        ("outgoing", OUTGOING),
    ):
        found[name] = float(rows[..., column].mean())
    return {name: value for name, value in found.items() if math.isfinite(value)}
