"""Key scores against a copy of as many bytes as reading the pages once and writing the scores."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report
from paged_pages import packed_pages

from kvplug_kernels.key_scores import key_scores
from kvplug_kernels.key_scores.naive import key_scores_naive

SMALL = (2, 40, 2, 16)
LARGE = [(1, 8192, 8, 128), (16, 1024, 8, 128), (64, 2048, 8, 128), (1, 131072, 8, 128)]


def measure(n_rows: int, tokens: int, kv_heads: int, head_size: int, repetitions: int) -> list[Row]:
    """Full rows. The floor reads the keys once; the operation needs them twice, for the anchor
    and then for the similarity to it."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    keys, values, table = packed_pages(n_rows, tokens, kv_heads, head_size, rng)
    lens = torch.full((n_rows,), tokens, dtype=torch.int32, device=target)
    out = torch.zeros(4, n_rows, kv_heads, tokens, device=target)
    n_tokens = n_rows * tokens * kv_heads
    n_bytes = 2 * 2 * n_tokens * head_size + 4 * out.numel() + 4 * (table.numel() + n_rows)

    shape = f"{n_rows} rows x {tokens} tokens, {kv_heads} heads of {head_size}"
    paths = [("triton" if target.type == "cuda" else "vectorized", key_scores)]
    if target.type == "cpu" and tokens <= SMALL[1]:
        paths.append(("naive", key_scores_naive))
    return [
        compare(
            "key_scores",
            path,
            shape,
            partial(implementation, keys, values, table, lens, out=out),
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
