"""Selection in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import check_arguments


def select_top_vectorized(
    scores: Tensor, count: int, lens: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.select_top.select_top`."""
    check_arguments(scores, count, lens, out)
    rows, heads, n = scores.shape
    if out is None:
        out = scores.new_empty((rows, heads, count), dtype=torch.int32)
    if out.numel() == 0:
        return out
    ranked = scores.masked_fill(scores.isnan(), float("-inf"))
    held = None
    if lens is not None:
        held = (torch.arange(n, device=scores.device) < lens[:, None, None]).expand_as(ranked)
        ranked.masked_fill_(~held, float("-inf"))
    threshold = ranked.topk(count, sorted=False).values.amin(-1, keepdim=True)
    kept = ranked >= threshold
    if held is not None:
        kept &= held
    if bool((kept.sum(-1) != count).any()):
        level = kept & (ranked == threshold)
        above = kept & ~level
        missing = count - above.sum(-1, keepdim=True)
        kept = above | (level & (level.cumsum(-1) <= missing))
        if held is not None:
            missing = count - kept.sum(-1, keepdim=True)
            kept |= ~held & ((~held).cumsum(-1) <= missing)
    out.copy_(kept.nonzero()[:, 2].view(rows, heads, count))
    return out
