"""The Hadamard transform in vectorized torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..arguments import checked
from ..coding import unflatten
from .naive import block_width, check_arguments


@functools.cache
def _matrix(block: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix, float32 ``[block, block]``."""
    h = torch.full((1, 1), block**-0.5, device=device)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@checked(check_arguments)
def hadamard_vectorized(
    x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.hadamard.hadamard`, as one matrix product: up to 256
    elements that is faster on a CPU than a butterfly's passes over memory."""
    if out is None:
        out = x.new_empty(x.shape)
    block = block_width(x.shape[-1])
    source = x.float()
    if signs is not None and not inverse:
        source = source * signs
    found = (unflatten(source, -1, (-1, block)) @ _matrix(block, x.device)).flatten(-2)
    if signs is not None and inverse:
        found *= signs
    return out.copy_(found)
