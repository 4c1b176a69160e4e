"""Coded writes against a copy of as many bytes as vectors read and codes written."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.quant_write import quant_write
from kvplug_kernels.quant_write.cpu import has_code
from kvplug_kernels.quant_write.naive import quant_write_naive
from kvplug_kernels.quant_write.vectorized import quant_write_vectorized

BLOCK_SIZE = 32
GROUP = 32
# Tokens of one step, KV heads, head size: a step of decoding, and a chunk of a prompt.
SMALL = (8, 2, 64)
LARGE = [(32, 8, 128), (4096, 8, 128)]


def layouts(head_size: int) -> dict[str, CodedPage]:
    """The codings of the built-in formats."""

    def same(coding: Coding) -> CodedPage:
        return CodedPage(coding, coding)

    return {
        "fp8": same(Coding(head_size, 8, "fp8")),
        "int8": same(Coding(head_size, 8)),
        "int4": same(Coding(head_size, 4)),
        "int4 in groups of 32 channels": same(Coding(head_size, 4, group=32)),
        "int2 with sums": same(Coding(head_size, 2, group=32, sums=True)),
        "codebook of 4 bits": same(Coding(head_size, 4, "codebook")),
        "codebook of 3 bits": same(Coding(head_size, 3, "codebook")),
        "int2, keys by groups of 32 tokens": CodedPage(
            Coding(head_size, 2, group=GROUP, axis="tokens"), Coding(head_size, 2)
        ),
        "plain": same(Coding(head_size, 16, "plain")),
    }


def measure(
    tokens: int, heads: int, head_size: int, name: str, layout: CodedPage, repetitions: int
) -> list[Row]:
    """A step's tokens: those of a prompt follow each other, those of decoding requests lie in a
    block each."""
    target = device()
    rng = torch.Generator().manual_seed(0)
    key, value = (
        torch.randn(tokens, heads, head_size, generator=rng).to(target, torch.bfloat16)
        for _ in range(2)
    )
    decoding = tokens <= 32
    offset = torch.full((tokens,), BLOCK_SIZE // 2) if decoding else torch.arange(tokens)
    slots = torch.arange(tokens) * BLOCK_SIZE + offset if decoding else offset
    slots = slots.to(target)
    blocks = int(slots.max()) // BLOCK_SIZE + 1
    shape = (blocks, heads, BLOCK_SIZE, layout.bytes_per_token)
    pages = torch.zeros(shape, dtype=torch.uint8, device=target)
    more = {}
    for side, coding in (("key", layout.key), ("value", layout.value)):
        if coding.kind == "codebook":
            levels = torch.linspace(-2, 2, coding.levels, device=target)
            more[f"{side}_levels"] = levels
    n_bytes = 2 * key.nbytes + slots.nbytes + tokens * heads * layout.bytes_per_token
    if layout.key.axis == "tokens" and decoding:
        recent_slots = torch.arange(tokens, device=target)
        more["recent_slots"] = recent_slots
        more["recent_key"] = key[:, None].expand(tokens, GROUP, heads, head_size).contiguous()
        # Each open group is read from what is kept exact, and coded again.
        before = BLOCK_SIZE // 2
        n_bytes += tokens * heads * before * (2 * head_size + layout.field("key_codes").size)
        scales = layout.field("key_scale").size + layout.field("key_zero").size
        n_bytes += tokens * heads * (GROUP - 1) * scales + recent_slots.nbytes
    what = "decoding" if decoding else "of a prompt"
    label = f"{name}, {tokens} tokens {what} x {heads} heads of {head_size}"
    paths = [("triton" if target.type == "cuda" else "cpu", quant_write, 5)]
    if target.type == "cpu" and (tokens, heads, head_size) == SMALL:
        paths.append(("naive", quant_write_naive, 1))
    rows = [
        compare(
            "quant_write",
            path,
            label,
            partial(implementation, key, value, pages, slots, layout, **more),
            n_bytes,
            repetitions=repetitions if path != "naive" else min(repetitions, 3),
            inner=inner if tokens <= 32 else 1,
        )
        for path, implementation, inner in paths
    ]
    if target.type == "cpu" and has_code(layout.key) and has_code(layout.value):
        written = (key, value, pages, slots, layout)
        rows.append(
            compare(
                "quant_write",
                "cpu",
                label,
                partial(quant_write, *written, **more),
                n_bytes,
                repetitions=repetitions,
                inner=5 if tokens <= 32 else 1,
                baseline=(
                    "the same in torch",
                    partial(quant_write_vectorized, *written, **more),
                ),
            )
        )
    return rows


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL] if options.quick else [SMALL, *LARGE]
    repetitions = 3 if options.quick else options.repetitions
    rows = [
        row
        for size in sizes
        for name, layout in layouts(size[2]).items()
        for row in measure(*size, name, layout, repetitions)
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
