"""The specification of the attention mass: legal arguments, then plain loops."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..arguments import FLOAT32, INT32, check_separate, check_tensor, checked
from ..paging import check_pages


def check_arguments(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    softcap: float = 0.0,
    how: Literal["sum", "max"] = "sum",
    out: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = key_cache.device
    check_pages("key_cache", key_cache, device)
    _, kv_heads, block_size, head_size = key_cache.shape
    query_shape = ("rows", "w", "num_heads", head_size)
    check_tensor("query", query, (key_cache.dtype,), query_shape, device)
    rows, w, num_heads, _ = query.shape
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of the {kv_heads} heads of key_cache, got {num_heads}."
        )
    check_tensor("block_table", block_table, INT32, (rows, "width"), device)
    check_tensor("lens", lens, INT32, (rows,), device)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and at least 0, got {softcap}.")
    if how not in ("sum", "max"):
        raise ValueError(f"how must be 'sum' or 'max', got {how!r}.")
    if out is not None:
        check_tensor("out", out, FLOAT32, (rows, num_heads, "max_len"), device)
    max_len = block_table.shape[1] * block_size if out is None else out.shape[2]
    if (key_positions is None) != (query_positions is None):
        missing = "key_positions" if key_positions is None else "query_positions"
        raise ValueError(
            f"{missing} must be given too: key_positions and query_positions go together."
        )
    if key_positions is not None and query_positions is not None:
        key_shape = (rows, kv_heads, max_len)
        check_tensor("key_positions", key_positions, INT32, key_shape, device)
        check_tensor("query_positions", query_positions, INT32, (rows, w), device)
    inputs = {
        "query": query,
        "key_cache": key_cache,
        "block_table": block_table,
        "lens": lens,
        "key_positions": key_positions,
        "query_positions": query_positions,
    }
    check_separate("out", out, inputs)


@checked(check_arguments)
def attention_mass_naive(
    query: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    softcap: float = 0.0,
    how: Literal["sum", "max"] = "sum",
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.attention_mass.attention_mass`, in float64."""
    rows, w, num_heads, _ = query.shape
    _, kv_heads, block_size, _ = key_cache.shape
    capacity = block_table.shape[1] * block_size
    if out is None:
        out = query.new_empty((rows, num_heads, capacity), dtype=torch.float32)
    out.zero_()
    for r, n in enumerate(lens.clamp(0, min(capacity, out.shape[2])).tolist()):
        slots = [(int(block_table[r, t // block_size]), t % block_size) for t in range(n)]
        for h in range(num_heads):
            kv_head = h // (num_heads // kv_heads)
            keys = [key_cache[block, kv_head, offset].double() for block, offset in slots]
            for i in range(w):
                q_position = n - w + i if query_positions is None else int(query_positions[r, i])
                visible = []
                for t in range(n):
                    k_position = t if key_positions is None else int(key_positions[r, kv_head, t])
                    if k_position <= q_position:
                        visible.append(t)
                if q_position < 0 or not visible:
                    continue
                q = query[r, i, h].double()
                logits = torch.stack([scale * torch.dot(q, keys[t]) for t in visible])
                if softcap > 0:
                    logits = softcap * torch.tanh(logits / softcap)
                for t, weight in zip(visible, torch.softmax(logits, 0).tolist(), strict=True):
                    before = float(out[r, h, t])
                    out[r, h, t] = before + weight if how == "sum" else max(before, weight)
    return out
