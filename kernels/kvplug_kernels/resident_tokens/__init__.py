"""What is known of the resident tokens of rows in several layers, laid out in one launch."""

from __future__ import annotations

from torch import Tensor

from .naive import LatestQueries, LayerSlice, ResidentTokens
from .vectorized import resident_tokens_vectorized

__all__ = ["LatestQueries", "LayerSlice", "ResidentTokens", "resident_tokens"]


def resident_tokens(
    block_table: Tensor,
    rows: Tensor,
    logical: Tensor,
    mixed: Tensor,
    stored: Tensor,
    layers: LayerSlice,
    *,
    count: int,
    totals: Tensor | None = None,
    latest: LatestQueries | None = None,
) -> ResidentTokens:
    """Lay out blocks, positions, totals and latest queries of some rows in some layers.

    Resident token ``t`` of a row lies in its logical block ``b = logical[row, t // block_size]``,
    whose number in layer ``l`` is ``block_table[rows[row], b] * layers.block_step + l *
    layers.layer_step``. Its position in the text is ``b * block_size + t % block_size``, but where
    ``b < mixed[row]``: such blocks carry tokens that were moved there, whose positions are in
    ``stored``, by block, head and slot. Totals lie likewise, for every block.

    Rows of the result are those of the first layer, then those of the next. Blocks, positions and
    totals are written twice, so that who is shown one copy cannot change the other. Nothing
    synchronises with the host on CUDA.

    Args:
        block_table: int32 ``[requests, width]``, the last dimension contiguous.
        rows: int32 ``[rows]``, the request of each row, any stride.
        logical: int32 ``[rows, n]``, the last dimension contiguous; all ``n`` blocks
            but the last are full.
        mixed: int32 ``[rows]``, any stride.
        stored: int32 ``[num_blocks, kv_heads, block_size]``, any strides, the last dimension
            contiguous.
        layers: The layers.
        count: Resident tokens of each row.
        totals: float32, of the shape of ``stored``, any strides as there; None for none.
        latest: Queries to lay out too; None for none.

    Returns:
        The tokens; see `ResidentTokens`.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or ``count`` does
            not end in the last block.
    """
    if block_table.is_cuda:
        from .kernel import resident_tokens_triton

        implementation = resident_tokens_triton
    else:
        implementation = resident_tokens_vectorized
    return implementation(
        block_table,
        rows,
        logical,
        mixed,
        stored,
        layers,
        count=count,
        totals=totals,
        latest=latest,
    )
