"""Rotated codes: K and V rotated by a random Hadamard matrix, then coded with one codebook.

TurboQuant, Zandieh et al., arXiv 2504.19874: after a random rotation the elements of any vector
are nearly independent Gaussians, so the levels that are best for a Gaussian (Lloyd, Max) are nearly
best for every vector, and no zero point and no calibration are needed. Queries are turned the same
way, which leaves products unchanged, and sums of values are turned back.

Differences from the paper:

* The rotation is a Hadamard matrix behind random signs, which costs ``n log n``, not a dense one.
* The stored number is not the norm but the scale that fits the chosen levels best (least squares),
  in the same two bytes, and levels are chosen again with it.
* With ``levels: uniform`` levels are evenly spaced between a vector's smallest and largest
  element, which takes a zero point.
* TurboQuant's second stage, one bit per element that makes products unbiased, is left out: vLLM's
  own TurboQuant leaves it out too, and that bit serves better as a level.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import FIT, LAYERS, LayerOptions, Levels, layer_bits
from kvplug_policies.turned import TurnedFormat

Bits = Literal[2, 3, 4]


@functools.cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The ``2**bits`` levels with the least mean squared error for a unit Gaussian, ascending.

    Lloyd's iteration (Max 1960, Lloyd 1982), on the positive half, which mirrors the other: each
    level moves to the mean of the Gaussian between the midpoints to its neighbours, until all
    stand still.
    """
    count = 1 << (bits - 1)
    levels = [3.0 * (i + 0.5) / count for i in range(count)]
    for _ in range(20_000):
        bounds = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        moved = []
        for low, high in itertools.pairwise(bounds):
            density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
            weight = math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))
            moved.append(density * math.sqrt(2 / math.pi) / weight)
        change = max(abs(a - b) for a, b in zip(levels, moved, strict=True))
        levels = moved
        if change < 1e-12:
            break
    return (*(-x for x in reversed(levels)), *levels)


class Rotated(TurnedFormat):
    """K and V in codebook codes after a random rotation."""

    name = "rotated"
    changes = "stores K and V rotated, in 2- to 4-bit codes"
    paper = "TurboQuant: Online Vector Quantization with Near-optimal Distortion, arXiv 2504.19874"

    class Options(LayerOptions):
        """Options of `Rotated`."""

        bits: Bits = Field(4, description="bits of a code")
        key_bits: Bits | None = Field(None, description="bits of a key's code, if different")
        value_bits: Bits | None = Field(None, description="bits of a value's code, if different")
        levels: Literal["gaussian", "uniform"] = Field(
            "gaussian",
            description="levels of a code: optimal for a Gaussian, with a scale; or evenly "
            "spaced ones, with a scale and a zero point, in four bytes more per token and head",
        )
        fit: int = Field(2, ge=0, le=8, description=FIT)
        layers: Mapping[str, Bits] = Field(default_factory=dict, description=LAYERS)

    options: Options

    def prepare(self) -> None:
        super().prepare()
        self._levels: dict[tuple[int, torch.device], Tensor] = {}

    def coding(self, layer: LayerView) -> CodedPage:
        options, width = self.options, layer.head_size
        self.check_width(width)
        key = layer_bits(options.layers, layer, options.key_bits or options.bits)
        value = layer_bits(options.layers, layer, options.value_bits or options.bits)
        kind: Literal["codebook", "int"] = "codebook" if options.levels == "gaussian" else "int"
        return CodedPage(
            Coding(width, key, kind, fit=options.fit), Coding(width, value, kind, fit=options.fit)
        )

    def levels(self, layer: LayerView, device: torch.device) -> Levels:
        if self.options.levels == "uniform":
            return None, None
        page = self.coded(layer)
        return self._level(page.key.bits, device), self._level(page.value.bits, device)

    def _level(self, bits: int, device: torch.device) -> Tensor:
        at = (bits, device)
        if at not in self._levels:
            self._levels[at] = torch.tensor(gaussian_levels(bits), device=device)
        return self._levels[at]
