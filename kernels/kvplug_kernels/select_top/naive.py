"""The specification of the selection: legal arguments, then plain loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import FLOAT32, INT32, check_separate, check_tensor, checked


def check_arguments(
    scores: Tensor, count: int, lens: Tensor | None = None, *, out: Tensor | None = None
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = scores.device
    check_tensor("scores", scores, FLOAT32, ("rows", "heads", "n"), device)
    rows, heads, n = scores.shape
    if not 0 <= count <= n:
        raise ValueError(f"count must lie between 0 and the {n} scores of a row, got {count}.")
    if lens is not None:
        check_tensor("lens", lens, INT32, (rows,), device)
    if out is not None:
        check_tensor("out", out, INT32, (rows, heads, count), device)
    check_separate("out", out, {"scores": scores, "lens": lens})


@checked(check_arguments)
def select_top_naive(
    scores: Tensor, count: int, lens: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.select_top.select_top`."""
    rows, heads, n = scores.shape
    if out is None:
        out = scores.new_empty((rows, heads, count), dtype=torch.int32)
    for r in range(rows):
        n_resident = n if lens is None else min(max(int(lens[r]), 0), n)
        for h in range(heads):
            row = [-math.inf if math.isnan(score) else score for score in scores[r, h].tolist()]
            resident = sorted(range(n_resident), key=lambda t, row=row: (-row[t], t))  # type: ignore[misc]
            kept = sorted([*resident, *range(n_resident, n)][:count])
            out[r, h] = torch.tensor(kept, dtype=torch.int32)
    return out
