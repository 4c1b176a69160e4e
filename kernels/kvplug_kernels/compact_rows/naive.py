"""The specification of compacted rows: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import INT32, INTEGERS, check_contiguous, check_separate, check_tensor, checked


def check_arguments(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    row_slots: Tensor,
    forces: Tensor,
    block_size: int,
    *,
    protected: int,
    out_table: Tensor,
    out_lens: Tensor,
    ring: int = 0,
    places: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = block_table.device
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    if protected < 0:
        raise ValueError(f"protected must be at least 0, got {protected}.")
    if ring < 0 or (ring > 0) != (places is not None):
        raise ValueError(f"ring must be positive with places and 0 without, got {ring}.")
    check_tensor("block_table", block_table, INT32, ("rows", "width"), device)
    rows, width = block_table.shape
    check_tensor("seq_lens", seq_lens, INT32, (rows,), device)
    check_tensor("query_start", query_start, INT32, (rows + 1,), device)
    check_tensor("row_slots", row_slots, INT32, (rows,), device)
    check_tensor("forces", forces, INT32, ("num_slots", 4), device)
    check_contiguous("forces", forces)
    if forces.shape[0] < 1:
        raise ValueError("forces must have at least one slot.")
    check_tensor("out_table", out_table, INT32, (">=rows", ">=width"), device)
    if out_table.shape[0] < rows or out_table.shape[1] < width:
        raise ValueError(
            f"out_table must be at least {rows} x {width}, got {tuple(out_table.shape)}."
        )
    check_tensor("out_lens", out_lens, INT32, (">=rows",), device)
    if out_lens.shape[0] < rows:
        raise ValueError(f"out_lens must have at least {rows} entries, got {out_lens.shape[0]}.")
    arguments = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "query_start": query_start,
        "row_slots": row_slots,
        "forces": forces,
    }
    check_separate("out_table", out_table, arguments)
    check_separate("out_lens", out_lens, {**arguments, "out_table": out_table})
    if places is not None:
        check_tensor("places", places, INTEGERS, ("num_tokens",), device)
        outputs = {"out_table": out_table, "out_lens": out_lens}
        check_separate("places", places, {**arguments, **outputs})


@checked(check_arguments)
def compact_rows_naive(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    row_slots: Tensor,
    forces: Tensor,
    block_size: int,
    *,
    protected: int,
    out_table: Tensor,
    out_lens: Tensor,
    ring: int = 0,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.compact_rows.compact_rows`."""
    rows, width = block_table.shape
    table, lens = block_table.tolist(), seq_lens.tolist()
    starts, slots = query_start.tolist(), row_slots.tolist()
    dump = forces.shape[0] * ring
    where = [dump] * (0 if places is None else places.shape[0])
    shown = []
    for r, (n, slot) in enumerate(zip(lens, slots, strict=True)):
        start, end = starts[r : r + 2]
        kept = resume = 0
        if slot >= 0 and n > 0:
            at, *force, _ = forces[slot].tolist()
            if n - (end - start) >= at:
                kept, resume = force
            for t in range(max(start, end - ring), min(end, len(where))):
                where[t] = slot * ring + (n - (end - t)) % ring
        lens[r] = n - (resume - kept) * block_size
        columns = [
            protected + c if c < kept else resume + c - kept
            for c in range(min(-(-lens[r] // block_size), width))
        ]
        blocks = [table[r][c] if 0 <= c < width else 0 for c in columns]
        shown.append(blocks + [0] * (width - len(blocks)))
    out_table[:rows, :width] = torch.tensor(shown, dtype=torch.int32).view(rows, width)
    out_lens[:rows] = torch.tensor(lens, dtype=torch.int32)
    if places is not None:
        places.copy_(torch.tensor(where, dtype=places.dtype))
    return out_table[:rows, :width], out_lens[:rows]
