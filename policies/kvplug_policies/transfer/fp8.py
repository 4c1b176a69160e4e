"""K and V as 8-bit floating-point numbers, one scale per token and KV head.

e4m3 of Micikevicius et al., arXiv 2209.05433, as the format of the same name stores it in pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import PlaneShape, PolicyOptions
from kvplug_kernels.coding import finite, quantize_fp8
from kvplug_policies.entropy import expand, squeeze
from kvplug_policies.planes import PlaneCodec, names, plane_dtype, take


class Fp8Codec(PlaneCodec):
    """One byte a number: a sign, four bits of exponent, three of mantissa."""

    name = "fp8"
    exact = False
    changes = "stores KV outside the pool as 8-bit floating-point numbers"
    paper = "FP8 Formats for Deep Learning, arXiv 2209.05433"

    class Options(PolicyOptions):
        """Options of `fp8`."""

        entropy: bool = Field(
            default=False,
            description="Huffman code the codes, which takes their exponents' unevenness",
        )

    options: Options

    def fingerprint(self) -> str:
        return f"entropy={self.options.entropy}"

    def cut(self, name: str, plane: Tensor, start: int) -> dict[str, Tensor]:
        if plane.dtype == torch.uint8:
            return {}
        codes, scale = quantize_fp8(finite(plane))
        squeezed = squeeze(codes.numpy()) if self.options.entropy else codes
        return {"codes": squeezed, "scale": scale.squeeze(-1)}

    def join(self, name: str, parts: Mapping[str, Tensor], plane: PlaneShape, start: int) -> Tensor:
        names(parts, ("codes", "scale"))
        scale = take(parts, "scale", torch.float16, plane.shape[:3])
        if self.options.entropy:
            found = expand(parts["codes"], math.prod(plane.shape)).copy()
            codes = torch.from_numpy(found).view(plane.shape)
        else:
            codes = take(parts, "codes", torch.uint8, plane.shape)
        numbers = codes.contiguous().view(torch.float8_e4m3fn).float()
        return (numbers * scale.float().unsqueeze(-1)).to(plane_dtype(plane))
