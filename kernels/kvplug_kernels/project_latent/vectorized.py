"""The projection in vectorized torch."""

from __future__ import annotations

from torch import Tensor

from ..arguments import checked
from .naive import check_arguments


@checked(check_arguments)
def project_latent_vectorized(
    x: Tensor, basis: Tensor, mean: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.project_latent.project_latent`."""
    if out is None:
        out = x.new_empty((x.shape[0], x.shape[1], basis.shape[2]))
    centred = x.float()
    if mean is not None:
        centred = centred - mean
    return out.copy_((centred.transpose(0, 1) @ basis.float()).transpose(0, 1))
