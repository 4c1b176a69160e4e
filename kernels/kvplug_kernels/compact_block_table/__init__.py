"""Drop freed entries from a paged KV-cache block table and shift the rest left."""

from __future__ import annotations

from torch import Tensor

from .vectorized import compact_block_table_vectorized

__all__ = ["compact_block_table"]


def compact_block_table(
    block_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    *,
    rows: Tensor | None = None,
    gap_start: Tensor | None = None,
    gap_end: Tensor | None = None,
    null_block: int = 0,
    out_table: Tensor | None = None,
    out_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compact the live entries of a block table, the whole batch in one launch.

    Output row ``r`` is read from row ``rows[r]`` of ``block_table`` (row ``r`` without
    ``rows``). Its live entries are the first ``ceil(seq_lens[r] / block_size)``, clipped to
    ``W``. A live entry is dropped when it equals ``null_block`` or when its column ``i``
    satisfies ``gap_start[r] <= i < gap_end[r]``. The others are shifted left in order, every
    column after them is ``null_block``, and the new length is
    ``seq_lens[r] - block_size * dropped``. A row of length 0 becomes all null, length 0.

    The caller guarantees that the last live entry of each row is never dropped and that
    ``rows`` lies in ``[0, S)``; neither is checked on the device and the result is undefined
    otherwise. Inputs are never written, and the outputs must not overlap them (only an equal
    start address is detected). Nothing synchronises with the host on CUDA, so with
    ``out_table`` and ``out_lens`` given the call can be captured in a CUDA graph.

    Args:
        block_table: int32 ``[S, W]``, any row stride, columns contiguous.
        seq_lens: int32 ``[R]``, tokens in each output row.
        block_size: tokens per block, at least 1.
        rows: int32 or int64 ``[R]``, source row of each output row; repeats are allowed.
            Without it ``S`` must equal ``R``.
        gap_start: int32 ``[R]``, first column of the dropped range. Given with ``gap_end``.
        gap_end: int32 ``[R]``, first column after the dropped range.
        null_block: the block id that means "no block".
        out_table: int32 ``[>=R, >=W]`` persistent buffer; only ``[:R, :W]`` is written.
        out_lens: int32 ``[>=R]`` persistent buffer; only ``[:R]`` is written.

    Returns:
        The compacted table, int32 ``[R, W]``, and the new lengths, int32 ``[R]``; views of
        ``out_table`` and ``out_lens`` where those were given.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``block_size`` is
            below 1, ``null_block`` does not fit int32, one gap tensor is given without the
            other, or an output starts at the address of an input.
    """
    if block_table.is_cuda:
        from .kernel import compact_block_table_triton

        implementation = compact_block_table_triton
    else:
        implementation = compact_block_table_vectorized
    return implementation(
        block_table,
        seq_lens,
        block_size,
        rows=rows,
        gap_start=gap_start,
        gap_end=gap_end,
        null_block=null_block,
        out_table=out_table,
        out_lens=out_lens,
    )
