"""Layouts of resident tokens against a copy of as many bytes as they take, twice each."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.resident_tokens import LayerSlice, resident_tokens
from kvplug_kernels.resident_tokens.naive import resident_tokens_naive

SMALL = (2, 48)
LARGE = [(28, 640), (28, 8192)]
HEADS, BLOCK_SIZE = 8, 16


def measure(n_layers: int, n: int, repetitions: int) -> list[Row]:
    """One request whose blocks all hold tokens that were moved there, with totals."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    width = -(-n // BLOCK_SIZE)
    stored = torch.randint(0, n, (n_layers * width, HEADS, BLOCK_SIZE), generator=rng)
    stored = stored.int().to(target)
    totals = torch.rand(stored.shape, generator=rng).to(target)
    table = torch.randperm(width, generator=rng).int()[None].to(target)
    rows = torch.zeros(1, dtype=torch.int32, device=target)
    logical = torch.arange(width, dtype=torch.int32, device=target)[None]
    mixed = torch.full((1,), width, dtype=torch.int32, device=target)
    layers = LayerSlice(0, n_layers, 1, width)
    n_bytes = 4 * (2 + 2 * 2) * n_layers * HEADS * n

    shape = f"{n} tokens, {n_layers} layers x {HEADS} heads"
    return compare_paths(
        "resident_tokens",
        shape,
        resident_tokens,
        resident_tokens_naive if n < 1024 else None,
        lambda path: partial(
            path, table, rows, logical, mixed, stored, layers, count=n, totals=totals
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
