"""Compaction against a copy of as many bytes as the moved tokens and the plan."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report
from paged_pages import packed_pages

from kvplug_kernels.compact_kv import compact_kv
from kvplug_kernels.compact_kv.naive import compact_kv_naive

SMALL = (2, 40, 2, 16)
LARGE = [(1, 8192, 8, 128), (16, 1024, 8, 128)]


def measure(n_rows: int, tokens: int, kv_heads: int, head_size: int, repetitions: int) -> list[Row]:
    """A random half of the tokens of each head survives, keys and values. A second call moves the
    same tokens again, because no slot that is read is ever written."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    keys, values, table = packed_pages(n_rows, tokens, kv_heads, head_size, rng)
    count = tokens // 2
    kept = torch.rand(n_rows, kv_heads, tokens, generator=rng).argsort(-1)[..., :count]
    n_moved = int((kept >= count).sum())
    keep = kept.sort(-1).values.to(target, torch.int32)
    out = torch.zeros_like(keep)
    # Keys and values read and written, the indices read and the plan written.
    n_bytes = 2 * 2 * 2 * n_moved * head_size + 2 * 4 * keep.numel()

    shape = f"{count} of {tokens} tokens, {n_rows} rows x {kv_heads} heads of {head_size}"
    paths = [("triton" if target.type == "cuda" else "vectorized", compact_kv)]
    if target.type == "cpu" and tokens <= SMALL[1]:
        paths.append(("naive", compact_kv_naive))
    return [
        compare(
            "compact_kv",
            path,
            shape,
            partial(implementation, [keys, values], table, keep, count=count, out=out),
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
