"""Code that the operations on a paged cache share: checks, layers as one cache, CPU gathering.

A page is ``[kv_heads, block_size, head_size]``. Resident token ``t`` of row ``r`` lies in the slot
``(block_table[r, t // block_size], t % block_size)``, and row ``r`` has ``lens[r]`` resident
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import FLOATS, check_tensor


def check_pages(name: str, cache: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor is a cache of float pages."""
    shape = ("num_blocks", "kv_heads", "block_size", "head_size")
    check_tensor(name, cache, FLOATS, shape, device)
    if min(cache.shape[1:]) < 1:
        raise ValueError(f"{name} must not have empty pages, got shape {tuple(cache.shape)}.")


@dataclass(frozen=True)
class FoldedLayers:
    """Caches of several layers as one, so that an operation takes rows of all layers at once.

    Block ``b`` of layer ``l`` is block ``b * block_step + l * layer_step`` of the one cache.

    Attributes:
        pages: Of their dtype, ``[num_blocks, kv_heads, block_size, head_size]``, a view of their
            memory; blocks of other numbers are nobody's.
        num_layers: Number of layers.
        block_step: Blocks of ``pages`` between two blocks of a layer.
        layer_step: Blocks of ``pages`` between two layers.
    """

    pages: Tensor
    num_layers: int
    block_step: int
    layer_step: int

    @classmethod
    def of(cls, caches: Sequence[Tensor]) -> FoldedLayers | None:
        """Fold caches, or return None where they do not lie the same distance apart in one
        allocation, a multiple of the smallest distance of blocks.

        Args:
            caches: float pages ``[num_blocks, kv_heads, block_size, head_size]`` of one shape and
                dtype, one a layer, in order.
        """
        first = caches[0]
        starts = [cache.storage_offset() for cache in caches]
        apart = starts[1] - starts[0] if len(caches) > 1 else first.stride(0)
        alike = all(
            cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and (cache.shape, cache.stride(), cache.dtype)
            == (first.shape, first.stride(), first.dtype)
            and start == starts[0] + i * apart
            for i, (cache, start) in enumerate(zip(caches, starts, strict=True))
        )
        step = math.gcd(first.stride(0), apart)
        if not alike or apart < 0 or step == 0 or first.shape[0] == 0:
            return None
        by_block, by_layer = first.stride(0) // step, apart // step
        count = (first.shape[0] - 1) * by_block + (len(caches) - 1) * by_layer + 1
        if count > 2**31 - 1:
            return None
        pages = first.as_strided((count, *first.shape[1:]), (step, *first.stride()[1:]))
        return cls(pages, len(caches), by_block, by_layer)

    def block_table(self, block_table: Tensor) -> Tensor:
        """The rows of a block table for each layer, those of the first layer first: ``[num_layers *
        rows, width]`` of its dtype."""
        layer = torch.arange(self.num_layers, dtype=block_table.dtype, device=block_table.device)
        folded = block_table * self.block_step + (layer * self.layer_step)[:, None, None]
        return folded.flatten(0, 1)


def batches(rows: int, heads: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Split rows x heads into rectangles of at most ``at_once`` pairs: whole rows where they
    fit."""
    row_step = max(at_once // heads, 1)
    head_step = min(max(at_once, 1), heads)
    for row in range(0, rows, row_step):
        for head in range(0, heads, head_step):
            yield slice(row, min(row + row_step, rows)), slice(head, min(head + head_step, heads))


def as_runs(pages: Tensor, run: int) -> Tensor | None:
    """The memory under ``pages`` as a matrix of rows of ``run`` elements, or None where a head's
    tokens do not start at multiples of ``run``. Copying whole rows is what a CPU is fast at."""
    strides = pages.stride()[:-1]
    if any(stride % run for stride in strides) or pages.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(pages.shape, strides, strict=False))
    return pages.as_strided((last // run + 1, run), (run, 1))


def gather_resident(cache: Tensor, block_table: Tensor, n: int) -> Tensor:
    """The first ``n`` resident tokens of each row as ``[rows, kv_heads, n, head_size]``, dense, of
    the dtype of the cache. Entries of the block table without any of them must still be blocks."""
    _, heads, block_size, size = cache.shape
    width = -(-n // block_size)
    table = block_table[:, :width].long()
    rows = table.shape[0]
    head = torch.arange(heads, device=cache.device)
    page = block_size * size
    if block_size == 1 or cache.stride(2) == size:
        runs = as_runs(cache[:, :, 0], page)
        if runs is not None:
            at = table[:, None, :] * (cache.stride(0) // page)
            at = at + (head * (cache.stride(1) // page))[:, None]
            tokens = runs.index_select(0, at.flatten())
            return tokens.view(rows, heads, width * block_size, size)[:, :, :n]
    runs = as_runs(cache, size)
    if runs is not None:
        at = table[:, None, :, None] * (cache.stride(0) // size)
        at = at + (head * (cache.stride(1) // size))[:, None, None]
        at = at + torch.arange(block_size, device=cache.device) * (cache.stride(2) // size)
        tokens = runs.index_select(0, at.flatten())
        return tokens.view(rows, heads, width * block_size, size)[:, :, :n]
    tokens = cache[table[:, None, :], head[:, None]]
    return tokens.reshape(rows, heads, width * block_size, size)[:, :, :n]


def live_table(block_table: Tensor, lens: Tensor, block_size: int) -> Tensor:
    """The block table with block 0 in every entry that holds no token of its row."""
    column = torch.arange(block_table.shape[1], device=block_table.device)
    return block_table.masked_fill(column * block_size >= lens[:, None], 0)


def bucket_rows(widths: Tensor) -> Iterator[Tensor]:
    """Indices of the rows with queries, those with about as many together: buckets of powers of
    two waste at most half of a padded batch."""
    if widths.numel() == 0:
        return
    level = torch.where(widths > 0, torch.log2(widths.clamp_min(1).float()).ceil(), -1.0)
    for at in sorted(set(level.tolist())):
        if at >= 0:
            yield (level == at).nonzero()[:, 0]
