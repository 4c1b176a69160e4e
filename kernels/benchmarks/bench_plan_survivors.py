"""Plans of evictions against a copy of as many bytes as scores, positions and plan."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare_paths, device, report

from kvplug_kernels.plan_survivors import plan_survivors
from kvplug_kernels.plan_survivors.naive import plan_survivors_naive

SMALL = (2, 48)
LARGE = [(28, 640), (28, 8192), (1, 131_072)]
HEADS = 8


def measure(n_rows: int, n: int, repetitions: int) -> list[Row]:
    """Half of the tokens stay."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(n_rows, HEADS, n, generator=rng).to(target)
    positions = torch.arange(n, dtype=torch.int32).expand(n_rows, HEADS, n).contiguous().to(target)
    num_tokens = torch.full((1,), n, dtype=torch.int32, device=target)
    count = n // 2
    out = torch.zeros(n_rows, HEADS, count, dtype=torch.int32, device=target)
    n_bytes = 4 * (scores.numel() + positions.numel() + out.numel())

    shape = f"{count} of {n} tokens, {n_rows} rows x {HEADS} heads"
    return compare_paths(
        "plan_survivors",
        shape,
        plan_survivors,
        plan_survivors_naive if n < 1024 else None,
        lambda path: partial(
            path,
            scores,
            positions,
            num_tokens,
            candidates=n,
            count=count,
            sink=4,
            recent=32,
            out=out,
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
