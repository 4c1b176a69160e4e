"""The projection against a copy of as many bytes as vectors and bases read and latents written."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.project_latent import project_latent
from kvplug_kernels.project_latent.naive import project_latent_naive

# Tokens of one step, heads, head size, rank: a step of decoding, and a chunk of a prompt.
SMALL = (8, 2, 64, 24)
LARGE = [(32, 8, 128, 64), (4096, 8, 128, 64), (4096, 8, 128, 32)]


def measure(
    tokens: int, heads: int, head_size: int, rank: int, basis_dtype: torch.dtype, repetitions: int
) -> list[Row]:
    """bfloat16 vectors; the products are 2 x head size x rank operations for each."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, heads, head_size, generator=rng).to(target, torch.bfloat16)
    basis = torch.randn(heads, head_size, rank, generator=rng).to(target, basis_dtype)
    mean = torch.randn(heads, head_size, generator=rng).to(target)
    out = torch.zeros(tokens, heads, rank, dtype=x.dtype, device=target)
    n_bytes = x.nbytes + basis.nbytes + mean.nbytes + out.nbytes
    operations = 2 * tokens * heads * head_size * rank
    label = (
        f"{tokens} tokens x {heads} heads of {head_size} to rank {rank}, basis "
        f"{str(basis_dtype).removeprefix('torch.')}, {operations / 1e6:.1f} million operations"
    )
    paths = [("triton" if target.type == "cuda" else "vectorized", project_latent)]
    if target.type == "cpu" and (tokens, heads, head_size, rank) == SMALL:
        paths.append(("naive", project_latent_naive))
    return [
        compare(
            "project_latent",
            path,
            label,
            partial(implementation, x, basis, mean, out=out),
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
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure(*size, dtype, repetitions)
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
