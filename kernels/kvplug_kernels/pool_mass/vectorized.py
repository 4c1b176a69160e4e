"""Pooling attention mass in vectorized torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import checked
from .naive import check_arguments, empty_scores


@checked(check_arguments)
def pool_mass_vectorized(
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
    """Same contract as :func:`kvplug_kernels.pool_mass.pool_mass`."""
    rows, kv_heads, n = positions.shape
    if out is None:
        out = empty_scores(mass, positions)
    own = mass.view(rows, kv_heads, mass.shape[1] // kv_heads, n).mean(2)
    if query_positions is not None:
        own = own / (query_positions >= 0).sum(-1).clamp(min=1).float()[:, None, None]
    inside = positions >= (num_tokens - latest)[:, None, None]
    if kernel == 1:
        return out.copy_(own.masked_fill(inside, kept))
    order = positions.argsort(-1)
    text = positions.gather(-1, order)
    reach = kernel // 2
    padded = functional.pad(own.masked_fill(inside, 0.0).gather(-1, order), (reach, reach))
    places = functional.pad(text, (reach, reach), value=-kernel)
    pooled = torch.zeros_like(own)
    for shift in range(kernel):
        near = (places[..., shift : shift + n] - text).abs() <= reach
        taken = padded[..., shift : shift + n].where(near, 0)
        pooled = torch.maximum(pooled, taken) if how == "max" else pooled + taken
    if how == "mean":
        pooled /= kernel
    out.scatter_(-1, order, pooled)
    return out.masked_fill_(inside, kept)
