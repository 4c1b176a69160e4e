"""The fields of packed chunks, and where they lie in one staging buffer."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..coding import Coding
from ..move_tokens.layers import LayerCaches

ALIGNMENT = 16


@dataclass(frozen=True)
class Packed:
    """Packed chunks.

    Attributes:
        content: uint8 ``[chunks, caches, tokens, heads, bytes]``: the bytes of slots, or codes.
        scale: float16 ``[chunks, caches, tokens, heads, groups]``; None for bytes.
        zero: The same shape, of integer codes; else None.
    """

    content: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def room(
        cls, caches: LayerCaches, chunks: int, tokens: int, coding: Coding | None = None
    ) -> int:
        """Return the bytes of a staging buffer for so many chunks of so many tokens each."""
        shapes = _shapes(caches, chunks, tokens, coding)
        return sum(_aligned(prod(shape) * dtype.itemsize) for _, shape, dtype in shapes)

    @classmethod
    def within(
        cls,
        buffer: Tensor,
        caches: LayerCaches,
        chunks: int,
        tokens: int,
        coding: Coding | None = None,
    ) -> Packed:
        """View a staging buffer as the fields of packed chunks, one field behind another.

        Args:
            buffer: uint8 ``[n]``, aligned to 16 bytes, on any device.
            caches: The caches that are packed.
            chunks: Number of chunks.
            tokens: Tokens of each.
            coding: How they are coded, or None.

        Raises:
            ValueError: The buffer is too small.
        """
        need = cls.room(caches, chunks, tokens, coding)
        if buffer.numel() < need:
            raise ValueError(f"buffer must have at least {need} bytes, got {buffer.numel()}.")
        at, fields = 0, {}
        for name, shape, dtype in _shapes(caches, chunks, tokens, coding):
            size = prod(shape) * dtype.itemsize
            fields[name] = buffer[at : at + size].view(dtype).view(shape)
            at += _aligned(size)
        return cls(**fields)

    @property
    def fields(self) -> dict[str, Tensor]:
        """The fields there are, by name."""
        found = {"content": self.content, "scale": self.scale, "zero": self.zero}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _shapes(
    caches: LayerCaches, chunks: int, tokens: int, coding: Coding | None
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    _, heads, _, content = caches.shape
    front = (chunks, len(caches.caches), tokens, heads)
    if coding is None:
        width = content * caches.pages[0].element_size()
        return [("content", (*front, width), torch.uint8)]
    found: list[tuple[str, tuple[int, ...], torch.dtype]]
    found = [("content", (*front, coding.code_bytes), torch.uint8)]
    found.append(("scale", (*front, coding.groups), torch.float16))
    if coding.kind == "int":
        found.append(("zero", (*front, coding.groups), torch.float16))
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def expected(
    caches: LayerCaches, chunks: int, tokens: int, coding: Coding | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each field."""
    return {name: (shape, dtype) for name, shape, dtype in _shapes(caches, chunks, tokens, coding)}
