"""Selection against a copy of as many bytes as reading the scores once and writing the indices."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.select_top import select_top
from kvplug_kernels.select_top.naive import select_top_naive

SMALL = (2, 2, 100)
LARGE = [(1, 8, 8192), (1, 8, 131_072), (16, 8, 1024)]


def measure(n_rows: int, heads: int, n: int, repetitions: int) -> list[Row]:
    """A quarter of random scores, all of them resident but five."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(n_rows, heads, n, generator=rng).to(target)
    lens = torch.full((n_rows,), n - 5, dtype=torch.int32, device=target)
    count = n // 4
    out = torch.zeros(n_rows, heads, count, dtype=torch.int32, device=target)
    n_bytes = 4 * (n_rows * heads * (n - 5) + out.numel() + n_rows)

    shape = f"{count} of {n} scores, {n_rows} rows x {heads} heads"
    return compare_paths(
        "select_top",
        shape,
        select_top,
        select_top_naive,
        lambda path: partial(path, scores, count, lens, out=out),
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
