"""Caches of many layers that one launch addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..compact_kv.naive import as_word_pages, check_cache

MAX_UNIT = 16


class LayerCaches:
    """Paged caches of equal shape and strides, and their addresses on their device.

    Made once, when the caches are allocated: making it copies the addresses to the device. The
    caches may lie in one allocation or in many.

    Args:
        caches: tensors ``[num_blocks, kv_heads, block_size, *content]`` of one dtype of 1, 2, 4 or
            8 bytes, one a layer. The first three dimensions have any strides, the same in all; the
            content is contiguous. In vLLM's pages, whose content is a token's key and then its
            value, a whole cache moves both.

    Attributes:
        caches: The caches.
        pages: The same as integers ``[num_blocks, kv_heads, block_size, content]``.
        pointers: Address of each cache, int64 ``[len(caches)]`` on their device.
        unit: Bytes that every address and extent is a multiple of: 16, 8, 4, 2 or 1.
        content: Units in a slot.
        strides: Units between blocks, heads and slots.

    Raises:
        ValueError: there are no caches, or they differ in shape, dtype, strides or device, or a
            content is not contiguous.
    """

    def __init__(self, caches: Sequence[Tensor]):
        if not caches:
            raise ValueError("caches must not be empty.")
        self.caches = tuple(caches)
        first = self.caches[0]
        kv_heads = first.shape[1] if first.ndim > 1 else 1
        for i, cache in enumerate(self.caches):
            check_cache(f"caches[{i}]", cache, kv_heads, first.device)
            _check_like(f"caches[{i}]", cache, first)
        self.pages = tuple(as_word_pages(cache) for cache in self.caches)
        size = first.element_size()
        extents = [size * extent for extent in (self.shape[3], *first.stride()[:3])]
        addresses = [page.data_ptr() for page in self.pages]
        self.unit = math.gcd(MAX_UNIT, *extents, *addresses)
        self.content = extents[0] // self.unit
        self.strides = tuple(extent // self.unit for extent in extents[1:])
        self.pointers = torch.tensor(addresses, dtype=torch.int64, device=first.device)

    @property
    def shape(self) -> torch.Size:
        """Shape of a cache, ``[num_blocks, kv_heads, block_size, content]``."""
        return self.pages[0].shape

    @property
    def device(self) -> torch.device:
        """Device of the caches."""
        return self.pages[0].device


def _check_like(name: str, cache: Tensor, first: Tensor) -> None:
    found = (cache.shape, cache.stride()[:3], cache.dtype)
    wanted = (first.shape, first.stride()[:3], first.dtype)
    for what, has, want in zip(("shape", "strides", "dtype"), found, wanted, strict=True):
        if has != want:
            raise ValueError(f"{name} must have the {what} of caches[0], {want}, got {has}.")
