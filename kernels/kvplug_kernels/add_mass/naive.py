"""The specification of adding attention mass: legal arguments, then plain loops."""

from __future__ import annotations

from torch import Tensor

from ..arguments import FLOAT32, INT32, check_tensor, checked


def check_arguments(totals: Tensor, block_table: Tensor, mass: Tensor, *, new: int) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    shape = ("num_blocks", "kv_heads", "block_size")
    check_tensor("totals", totals, FLOAT32, shape, totals.device)
    kv_heads, block_size = totals.shape[1:]
    check_tensor("block_table", block_table, INT32, ("rows", "width"), totals.device)
    rows, width = block_table.shape
    check_tensor("mass", mass, FLOAT32, (rows, "num_heads", "n"), totals.device)
    num_heads, n = mass.shape[1:]
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"mass must have a multiple of the {kv_heads} heads of totals, got {num_heads}."
        )
    if n > width * block_size:
        raise ValueError(
            f"mass must have at most the {width * block_size} slots of a row of block_table, "
            f"got {n}."
        )
    if not 0 <= new <= n:
        raise ValueError(f"new must lie between 0 and the {n} tokens of a row, got {new}.")


@checked(check_arguments)
def add_mass_naive(totals: Tensor, block_table: Tensor, mass: Tensor, *, new: int) -> None:
    """Same contract as :func:`kvplug_kernels.add_mass.add_mass`, in float64."""
    kv_heads, size = totals.shape[1:]
    group, n = mass.shape[1] // kv_heads, mass.shape[2]
    for r, table in enumerate(block_table.tolist()):
        for h in range(kv_heads):
            paid = mass[r, h * group : (h + 1) * group].double().mean(0)
            for t in range(n):
                at = (table[t // size], h, t % size)
                before = float(totals[at]) if t < n - new else 0.0
                totals[at] = before + float(paid[t])
