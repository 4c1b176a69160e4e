"""Packing chunks of all layers, and unpacking them, against a copy of as many bytes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.coding import Coding
from kvplug_kernels.pack_pages import LayerCaches, Packed, pack_pages, unpack_pages
from kvplug_kernels.pack_pages.naive import pack_pages_naive, unpack_pages_naive

BLOCK_SIZE = 16
CODINGS = {"bytes": None, "int8": (8, "int"), "int4": (4, "int"), "fp8": (8, "fp8")}
# Layers, chunks, tokens of a chunk, KV heads, head size.
SMALL = (2, 2, 32, 2, 16)
LARGE = [(28, 8, 256, 8, 128), (28, 64, 32, 8, 128), (36, 16, 256, 8, 128)]


def measure(
    layers: int, chunks: int, tokens: int, heads: int, head_size: int, repetitions: int
) -> list[Row]:
    """Chunks of random blocks, keys and values of a token side by side in slots that hold a token's
    heads together."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    width = tokens // BLOCK_SIZE
    blocks = torch.randperm(chunks * width, generator=rng).view(chunks, width).to(target)
    pages = torch.randn(
        layers, chunks * width, BLOCK_SIZE, heads, 2 * head_size, device=target
    ).bfloat16()
    pages = pages.transpose(2, 3)
    caches = LayerCaches([*pages[..., :head_size], *pages[..., head_size:]])
    fast = "triton" if target.type == "cuda" else "vectorized"
    found = []
    for name, options in CODINGS.items():
        coding = Coding(head_size, *options) if options else None
        need = Packed.room(caches, chunks, tokens, coding)
        buffer = torch.zeros(need, dtype=torch.uint8, device=target)
        packed = Packed.within(buffer, caches, chunks, tokens, coding)
        # Elements on one side, what they are packed in on the other.
        elements = 2 * chunks * layers * tokens * heads * head_size * 2
        n_bytes = elements + sum(field.nbytes for field in packed.fields.values())
        calls = [
            (f"pack {name}", [(fast, pack_pages), ("naive", pack_pages_naive)]),
            (f"unpack {name}", [(fast, unpack_pages), ("naive", unpack_pages_naive)]),
        ]
        for what, paths in calls:
            shape = f"{what}: {chunks} x {tokens} tokens, {layers} layers x {heads} of {head_size}"
            for path, implementation in paths:
                if path == "naive" and (target.type != "cpu" or tokens > SMALL[2] or layers > 2):
                    continue
                found.append(
                    compare(
                        "pack_pages",
                        path,
                        shape,
                        partial(implementation, caches, blocks, packed, coding),
                        n_bytes,
                        repetitions=repetitions if path != "naive" else min(repetitions, 3),
                        inner=1,
                    )
                )
    return found


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL] if options.quick else [SMALL, *LARGE]
    repetitions = 3 if options.quick else options.repetitions
    rows = [row for size in sizes for row in measure(*size, repetitions)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
