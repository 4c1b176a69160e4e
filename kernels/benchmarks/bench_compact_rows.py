"""A step's compacted rows against a copy that moves the same number of bytes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.compact_rows import compact_rows
from kvplug_kernels.compact_rows.naive import compact_rows_naive

BLOCK_SIZE, KEPT, RING = 16, 32, 32


def measure(n_rows: int, width: int, repetitions: int) -> list[Row]:
    """Decoding rows, every one past an eviction, in a table of ``width`` columns."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(KEPT + 2, width + 1, (n_rows,), generator=rng)
    forces = torch.zeros(n_rows, 4, dtype=torch.int32)
    forces[:, 0], forces[:, 1], forces[:, 2] = (blocks - 1) * BLOCK_SIZE, KEPT, blocks - 1
    step: dict[str, Any] = {
        "block_table": torch.randint(1, 100_000, (n_rows, width), generator=rng),
        "seq_lens": blocks * BLOCK_SIZE,
        "query_start": torch.arange(n_rows + 1),
        "row_slots": torch.randperm(n_rows, generator=rng),
        "out_table": torch.zeros(n_rows, width),
        "out_lens": torch.zeros(n_rows),
        "places": torch.zeros(n_rows),
    }
    step["forces"] = torch.empty_like(forces)
    step["forces"][step["row_slots"]] = forces
    step = {name: tensor.to(target, torch.int32) for name, tensor in step.items()}
    step |= {"block_size": BLOCK_SIZE, "protected": 0, "ring": RING}
    # What is shown is read, whole rows written; a length, a start, a slot, a force and a place.
    n_bytes = 4 * (n_rows * (KEPT + 1) + n_rows * width + 8 * n_rows)

    return compare_paths(
        "compact_rows",
        f"{n_rows} rows x {width} columns",
        compact_rows,
        compact_rows_naive,
        lambda path: partial(path, **step),
        n_bytes,
        repetitions=repetitions,
        inner=20,
        most_naive=5,
    )


def main() -> None:
    options = arguments(__doc__)
    sizes = [(4, 64)] if options.quick else [(24, 320), (256, 2048), (256, 8192)]
    repetitions = 3 if options.quick else options.repetitions
    rows = [row for size in sizes for row in measure(*size, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
