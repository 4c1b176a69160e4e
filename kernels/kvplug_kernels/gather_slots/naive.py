"""The specification of the slot gather: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_arguments(cache: Tensor, slots: Tensor, out: Tensor | None) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    if cache.ndim != 4:
        raise ValueError(
            "cache must have shape [num_blocks, num_heads, block_size, content], "
            f"got shape {tuple(cache.shape)}."
        )
    if cache.element_size() not in _WORDS:
        raise ValueError(f"cache must have elements of 1, 2, 4 or 8 bytes, got {cache.dtype}.")
    if cache.shape[2] < 1:
        raise ValueError("cache must have a block_size (third dimension) of at least 1, got 0.")
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots must have dtype torch.int32 or torch.int64, got {slots.dtype}.")
    if slots.ndim != 1:
        raise ValueError(f"slots must have 1 dimension, got shape {tuple(slots.shape)}.")
    if out is not None:
        shape = (slots.shape[0], cache.shape[1], cache.shape[3])
        if out.dtype != cache.dtype:
            raise ValueError(f"out must have the dtype of cache, {cache.dtype}, got {out.dtype}.")
        if tuple(out.shape) != shape:
            raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}.")
    for name, tensor in (("cache", cache), ("slots", slots), ("out", out)):
        if tensor is None:
            continue
        if tensor.device != cache.device:
            raise ValueError(f"{name} must be on {cache.device} like cache, got {tensor.device}.")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}."
            )
    if out is not None and out.numel() > 0:
        for name, tensor in (("cache", cache), ("slots", slots)):
            if tensor.numel() > 0 and tensor.data_ptr() == out.data_ptr():
                raise ValueError(f"out must not share memory with {name}.")


def as_words(tensor: Tensor) -> Tensor:
    """View a tensor as integers of its element size, so that moving it cannot change a bit."""
    return tensor.view(_WORDS[tensor.element_size()])


def gather_slots_naive(cache: Tensor, slots: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Same contract as :func:`kvplug_kernels.gather_slots.gather_slots`."""
    check_arguments(cache, slots, out)
    _, num_heads, block_size, content = cache.shape
    if out is None:
        out = cache.new_empty((slots.shape[0], num_heads, content))
    words, out_words = as_words(cache), as_words(out)
    for i, slot in enumerate(slots.tolist()):
        for h in range(num_heads):
            if slot < 0:
                out_words[i, h] = 0
            else:
                out_words[i, h] = words[slot // block_size, h, slot % block_size]
    return out
