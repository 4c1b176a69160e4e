"""Attention of queries over coded pages, on the codes."""

from __future__ import annotations

from torch import Tensor

from ..coding import CodedPage
from .cpu import paged_attend_quant_cpu

__all__ = ["paged_attend_quant"]


def paged_attend_quant(
    query: Tensor,
    pages: Tensor,
    layout: CodedPage,
    block_table: Tensor,
    lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    causal: bool,
    softcap: float = 0.0,
    integer: bool = False,
    max_query_len: int,
    max_len: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend the queries of each row to the row's resident tokens in coded pages.

    Resident token ``t`` of row ``r`` lies in the slot ``(block_table[r, t // block_size],
    t % block_size)``; query head ``h`` reads the stored head ``h // (num_heads // heads)``. A logit
    is ``scale * q . k``, or ``softcap * tanh(scale * q . k / softcap)`` when ``softcap`` is
    positive. Scales and zeros are folded into the query, the logits and the weights where that is
    less work than applying them to every code; nothing decoded is written to memory on a GPU, and
    the CPU path holds at most 64 MB of logits and 64 MB of decoded vectors at a time.

    With ``integer`` both products are integer products of codes (HACK, arXiv 2502.03589). The query
    is quantized asymmetrically to 8 bits for each token, head and group of channels;
    ``q . k = sq sk (cq . ck) + sq zk sum(cq) + zq sk sum(ck) + n zq zk`` of each group of ``n``
    channels, where ``sum(ck)`` is read from the page if it is stored. The softmax weights, times
    the value scales, are quantized to 8 bits for each row and tile of 32 tokens; what remains is
    an integer product with the value codes less the middle one, and the weighted sum of what that
    and the zeros stand for. The integer products are exact.

    Lengths are clamped to ``max_len`` and to what the block table can hold. Blocks that hold a
    token of the row must exist, which is not checked on the device; other bytes of the pages and
    other entries of the table are ignored. Nothing synchronises with the host on CUDA, and launches
    depend on shapes, ``max_query_len`` and ``max_len`` alone, so that the call can be captured in a
    CUDA graph.

    Args:
        query: float32, float16 or bfloat16 ``[num_tokens, num_heads, layout.key.width]``.
        pages: uint8 ``[num_blocks, heads, block_size, layout.bytes_per_token]``, contiguous within
            a page. 16-bit ``plain`` vectors are of the dtype of ``query``.
        layout: The fields of a page and how they are coded.
        block_table: int32 ``[rows, width]``.
        lens: int32 ``[rows]``, stored tokens of each row.
        query_start: int32 ``[rows + 1]``, first query of each row, ascending from 0. Queries behind
            the last row's see nothing.
        scale: Factor of the logits, finite.
        key_levels: float32 ``[2**bits]``, levels of the keys' codebook.
        value_levels: The same of values.
        causal: False: every query of a row sees all its tokens. True: query ``i`` of ``q`` sees the
            first ``lens[row] - q + i + 1``.
        softcap: Bound of the logits, 0 for none.
        integer: Take products on the codes as integers; K and V must be ``int`` codes
            grouped along channels, of at most 256 to a group, without outliers.
        max_query_len: At least the most queries of a row.
        max_len: At least the most stored tokens of a row.
        out: float32 ``[num_tokens, num_heads, layout.value.width]``, contiguous.
        lse: float32 ``[num_tokens, num_heads]``, contiguous.

    Returns:
        ``out``, normalized, and ``lse``, the natural log of the sum of exponentials of the logits;
        0 and -inf where a query sees nothing.

    Raises:
        ValueError: An argument has the wrong dtype, shape, stride or device, the layout does
            not support the options, or an output starts at the address of an input.
    """
    if pages.is_cuda:
        from .kernel import paged_attend_quant_triton

        implementation = paged_attend_quant_triton
    else:
        implementation = paged_attend_quant_cpu
    return implementation(
        query,
        pages,
        layout,
        block_table,
        lens,
        query_start,
        scale,
        key_levels=key_levels,
        value_levels=value_levels,
        causal=causal,
        softcap=softcap,
        integer=integer,
        max_query_len=max_query_len,
        max_len=max_len,
        out=out,
        lse=lse,
    )
