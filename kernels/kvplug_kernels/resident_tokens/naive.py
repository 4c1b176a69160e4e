"""The specification of laying out resident tokens: legal arguments, then plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import FLOAT32, FLOATS, INT32, check_tensor, checked

COPIES = 2


@dataclass(frozen=True)
class LayerSlice:
    """Neighbouring layers whose caches are numbered as one; see `paging.FoldedLayers`.

    Attributes:
        first: The first of them.
        num_layers: How many.
        block_step: Blocks of the one cache between two blocks of a layer.
        layer_step: Blocks of the one cache between two layers.
    """

    first: int
    num_layers: int
    block_step: int
    layer_step: int


@dataclass(frozen=True)
class LatestQueries:
    """The latest queries of each row, to be laid out in the order of the text.

    Attributes:
        queries: Remembered queries of all layers, float32, float16 or bfloat16 ``[n, num_heads,
            head_size]``, contiguous. The query at position ``p`` of a text is at ``starts[layer] +
            places[row] + p % ring``.
        starts: int64 ``[>= layers.first + layers.num_layers]``, by layer.
        places: int32 ``[rows]``, by row, any stride.
        ends: int32 ``[rows]``, tokens of each row's text, any stride.
        ring: Queries remembered of a row.
        window: Latest queries wanted.
        begins: int32 ``[rows]``, any stride: queries before this position of a text are given the
            position -1; None for none.
    """

    queries: Tensor
    starts: Tensor
    places: Tensor
    ends: Tensor
    ring: int
    window: int
    begins: Tensor | None = None


@dataclass(frozen=True)
class ResidentTokens:
    """Resident tokens of ``n`` rows, layer by layer; see `resident_tokens`.

    Attributes:
        table: Blocks, int32 ``[2, n, blocks]``.
        positions: Positions in the text, int32 ``[2, n, kv_heads, count]``.
        lens: ``count`` for each row, int32 ``[n]``.
        totals: Totals, float32 ``[2, n, kv_heads, count]``, or None.
        queries: Latest queries, oldest first, ``[n, window, num_heads, head_size]``, or None.
        query_positions: Their positions, int32 ``[n, window]``, or None; -1 for those that are none
            of the text's, or before its ``begins``.
    """

    table: Tensor
    positions: Tensor
    lens: Tensor
    totals: Tensor | None
    queries: Tensor | None
    query_positions: Tensor | None


def check_arguments(
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
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = block_table.device
    check_tensor("block_table", block_table, INT32, ("requests", "width"), device)
    check_tensor("rows", rows, INT32, ("rows",), device, any_strides=True)
    n = rows.shape[0]
    check_tensor("logical", logical, INT32, (n, "n"), device)
    check_tensor("mixed", mixed, INT32, (n,), device, any_strides=True)
    check_tensor("stored", stored, INT32, ("num_blocks", "kv_heads", "block_size"), device)
    n_blocks, size = logical.shape[1], stored.shape[2]
    if not (n_blocks - 1) * size < count <= n_blocks * size and (n_blocks or count):
        raise ValueError(
            f"count must end in the last of the {n_blocks} blocks of logical, got {count}."
        )
    if totals is not None:
        check_tensor("totals", totals, FLOAT32, tuple(stored.shape), device)
    if latest is not None:
        shape = ("n", "num_heads", "head_size")
        check_tensor("latest.queries", latest.queries, FLOATS, shape, device)
        if not latest.queries.is_contiguous():
            raise ValueError("latest.queries must be contiguous.")
        check_tensor("latest.starts", latest.starts, (torch.int64,), ("layers",), device)
        if latest.starts.shape[0] < layers.first + layers.num_layers:
            raise ValueError(f"latest.starts must have an entry for each of {layers}.")
        check_tensor("latest.places", latest.places, INT32, (n,), device, any_strides=True)
        check_tensor("latest.ends", latest.ends, INT32, (n,), device, any_strides=True)
        if latest.begins is not None:
            check_tensor("latest.begins", latest.begins, INT32, (n,), device, any_strides=True)
        if not 0 < latest.window <= latest.ring:
            raise ValueError(
                f"latest.window must lie between 1 and the {latest.ring} queries remembered, "
                f"got {latest.window}."
            )


def empty_result(
    rows: Tensor,
    logical: Tensor,
    stored: Tensor,
    layers: LayerSlice,
    count: int,
    totals: Tensor | None,
    latest: LatestQueries | None,
) -> ResidentTokens:
    """The result, yet to be written."""
    n, heads = layers.num_layers * rows.shape[0], stored.shape[1]
    table = logical.new_empty((COPIES, n, logical.shape[1]))
    positions = logical.new_empty((COPIES, n, heads, count))
    lens = logical.new_empty((n,))
    own = None
    if totals is not None:
        own = totals.new_empty((COPIES, n, heads, count))
    if latest is None:
        return ResidentTokens(table, positions, lens, own, None, None)
    queries = latest.queries.new_empty((n, latest.window, *latest.queries.shape[1:]))
    places = logical.new_empty((n, latest.window))
    return ResidentTokens(table, positions, lens, own, queries, places)


@checked(check_arguments)
def resident_tokens_naive(
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
    size, n = stored.shape[2], rows.shape[0]
    for i in range(layers.num_layers):
        layer = layers.first + i
        for r in range(n):
            at = i * n + r
            made.lens[at] = count
            for j, block in enumerate(logical[r].tolist()):
                own = int(block_table[rows[r], block]) * layers.block_step
                made.table[:, at, j] = own + layer * layers.layer_step
            for t in range(count):
                block, slot = int(logical[r, t // size]), t % size
                number = made.table[0, at, t // size]
                moved = block < int(mixed[r])
                made.positions[:, at, :, t] = (
                    stored[number, :, slot] if moved else block * size + slot
                )
                if totals is not None and made.totals is not None:
                    made.totals[:, at, :, t] = totals[number, :, slot]
            if latest is None or made.queries is None or made.query_positions is None:
                continue
            for w in range(latest.window):
                position = int(latest.ends[r]) - latest.window + w
                place = int(latest.starts[layer]) + int(latest.places[r]) + position % latest.ring
                made.queries[at, w] = latest.queries[place]
                begin = int(latest.begins[r]) if latest.begins is not None else 0
                made.query_positions[at, w] = position if position >= max(begin, 0) else -1
    return made
