"""Packing in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..coding import Coding, decode_vectors, encode_vectors
from ..move_tokens.layers import LayerCaches
from .naive import check_arguments
from .packed import Packed


@checked(check_arguments)
def pack_pages_vectorized(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Same contract as :func:`kvplug_kernels.pack_pages.pack_pages`."""
    tokens = packed.content.shape[2]
    table = blocks.long()
    for i, (cache, words) in enumerate(zip(caches.caches, caches.pages, strict=True)):
        source = words if coding is None else cache
        found = source[table].transpose(2, 3).flatten(1, 2)[:, :tokens]
        if coding is None:
            packed.content[:, i].view(words.dtype).copy_(found)
            continue
        fields = encode_vectors(found, coding)
        packed.content[:, i] = fields["codes"]
        for name in ("scale", "zero"):
            field = getattr(packed, name)
            if field is not None:
                field[:, i] = fields[name].view(torch.float16)


@checked(check_arguments)
def unpack_pages_vectorized(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Same contract as :func:`kvplug_kernels.pack_pages.unpack_pages`."""
    tokens = packed.content.shape[2]
    size = caches.shape[2]
    at = torch.arange(tokens, device=blocks.device)
    block, slot = blocks.long()[:, at // size].flatten(), (at % size).repeat(len(blocks))
    for i, (cache, words) in enumerate(zip(caches.caches, caches.pages, strict=True)):
        content = packed.content[:, i]
        if coding is None:
            words[block, :, slot] = content.view(words.dtype).flatten(0, 1)
            continue
        fields = {"codes": content}
        for name in ("scale", "zero"):
            field = getattr(packed, name)
            if field is not None:
                fields[name] = field[:, i].view(torch.uint8)
        cache[block, :, slot] = decode_vectors(fields, coding, dtype=cache.dtype).flatten(0, 1)
