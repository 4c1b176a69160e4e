"""The specification of the compaction: legal arguments, then plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import INT32, check_separate, check_tensor, checked

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_plan_arguments(keep: Tensor, count: int, *, out: Tensor | None = None) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_tensor("keep", keep, INT32, ("rows", "kv_heads", count), keep.device)
    if out is not None:
        check_tensor("out", out, INT32, tuple(keep.shape), keep.device)
    check_separate("out", out, {"keep": keep})


def check_arguments(
    caches: Sequence[Tensor],
    block_table: Tensor,
    keep: Tensor,
    *,
    count: int,
    out: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_plan_arguments(keep, count, out=out)
    rows, kv_heads, _ = keep.shape
    check_tensor("block_table", block_table, INT32, (rows, "width"), keep.device)
    inputs = {"keep": keep, "block_table": block_table}
    for i, cache in enumerate(caches):
        name = f"caches[{i}]"
        inputs[name] = cache
        check_cache(name, cache, kv_heads, keep.device)
        capacity = block_table.shape[1] * cache.shape[2]
        if count > capacity:
            raise ValueError(
                f"count must be at most the {capacity} slots of a row of block_table in {name}, "
                f"got {count}."
            )
    check_separate("out", out, inputs)


def check_cache(name: str, cache: Tensor, kv_heads: int, device: torch.device) -> None:
    """Raise ValueError unless the tensor is a cache whose tokens can be moved."""
    if cache.element_size() not in WORDS:
        raise ValueError(f"{name} must have elements of 1, 2, 4 or 8 bytes, got {cache.dtype}.")
    if cache.ndim < 3 or cache.shape[1] != kv_heads or cache.shape[2] < 1:
        raise ValueError(
            f"{name} must have shape [num_blocks, {kv_heads}, block_size, *content], "
            f"got {tuple(cache.shape)}."
        )
    if cache.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {cache.device}.")
    dense = 1
    for size, stride in zip(reversed(cache.shape[3:]), reversed(cache.stride()), strict=False):
        if size > 1 and stride != dense:
            raise ValueError(
                f"{name} must be contiguous from its fourth dimension on, "
                f"got strides {cache.stride()}."
            )
        dense *= size


def as_word_pages(cache: Tensor) -> Tensor:
    """View a cache as integers of its element size, ``[num_blocks, kv_heads, block_size,
    content]``, so that moving it cannot change a bit."""
    words = cache.view(WORDS[cache.element_size()])
    content = words.shape[3:].numel()
    return words.as_strided((*words.shape[:3], content), (*words.stride()[:3], 1))


@checked(check_plan_arguments)
def plan_moves_naive(keep: Tensor, count: int, *, out: Tensor | None = None) -> Tensor:
    """Same contract as :func:`kvplug_kernels.compact_kv.plan_moves`."""
    if out is None:
        out = torch.empty_like(keep, memory_format=torch.contiguous_format)
    for r in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            kept = keep[r, h].tolist()
            stays = {t for t in kept if t < count}
            movers = iter([t for t in kept if t >= count])
            source = [j if j in stays else next(movers) for j in range(count)]
            out[r, h] = torch.tensor(source, dtype=torch.int32)
    return out


@checked(check_arguments)
def compact_kv_naive(
    caches: Sequence[Tensor],
    block_table: Tensor,
    keep: Tensor,
    *,
    count: int,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.compact_kv.compact_kv`."""
    source = plan_moves_naive(keep, count, out=out)
    for cache in caches:
        pages = as_word_pages(cache)
        block_size = pages.shape[2]
        for r, table in enumerate(block_table.tolist()):
            for h, row in enumerate(source[r].tolist()):
                for j, t in enumerate(row):
                    if t != j:
                        token = pages[table[t // block_size], h, t % block_size]
                        pages[table[j // block_size], h, j % block_size] = token
    return source
