"""Rotating keys in place against a copy of as many bytes as keys read and written."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report
from paged_pages import BLOCK_SIZE, packed_pages

from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.quant_write import quant_write
from kvplug_kernels.rerotate import rerotate, rerotate_coded
from kvplug_kernels.rerotate.naive import rerotate_coded_naive, rerotate_naive

SMALL = (40, 2, 16)
LARGE = [(1024, 8, 128), (8192, 8, 128)]
LEVELS = [-2.15, -1.34, -0.756, -0.245, 0.245, 0.756, 1.34, 2.15]


def codings(size: int) -> dict[str, Coding]:
    return {
        "int8": Coding(size, 8),
        "int4": Coding(size, 4),
        "fp8": Coding(size, 8, "fp8"),
        "3-bit codebook": Coding(size, 3, "codebook"),
    }


def measure(tokens: int, heads: int, size: int, repetitions: int) -> list[Row]:
    """All tokens of a row, its blocks in random order, moved by one shift or one of their own."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    keys, values, block_table = packed_pages(1, tokens, heads, size, rng)
    token = torch.arange(tokens, device=target)
    slots = block_table[0].long()[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE
    frequencies = (10000.0 ** -(torch.arange(size // 2) / (size // 2))).to(target)
    shifts = {"one shift": 100, "a shift each": token % 512 + 1}
    path = "triton" if target.type == "cuda" else "vectorized"
    slow = target.type == "cpu" and tokens <= SMALL[0]
    shape = f"{tokens} tokens, {heads} heads of {size}"
    rows = []
    for name, shift in shifts.items():
        for interleaved in (False, True):
            paths = [(path, rerotate), *([("naive", rerotate_naive)] if slow else [])]
            rows += [
                compare(
                    "rerotate",
                    label,
                    f"{shape}, {'GPT-J' if interleaved else 'NeoX'}, {name}",
                    partial(of, keys, slots, shift, frequencies, interleaved=interleaved),
                    2 * tokens * heads * size * 2 + slots.nbytes,
                    repetitions=repetitions if label != "naive" else min(repetitions, 3),
                    inner=1,
                )
                for label, of in paths
            ]
    blocks = keys.shape[0]
    for name, coding in codings(size).items():
        layout = CodedPage(coding, coding)
        page = (blocks, heads, BLOCK_SIZE, layout.bytes_per_token)
        pages = torch.zeros(page, dtype=torch.uint8, device=target)
        levels = torch.tensor(LEVELS, device=target) if coding.kind == "codebook" else None
        dense = [x.transpose(1, 2).flatten(0, 1)[slots] for x in (keys, values)]
        quant_write(*dense, pages, slots, layout, key_levels=levels, value_levels=levels)
        stored = sum(size for _, size, _ in coding.sizes())
        coded_paths = [(path, rerotate_coded)]
        if slow:
            coded_paths.append(("naive", rerotate_coded_naive))
        rows += [
            compare(
                "rerotate_coded",
                label,
                f"{shape}, {name}",
                partial(of, pages, slots, 100, layout, frequencies, key_levels=levels),
                2 * tokens * heads * stored + slots.nbytes,
                repetitions=repetitions if label != "naive" else min(repetitions, 3),
                inner=1,
            )
            for label, of in coded_paths
        ]
    return rows


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL] if options.quick else [SMALL, *LARGE]
    repetitions = 3 if options.quick else options.repetitions
    rows = [row for size in sizes for row in measure(*size, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
