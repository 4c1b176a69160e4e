"""Choosing survivors in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..compact_kv.vectorized import plan_moves_vectorized
from ..select_top.vectorized import select_top_vectorized
from .naive import LARGEST, check_arguments


@checked(check_arguments)
def plan_survivors_vectorized(
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
    at = positions[..., :candidates]
    since = (num_tokens - recent).repeat(len(at) // max(len(num_tokens), 1))
    always = (at < sink) | (at >= since[:, None, None])
    ranked = scores[..., :candidates].nan_to_num(nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)
    ranked = ranked.masked_fill_(always, torch.inf).contiguous()
    return plan_moves_vectorized(select_top_vectorized(ranked, count), count, out=out)
