"""Key scores in vectorized torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import checked
from ..paging import batches, gather_resident, live_table
from .naive import ALL, KEY_NORM, KEY_TO_MEAN, KEY_TO_PREVIOUS, VALUE_NORM, check_arguments

TOKENS_BYTES = 2 << 20


@checked(check_arguments)
def key_scores_vectorized(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    which: Sequence[int] = ALL,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.key_scores.key_scores`."""
    _, kv_heads, block_size, head_size = key_cache.shape
    rows, width = block_table.shape
    if out is None:
        shape = (len(which), rows, kv_heads, width * block_size)
        out = key_cache.new_empty(shape, dtype=torch.float32)
    n_resident = lens.clamp(0, min(width * block_size, out.shape[3])).long()
    longest = int(n_resident.max()) if rows > 0 else 0
    out.zero_()
    if longest == 0:
        return out
    table = live_table(block_table, n_resident, block_size)

    at_once = TOKENS_BYTES // (longest * head_size * 4)
    for in_rows, in_heads in batches(rows, kv_heads, at_once):
        n = int(n_resident[in_rows].max())
        if n == 0:
            continue
        # A view of the plane of each score that is asked for.
        planes = {score: out[i, in_rows, in_heads, :n] for i, score in enumerate(which)}
        resident = n_resident[in_rows, None, None]
        beyond = torch.arange(n, device=lens.device) >= resident
        shortest = int(resident.min())
        if VALUE_NORM in planes:
            values = gather_resident(value_cache[:, in_heads], table[in_rows], n)
            norms = planes[VALUE_NORM]
            torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32, out=norms)
        if planes.keys() - {VALUE_NORM}:
            keys = gather_resident(key_cache[:, in_heads], table[in_rows], n).float()
            if shortest < n:
                keys[:, :, shortest:].masked_fill_(beyond[..., shortest:, None], 0)
            norm = torch.linalg.vector_norm(keys, dim=-1)
            inverse = norm.reciprocal().masked_fill_(norm == 0, 0)
        if KEY_NORM in planes:
            planes[KEY_NORM].copy_(norm)
        if KEY_TO_MEAN in planes:
            # One product with the weights 1 / norm adds the unit keys up without forming them.
            total = inverse[:, :, None] @ keys
            length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
            anchor = torch.where(length > 0, total / length, 0)
            planes[KEY_TO_MEAN].copy_((keys @ anchor.mT).squeeze(-1) * inverse)
        if KEY_TO_PREVIOUS in planes:
            products = (keys[:, :, 1:] * keys[:, :, :-1]).sum(-1)
            planes[KEY_TO_PREVIOUS][..., 1:] = products * inverse[:, :, 1:] * inverse[:, :, :-1]
        for plane in planes.values():
            plane.masked_fill_(beyond, 0)
    return out
