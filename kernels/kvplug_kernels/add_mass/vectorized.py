"""Adding attention mass in vectorized torch."""

from __future__ import annotations

from torch import Tensor

from ..arguments import checked
from .naive import check_arguments


@checked(check_arguments)
def add_mass_vectorized(totals: Tensor, block_table: Tensor, mass: Tensor, *, new: int) -> None:
    """Same contract as :func:`kvplug_kernels.add_mass.add_mass`."""
    kv_heads, size = totals.shape[1:]
    rows, num_heads, n = mass.shape
    width = -(-n // size)
    blocks = block_table[:, :width].long()
    before = totals[blocks].transpose(1, 2).reshape(rows, kv_heads, width * size)
    before[..., n - new : n] = 0
    before[..., :n] += mass.view(rows, kv_heads, num_heads // kv_heads, n).mean(2)
    # The slots behind the last token keep what they had.
    totals[blocks] = before.view(rows, kv_heads, width, size).transpose(1, 2)
