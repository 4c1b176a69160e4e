"""Attention mass in vectorized torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..arguments import checked
from ..paging import batches, gather_resident, live_table
from .naive import check_arguments

LOGITS_BYTES = 4 << 20
KEYS_BYTES = 4 << 20


@checked(check_arguments)
def attention_mass_vectorized(
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
    """Same contract as :func:`kvplug_kernels.attention_mass.attention_mass`."""
    rows, w, num_heads, head_size = query.shape
    _, kv_heads, block_size, _ = key_cache.shape
    group = num_heads // kv_heads
    capacity = block_table.shape[1] * block_size
    if out is None:
        out = query.new_empty((rows, num_heads, capacity), dtype=torch.float32)
    n_resident = lens.clamp(0, min(capacity, out.shape[2])).long()
    longest = int(n_resident.max()) if rows > 0 else 0
    out.zero_()
    if longest == 0 or w == 0:
        return out
    table = live_table(block_table, n_resident, block_size)
    grouped_out = out.view(rows, kv_heads, group, out.shape[2])
    offset = torch.arange(w, device=query.device)
    q_position = (
        n_resident[:, None] - w + offset if query_positions is None else query_positions.long()
    )
    scaled = query.permute(0, 2, 1, 3).float() * scale
    scaled = scaled.view(rows, kv_heads, group, w, head_size)

    # A few megabytes of logits stay in the CPU's cache between the passes over them.
    at_once = min(
        LOGITS_BYTES // (group * w * longest * 4), KEYS_BYTES // (longest * head_size * 4)
    )
    group_step = min(max(LOGITS_BYTES // (w * longest * 4), 1), group)
    w_step = min(max(LOGITS_BYTES // (longest * 4), 1), w)
    for in_rows, in_heads in batches(rows, kv_heads, at_once):
        resident = n_resident[in_rows]
        n = int(resident.max())
        if n == 0:
            continue
        keys = gather_resident(key_cache[:, in_heads], table[in_rows], n).float()
        token = torch.arange(n, device=query.device)
        beyond = (token >= resident[:, None])[:, None]
        position = token.expand(*keys.shape[:3])
        if key_positions is not None:
            position = key_positions[in_rows, in_heads, :n].long()
        position = position.masked_fill(beyond, 2**31)
        seen_by = q_position[in_rows]
        # A query that sees nothing hides no column either: its weights mean nothing and are
        # replaced by zeros.
        active = (seen_by >= 0)[:, None] & (position.amin(2)[..., None] <= seen_by[:, None])
        seen_by = seen_by[:, None].masked_fill(~active, 2**31)
        all_active = bool(active.all())
        hidden_from_some = position > seen_by.amin(2)[..., None]
        hidden_columns = hidden_from_some.flatten(0, 1).any(0).nonzero()
        first_hidden = int(hidden_columns[0]) if hidden_columns.numel() > 0 else n
        for w_start in range(0, w, w_step):
            in_w = slice(w_start, min(w_start + w_step, w))
            hidden = position[:, :, None, first_hidden:] > seen_by[:, :, in_w, None]
            for g_start in range(0, group, group_step):
                in_group = slice(g_start, min(g_start + group_step, group))
                q = scaled[in_rows, in_heads, in_group, in_w]
                logits = (q.flatten(2, 3) @ keys.mT).view(*q.shape[:4], n)
                if softcap > 0:
                    logits.div_(softcap).tanh_().mul_(softcap)
                if first_hidden < n:
                    logits[..., first_hidden:].masked_fill_(hidden[:, :, None], float("-inf"))
                weights = torch.softmax(logits, -1, out=logits)
                if not all_active:
                    weights.masked_fill_(~active[:, :, None, in_w, None], 0)
                so_far = grouped_out[in_rows, in_heads, in_group, :n]
                if how == "sum":
                    so_far += weights.sum(3)
                else:
                    torch.maximum(so_far, weights.amax(3), out=so_far)
    return out
