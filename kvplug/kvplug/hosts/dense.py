"""Attention over any format by reading its pages back: the reference that kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from kvplug.contract import AttendBatch, FormatPolicy, LayerView, ReadBack

LOGITS_BYTES = 64 << 20
"""Bytes of logits in memory at a time."""


def attend(
    policy: FormatPolicy, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor
) -> None:
    """Attend by the format's own `FormatPolicy.attend`, or by `attend_dense` where it has none.

    Takes what `attend_dense` takes.
    """
    try:
        policy.attend(layer, batch, cache, out)
    except ReadBack:
        attend_dense(policy, layer, batch, cache, out)


def attend_dense(
    policy: FormatPolicy, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor
) -> None:
    """Attend a step's queries over stored tokens, read back with `FormatPolicy.read`.

    Rows with about as many queries go together, so a batch of decoding requests is one product.

    Args:
        policy: The format.
        layer: The layer.
        batch: The queries.
        cache: ``[num_blocks, heads, block_size, bytes_per_token_head]`` uint8.
        out: ``[num_tokens, num_heads, head_size]``.
    """
    from kvplug_kernels.paging import bucket_rows

    starts = batch.query_start.long()
    widths = starts[1:] - starts[:-1]
    for rows in bucket_rows(widths):
        kv_heads, stored = layer.num_kv_heads, int(batch.seq_lens[rows].max())
        logits = int(widths[rows].max()) * batch.query.shape[1] * stored * 4
        for part in torch.split(rows, max(1, LOGITS_BYTES // max(logits, 1))):
            _attend_rows(policy, layer, batch, cache, out, part, widths[part], kv_heads)


def _attend_rows(
    policy: FormatPolicy,
    layer: LayerView,
    batch: AttendBatch,
    cache: Tensor,
    out: Tensor,
    rows: Tensor,
    widths: Tensor,
    kv_heads: int,
) -> None:
    size, device = cache.shape[2], cache.device
    lens = batch.seq_lens[rows].long()
    stored = int(lens.max())
    pages = -(-stored // size)
    live = torch.arange(pages, device=device) * size < lens[:, None]
    table = torch.where(live, batch.block_table[rows, :pages].long(), 0)
    key, value = policy.read(layer, cache, table.flatten())
    shape = (len(rows), pages)

    def rowwise(pages_: Tensor) -> Tensor:
        by_row = pages_.reshape(*shape, *pages_.shape[1:]).transpose(1, 2)
        return by_row.flatten(2, 3)[:, :, :stored].float()

    keys, values = rowwise(key), rowwise(value)
    # Slots that were never written may read back as NaN, and zero times NaN is NaN.
    beyond = (torch.arange(stored, device=device) >= lens[:, None])[:, None, :, None]
    keys.masked_fill_(beyond, 0.0)
    values.masked_fill_(beyond, 0.0)
    width = int(widths.max())
    step = torch.arange(width, device=device)
    mine = step < widths[:, None]
    token = (batch.query_start[rows].long()[:, None] + step).clamp_max(batch.query.shape[0] - 1)
    at = lens[:, None] - widths[:, None] + step
    if batch.key is not None and batch.value is not None:
        row = torch.arange(len(rows), device=device)[:, None].expand_as(at)[mine]
        keys[row, :, at[mine]] = batch.key[token[mine]].float()
        values[row, :, at[mine]] = batch.value[token[mine]].float()
        if batch.recent is not None and batch.request_slots is not None:
            ring, slot = batch.recent.key.shape[1], batch.request_slots[rows].long()
            place, before = torch.arange(ring, device=device), lens - widths
            known = (place < (before % ring)[:, None]) & (slot >= 0)[:, None]
            row, place = known.nonzero(as_tuple=True)
            position = (before - before % ring)[row] + place
            keys[row, :, position] = batch.recent.key[slot[row], place].float()
            values[row, :, position] = batch.recent.value[slot[row], place].float()
    query = batch.query[token].float()
    query = query.view(*query.shape[:2], kv_heads, -1, query.shape[3])
    seen = torch.arange(stored, device=device) <= at[..., None]
    tile = max(1, LOGITS_BYTES // max(len(rows) * batch.query.shape[1] * stored * 4, 1))
    for first in range(0, width, tile):
        part = slice(first, first + tile)
        logits = torch.einsum("rqhgd,rhtd->rhgqt", query[:, part], keys) * batch.scale
        if batch.softcap:
            logits = batch.softcap * torch.tanh(logits / batch.softcap)
        logits = logits.masked_fill(~seen[:, None, None, part], float("-inf"))
        sums = torch.einsum("rhgqt,rhtd->rqhgd", logits.softmax(-1), values).flatten(2, 3)
        out[token[:, part][mine[:, part]]] = sums[mine[:, part]].to(out.dtype)
