"""Pooled attention against a copy of as many bytes as mass, positions and scores."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.pool_mass import pool_mass
from kvplug_kernels.pool_mass.naive import pool_mass_naive

SMALL = (2, 48)
LARGE = [(28, 640), (28, 8192), (1, 131_072)]
HEADS, GROUP = 8, 4


def measure(n_rows: int, n: int, repetitions: int) -> list[Row]:
    """The largest of seven neighbours, of tokens whose neighbours are all resident."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    mass = torch.rand(n_rows, HEADS * GROUP, n, generator=rng).to(target)
    positions = torch.arange(n, dtype=torch.int32).expand(n_rows, HEADS, n).contiguous().to(target)
    num_tokens = torch.full((n_rows,), n, dtype=torch.int32, device=target)
    out = torch.zeros(n_rows, HEADS, n, device=target)
    n_bytes = 4 * (mass.numel() + positions.numel() + out.numel())

    shape = f"{n} tokens, {n_rows} rows x {HEADS} heads of {GROUP}"
    return compare_paths(
        "pool_mass",
        shape,
        pool_mass,
        pool_mass_naive if n < 1024 else None,
        lambda path: partial(
            path, mass, positions, num_tokens, latest=32, longest=n, kernel=7, kept=1e30, out=out
        ),
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
