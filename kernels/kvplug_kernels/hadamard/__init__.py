"""The randomized Hadamard transform of vectors."""

from __future__ import annotations

from torch import Tensor

from .naive import block_width
from .vectorized import hadamard_vectorized

__all__ = ["block_width", "hadamard"]


def hadamard(
    x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rotate vectors by ``H diag(signs)``, or back by ``diag(signs) H``.

    ``H`` is the orthonormal Walsh-Hadamard matrix in natural order, ``H[i, j] = (-1)**popcount(i &
    j) / sqrt(b)``. Where ``d`` is no power of two, the transform is one of blocks of the largest
    power of two ``b`` that divides it. With random signs it makes the elements of any vector nearly
    normal and of like size, which is what quantizers with few levels want (QuIP#, arXiv
    2402.04396; TurboQuant, arXiv 2504.19874). Products of vectors rotated alike are those of the
    vectors. Sums are float32.

    Nothing synchronises with the host on CUDA, so with ``out`` given the call can be captured in a
    CUDA graph.

    Args:
        x: float32, float16 or bfloat16 ``[..., d]``, any strides with the last dimension
            contiguous.
        signs: float32 ``[d]`` of 1 and -1; None for 1.
        inverse: Rotate back.
        out: The shape of ``x``, of its dtype or float32, last dimension contiguous. It may be
            ``x`` itself.

    Returns:
        ``out``, or a new contiguous tensor of the dtype of ``x``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or no power of two
            from 16 on divides ``d``.
    """
    if x.is_cuda:
        from .kernel import hadamard_triton

        return hadamard_triton(x, signs, inverse=inverse, out=out)
    return hadamard_vectorized(x, signs, inverse=inverse, out=out)
