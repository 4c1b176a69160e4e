"""Random rotations of vectors, which even out their elements before they are coded."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvplug_kernels.hadamard import hadamard

SEED = 2504
"""Of the signs; part of every format that rotates."""


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
        raise ValueError(
            f"no Hadamard matrix of order {n} is known: vectors of that size cannot be rotated"
        )
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


class Rotation:
    """A Hadamard matrix behind random signs, for vectors of any width that has one.

    Inner products stay as they are, and every element of a rotated vector is a sum of all of its
    elements with random signs: about Gaussian, whatever the vector.
    """

    def __init__(self) -> None:
        self._signs: dict[tuple[int, torch.device], Tensor] = {}
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
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
