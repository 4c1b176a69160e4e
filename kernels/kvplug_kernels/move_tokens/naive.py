"""The specification of moving tokens: legal arguments, then plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import INT32, INTEGERS, check_tensor, checked
from .layers import LayerCaches

BESIDE_DTYPES = (torch.int32, torch.float32)
MAX_BESIDE = 2


def check_arguments(
    caches: LayerCaches,
    block_table: Tensor,
    source: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    _, kv_heads, block_size, _ = caches.shape
    shape = ("num_layers", "rows", kv_heads, "count")
    check_tensor("source", source, INT32, shape, caches.device)
    layers, rows, _, count = source.shape
    if layers < 1 or len(caches.pages) % layers:
        raise ValueError(
            f"source must have a number of layers that divides the {len(caches.pages)} caches, "
            f"got {layers}."
        )
    check_tensor("block_table", block_table, INTEGERS, (rows, "width"), caches.device)
    capacity = block_table.shape[1] * block_size
    if count > capacity:
        raise ValueError(
            f"source must have at most the {capacity} slots of a row of block_table, got {count}."
        )
    if beside and (layers != 1 or len(beside) > MAX_BESIDE):
        raise ValueError(
            f"beside must be at most {MAX_BESIDE} pairs, and source of one layer, got "
            f"{len(beside)} and {layers}."
        )
    for i, (pages, values) in enumerate(beside):
        slots, tokens = ("num_blocks", kv_heads, block_size), (rows, kv_heads, "n")
        check_tensor(f"beside[{i}][0]", pages, BESIDE_DTYPES, slots, caches.device)
        check_tensor(f"beside[{i}][1]", values, (pages.dtype,), tokens, caches.device)


@checked(check_arguments)
def move_tokens_naive(
    caches: LayerCaches,
    block_table: Tensor,
    source: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Same contract as :func:`kvplug_kernels.move_tokens.move_tokens`."""
    layers, (_, _, block_size, _) = source.shape[0], caches.shape
    plan = source.tolist()
    for i, pages in enumerate(caches.pages):
        for r, table in enumerate(block_table.tolist()):
            for h, row in enumerate(plan[i % layers][r]):
                for j, t in enumerate(row):
                    if t != j:
                        token = pages[table[t // block_size], h, t % block_size]
                        pages[table[j // block_size], h, j % block_size] = token
    for pages, values in beside:
        for r, table in enumerate(block_table.tolist()):
            for h, row in enumerate(plan[0][r]):
                for j, t in enumerate(row):
                    pages[table[j // block_size], h, j % block_size] = values[r, h, t]
