"""Totals of attention against a copy of as many bytes as mass and totals, read and written."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.add_mass import add_mass
from kvplug_kernels.add_mass.naive import add_mass_naive

SMALL = (2, 48)
LARGE = [(28, 640), (28, 8192), (1, 131_072)]
HEADS, GROUP, BLOCK_SIZE = 8, 4, 16


def measure(n_rows: int, n: int, repetitions: int) -> list[Row]:
    """Rows are the layers of a request; 32 tokens had no total."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    width = -(-n // BLOCK_SIZE)
    totals = torch.rand(n_rows * width, HEADS, BLOCK_SIZE, generator=rng).to(target)
    table = torch.randperm(n_rows * width, generator=rng).int().view(n_rows, width).to(target)
    mass = torch.rand(n_rows, HEADS * GROUP, n, generator=rng).to(target)
    n_bytes = 4 * (mass.numel() + 2 * n_rows * HEADS * n + table.numel())

    shape = f"{n} tokens, {n_rows} rows x {HEADS} heads of {GROUP}"
    return compare_paths(
        "add_mass",
        shape,
        add_mass,
        add_mass_naive if n < 1024 else None,
        lambda path: partial(path, totals, table, mass, new=32),
        n_bytes,
        repetitions=repetitions,
        inner=5,
    )


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL] if options.quick else LARGE
    repetitions = 3 if options.quick else options.repetitions
    rows = [row for size in sizes for row in measure(*size, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
