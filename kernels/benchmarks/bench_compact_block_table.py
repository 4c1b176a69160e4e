"""Block-table compaction against a copy that moves the same number of bytes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.compact_block_table import compact_block_table
from kvplug_kernels.compact_block_table.naive import compact_block_table_naive

BLOCK_SIZE = 16


def measure(n_rows: int, width: int, repetitions: int) -> list[Row]:
    """Rows on average three quarters full with a quarter of the live entries null, plus a gap."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    n_live = torch.randint(width // 2, width + 1, (n_rows,), generator=rng)
    table = torch.randint(1, 100_000, (n_rows, width), generator=rng)
    table[torch.rand(n_rows, width, generator=rng) < 0.25] = 0
    table[torch.arange(n_rows), n_live - 1] = 7
    gap_start = torch.randint(0, width // 4, (n_rows,), generator=rng)
    buffers: dict[str, Any] = {
        "rows": torch.randperm(n_rows, generator=rng).to(target, torch.int32),
        "gap_start": gap_start.to(target, torch.int32),
        "gap_end": (gap_start + width // 8).to(target, torch.int32),
        "out_table": torch.zeros(n_rows, width, dtype=torch.int32, device=target),
        "out_lens": torch.zeros(n_rows, dtype=torch.int32, device=target),
    }
    source = torch.zeros(n_rows, width, dtype=torch.int32, device=target)
    source[buffers["rows"].long()] = table.to(target, torch.int32)
    seq_lens = (n_live * BLOCK_SIZE).to(target, torch.int32)
    # Live entries read, whole rows written; rows, both gap bounds and lengths in and out.
    n_bytes = 4 * (int(n_live.sum()) + n_rows * width + 5 * n_rows)

    shape = f"{n_rows} rows x {width} columns"
    paths = [("triton" if target.type == "cuda" else "vectorized", compact_block_table, 20)]
    if target.type == "cpu":
        paths.append(("naive", compact_block_table_naive, 1))
    return [
        compare(
            "compact_block_table",
            path,
            shape,
            partial(implementation, source, seq_lens, block_size=BLOCK_SIZE, **buffers),
            n_bytes,
            repetitions=repetitions if path != "naive" else min(repetitions, 5),
            inner=inner,
        )
        for path, implementation, inner in paths
    ]


def main() -> None:
    options = arguments(__doc__)
    sizes = [(3, 16)] if options.quick else [(8, 512), (256, 512), (256, 8192)]
    repetitions = 3 if options.quick else options.repetitions
    rows = [row for size in sizes for row in measure(*size, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
