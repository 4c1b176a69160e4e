"""The specification of choosing survivors: legal arguments, then plain loops."""

from __future__ import annotations

import math

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
from ..compact_kv.naive import plan_moves_naive

LARGEST = torch.finfo(torch.float32).max


def check_arguments(
    scores: Tensor,
    positions: Tensor,
    num_tokens: Tensor,
    *,
    candidates: int,
    count: int,
    sink: int,
    recent: int,
    out: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = scores.device
    check_tensor("scores", scores, FLOAT32, ("rows", "heads", "n"), device)
    rows, heads, n = scores.shape
    check_tensor("positions", positions, INT32, (rows, heads, n), device)
    check_tensor("num_tokens", num_tokens, INT32, ("texts",), device, any_strides=True)
    if rows and (not len(num_tokens) or rows % len(num_tokens)):
        raise ValueError(
            f"num_tokens must have a number of texts that divides the {rows} rows, got "
            f"{len(num_tokens)}."
        )
    if not 0 <= candidates <= n:
        raise ValueError(f"candidates must lie between 0 and the {n} tokens, got {candidates}.")
    if not 0 <= count <= candidates:
        raise ValueError(f"count must lie between 0 and the {candidates} candidates, got {count}.")
    for name, number in (("sink", sink), ("recent", recent)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}.")
    if out is not None:
        check_tensor("out", out, INT32, (rows, heads, count), device)
        check_contiguous("out", out)
    inputs = {"scores": scores, "positions": positions, "num_tokens": num_tokens}
    check_separate("out", out, inputs)


@checked(check_arguments)
def plan_survivors_naive(
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
    """Same contract as :func:`kvplug_kernels.plan_survivors.plan_survivors`."""
    rows, heads, _ = scores.shape
    keep = scores.new_empty((rows, heads, count), dtype=torch.int32)
    for r in range(rows):
        latest = int(num_tokens[r % len(num_tokens)]) - recent
        for h in range(heads):
            worth = []
            for t in range(candidates):
                score, position = float(scores[r, h, t]), int(positions[r, h, t])
                score = -LARGEST if math.isnan(score) else min(max(score, -LARGEST), LARGEST)
                worth.append(math.inf if position < sink or position >= latest else score)
            best = sorted(range(candidates), key=lambda t, worth=worth: (-worth[t], t))  # type: ignore[misc]
            keep[r, h] = torch.tensor(sorted(best[:count]), dtype=torch.int32)
    return plan_moves_naive(keep, count, out=out)
