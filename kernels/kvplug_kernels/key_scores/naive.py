"""The specification of the key scores: legal arguments, then plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import FLOAT32, INT32, check_separate, check_tensor, checked
from ..paging import check_pages

KEY_NORM = 0
VALUE_NORM = 1
KEY_TO_MEAN = 2
KEY_TO_PREVIOUS = 3
ALL = (KEY_NORM, VALUE_NORM, KEY_TO_MEAN, KEY_TO_PREVIOUS)


def check_arguments(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    which: Sequence[int] = ALL,
    out: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = key_cache.device
    check_pages("key_cache", key_cache, device)
    check_pages("value_cache", value_cache, device)
    num_blocks, kv_heads, block_size, _ = key_cache.shape
    shape = (num_blocks, kv_heads, block_size, "head_size")
    check_tensor("value_cache", value_cache, (key_cache.dtype,), shape, device)
    check_tensor("block_table", block_table, INT32, ("rows", "width"), device)
    rows = block_table.shape[0]
    check_tensor("lens", lens, INT32, (rows,), device)
    if not which or len(set(which)) < len(which) or not set(which) <= set(ALL):
        raise ValueError(f"which must name distinct scores of {ALL}, got {tuple(which)}.")
    if out is not None:
        check_tensor("out", out, FLOAT32, (len(which), rows, kv_heads, "max_len"), device)
    inputs = {
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": block_table,
        "lens": lens,
    }
    check_separate("out", out, inputs)


@checked(check_arguments)
def key_scores_naive(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    *,
    which: Sequence[int] = ALL,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.key_scores.key_scores`, in float64."""
    _, kv_heads, block_size, _ = key_cache.shape
    rows, width = block_table.shape
    if out is None:
        shape = (len(which), rows, kv_heads, width * block_size)
        out = key_cache.new_empty(shape, dtype=torch.float32)
    out.zero_()

    def cosine(a: Tensor, b: Tensor) -> float:
        norms = float(a.norm() * b.norm())
        return float(torch.dot(a, b)) / norms if norms > 0 else 0.0

    for r, n in enumerate(lens.clamp(0, min(width * block_size, out.shape[3])).tolist()):
        slots = [(int(block_table[r, t // block_size]), t % block_size) for t in range(n)]
        for h in range(kv_heads):
            keys = [key_cache[block, h, offset].double() for block, offset in slots]
            values = [value_cache[block, h, offset].double() for block, offset in slots]
            anchor = torch.zeros(key_cache.shape[3], dtype=torch.float64, device=key_cache.device)
            for key in keys:
                if key.norm() > 0:
                    anchor += key / key.norm() / n
            for t in range(n):
                found = {
                    KEY_NORM: float(keys[t].norm()),
                    VALUE_NORM: float(values[t].norm()),
                    KEY_TO_MEAN: cosine(keys[t], anchor),
                    KEY_TO_PREVIOUS: cosine(keys[t], keys[t - 1]) if t > 0 else 0.0,
                }
                for place, score in enumerate(which):
                    out[place, r, h, t] = found[score]
    return out
