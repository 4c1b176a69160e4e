"""The specification of the Hadamard transform: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import FLOAT32, FLOATS, check_tensor, checked
from ..coding import unflatten

MIN_BLOCK = 16
"""Narrower blocks mix too few elements to be of use."""


def block_width(d: int) -> int:
    """Elements transformed together: the largest power of two that divides ``d``.

    Raises:
        ValueError: it is below 16.
    """
    width = d & -d
    if width < MIN_BLOCK:
        raise ValueError(
            f"x must have vectors of a multiple of {MIN_BLOCK} elements to be rotated, got {d}."
        )
    return width


def check_arguments(
    x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, out: Tensor | None = None
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    if x.ndim < 1:
        raise ValueError(f"x must have a last dimension, got shape {tuple(x.shape)}.")
    check_tensor("x", x, FLOATS, tuple(x.shape), x.device)
    d = x.shape[-1]
    block_width(d)
    if signs is not None:
        check_tensor("signs", signs, FLOAT32, (d,), x.device)
    if out is not None:
        check_tensor("out", out, (x.dtype, torch.float32), tuple(x.shape), x.device)


@checked(check_arguments)
def hadamard_naive(
    x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.hadamard.hadamard`, by the definition, in float64."""
    d = x.shape[-1]
    block = block_width(d)
    flips = x.new_ones(d, dtype=torch.float64) if signs is None else signs.double()
    source = x.double() if inverse else x.double() * flips
    found = torch.zeros_like(source)
    for i in range(block):
        row = [-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(block)]
        signed = unflatten(source, -1, (-1, block)) * source.new_tensor(row)
        found[..., i::block] = signed.sum(-1)
    found *= block**-0.5
    if inverse:
        found *= flips
    if out is None:
        out = x.new_empty(x.shape)
    return out.copy_(found)
