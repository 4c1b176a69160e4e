"""Laying out resident tokens in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from .naive import LatestQueries, LayerSlice, ResidentTokens, check_arguments, empty_result


@checked(check_arguments)
def resident_tokens_vectorized(
    block_table: Tensor,
    rows: Tensor,
    logical: Tensor,
    mixed: Tensor,
    stored: Tensor,
    layers: LayerSlice,
    *,
    count: int,
    totals: Tensor | None = None,
    latest: LatestQueries | None = None,
) -> ResidentTokens:
    """Same contract as :func:`kvplug_kernels.resident_tokens.resident_tokens`."""
    made = empty_result(rows, logical, stored, layers, count, totals, latest)
    device, size, n = logical.device, stored.shape[2], layers.num_layers
    layer = torch.arange(layers.first, layers.first + n, device=device, dtype=torch.int32)
    blocks = block_table[rows.long()].gather(1, logical.long()) * layers.block_step
    blocks = (blocks + layer[:, None, None] * layers.layer_step).flatten(0, 1)
    made.table.copy_(blocks)
    made.lens.fill_(count)

    def beside(side: Tensor) -> Tensor:
        """In resident order, ``[n, kv_heads, blocks, block_size]``."""
        return side[blocks.long()].transpose(1, 2)

    plain = logical[..., None] * size + torch.arange(size, dtype=torch.int32, device=device)
    moved = (logical < mixed[:, None]).repeat(n, 1)[:, None, :, None]
    found = torch.where(moved, beside(stored), plain.repeat(n, 1, 1)[:, None])
    made.positions.copy_(found.flatten(2)[..., :count])
    if totals is not None and made.totals is not None:
        made.totals.copy_(beside(totals).flatten(2)[..., :count])
    if latest is not None and made.queries is not None and made.query_positions is not None:
        window = torch.arange(-latest.window, 0, dtype=torch.int32, device=device)
        position = latest.ends[:, None] + window
        place = (latest.places[:, None] + position % latest.ring).long()
        place = latest.starts[layer.long()][:, None, None] + place
        made.queries.copy_(latest.queries[place.flatten(0, 1)])
        position = position.clamp_min(-1)
        if latest.begins is not None:
            position = position.masked_fill(position < latest.begins[:, None], -1)
        made.query_positions.copy_(position.repeat(n, 1))
    return made
