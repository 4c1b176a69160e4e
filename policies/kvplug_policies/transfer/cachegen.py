"""Differences from an anchor token, coarser the deeper the layer, entropy coded.

CacheGen, arXiv 2310.07240: tokens near each other have like K and V, so every group of tokens
stores its first with eight bits and the others by what they differ from it; and the first layers
matter most to the answer, so their differences get the finest bins. A bin is a part of the
channel's own deviation. The paper's arithmetic coder has a distribution per channel and layer,
profiled before; here each third of the layers has Huffman codes of its own in every chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kvplug.contract import PlaneShape, PolicyOptions
from kvplug_kernels.coding import finite, quantize_int
from kvplug_policies.entropy import expand, squeeze
from kvplug_policies.planes import PlaneCodec, names, plane_dtype, take

THIRDS = 3

STEPS = 8
"""Codes of a deviation in each factor of two."""


class CacheGen(PlaneCodec):
    """Anchor tokens, and differences from them."""

    name = "cachegen"
    exact = False
    changes = "stores KV outside the pool as differences from every few tokens' first, rounded"
    paper = "CacheGen: KV Cache Compression and Streaming, arXiv 2310.07240"

    class Options(PolicyOptions):
        """Options of `cachegen`."""

        group: int = Field(default=10, ge=2, le=256, description="tokens that share an anchor")
        bins: tuple[float, ...] = Field(
            default=(0.5, 1.0, 1.5),
            description="width of a bin, in deviations of a channel, in the first, the middle and "
            "the last third of the layers",
        )

        @field_validator("bins", mode="before")
        @classmethod
        def _three_widths(cls, value: object) -> object:
            if not isinstance(value, list | tuple) or len(value) != THIRDS:
                raise ValueError("give three widths, one for each third of the layers")
            found = tuple(float(one) for one in value)
            if not all(0.01 <= one <= 16 for one in found):
                raise ValueError("a width must be from 0.01 to 16 deviations")
            return found

    options: Options

    def fingerprint(self) -> str:
        return f"group={self.options.group} bins={','.join(map(str, self.options.bins))}"

    def depths(self, layers: int) -> Tensor:
        """Third of the model that each layer of a plane is in, ``[layers]``."""
        known = self.engine.layers
        if len(known) == layers:
            return torch.tensor([THIRDS * v.index // v.num_layers for v in known])
        return torch.arange(layers) * THIRDS // layers

    def cut(self, name: str, plane: Tensor, start: int) -> dict[str, Tensor]:
        if plane.dtype == torch.uint8:
            return {}
        x = finite(plane)
        group, tokens = self.options.group, plane.shape[1]
        codes, scale, zero = quantize_int(x[:, ::group], 8)
        anchors = codes.float() * scale.float() + zero.float()
        off = x - anchors.repeat_interleave(group, 1)[:, :tokens]
        depth = self.depths(len(plane))
        inner = torch.arange(tokens) % group != 0
        others = off[:, inner]
        spread = others.square().sum(1).div_(max(others.shape[1], 1)).sqrt_()
        level = spread.clamp_min(2.0**-16).log2_().mul_(STEPS).add_(128).round_().clamp_(1, 255)
        step = self._step(level.to(torch.uint8), depth)
        bins = (others / step).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
        parts = {
            "anchors": codes,
            "scale": scale.squeeze(-1),
            "zero": zero.squeeze(-1),
            "deviation": squeeze(level.to(torch.uint8).numpy()),
        }
        for third in range(THIRDS):
            parts[f"bins{third}"] = squeeze(bins[depth == third].numpy())
        return parts

    def _step(self, level: Tensor, depth: Tensor) -> Tensor:
        """Width of a bin ``[layers, 1, heads, size]`` by the level of its deviation."""
        width = torch.tensor(self.options.bins)[depth].view(-1, 1, 1)
        return (((level.float() - 128) / STEPS).exp2_() * width).unsqueeze(1)

    def join(self, name: str, parts: Mapping[str, Tensor], plane: PlaneShape, start: int) -> Tensor:
        thirds = [f"bins{third}" for third in range(THIRDS)]
        names(parts, ("anchors", "scale", "zero", "deviation", *thirds))
        layers, tokens, heads, size = plane.shape
        group = self.options.group
        count = -(-tokens // group)
        codes = take(parts, "anchors", torch.uint8, (layers, count, heads, size))
        scale = take(parts, "scale", torch.float16, (layers, count, heads)).float()
        zero = take(parts, "zero", torch.float16, (layers, count, heads)).float()
        level = expand(parts["deviation"], layers * heads * size).copy()
        depth = self.depths(layers)
        step = self._step(torch.from_numpy(level).view(layers, heads, size), depth)
        anchors = codes.float() * scale.unsqueeze(-1) + zero.unsqueeze(-1)
        found = anchors.repeat_interleave(group, 1)[:, :tokens]
        inner = torch.arange(tokens) % group != 0
        others = tokens - count
        bins = torch.empty(layers, others, heads, size)
        for third, part in enumerate(thirds):
            here = depth == third
            n = int(here.sum())
            data = expand(parts[part], n * others * heads * size)
            if n and others:
                bins[here] = torch.from_numpy(data.copy()).view(n, others, heads, size).float()
        found[:, inner] += bins.sub_(128).mul_(step)
        return found.to(plane_dtype(plane))
