"""Slot gather in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import as_words, check_arguments


def _as_widest_words(cache: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """View both tensors as the widest integers their layouts allow: fewer elements to index."""
    size = cache.element_size()
    for word in (torch.int64, torch.int32, torch.int16):
        per_word = word.itemsize // size
        if per_word <= 1:
            break
        extents = (
            cache.shape[3],
            *cache.stride()[:3],
            cache.storage_offset(),
            *out.stride()[:2],
            out.storage_offset(),
        )
        if all(extent % per_word == 0 for extent in extents):
            return cache.view(word), out.view(word)
    return as_words(cache), as_words(out)


def gather_slots_vectorized(cache: Tensor, slots: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Same contract as :func:`kvplug_kernels.gather_slots.gather_slots`."""
    check_arguments(cache, slots, out)
    num_blocks, num_heads, block_size, content = cache.shape
    if out is None:
        out = cache.new_empty((slots.shape[0], num_heads, content))
    if out.numel() == 0:
        return out
    words, out_words = _as_widest_words(cache, out)
    if num_blocks == 0:
        out_words.zero_()
        return out
    live = slots.clamp(min=0).long()
    index = [live // block_size, None, live % block_size]
    torch.ops.aten.index.Tensor_out(words, index, out=out_words)
    out_words.masked_fill_((slots < 0)[:, None, None], 0)
    return out
