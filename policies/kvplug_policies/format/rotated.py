"""Rotated codes: K and V turned by a random Hadamard matrix, then coded with one codebook.

TurboQuant, Zandieh et al., arXiv 2504.19874: after a random rotation the elements of any vector
are nearly independent Gaussians, so the levels that are best for a Gaussian (Lloyd, Max) are nearly
best for every vector, and no zero point and no calibration are needed. Queries are turned the same
way, which leaves products unchanged, and sums of values are turned back.

Differences from the paper:

* The rotation is a Hadamard matrix behind random signs, which costs ``n log n``, not a dense one.
* The stored number is not the norm but the scale that fits the chosen levels best (least squares),
  in the same two bytes.
* TurboQuant's second stage, one bit per element that makes products unbiased, is left out: vLLM's
  own TurboQuant leaves it out too, and that bit serves better as a level.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import EngineView, LayerView, PolicyOptions
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.hadamard import hadamard
from kvplug_policies.formats import LAYERS, CodedFormat, LayerOptions, Levels, layer_bits

Bits = Literal[2, 3, 4]

SEED = 2504
"""Of the signs; part of the format."""


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


@functools.cache
def hadamard_matrix(n: int) -> Tensor:
    """A matrix of 1 and -1 with orthogonal rows, float32 ``[n, n]``.

    Sylvester's doubling of a Paley matrix: for a prime ``q = 3 mod 4`` one of order ``q + 1``, for
    a prime ``q = 1 mod 4`` one of order ``2 (q + 1)``.

    Raises:
        ValueError: None is known to this construction.
    """
    core, doublings = _paley(n), 0
    while core is None and (n >> doublings) % 2 == 0:
        doublings += 1
        core = _paley(n >> doublings)
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here, so it cannot be rotated")
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(doublings):
        core = torch.kron(step, core)
    return core


def _paley(n: int) -> Tensor | None:
    """A Hadamard matrix of order ``n`` by one of Paley's constructions, or None."""
    if n == 1:
        return torch.ones(1, 1)
    for q in (n - 1, n // 2 - 1):
        first = q == n - 1
        if q % 4 != (3 if first else 1) or n % 4 or any(q % d == 0 for d in range(2, q)):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor(
            [0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(q)]
        )
        at = torch.arange(q)
        bordered = torch.zeros(q + 1, q + 1)
        bordered[1:, 1:] = character[(at[:, None] - at) % q]
        bordered[0, 1:] = 1
        bordered[1:, 0] = -1 if first else 1
        if first:
            return bordered + torch.eye(n)
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        return torch.kron(bordered, ones) + torch.kron(
            torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        )
    return None


class Rotated(CodedFormat):
    """K and V in codebook codes after a random rotation."""

    name = "rotated"
    changes = "stores K and V rotated, as 2- to 4-bit codes of a codebook for Gaussians"
    paper = "TurboQuant: Online Vector Quantization with Near-optimal Distortion, arXiv 2504.19874"
    rotation: ClassVar[str | None] = "hadamard"

    class Options(LayerOptions):
        """Knobs of `Rotated`."""

        bits: Bits = Field(4, description="bits of a code")
        key_bits: Bits | None = Field(None, description="bits of a key's code, if others")
        value_bits: Bits | None = Field(None, description="bits of a value's code, if others")
        layers: Mapping[str, Bits] = Field(default_factory=dict, description=LAYERS)

    def __init__(self, options: PolicyOptions, engine: EngineView):
        self.own = cast(Rotated.Options, options)
        self._signs: dict[tuple[int, torch.device], Tensor] = {}
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}
        self._levels: dict[tuple[int, torch.device], Tensor] = {}
        super().__init__(options, engine)

    def coding(self, layer: LayerView) -> CodedPage:
        own, width = self.own, layer.head_size
        if width < 16:
            raise ValueError(f"{width} elements are too few to be mixed by a rotation; at least 16")
        hadamard_matrix(width)
        key = layer_bits(own.layers, layer, own.key_bits or own.bits)
        value = layer_bits(own.layers, layer, own.value_bits or own.bits)
        return CodedPage(Coding(width, key, "codebook"), Coding(width, value, "codebook"))

    def levels(self, layer: LayerView, device: torch.device) -> Levels:
        page = self.coded(layer)
        return self._level(page.key.bits, device), self._level(page.value.bits, device)

    def _level(self, bits: int, device: torch.device) -> Tensor:
        at = (bits, device)
        if at not in self._levels:
            self._levels[at] = torch.tensor(gaussian_levels(bits), device=device)
        return self._levels[at]

    def _turn(self, x: Tensor, back: bool = False) -> Tensor:
        """Vectors ``[..., width]`` rotated, or back, float32."""
        width, device = x.shape[-1], x.device
        at = (width, device)
        if at not in self._signs:
            random = torch.Generator().manual_seed(SEED)
            signs = torch.randint(0, 2, (width,), generator=random) * 2.0 - 1.0
            self._signs[at] = signs.to(device)
        signs = self._signs[at]
        if width & (width - 1) == 0:
            out = torch.empty(x.shape, dtype=torch.float32, device=device)
            return hadamard(x, signs, inverse=back, out=out)
        if at not in self._matrices:
            self._matrices[at] = (hadamard_matrix(width) * width**-0.5).to(device)
        if back:
            return (x.float() @ self._matrices[at].T) * signs
        return (x.float() * signs) @ self._matrices[at]

    def into(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._turn(key), self._turn(value)

    def query_into(self, layer: LayerView, query: Tensor) -> Tensor:
        return self._turn(query).to(query.dtype)

    def key_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self._turn(coded, back=True)

    def value_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self._turn(coded, back=True)

    def out_back(self, layer: LayerView, out: Tensor) -> Tensor:
        return self._turn(out, back=True)
