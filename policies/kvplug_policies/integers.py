"""Base of the codecs whose codes are integers with a scale and a zero point per group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.contract import PlaneShape
from kvplug_kernels.coding import affine, affine_codes, finite, pack, quantize_int, unpack
from kvplug_policies.planes import PlaneCodec, names, plane_dtype, take


class IntegerCodec(PlaneCodec):
    """Codes of `bits` bits along the tokens of a chunk, or along the channels of a token.

    Attributes:
        bits: Bits of a code, 4 or 8.
    """

    exact = False
    bits: ClassVar[int]

    def groups(self, tokens: int) -> int:
        """Groups of nearly equal size that the tokens of a chunk are coded in; 0, unless a codec
        says otherwise, for groups along the channels of each token and KV head."""
        return 0

    def cut(self, name: str, plane: Tensor, start: int) -> dict[str, Tensor]:
        if plane.dtype == torch.uint8:
            return {}
        x = finite(plane)
        n = self.groups(plane.shape[1])
        if n:
            coded = [_along_tokens(part, self.bits) for part in x.tensor_split(n, dim=1)]
            codes = torch.cat([codes for codes, _, _ in coded], 1)
            scale, zero = (torch.cat([one[i] for one in coded], 1) for i in (1, 2))
        else:
            codes, scale, zero = quantize_int(x, self.bits)
            scale, zero = scale.squeeze(-1), zero.squeeze(-1)
        codes = codes.reshape(-1)
        if len(codes) * self.bits % 8:
            codes = torch.cat([codes, codes.new_zeros(1)])
        packed = pack(codes, self.bits)
        return {"codes": packed, "scale": scale, "zero": zero}

    def join(self, name: str, parts: Mapping[str, Tensor], plane: PlaneShape, start: int) -> Tensor:
        names(parts, ("codes", "scale", "zero"))
        layers, tokens, heads, size = plane.shape
        n, count = self.groups(tokens), math.prod(plane.shape)
        shape = (layers, n, heads, size) if n else (layers, tokens, heads)
        scale = take(parts, "scale", torch.float16, shape).float()
        zero = take(parts, "zero", torch.float16, shape).float()
        length = -(-count * self.bits // 8)
        packed = take(parts, "codes", torch.uint8, (length,))
        codes = unpack(packed, self.bits, length * 8 // self.bits)[:count]
        found = codes.float().view(plane.shape)
        if n:
            for i, part in enumerate(found.tensor_split(n, dim=1)):
                part.mul_(scale[:, i : i + 1]).add_(zero[:, i : i + 1])
        else:
            found.mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
        return found.to(plane_dtype(plane))


def _along_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``[layers, tokens, heads, size]``; scale and zero ``[layers, 1, heads, size]``."""
    scale, zero = affine(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits)
    return affine_codes(x, scale, zero, bits), scale, zero
