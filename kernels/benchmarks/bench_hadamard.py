"""The Hadamard transform against a copy of as many bytes as vectors read and written."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.hadamard import hadamard
from kvplug_kernels.hadamard.naive import hadamard_naive

# Tokens of one step, heads, head size: a step of decoding, and a chunk of a prompt.
SMALL = (8, 2, 64)
LARGE = [(32, 40, 128), (4096, 8, 64), (4096, 8, 96), (4096, 8, 128), (4096, 8, 256)]


def measure(
    tokens: int, heads: int, head_size: int, dtype: torch.dtype, repetitions: int
) -> list[Row]:
    target = device()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, heads, head_size, generator=rng).to(target, dtype)
    signs = (torch.randint(0, 2, (head_size,), generator=rng) * 2.0 - 1).to(target)
    out = torch.zeros_like(x)
    n_bytes = x.nbytes + out.nbytes + signs.nbytes
    label = f"{tokens} tokens x {heads} heads of {head_size}, {str(dtype).removeprefix('torch.')}"
    paths = [("triton" if target.type == "cuda" else "vectorized", hadamard)]
    if target.type == "cpu" and (tokens, heads, head_size) == SMALL:
        paths.append(("naive", hadamard_naive))
    return [
        compare(
            "hadamard",
            path,
            label,
            partial(implementation, x, signs, out=out),
            n_bytes,
            repetitions=repetitions if path != "naive" else min(repetitions, 3),
            inner=5 if tokens <= 32 else 1,
        )
        for path, implementation in paths
    ]


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL] if options.quick else [SMALL, *LARGE]
    repetitions = 3 if options.quick else options.repetitions
    rows = [
        row
        for size in sizes
        for dtype in (torch.bfloat16, torch.float32)
        for row in measure(*size, dtype, repetitions)
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
