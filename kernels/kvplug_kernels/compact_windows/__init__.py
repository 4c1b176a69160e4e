"""Show the window of each of a step's rows to attention, in one launch."""

from __future__ import annotations

from torch import Tensor

from .vectorized import compact_windows_vectorized

__all__ = ["compact_windows"]


def compact_windows(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    block_size: int,
    *,
    sink: int,
    window: int,
    out_table: Tensor,
    out_lens: Tensor,
    rows: Tensor | None = None,
    ends: Tensor | None = None,
    exempt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide the blocks of each row between its sink and its window, from the row's positions alone.

    Output row ``r`` shows the text of row ``s = rows[r]`` of ``block_table`` (``s = r`` without
    ``rows``) up to ``n = ends[r]`` tokens, or ``seq_lens[s]`` where ``ends[r]`` is 0 or not given.
    Its first query is token ``n - (query_start[r + 1] - query_start[r])``, in block ``b``, and sees
    the first ``sink`` blocks, the ``window`` blocks before ``b``, and all from ``b`` on. The other
    ``gap = max(b - window - sink, 0)`` blocks are hidden: column ``c`` of the output is column
    ``c`` of the table for ``c < sink``, else ``c + gap``, and the new length is ``n - gap *
    block_size``. Where ``exempt[s]`` is true, the gap is 0. Columns of ``out_table`` at or past
    ``ceil(new length / block_size)`` are left as they are; rows of length 0 stay so.

    The caller guarantees ``rows`` in ``[0, S)``, which is not checked on the device. Inputs are
    never written, and the outputs must not overlap them (only an equal start address is detected).
    Nothing synchronises with the host on CUDA and nothing is allocated, so the call can be captured
    in a CUDA graph.

    Args:
        block_table: int32 ``[S, width]``, any row stride, columns contiguous.
        seq_lens: int32 ``[S]``, tokens of each row, its queries included.
        query_start: int32 ``[R + 1]``, first token of each output row, not descending.
        block_size: tokens per block.
        sink: blocks at the start of a text that are always seen.
        window: blocks before the one of the first query that are seen.
        out_table: int32 ``[>=R, >=width]`` persistent buffer; only live columns are written.
        out_lens: int32 ``[>=R]`` persistent buffer; only ``[:R]`` is written.
        rows: int32 ``[R]``, source of each output row; repeats are allowed. Without it ``R`` is
            ``S``.
        ends: int32 ``[R]``, tokens of each output row, or 0 for all of its source. Given with
            ``rows`` alone.
        exempt: bool ``[S]``, rows that see everything.

    Returns:
        ``out_table[:R, :width]`` and ``out_lens[:R]``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``block_size`` is
            below 1, ``sink`` or ``window`` is negative, ``ends`` is given without ``rows``, or an
            output starts at the address of another argument.
    """
    if block_table.is_cuda:
        from .kernel import compact_windows_triton

        implementation = compact_windows_triton
    else:
        implementation = compact_windows_vectorized
    return implementation(
        block_table,
        seq_lens,
        query_start,
        block_size,
        sink=sink,
        window=window,
        out_table=out_table,
        out_lens=out_lens,
        rows=rows,
        ends=ends,
        exempt=exempt,
    )
