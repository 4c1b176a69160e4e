"""The specification of the projection: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import FLOAT32, FLOATS, check_separate, check_tensor, checked


def check_arguments(
    x: Tensor, basis: Tensor, mean: Tensor | None = None, *, out: Tensor | None = None
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_tensor("x", x, FLOATS, ("n", "heads", "d"), x.device)
    n, heads, d = x.shape
    check_tensor("basis", basis, (torch.float32, x.dtype), (heads, d, "r"), x.device)
    if mean is not None:
        check_tensor("mean", mean, FLOAT32, (heads, d), x.device)
    if out is not None:
        shape = (n, heads, basis.shape[2])
        check_tensor("out", out, (x.dtype, torch.float32), shape, x.device)
    check_separate("out", out, {"x": x, "basis": basis, "mean": mean})


@checked(check_arguments)
def project_latent_naive(
    x: Tensor, basis: Tensor, mean: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.project_latent.project_latent`, in float64."""
    n, heads, _ = x.shape
    if out is None:
        out = x.new_empty((n, heads, basis.shape[2]))
    for i in range(n):
        for h in range(heads):
            vector = x[i, h].double()
            if mean is not None:
                vector = vector - mean[h].double()
            for j in range(basis.shape[2]):
                out[i, h, j] = torch.dot(vector, basis[h, :, j].double())
    return out
