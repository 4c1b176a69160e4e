"""A step's windows against a copy that moves the same number of bytes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.compact_windows import compact_windows
from kvplug_kernels.compact_windows.naive import compact_windows_naive

BLOCK_SIZE, SINK, WINDOW = 16, 1, 32


def measure(n_rows: int, width: int, repetitions: int) -> list[Row]:
    """Decoding rows, every one longer than its sink and window, in a table of ``width`` columns."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    step: dict[str, Any] = {
        "block_table": torch.randint(1, 100_000, (n_rows, width), generator=rng),
        "seq_lens": torch.randint(SINK + WINDOW + 1, width + 1, (n_rows,), generator=rng)
        * BLOCK_SIZE,
        "query_start": torch.arange(n_rows + 1),
        "out_table": torch.zeros(n_rows, width),
        "out_lens": torch.zeros(n_rows),
    }
    step = {name: tensor.to(target, torch.int32) for name, tensor in step.items()}
    step |= {"block_size": BLOCK_SIZE, "sink": SINK, "window": WINDOW}
    # What is shown is read and written; two lengths and a start.
    n_bytes = 4 * (n_rows * 2 * (SINK + WINDOW + 1) + 3 * n_rows)

    return compare_paths(
        "compact_windows",
        f"{n_rows} rows x {width} columns",
        compact_windows,
        compact_windows_naive,
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
