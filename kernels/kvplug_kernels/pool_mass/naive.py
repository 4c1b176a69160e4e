"""The specification of pooling attention mass: legal arguments, then plain loops."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..arguments import (
    FLOAT32,
    INT32,
    check_contiguous,
    check_separate,
    check_tensor,
    checked,
)


def check_arguments(
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
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = mass.device
    check_tensor("mass", mass, FLOAT32, ("rows", "num_heads", "n"), device)
    rows, num_heads, n = mass.shape
    check_tensor("positions", positions, INT32, (rows, "kv_heads", n), device)
    kv_heads = positions.shape[1]
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"mass must have a multiple of the {kv_heads} heads of positions, got {num_heads}."
        )
    check_tensor("num_tokens", num_tokens, INT32, (rows,), device, any_strides=True)
    if isinstance(latest, Tensor):
        check_tensor("latest", latest, INT32, (rows,), device, any_strides=True)
    if longest < 0:
        raise ValueError(f"longest must be at least 0, got {longest}.")
    if query_positions is not None:
        shape = (rows, "w")
        check_tensor("query_positions", query_positions, INT32, shape, device, any_strides=True)
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, got {kernel}.")
    if how not in ("mean", "max"):
        raise ValueError(f"how must be 'mean' or 'max', got {how!r}.")
    if out is not None:
        check_tensor("out", out, FLOAT32, (rows, kv_heads, n), device)
        check_contiguous("out", out)
    inputs = {"mass": mass, "positions": positions, "num_tokens": num_tokens}
    check_separate("out", out, {**inputs, "query_positions": query_positions})


@checked(check_arguments)
def pool_mass_naive(
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
    """Same contract as :func:`kvplug_kernels.pool_mass.pool_mass`, in float64."""
    rows, kv_heads, n = positions.shape
    group = mass.shape[1] // kv_heads
    if out is None:
        out = mass.new_empty((rows, kv_heads, n))
    for r in range(rows):
        since = int(num_tokens[r]) - (int(latest[r]) if isinstance(latest, Tensor) else latest)
        queries = 1 if query_positions is None else max(int((query_positions[r] >= 0).sum()), 1)
        for h in range(kv_heads):
            own = mass[r, h * group : (h + 1) * group].double().mean(0) / queries
            place = {int(p): t for t, p in enumerate(positions[r, h])}
            for position, t in place.items():
                if position >= since:
                    out[r, h, t] = kept
                    continue
                around = [
                    float(own[place[p]]) if p in place and p < since else 0.0
                    for p in range(position - kernel // 2, position + kernel // 2 + 1)
                ]
                out[r, h, t] = max(around) if how == "max" else sum(around) / kernel
    return out


def empty_scores(mass: Tensor, positions: Tensor) -> Tensor:
    """The result, yet to be written."""
    return torch.empty(positions.shape, dtype=torch.float32, device=mass.device)
