"""Attention mass added to the totals that are kept beside tokens, in one launch."""

from __future__ import annotations

from torch import Tensor

from .vectorized import add_mass_vectorized

__all__ = ["add_mass"]


def add_mass(totals: Tensor, block_table: Tensor, mass: Tensor, *, new: int) -> None:
    """Add to the total of each resident token what the query heads of its group pay it on average.

    Resident token ``t`` of row ``r`` has its total in ``totals[block_table[r, t // block_size], h,
    t % block_size]``. Those of the last ``new`` tokens of each row were nobody's before and count
    as 0. Nothing synchronises with the host on CUDA.

    Args:
        totals: float32 ``[num_blocks, kv_heads, block_size]``, any strides with the last dimension
            contiguous, changed in place.
        block_table: int32 ``[rows, width]``; the blocks of its rows are distinct.
        mass: float32 ``[rows, num_heads, n]``, the last dimension contiguous; ``num_heads`` is a
            multiple of ``kv_heads``.
        new: tokens at the end of each row that had no total, at most ``n``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``n`` exceeds the
            block table, or ``new`` is out of range.
    """
    if totals.is_cuda:
        from .kernel import add_mass_triton

        add_mass_triton(totals, block_table, mass, new=new)
    else:
        add_mass_vectorized(totals, block_table, mass, new=new)
