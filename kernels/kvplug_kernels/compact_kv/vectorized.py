"""Compaction in vectorized torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import checked
from ..paging import as_runs
from .naive import as_word_pages, check_arguments, check_plan_arguments

MOVED_BYTES = 16 << 20


@checked(check_plan_arguments)
def plan_moves_vectorized(keep: Tensor, count: int, *, out: Tensor | None = None) -> Tensor:
    """Same contract as :func:`kvplug_kernels.compact_kv.plan_moves`."""
    if out is None:
        out = torch.empty_like(keep, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    slot = torch.arange(count, dtype=torch.int32, device=keep.device)
    stays = torch.zeros(*keep.shape[:2], count + 1, dtype=torch.bool, device=keep.device)
    stays = stays.scatter_(2, keep.clamp(max=count).long(), True)[..., :count]
    # Slot j is the hole number j minus the kept tokens below it, and takes the mover of that
    # number; the movers follow the tokens that stay.
    n_stay = stays.sum(-1, keepdim=True)
    mover = n_stay + slot - stays.cumsum(-1)
    moved = keep.gather(2, mover.clamp_(max=count - 1))
    torch.where(stays, slot, moved, out=out)
    return out


def _as_widest_words(runs: Tensor) -> Tensor:
    """View rows as the widest integers their layout allows: fewer elements to move."""
    size = runs.element_size()
    for word in (torch.int64, torch.int32, torch.int16):
        extents = (runs.shape[1] * size, runs.storage_offset() * size)
        if word.itemsize > size and all(extent % word.itemsize == 0 for extent in extents):
            return runs.view(word)
    return runs


@checked(check_arguments)
def compact_kv_vectorized(
    caches: Sequence[Tensor],
    block_table: Tensor,
    keep: Tensor,
    *,
    count: int,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.compact_kv.compact_kv`."""
    source = plan_moves_vectorized(keep, count, out=out)
    slot = torch.arange(count, dtype=torch.int32, device=keep.device)
    row, head, target = (source != slot).nonzero(as_tuple=True)
    origin = source[row, head, target].long()
    for cache in caches:
        move_words(as_word_pages(cache), block_table, row, head, target, origin)
    return source


def move_words(
    pages: Tensor, block_table: Tensor, row: Tensor, head: Tensor, target: Tensor, origin: Tensor
) -> None:
    """Copy single tokens of one cache, a few megabytes at a time.

    Args:
        pages: ``[num_blocks, kv_heads, block_size, content]`` of integers.
        block_table: int32 or int64 ``[rows, width]``.
        row: int64 ``[n]``, row of each copy.
        head: int64 ``[n]``, its KV head.
        target: int64 ``[n]``, resident index it is written to.
        origin: int64 ``[n]``, resident index it is read from; none is a target of its row and head.
    """
    block_size, content = pages.shape[2:]
    if content == 0:
        return
    at_once = max(MOVED_BYTES // (content * pages.element_size()), 1)
    for start in range(0, row.shape[0], at_once):
        r, h, to, of = (x[start : start + at_once] for x in (row, head, target, origin))
        to_block = block_table[r, to // block_size].long()
        of_block = block_table[r, of // block_size].long()
        runs = as_runs(pages, content)
        if runs is None:
            pages[to_block, h, to % block_size] = pages[of_block, h, of % block_size]
            continue
        by_block, by_head, by_slot = (stride // content for stride in pages.stride()[:3])
        runs = _as_widest_words(runs)
        destination = to_block * by_block + h * by_head + to % block_size * by_slot
        position = of_block * by_block + h * by_head + of % block_size * by_slot
        runs.index_copy_(0, destination, runs.index_select(0, position))
