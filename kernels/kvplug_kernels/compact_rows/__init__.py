"""Show the resident blocks of a step's rows to attention, in one launch."""

from __future__ import annotations

from torch import Tensor

from .vectorized import compact_rows_vectorized

__all__ = ["compact_rows"]


def compact_rows(
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
    """Compact the rows whose slot has an eviction in force, and place the latest queries.

    ``forces[slot]`` is ``(at, kept, resume, unused)``: an eviction at position ``at`` left its
    survivors in the ``kept`` blocks from ``protected`` on, and the text goes on in block
    ``resume``. It applies to row ``r`` of slot ``s = row_slots[r]`` when ``s`` is not negative,
    ``seq_lens[r]`` is positive and the row's first query is at or past it: ``seq_lens[r] -
    (query_start[r + 1] - query_start[r]) >= at``. A slot without an eviction holds the ``at`` that
    no text reaches, 2**31 - 1, or zeros alone, which change nothing. One that changed hands may be
    reset a step late: its new request starts before the old eviction.

    Column ``c`` of the output shows column ``protected + c`` for ``c < kept``, else ``resume + c -
    kept``; the new length is ``seq_lens[r] - (resume - kept) * block_size``. Any other row shows
    its columns and its length as they are. Columns at or past ``ceil(length / block_size)`` are 0,
    as are those whose source lies outside the table; rows of length 0 stay so.

    ``places`` tells a scatter of the step's queries where each goes, in a ring of ``ring`` entries
    per slot: token ``t`` of row ``r``, at position ``p = seq_lens[r] - (query_start[r + 1] - t)``,
    goes to ``s * ring + p % ring`` if it is one of the last ``ring`` of its row. All others, those
    of rows without a slot or a length and those past the last row go to the dump entry,
    ``num_slots * ring``.

    The caller guarantees slots below ``num_slots``, which is not checked on the device. Inputs are
    never written, and the outputs must not overlap them (only an equal start address is detected).
    Nothing synchronises with the host on CUDA and nothing is allocated, so the call can be captured
    in a CUDA graph.

    Args:
        block_table: int32 ``[rows, width]``, any row stride, columns contiguous.
        seq_lens: int32 ``[rows]``, tokens of each row, its queries included.
        query_start: int32 ``[rows + 1]``, first token of each row, from 0 on and not descending.
        row_slots: int32 ``[rows]``, slot of each row, negative for none.
        forces: int32 ``[num_slots, 4]``, contiguous, at least one slot.
        block_size: tokens per block.
        protected: blocks at the start of a text that an eviction does not write.
        out_table: int32 ``[>=rows, >=width]`` persistent buffer; only ``[:rows, :width]`` is
            written.
        out_lens: int32 ``[>=rows]`` persistent buffer; only ``[:rows]`` is written.
        ring: queries remembered per slot. Given with ``places``.
        places: int32 or int64 ``[num_tokens]``, contiguous; written whole.

    Returns:
        ``out_table[:rows, :width]`` and ``out_lens[:rows]``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``block_size`` is
            below 1, ``protected`` is negative, one of ``ring`` and ``places`` is given without the
            other, or an output starts at the address of another argument.
    """
    if block_table.is_cuda:
        from .kernel import compact_rows_triton

        implementation = compact_rows_triton
    else:
        implementation = compact_rows_vectorized
    return implementation(
        block_table,
        seq_lens,
        query_start,
        row_slots,
        forces,
        block_size,
        protected=protected,
        out_table=out_table,
        out_lens=out_lens,
        ring=ring,
        places=places,
    )
