"""Attention over coded pages against a copy of as many bytes as it must read, against 16-bit pages,
and integer products against dequantizing the same codes."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, _timer, arguments, compare, device, report
from torch import Tensor

from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.paged_attend_quant import paged_attend_quant
from kvplug_kernels.paged_attend_quant.naive import paged_attend_quant_naive
from kvplug_kernels.paged_attend_quant.vectorized import paged_attend_quant_vectorized

# rows, tokens, KV heads, query heads, head size, block size, queries a row
SMALL = (2, 40, 2, 4, 32, 16, 1)
CPU = [(8, 1024, 3, 9, 64, 32, 1), (1, 1024, 3, 9, 64, 32, 512)]
GPU = [
    (32, 32768, 8, 32, 128, 16, 1),
    (32, 32768, 8, 32, 128, 64, 1),
    (1, 131072, 8, 32, 128, 16, 1),
    (1, 16384, 8, 32, 128, 16, 1024),
]


def layouts(size: int) -> dict[str, tuple[CodedPage, bool]]:
    """The layouts measured, and whether their products are integer."""

    def both(*args: object, **kwargs: object) -> CodedPage:
        coding = Coding(size, *args, **kwargs)  # type: ignore[arg-type]
        return CodedPage(coding, coding)

    four = CodedPage(Coding(size, 4, sums=True), Coding(size, 4))
    two = CodedPage(Coding(size, 2, sums=True), Coding(size, 2))
    kivi = CodedPage(Coding(size, 2, axis="tokens", group=16), Coding(size, 2))
    return {
        "int4": (both(4), False),
        "int8": (both(8), False),
        "fp8": (both(8, "fp8"), False),
        "kivi, 2 bits": (kivi, False),
        "rotated, 4 bits": (both(4, "codebook"), False),
        "hack, 4 bits": (four, True),
        "hack, 2 bits": (two, True),
    }


def make_pages(layout: CodedPage, blocks: int, heads: int, block_size: int) -> Tensor:
    """Random codes with scales and zeros of an ordinary size."""
    shape = (blocks, heads, block_size, layout.bytes_per_token)
    pages = torch.empty(shape, dtype=torch.uint8, device=device()).random_(0, 256)
    for field in layout.fields:
        plane = layout.plane(pages, field.name)
        if field.dtype == "float8_e4m3fn":
            plane.random_(0, 0x70)
        elif field.dtype == "float16":
            coding = layout.key if field.name.startswith("key") else layout.value
            step = 0.01 if field.name.endswith("zero") else 2.0 / coding.levels
            plane.view(torch.float16).fill_(step)
        elif field.name.endswith("codes") and field.dtype.startswith("float16"):
            plane.view(torch.bfloat16).normal_()
    return pages


def measure(
    n_rows: int,
    tokens: int,
    heads: int,
    num_heads: int,
    size: int,
    block_size: int,
    queries: int,
    repetitions: int,
    naive: bool,
) -> list[Row]:
    target = device()
    rng = torch.Generator().manual_seed(0)
    width = -(-tokens // block_size)
    table = torch.randperm(n_rows * width, generator=rng).view(n_rows, width)
    table = table.to(target, torch.int32)
    lens = torch.full((n_rows,), tokens, dtype=torch.int32, device=target)
    starts = torch.arange(n_rows + 1, dtype=torch.int32, device=target) * queries
    query = torch.randn(n_rows * queries, num_heads, size, device=target).to(torch.bfloat16)
    out = torch.zeros(n_rows * queries, num_heads, size, device=target)
    lse = torch.zeros(n_rows * queries, num_heads, device=target)
    scale = size**-0.5
    gflop = 4 * n_rows * queries * tokens * num_heads * size / 1e9
    shape = (
        f"{n_rows} rows x {tokens} tokens, {num_heads} heads on {heads} of {size}, blocks of "
        f"{block_size}, {queries} queries, {gflop:.3g} Gop of products"
    )
    path = "triton" if target.type == "cuda" else "cpu"

    def call_of(name: str, pages: Tensor, layout: CodedPage, integer: bool, plain: bool) -> partial:
        levels = [
            torch.linspace(-2, 2, coding.levels, device=target)
            if coding.kind == "codebook"
            else None
            for coding in (layout.key, layout.value)
        ]
        return partial(
            paged_attend_quant_naive if plain else paged_attend_quant,
            query,
            pages,
            layout,
            table,
            lens,
            starts,
            scale,
            key_levels=levels[0],
            value_levels=levels[1],
            causal=False,
            integer=integer,
            max_query_len=queries,
            max_len=tokens,
            out=out,
            lse=lse,
        )

    def add(name: str, call: partial, n_bytes: int, baseline: tuple[str, partial] | None) -> None:
        rows.append(
            compare(
                f"paged_attend_quant {name}",
                path,
                shape,
                call,
                n_bytes,
                repetitions=repetitions,
                inner=1,
                baseline=baseline,
            )
        )

    rows: list[Row] = []
    wide = best_wide(n_rows, tokens, heads, size, block_size, queries, query, table, lens, call_of)
    for name, (layout, integer) in layouts(size).items():
        pages = make_pages(layout, n_rows * width, heads, block_size)
        moved = n_rows * tokens * heads * layout.bytes_per_token
        n_bytes = moved + 2 * query.numel() + 4 * (out.numel() + lse.numel() + table.numel())
        call = call_of(name, pages, layout, integer, False)
        add(name, call, n_bytes, None)
        add(name, call, n_bytes, wide)
        if target.type == "cpu" and not integer:
            by_torch = partial(paged_attend_quant_vectorized, *call.args, **call.keywords)
            add(name, call, n_bytes, ("the same in torch", by_torch))
        if integer:
            dequantized = call_of(name, pages, layout, False, False)
            add(name, call, n_bytes, ("dequantizing the same codes", dequantized))
        if naive and name == "int4":
            plain = call_of(name, pages, layout, integer, True)
            rows.append(
                compare(
                    "paged_attend_quant int4",
                    "naive",
                    shape,
                    plain,
                    n_bytes,
                    repetitions=min(repetitions, 3),
                    inner=1,
                )
            )
    return rows


def best_wide(
    n_rows: int,
    tokens: int,
    heads: int,
    size: int,
    block_size: int,
    queries: int,
    query: Tensor,
    table: Tensor,
    lens: Tensor,
    call_of: object,
) -> tuple[str, partial]:
    """The fastest attention over 16-bit pages here: of the paged decodes there are for one query a
    row on a GPU, and the same operation over ``plain`` pages otherwise."""
    blocks = table.numel()
    if query.is_cuda and queries == 1:
        from bf16_paged_decode import decoders

        shape = (blocks, 2, heads, block_size, size)
        pages = torch.empty(shape, dtype=torch.bfloat16, device=query.device).normal_()
        calls = decoders(query, pages, table, lens, size**-0.5)
        times = {}
        for name, call in calls.items():
            try:
                timer = _timer(call, 1)
            except RuntimeError as error:  # Not timed where a CUDA graph cannot capture it.
                print(f"{name} is left out: {str(error).splitlines()[:1]}")
                continue
            times[name] = statistics.median(timer() for _ in range(7))
            print(f"{name}: {times[name]:.1f} us")
        best = min(times, key=lambda name: times[name])
        return best, calls[best]  # type: ignore[return-value]
    coding = Coding(size, 16, "plain")
    layout = CodedPage(coding, coding)
    pages = make_pages(layout, blocks, heads, block_size)
    assert callable(call_of)
    return "the same over bf16 pages", call_of("bf16", pages, layout, False, False)


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL]
    if not options.quick:
        sizes += GPU if torch.cuda.is_available() else CPU
    repetitions = 3 if options.quick else options.repetitions
    rows = []
    for size in sizes:
        naive = size is SMALL and device().type == "cpu"
        rows += measure(*size, repetitions, naive)
    report(rows, options.json)


if __name__ == "__main__":
    main()
