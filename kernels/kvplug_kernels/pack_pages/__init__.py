"""Gather the tokens of many blocks over all layers into a staging buffer, and scatter them back."""

from __future__ import annotations

from torch import Tensor

from ..coding import Coding
from ..move_tokens.layers import LayerCaches
from .packed import Packed
from .vectorized import pack_pages_vectorized, unpack_pages_vectorized

__all__ = ["LayerCaches", "Packed", "pack_pages", "unpack_pages"]


def pack_pages(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Copy, or quantize, the tokens of some blocks out of every cache, in one launch.

    Row ``c`` of ``blocks`` is a chunk: token ``t`` of it lies in block ``blocks[c, t //
    block_size]`` at ``t % block_size``. After the call ``packed.content[c, l, t, h]`` has the bytes
    of its head ``h`` in cache ``l``: unchanged, whatever they are, or the codes of
    `kvplug_kernels.coding.encode_vectors` with their scales and zeros, code for code. Chunks lie
    one behind another and each of their fields is ``[caches, tokens, heads, ...]``, as a transfer
    codec hands it on. So pages of bytes that a format coded travel as they are, and pages of
    elements travel in 16, 8 or 4 bits.

    In vLLM's pages a slot holds a token's key and then its value; ``LayerCaches([*keys, *values])``
    of views of both gives all keys of a chunk, then all values.

    The caller guarantees that blocks are below ``num_blocks``, which is not checked on the device.
    Nothing synchronises with the host on CUDA and nothing is allocated, so the call can run on a
    stream of its own and be captured in a CUDA graph.

    Args:
        caches: The caches, opened once for many calls.
        blocks: int32 or int64 ``[chunks, n]``, last dimension contiguous.
        packed: Where they go; its ``tokens`` fill ``n`` blocks, but for a part of the last.
        coding: How the content of a slot is coded, along channels; None to copy it.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, ``packed`` was made
            for another coding, or the coding's groups do not fall on runs of channels that a tile
            has: a coding of one group always does.
    """
    if blocks.is_cuda:
        from .kernel import pack_pages_triton

        pack_pages_triton(caches, blocks, packed, coding)
    else:
        pack_pages_vectorized(caches, blocks, packed, coding)


def unpack_pages(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Copy, or dequantize, packed tokens into the slots of some blocks, in one launch.

    The inverse of :func:`pack_pages`: only the slots of the chunks' tokens change. Numbers are
    ``scale * code + zero`` in float32, product and sum each rounded once, and then to the type of
    the caches. A block that several chunks name must receive the same tokens from all of them.

    Args:
        caches: The caches, changed in place.
        blocks: int32 or int64 ``[chunks, n]``, last dimension contiguous.
        packed: What `pack_pages` filled, or the same bytes from elsewhere.
        coding: As it was packed.

    Raises:
        ValueError: As `pack_pages` does.
    """
    if blocks.is_cuda:
        from .kernel import unpack_pages_triton

        unpack_pages_triton(caches, blocks, packed, coding)
    else:
        unpack_pages_vectorized(caches, blocks, packed, coding)
