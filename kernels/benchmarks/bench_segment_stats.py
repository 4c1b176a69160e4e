"""A segment's measures against a copy of as many bytes as reading its keys and values once."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.segment_stats import segment_stats
from kvplug_kernels.segment_stats.naive import segment_stats_naive

# Tokens, heads, head size, query heads per head, queries, tokens before.
SMALL = (40, 2, 16, 2, 4, 24)
LARGE = [
    (1024, 8, 128, 4, 0, 0),
    (8192, 8, 128, 4, 0, 0),
    (1024, 8, 128, 4, 16, 4096),
]


def measure(
    n: int, heads: int, size: int, group: int, m: int, c: int, repetitions: int
) -> list[Row]:
    """The floor reads what must be read once: keys, values, queries and the keys before."""
    target = device()
    rng = torch.Generator().manual_seed(0)

    def tokens(count: int, of: int) -> torch.Tensor:
        return torch.randn(count, of, size, generator=rng).to(target, torch.bfloat16)

    key, value = tokens(n, heads), tokens(n, heads)
    query, before = tokens(m, heads * group), tokens(c, heads)
    asked = (query, before) if m else (None, None)
    n_bytes = key.nbytes + value.nbytes + query.nbytes + before.nbytes + heads * 5 * 4
    shape = f"{n} tokens, {heads} heads of {size}"
    if m:
        products = 2 * m * heads * group * size * (n + c)
        shape += f", {m} queries of {heads * group} heads over {c} before, {products / 1e6:.0f} MF"
    paths = [("triton" if target.type == "cuda" else "vectorized", segment_stats)]
    if target.type == "cpu" and n <= SMALL[0]:
        paths.append(("naive", segment_stats_naive))
    return [
        compare(
            "segment_stats",
            path,
            shape,
            partial(implementation, key, value, *asked, size**-0.5),
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
