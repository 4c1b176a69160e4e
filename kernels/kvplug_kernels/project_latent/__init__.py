"""Project the vectors of each head on a basis of its own."""

from __future__ import annotations

from torch import Tensor

from .vectorized import project_latent_vectorized

__all__ = ["project_latent"]


def project_latent(
    x: Tensor, basis: Tensor, mean: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``out[i, h] = (x[i, h] - mean[h]) @ basis[h]``.

    With the leading singular vectors of real keys or values as basis this is the low-rank KV cache
    of Palu (arXiv 2407.21118) and Eigen Attention (arXiv 2408.05646). Sums are float32, and so are
    products unless ``x`` and ``basis`` have the same narrower dtype.

    Nothing synchronises with the host on CUDA, so with ``out`` given the call can be captured in a
    CUDA graph.

    Args:
        x: float32, float16 or bfloat16 ``[n, heads, d]``, any strides with the last dimension
            contiguous.
        basis: float32, or the dtype of ``x``, ``[heads, d, r]``, last dimension contiguous.
        mean: float32 ``[heads, d]``; None for 0.
        out: ``[n, heads, r]`` of the dtype of ``x`` or float32, last dimension contiguous.

    Returns:
        ``out``, or a new contiguous tensor of the dtype of ``x``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or ``out`` starts at
            the address of an input.
    """
    if x.is_cuda:
        from .kernel import project_latent_triton

        return project_latent_triton(x, basis, mean, out=out)
    return project_latent_vectorized(x, basis, mean, out=out)
