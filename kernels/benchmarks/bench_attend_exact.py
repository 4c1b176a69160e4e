"""Exact attention of a step and the merge of two parts, against a copy of as many bytes as they
read and write."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Row, arguments, compare, device, report

from kvplug_kernels.attend_exact import attend_exact, merge_attention
from kvplug_kernels.attend_exact.naive import attend_exact_naive, merge_attention_naive

# rows, queries a row, KV heads, query heads, head size, recent tokens
SMALL = (2, 3, 2, 4, 32, 4)
CPU = [(8, 1, 3, 9, 64, 32), (1, 512, 3, 9, 64, 0)]
GPU = [(32, 1, 8, 32, 128, 64), (2, 2048, 8, 32, 128, 0)]


def measure(
    n_rows: int,
    queries: int,
    heads: int,
    num_heads: int,
    size: int,
    recent: int,
    repetitions: int,
    naive: bool,
) -> list[Row]:
    target = device()
    tokens = n_rows * queries
    query = torch.randn(tokens, num_heads, size, device=target).bfloat16()
    key, value = (torch.randn(tokens, heads, size, device=target).bfloat16() for _ in range(2))
    starts = torch.arange(n_rows + 1, dtype=torch.int32, device=target) * queries
    out = torch.zeros(tokens, num_heads, size, device=target)
    lse = torch.zeros(tokens, num_heads, device=target)
    kept = {}
    if recent:
        shape = (n_rows, recent, heads, size)
        kept = {
            "recent_key": torch.randn(shape, device=target).bfloat16(),
            "recent_value": torch.randn(shape, device=target).bfloat16(),
            "recent_slots": torch.arange(n_rows, device=target),
            "recent_lens": torch.full((n_rows,), recent, dtype=torch.int32, device=target),
        }
    shape_said = (
        f"{n_rows} rows x {queries} queries, {num_heads} heads on {heads} of {size}, "
        f"{recent} recent tokens"
    )
    path = "triton" if target.type == "cuda" else "vectorized"
    own = 2 * (query.numel() + key.numel() + value.numel()) + 4 * (out.numel() + lse.numel())
    attend_bytes = own + 4 * n_rows * recent * heads * size
    past, past_lse = torch.randn_like(out), torch.randn_like(lse)
    merged = torch.zeros_like(query)
    merge_bytes = 8 * (out.numel() + lse.numel()) + 2 * merged.numel()
    calls = [
        ("attend_exact", path, attend_exact, attend_bytes, repetitions),
        ("merge_attention", path, merge_attention, merge_bytes, repetitions),
    ]
    if naive:
        few = min(repetitions, 3)
        calls += [
            ("attend_exact", "naive", attend_exact_naive, attend_bytes, few),
            ("merge_attention", "naive", merge_attention_naive, merge_bytes, few),
        ]
    rows = []
    for op, of, function, n_bytes, times in calls:
        call = partial(function, past, past_lse, out, lse, merged)
        if op == "attend_exact":
            call = partial(
                function,
                query,
                key,
                value,
                starts,
                size**-0.5,
                max_query_len=queries,
                out=out,
                lse=lse,
                **kept,
            )
        rows.append(compare(op, of, shape_said, call, n_bytes, repetitions=times, inner=1))
    return rows


def main() -> None:
    options = arguments(__doc__)
    sizes = [SMALL]
    if not options.quick:
        sizes += GPU if torch.cuda.is_available() else CPU
    repetitions = 3 if options.quick else options.repetitions
    rows = []
    for size in sizes:
        rows += measure(*size, repetitions, size is SMALL and device().type == "cpu")
    report(rows, options.json)


if __name__ == "__main__":
    main()
