"""Attention mass against a copy of as many bytes as reading every key once and writing the mass."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report
from paged_pages import packed_pages

from kvplug_kernels.attention_mass import attention_mass
from kvplug_kernels.attention_mass.naive import attention_mass_naive

SMALL = (2, 40, 2, 4, 16, 3)
LARGE = [
    (1, 8192, 8, 32, 128, 64),
    (1, 8192, 8, 32, 128, 1),
    (16, 1024, 8, 32, 128, 32),
    (64, 2048, 8, 32, 128, 32),
    (1, 131072, 8, 32, 128, 32),
    (1, 131072, 8, 32, 128, 1),
]


def measure(
    n_rows: int,
    tokens: int,
    kv_heads: int,
    num_heads: int,
    head_size: int,
    w: int,
    repetitions: int,
) -> list[Row]:
    """Full rows in text order. The logits alone take 2 * w * num_heads * tokens * head_size
    operations a row, and the Triton path computes them twice: with a wide window it is these and
    not the bytes that set the time."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    keys, _, table = packed_pages(n_rows, tokens, kv_heads, head_size, rng)
    query = torch.randn(n_rows, w, num_heads, head_size, generator=rng).to(target, keys.dtype)
    lens = torch.full((n_rows,), tokens, dtype=torch.int32, device=target)
    out = torch.zeros(n_rows, num_heads, tokens, device=target)
    n_keys = n_rows * tokens * kv_heads * head_size
    n_bytes = 2 * n_keys + 4 * out.numel() + 2 * query.numel() + 4 * (table.numel() + n_rows)
    gflop = 2 * w * (num_heads // kv_heads) * n_keys / 1e9

    shape = (
        f"{n_rows} rows x {tokens} tokens, {num_heads} heads on {kv_heads} of {head_size}, "
        f"window {w}, {gflop:.3g} Gflop of logits"
    )
    paths = [("triton" if target.type == "cuda" else "vectorized", attention_mass)]
    if target.type == "cpu" and tokens <= SMALL[1]:
        paths.append(("naive", attention_mass_naive))
    scale = head_size**-0.5
    return [
        compare(
            "attention_mass",
            path,
            shape,
            partial(implementation, query, keys, table, lens, scale, out=out),
            n_bytes,
            repetitions=repetitions if path != "naive" else min(repetitions, 3),
            inner=1,
        )
        for path, implementation in paths
    ]


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL] if options.quick else [SMALL, *LARGE]
    repetitions = 3 if options.quick else options.repetitions
    rows = [row for size in sizes for row in measure(*size, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
