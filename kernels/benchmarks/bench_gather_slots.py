"""Slot gather against a copy that moves the same number of bytes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.gather_slots import gather_slots
from kvplug_kernels.gather_slots.naive import gather_slots_naive

BLOCK_SIZE = 16


def measure(n: int, num_heads: int, content: int, layout: str, repetitions: int) -> list[Row]:
    """Random slots, one in fifty padding, out of a cache twice as large as what is gathered."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    num_blocks = 2 * n // BLOCK_SIZE + 1
    shape = (num_blocks, num_heads, BLOCK_SIZE, content)
    cache = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8).to(target)
    if layout == "token-major":
        cache = cache.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    slots = torch.randint(0, num_blocks * BLOCK_SIZE, (n,), generator=rng)
    slots[::50] = -1
    n_live = int((slots >= 0).sum())
    slots = slots.to(target)
    out = torch.zeros(n, num_heads, content, dtype=torch.uint8, device=target)
    # Live slots read, every slot written, the slot ids themselves read once.
    n_bytes = (n_live + n) * num_heads * content + n * slots.element_size()

    label = f"{n} slots x {num_heads} heads x {content} bytes, {layout}"
    paths = [("triton" if target.type == "cuda" else "vectorized", gather_slots, 5)]
    if target.type == "cpu":
        paths.append(("naive", gather_slots_naive, 1))
    return [
        compare(
            "gather_slots",
            path,
            label,
            partial(implementation, cache, slots, out=out),
            n_bytes,
            repetitions=repetitions if path != "naive" else min(repetitions, 3),
            inner=inner,
        )
        for path, implementation, inner in paths
    ]


def main() -> None:
    options = arguments(__doc__)
    size = (64, 2, 32) if options.quick else (16_384, 8, 256)
    repetitions = 3 if options.quick else options.repetitions
    layouts = ("head-major", "token-major")
    rows = [row for layout in layouts for row in measure(*size, layout, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
