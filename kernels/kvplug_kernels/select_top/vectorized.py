"""Selection in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments


@checked(check_arguments)
def select_top_vectorized(
    scores: Tensor, count: int, lens: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.select_top.select_top`."""
    rows, heads, n = scores.shape
    if out is None:
        out = scores.new_empty((rows, heads, count), dtype=torch.int32)
    if out.numel() == 0:
        return out
    ranked = scores.masked_fill(scores.isnan(), float("-inf"))
    resident = None
    if lens is not None:
        resident = (torch.arange(n, device=scores.device) < lens[:, None, None]).expand_as(ranked)
        ranked.masked_fill_(~resident, float("-inf"))
    threshold = ranked.topk(count, sorted=False).values.amin(-1, keepdim=True)
    kept = ranked >= threshold
    if resident is not None:
        kept &= resident
    if bool((kept.sum(-1) != count).any()):
        level = kept & (ranked == threshold)
        above = kept & ~level
        missing = count - above.sum(-1, keepdim=True)
        kept = above | (level & (level.cumsum(-1) <= missing))
        if resident is not None:
            missing = count - kept.sum(-1, keepdim=True)
            kept |= ~resident & ((~resident).cumsum(-1) <= missing)
    out.copy_(kept.nonzero()[:, 2].view(rows, heads, count))
    return out
