"""Exact attention and the merge in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import attention_outputs, checked
from ..paging import bucket_rows
from .naive import check_exact, check_merge

LOGITS_BYTES = 4 << 20
"""Logits of a tile: a few megabytes stay in the CPU's cache between the passes over them."""
KEYS_BYTES = 16 << 20
"""Keys, and as many values, that are gathered at a time; one row may need more."""


@checked(check_exact)
def attend_exact_vectorized(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    max_query_len: int,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_lens: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.attend_exact.attend_exact`."""
    head_size = query.shape[2]
    out, lse = attention_outputs(query, head_size, out, lse)
    out.zero_()
    lse.fill_(float("-inf"))
    starts = query_start.long()
    widths = starts[1:] - starts[:-1]
    for bucket in bucket_rows(widths):
        width = int(widths[bucket].max())
        recent = None
        before = 0
        if recent_key is not None and recent_value is not None:
            assert recent_slots is not None and recent_lens is not None
            lens = recent_lens.long().clamp(0, recent_key.shape[1])
            before = int(lens[bucket].max())
            recent = recent_key[:, :before], recent_value[:, :before], recent_slots, lens
        if width == 1 and before == 0:
            # A token alone sees itself: the value is the output.
            at = starts[bucket]
            _attend_alone(query, key, value, at, scale, softcap, out, lse)
            continue
        key_bytes = (before + width) * key.shape[1] * head_size * 4
        for rows in torch.split(bucket, max(1, KEYS_BYTES // max(key_bytes, 1))):
            _attend_rows(
                query, key, value, starts, widths, rows, width, recent, scale, softcap, out, lse
            )
    return out, lse


def _attend_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    at: Tensor,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    group = query.shape[1] // key.shape[1]
    grouped = torch.unflatten(query[at].float(), 1, (-1, group))
    logits = (grouped * key[at].float()[:, :, None]).sum(-1).flatten(1) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse[at] = logits
    out[at] = value[at].float().repeat_interleave(group, 1)


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    widths: Tensor,
    rows: Tensor,
    width: int,
    recent: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    num_heads, head_size = query.shape[1:]
    kv_heads = key.shape[1]
    group = num_heads // kv_heads
    step = torch.arange(width, device=query.device)
    mine = step < widths[rows, None]
    token = (starts[rows, None] + step).clamp_max(query.shape[0] - 1)
    whole = bool(mine.all())
    # [rows, kv_heads, n, head_size]: a head's keys as one matrix.
    keys, values = (x[token].float().transpose(1, 2) for x in (key, value))
    before = 0
    first_seen = None
    if recent is not None and recent[0].shape[1] > 0:
        old_key, old_value, recent_slots, lens = recent
        before = old_key.shape[1]
        n_recent = lens[rows]
        slot = torch.where(n_recent > 0, recent_slots[rows], 0)
        beyond = torch.arange(before, device=query.device) >= n_recent[:, None]
        old_values = old_value[slot].float().masked_fill(beyond[..., None, None], 0.0)
        keys = torch.cat([old_key[slot].float().transpose(1, 2), keys], 2)
        values = torch.cat([old_values.transpose(1, 2), values], 2)
        first_seen = beyond if bool(beyond.any()) else None
    grouped = (query[token].float() * scale).view(len(rows), width, kv_heads, group, head_size)
    if not whole:
        # Rows padded to the width see copies of other rows' tokens, which may not be finite.
        values[:, :, before:].masked_fill_(~mine[:, None, :, None], 0.0)
    tile = max(1, LOGITS_BYTES // (len(rows) * num_heads * (before + width) * 4))
    keys, values = keys.contiguous(), values.contiguous()
    for at in range(0, width, tile):
        end = min(at + tile, width)
        n, held_n = end - at, before + end
        q = grouped[:, at:end].permute(0, 2, 3, 1, 4).reshape(len(rows), kv_heads, -1, head_size)
        logits = (q @ keys[:, :, :held_n].mT).view(len(rows), kv_heads, group, n, held_n)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        if n > 1:
            ahead = torch.ones(n, n, dtype=torch.bool, device=query.device).triu_(1)
            logits[..., before + at :].masked_fill_(ahead, float("-inf"))
        if first_seen is not None:
            logits[..., :before].masked_fill_(first_seen[:, None, None, None], float("-inf"))
        total = torch.logsumexp(logits, -1)
        weights = logits.sub_(total[..., None]).exp_().view(len(rows), kv_heads, -1, held_n)
        sums = (weights @ values[:, :, :held_n]).view(len(rows), kv_heads, group, n, head_size)
        sums = sums.permute(0, 3, 1, 2, 4).reshape(len(rows), n, num_heads, head_size)
        total = total.permute(0, 3, 1, 2).reshape(len(rows), n, num_heads)
        own = mine[:, at:end]
        to = token[:, at:end][own]
        out[to], lse[to] = sums[own], total[own]


@checked(check_merge)
def merge_attention_vectorized(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.attend_exact.merge_attention`."""
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == float("-inf"), 0.0, top)
    a, b = (lse_a - top).exp(), (lse_b - top).exp()
    total = (a + b).clamp_min(1e-37)
    a, b = (a / total)[..., None], (b / total)[..., None]
    merged = torch.where(a > 0, out_a, 0.0) * a + torch.where(b > 0, out_b, 0.0) * b
    out.copy_(merged)
    return out
