"""Moving the survivors of an eviction in all layers against a copy of as many bytes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.compact_kv import plan_moves
from kvplug_kernels.move_tokens import LayerCaches, move_tokens
from kvplug_kernels.move_tokens.naive import move_tokens_naive

BLOCK_SIZE = 16
# Layers, rows, resident tokens, survivors, KV heads, head size.
SMALL = (2, 2, 64, 32, 2, 16)
LARGE = [(28, 1, 640, 512, 8, 128), (28, 8, 640, 512, 8, 128), (36, 4, 1152, 1024, 8, 128)]


def measure(
    layers: int, rows: int, tokens: int, count: int, heads: int, head_size: int, repetitions: int
) -> list[Row]:
    """Random survivors in pages that hold a token's heads side by side, its key before its value.
    A second call moves the same tokens again, because no slot that is read is ever written."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    width = -(-tokens // BLOCK_SIZE)
    pages = torch.zeros(
        layers, rows * width, BLOCK_SIZE, heads, 2 * head_size, dtype=torch.bfloat16, device=target
    )
    caches = LayerCaches(list(pages.transpose(2, 3)))
    table = torch.randperm(rows * width, generator=rng).view(rows, width)
    kept = torch.rand(layers * rows, heads, tokens, generator=rng).argsort(-1)[..., :count]
    n_moved = int((kept >= count).sum())
    keep = kept.sort(-1).values.to(target, torch.int32)
    source = plan_moves(keep, count).view(layers, rows, heads, count)
    # Keys and values read and written, the plan read.
    n_bytes = 2 * 2 * 2 * n_moved * head_size + 4 * source.numel()

    shape = f"{count} of {tokens} tokens, {layers} layers x {rows} rows x {heads} of {head_size}"
    paths = [("triton" if target.type == "cuda" else "vectorized", move_tokens)]
    if target.type == "cpu" and tokens <= SMALL[2]:
        paths.append(("naive", move_tokens_naive))
    return [
        compare(
            "move_tokens",
            path,
            shape,
            partial(implementation, caches, table.to(target, torch.int32), source),
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
