"""NF4: K and V in 4-bit NormalFloat, the data type of QLoRA, one scale per token and head.

Sixteen levels between -1 and 1, spaced so that a Gaussian falls into each equally often, and the
largest magnitude of a vector as its scale.
"""

import torch
from torch import Tensor

from kvplug import hookimpl
from kvplug.contract import FormatPolicy, LayerView, PageField, PageLayout
from kvplug.registry import PolicyRegistry

TAIL = 0.9677083
UP, DOWN = (torch.special.ndtri(torch.linspace(0.5, TAIL, n, dtype=torch.float64)) for n in (9, 8))
LEVELS = (torch.cat([-DOWN[1:].flip(0), UP]) / UP[-1]).float()


class Nf4(FormatPolicy):
    """Stores each vector as a scale and one of sixteen levels per element."""

    name = "nf4"
    changes = "stores K and V as 4-bit NormalFloat codes, one scale per token and head"
    paper = "QLoRA, arXiv 2305.14314"

    def layout(self, layer: LayerView) -> PageLayout:
        if layer.head_size % 2:
            raise ValueError(f"two codes share a byte: head size {layer.head_size} must be even")
        codes = PageField("codes", 0, layer.head_size, "uint8")
        scales = PageField("scales", layer.head_size, 4, "float16")
        size = -(-(layer.head_size + 4) // 4) * 4
        return PageLayout(size, key_bits=4, value_bits=4, fields=(codes, scales))

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        both = torch.stack([key, value], dim=2).float()
        scale = both.abs().amax(-1, keepdim=True).clamp(1e-6, 65504).half()
        bounds = (LEVELS[1:] + LEVELS[:-1]).to(both.device) / 2
        codes = torch.bucketize(both / scale.float(), bounds).to(torch.uint8)
        packed = codes[..., ::2] | codes[..., 1::2] << 4
        cell = torch.cat([packed.flatten(2), scale.view(torch.uint8).flatten(2)], dim=-1)
        return torch.nn.functional.pad(cell, (0, -cell.shape[-1] % 4))

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        size = layer.head_size
        packed = cells[..., :size].unflatten(-1, (2, size // 2))
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        scale = cells[..., size : size + 4].contiguous().view(torch.float16).unsqueeze(-1)
        both = LEVELS.to(cells.device)[codes.int()] * scale.float()
        return both[:, :, 0], both[:, :, 1]


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    registry.add(Nf4)
